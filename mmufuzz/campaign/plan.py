"""What ``mmufuzz fuzz`` was asked to do, and how it divides its time."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from mmufuzz.campaign.kernel import Kernel

DEFAULT_SECONDS = 60.0

HARNESSES = {
    "state_machine": "hypothesis",
    "cases": "hypothesis",
    "atheris_cases": "atheris",
    "atheris_insn": "atheris",
}
"""Harness name to the engine that runs it."""

ENGINES = ("guided", "hypothesis", "atheris", "random")


@dataclass(frozen=True)
class Plan:
    """One campaign. At most one of ``seconds`` and ``cases`` is set; ``harness`` "" means all of an engine's."""

    kernel: Kernel
    seed: int
    corpus: Path
    findings: Path
    seconds: float | None = DEFAULT_SECONDS
    cases: int | None = None
    engine: str = "auto"
    harness: str = ""
    jobs: int = 1
    checkout: Path | None = None


@dataclass(frozen=True)
class Share:
    """A slice of the campaign: ``harness`` of ``engine`` gets ``weight`` parts of the budget."""

    engine: str
    harness: str
    weight: int

    @property
    def name(self) -> str:
        """What summaries call it."""
        return f"{self.engine}:{self.harness}" if self.harness else self.engine


SHARES = (
    Share("guided", "", 10),
    Share("hypothesis", "state_machine", 3),
    Share("hypothesis", "cases", 2),
    Share("atheris", "atheris_cases", 4),
    Share("atheris", "atheris_insn", 1),
)
"""The guided engine gets half: per second it runs the most schedules, and schedules are what races hide in."""

BLIND = Share("random", "", 1)
"""The control: only on request."""


def missing(engine: str, checkout: Path | None) -> str:
    """Why ``engine`` cannot run here; "" if it can."""
    if engine in ("guided", "random"):
        return ""
    if checkout is None:
        return "its harnesses are in the source checkout; run mmufuzz from there"
    if importlib.util.find_spec(engine) is None:
        if engine == "atheris" and (sys.platform != "linux"):
            return "Atheris has wheels for Linux x86-64 only"
        return f"not installed; pip install 'mmufuzz[{engine}]'"
    return ""


def shares(plan: Plan) -> tuple[list[Share], list[str]]:
    """The slices that ``plan`` gets, and a line for each engine left out.

    An engine or harness asked for by name is never left out silently: then the list is empty.
    """
    chosen: list[Share] = []
    left_out: list[str] = []
    if plan.engine == BLIND.engine:
        return [BLIND], left_out
    for engine in ENGINES:
        wanted = [share for share in SHARES if share.engine == engine and plan.harness in ("", share.harness)]
        if plan.engine not in ("auto", engine) or not wanted:
            continue
        why = missing(engine, plan.checkout)
        if why:
            left_out.append(f"{engine}: {why}")
        else:
            chosen.extend(wanted)
    return chosen, left_out
