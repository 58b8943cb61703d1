"""Runs a litmus test under every order of its accesses, and says what its condition comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from mmufuzz.case.model import Case
from mmufuzz.case.text import label_text
from mmufuzz.litmus.build import build, final_word
from mmufuzz.litmus.model import EXISTS, FORALL, KINDS, Item, LitmusTest, Shown, register
from mmufuzz.outcome import HARNESS_ERROR, OK, Finding, Outcome
from mmufuzz.run import run
from mmufuzz.search.order_strategy import OrderStrategy, strays
from mmufuzz.search.orders import Orders

VALIDATED: Final = "ok"
REFUTED: Final = "no"
CUT_SHORT: Final = "incomplete"
FOUND: Final = "finding"


@dataclass
class Result:
    """What the search of one test found.

    ``states`` maps the values of ``LitmusTest.observed`` to the schedules that ended with them; ``positive`` and
    ``negative`` count the schedules for which the proposition holds and does not hold. ``runs`` also counts runs that
    were cut where only known orders were left. ``finding`` is what an oracle objected to; the search ends there.
    """

    test: LitmusTest
    states: dict[tuple[int, ...], int] = field(default_factory=dict)
    positive: int = 0
    negative: int = 0
    runs: int = 0
    complete: bool = False
    witness: Case | None = None
    """With the schedule of the first run that shows what ``exists`` asks for, or what refutes the other two."""
    finding: Finding | None = None
    internal: bool = False
    """The finding is an error inside mmufuzz."""

    @property
    def verdict(self) -> str:
        """VALIDATED, REFUTED, CUT_SHORT or FOUND.

        A search that was cut short can refute a condition, but not validate it.
        """
        if self.finding is not None:
            return FOUND
        if self.test.quantifier == EXISTS:
            refuted = self.complete and not self.positive
        else:
            refuted = (self.negative if self.test.quantifier == FORALL else self.positive) > 0
        if refuted:
            return REFUTED
        return VALIDATED if self.complete else CUT_SHORT

    def satisfies(self, state: tuple[int, ...]) -> bool:
        """Whether the proposition holds in ``state``."""
        return self.test.condition.holds(dict(zip(self.test.observed, state, strict=True)))


def check(test: LitmusTest, dress: Callable[[Case], Case], should_stop: Callable[[int], bool]) -> Result:
    """Search ``test`` on the kernel that ``dress`` puts its Case on.

    ``should_stop`` is asked after each run, with the number of runs. Raises RuntimeError if a run leaves the plan.
    """
    case, plans = build(test)
    case = dress(case)
    result = Result(test)
    search = Orders()
    while True:
        strategy = OrderStrategy(plans, search)
        outcome = run(case, strategy)
        result.runs += 1
        if outcome.verdict != OK:
            result.finding = outcome.findings[0]
            result.internal = outcome.verdict == HARNESS_ERROR
            return result
        stray = strays(plans, outcome.trace)
        if stray:
            raise RuntimeError(f"litmus {test.name}: {label_text(stray, outcome.threads)} was not planned")
        if strategy.complete:
            if _count(result, _state(test, outcome)) and result.witness is None:
                result.witness = replace(case, schedule=outcome.schedule)
        elif not strategy.asleep:
            return result
        if not search.advance():
            result.complete = True
            return result
        if should_stop(result.runs):
            return result


def _state(test: LitmusTest, outcome: Outcome) -> tuple[int, ...]:
    """The observed values at the end of a run, unsigned."""
    values = []
    for item in test.observed:
        if item.thread < 0:
            values.append(final_word(outcome.words, test.locations[item.name]))
        else:
            found = register(item.name, test.arch)
            assert found is not None
            size = min(found.size, test.shown[item].size)
            values.append(outcome.registers[item.thread][found.number] & (1 << 8 * size) - 1)
    return tuple(values)


def _count(result: Result, state: tuple[int, ...]) -> bool:
    """Count the end of a run; True if it is a witness."""
    result.states[state] = result.states.get(state, 0) + 1
    holds = result.satisfies(state)
    if holds:
        result.positive += 1
    else:
        result.negative += 1
    return holds != (result.test.quantifier == FORALL)


def summary(result: Result) -> list[str]:
    """The lines that herd prints, with the states in litmus7's form: a count, and ``*>`` where the condition holds."""
    test = result.test
    lines = [f"Test {test.name} {KINDS[test.quantifier]}", f"States {len(result.states)}"]
    for state in sorted(result.states):
        mark = "*>" if result.satisfies(state) else ":>"
        lines.append(f"{result.states[state]:<6}{mark}{state_text(test, state)}")
    lines.append({VALIDATED: "Ok", REFUTED: "No", CUT_SHORT: "Incomplete", FOUND: "Finding"}[result.verdict])
    # herd counts as positive what speaks for the test, and for the proposition in the last line.
    witnesses = (result.positive, result.negative)
    if test.quantifier not in (EXISTS, FORALL):
        witnesses = (result.negative, result.positive)
    lines.append("Witnesses")
    lines.append(f"Positive: {witnesses[0]} Negative: {witnesses[1]}")
    lines.append(f"Condition {test.quantifier} ({test.condition})")
    lines.append(f"Observation {test.name} {observation(result)} {result.positive} {result.negative}")
    return lines


def observation(result: Result) -> str:
    """How often the proposition held."""
    if not result.positive:
        return "Never"
    return "Sometimes" if result.negative else "Always"


def state_text(test: LitmusTest, state: tuple[int, ...]) -> str:
    """``0:EAX=0; [x]=1;``"""
    return " ".join(f"{item}={_value(test, item, value)};" for item, value in zip(test.observed, state, strict=True))


def _value(test: LitmusTest, item: Item, value: int) -> str:
    """``value`` as its type shows it; the address of a location as its name."""
    for location in test.locations.values():
        if value == location.address:
            return location.name
    shown: Shown = test.shown[item]
    if shown.signed and value >> (8 * shown.size - 1):
        value -= 1 << 8 * shown.size
    return str(value)
