"""Exhaustive search over schedules: stateless, with pruning of states that were met before.

Every question the host asks (which thread, which buffer drains, is this store held) is a branching point whose option
0 is the default schedule's answer. A schedule is the sparse list of points where another option is taken, so
each schedule runs once. Schedules are run in order of cost, the number of their deviations: the delay bounding of Emmi,
Qadeer and Rakamaric (POPL 2011), with a held store as one more kind of delay. When a held store is released is
part of its deviation and costs nothing. So the first finding has the fewest deviations there are.

Bounding deviations and not only preemptions (iterative context bounding, PLDI 2007) matters here: a vCPU yields at
every fault, so with three threads free choices at yields alone would make thousands of schedules at cost 0.

Pruning is that of a stateful search: a run that reaches a choice in a state met before is cut. It is exact if equal
``Host.fingerprint()`` means equal futures, up to collisions of 64-bit fingerprints. As costs only grow from
run to run, the first visit to a state has the most budget left, so later ones add nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.case.model import Case
from mmufuzz.host.deviation import Deviation
from mmufuzz.host.memory import mix
from mmufuzz.host.sched import SLICE
from mmufuzz.host.strategy import STOP, Strategy
from mmufuzz.outcome import FINDING, HARNESS_ERROR, OK, Outcome
from mmufuzz.run import run

COMPLETE: Final = "complete"
INCOMPLETE: Final = "incomplete"

HORIZON: Final = SLICE
"""Events within which all choices of a run must lie; a run that goes past them makes the search incomplete."""


# A choice is named by the events before it and its number among the choices between two events.
_CHOICE_BITS: Final = 16


class Branch:
    """A schedule: option ``option`` at choice ``position``, what ``parent`` says before it, option 0 elsewhere."""

    def __init__(self, parent: Branch | None, position: int, option: int, cost: int) -> None:
        self.parent = parent
        self.position = position
        self.option = option
        self.cost = cost


@mypyc_attr(native_class=False)
class NondeterminismError(RuntimeError):
    """A replayed prefix of choices was not offered again: the run depends on something outside its Case."""


class ExploreStrategy(Strategy):
    """Follows one ``Branch`` and then the default, and collects the branches that leave its path after that.

    ``met`` holds the states met by all runs so far; None searches without pruning.
    """

    def __init__(self, branch: Branch | None, bound: int, met: dict[int, int] | None) -> None:
        self.horizon = HORIZON
        self.branch = branch
        self.cost = branch.cost if branch is not None else 0
        self.bound = bound
        self.met = met
        self.forced: list[Branch] = []
        item = branch
        while item is not None:
            self.forced.append(item)
            item = item.parent
        self.position = -1
        self.pruned = False
        self.found: list[Branch] = []
        self.count = 0
        self._await_next()

    def begin(self, threads: int) -> None:
        """See ``Strategy``."""
        self.count = threads

    def pick(self, current: int, enabled: int, label: int) -> int:
        """See ``Strategy``."""
        drains = enabled >> self.count != 0
        others = enabled & ~(1 << current)
        if self.forced:
            option = self._forced_option()
            return _nth(others, option) if option else current
        self._advance()
        price = 0 if drains else 1
        if self.met is not None:
            # Who is current matters only where going on is cheaper than switching.
            key = mix(self.state, enabled) if self.bound < 0 else mix(mix(self.state, enabled), current << 1 | price)
            if key in self.met:
                self.pruned = True
                return STOP
            self.met[key] = 1
        option = 1
        while others:
            self._offer(option, price)
            others &= others - 1
            option += 1
        return current

    def hold(self, label: int) -> bool:
        """See ``Strategy``."""
        if self.forced:
            return self._forced_option() == 1
        self._advance()
        self._offer(1, 1)
        return False

    def _advance(self) -> None:
        """Come to the next choice."""
        first = self.events << _CHOICE_BITS
        self.position = self.position + 1 if self.position >= first else first

    def _forced_option(self) -> int:
        """The option of the branch at the next choice."""
        self._advance()
        if self.position != self.forced[-1].position:
            return 0
        option = self.forced.pop().option
        self._await_next()
        return option

    def _await_next(self) -> None:
        """Up to the branch's next choice the run is known: nothing need be asked."""
        self.next_event = self.forced[-1].position >> _CHOICE_BITS if self.forced else 0
        self.wants_state = not self.forced and self.met is not None

    def _offer(self, option: int, price: int) -> None:
        if self.bound < 0 or self.cost + price <= self.bound:
            self.found.append(Branch(self.branch, self.position, option, self.cost + price))


