"""What a campaign has done, as sums that several engines and processes can add up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmufuzz.outcome import Outcome


@dataclass
class EngineTally:
    """One engine's share: ``cases`` it made, ``schedules`` they were run under, ``seconds`` it had."""

    cases: int = 0
    schedules: int = 0
    seconds: float = 0.0
    executions: int = 0
    """Calls of an entry point that makes no Case (decoder and executor alone)."""
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; the rate is cases, or executions where there are no Cases, per second."""
        work = self.cases or self.executions
        rate = work / self.seconds if self.seconds else 0.0
        fields: dict[str, Any] = {
            "cases": self.cases,
            "schedules": self.schedules,
            "seconds": round(self.seconds, 3),
            "cases_per_second": round(rate, 1),
        }
        if self.executions:
            fields["executions"] = self.executions
        if self.note:
            fields["note"] = self.note
        return fields


@dataclass
class Tally:
    """Sums over all engines."""

    engines: dict[str, EngineTally] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """Cases made by all engines."""
        return sum(engine.cases for engine in self.engines.values())

    @property
    def schedules(self) -> int:
        """Runs by all engines."""
        return sum(engine.schedules for engine in self.engines.values())

    def engine(self, name: str) -> EngineTally:
        """The share of engine ``name``, begun if it is the first time."""
        return self.engines.setdefault(name, EngineTally())

    def count(self, outcome: Outcome) -> None:
        """Add what one run passed."""
        _add(self.marks, outcome.marks)
        _add(self.exits, outcome.exits)
        self.verdicts[outcome.verdict] = self.verdicts.get(outcome.verdict, 0) + 1

    def as_json(self) -> dict[str, Any]:
        """The form in which processes hand their sums on."""
        return {
            "engines": {name: engine.as_json() for name, engine in self.engines.items()},
            "marks": dict(sorted(self.marks.items())),
            "exits": dict(sorted(self.exits.items())),
            "verdicts": dict(sorted(self.verdicts.items())),
        }

    def absorb(self, fields: dict[str, Any]) -> None:
        """Add the sums of another process, in the form of ``as_json``."""
        for name, engine in fields["engines"].items():
            mine = self.engine(name)
            mine.cases += engine["cases"]
            mine.schedules += engine["schedules"]
            mine.executions += engine.get("executions", 0)
            mine.seconds += engine["seconds"]
            mine.note = mine.note or engine.get("note", "")
        _add(self.marks, fields["marks"])
        _add(self.exits, fields["exits"])
        _add(self.verdicts, fields["verdicts"])


def _add(into: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        into[name] = into.get(name, 0) + count