def _nth(actors: int, number: int) -> int:
    """The ``number``-th actor, from 1, of a mask."""
    while number > 1 and actors:
        actors &= actors - 1
        number -= 1
    if not actors:
        raise NondeterminismError("a choice of the run offered fewer options than before")
    return (actors & -actors).bit_length() - 1


class Reached:
    """A guest-visible result: how many schedules gave it, and the first of them."""

    def __init__(self, schedule: tuple[Deviation, ...]) -> None:
        self.count = 0
        self.schedule = schedule


class ExploreResult:
    """``verdict``: COMPLETE (every schedule within the bound), INCOMPLETE (a limit was hit) or FINDING.

    ``schedules`` counts runs, ``pruned`` those of them that were cut. ``outcomes`` maps ``Outcome.guest`` to
    what reached it. ``cost`` is that of ``finding`` and the least there is; without a finding, the greatest cost up to
    which every schedule was run, -1 for none.
    """

    def __init__(self) -> None:
        self.verdict = INCOMPLETE
        self.schedules = 0
        self.pruned = 0
        self.states = 0
        self.outcomes: dict[str, Reached] = {}
        self.finding: Outcome | None = None
        self.cost = -1
        self.reached = 0
        """Runs that passed every mark of ``expect.reach``: with none, a complete search may have shown nothing."""


def explore(
    run_with: Callable[[Strategy], Outcome],
    bound: int | None,
    should_stop: Callable[[], bool],
    prune: bool = True,
) -> ExploreResult:
    """Run every schedule of cost at most ``bound``, or every schedule at all with None, until one has a finding.

    ``run_with`` runs the program under a strategy; with ``prune`` it must set ``Host.track`` and ``Memory.track``.
    ``should_stop`` is asked after each run.
    """
    result = ExploreResult()
    met: dict[int, int] | None = {} if prune else None
    limit = -1 if bound is None else bound
    buckets: list[deque[Branch | None]] = [deque([None])]
    complete = True
    cost = 0
    while cost < len(buckets):
        while buckets[cost]:
            strategy = ExploreStrategy(buckets[cost].popleft(), limit, met)
            outcome = run_with(strategy)
            if strategy.forced:
                raise NondeterminismError("the run did not come to the choice it was to take")
            result.schedules += 1
            for branch in strategy.found:
                while len(buckets) <= branch.cost:
                    buckets.append(deque())
                buckets[branch.cost].append(branch)
            result.states = len(met) if met is not None else 0
            if outcome.verdict in (FINDING, HARNESS_ERROR):
                result.verdict = FINDING
                result.finding = outcome
                result.cost = cost
                return result
            if strategy.pruned:
                result.pruned += 1
            elif outcome.verdict != OK or outcome.events >= HORIZON:
                complete = False
            else:
                reached = result.outcomes.setdefault(outcome.guest, Reached(outcome.schedule))
                reached.count += 1
            if should_stop():
                return _finished(result, buckets, complete)
        if complete:
            result.cost = cost
        cost += 1
    return _finished(result, buckets, complete)


def _finished(result: ExploreResult, buckets: list[deque[Branch | None]], complete: bool) -> ExploreResult:
    for bucket in buckets:
        if bucket:
            complete = False
    if complete:
        result.verdict = COMPLETE
        result.cost = len(buckets) - 1
    return result


def explore_case(case: Case, bound: int | None, should_stop: Callable[[], bool]) -> ExploreResult:
    """``explore`` every schedule of ``case``; its own schedule is not followed, except for TLB deviations."""

    reached = 0

    def run_with(strategy: Strategy) -> Outcome:
        nonlocal reached
        outcome = run(case, strategy, track=True)
        if all(outcome.marks.get(mark, 0) for mark in case.expect.reach):
            reached += 1
        return outcome

    result = explore(run_with, bound, should_stop)
    result.reached = reached
    return result
