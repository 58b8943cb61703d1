"""The in-process loop: generate or mutate a Case, run it under the schedules of a portfolio, keep what is novel.

The seed, and the corpus it starts from, decide everything this engine does, case by case; time only decides where it
ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mmufuzz.campaign.budget import Budget
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case.generate import generate
from mmufuzz.case.model import Case
from mmufuzz.case.mutate import mutate, splice
from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import EVICT, FILL
from mmufuzz.outcome import OK, Outcome
from mmufuzz.search.racing import Aims, Races
from mmufuzz.search.strategies import portfolio

SCHEDULES: Final = 12
"""Schedules per Case; as many again whenever one of them reached something novel, up to ``MOST_SCHEDULES``."""

MOST_SCHEDULES: Final = 72

MOST_EVENTS: Final = 15_000
"""Events of one Case's runs after which it gets no more schedules: one that runs long costs as much as fifty others."""

FRESH: Final = 60
"""Cases, of a hundred, that are not derived from others."""

STARTING_POINTS: Final = 200
"""Cases of the corpus that are run first."""


class RandomEngine:
    """One loop over ``recorder``'s corpus."""

    def __init__(self, recorder: Recorder, seed: int, budget: Budget, tick: Callable[[], None]) -> None:
        self.recorder = recorder
        self.rng = Rng(seed)
        self.budget = budget
        self.tick = tick
        self.cases = 0
        self.aims = Aims()

    def run(self) -> None:
        """Go on until the budget is spent or the campaign is stopped."""
        for case in self._starting_points():
            if self._over():
                return
            self._try(self.recorder.kernel.dress(case), 1)
        while not self._over():
            self._try(self._next(), SCHEDULES)

    def _starting_points(self) -> list[Case]:
        """What the corpus holds, or a sample of it: to run all of a big one would take all the time there is."""
        pool = self.recorder.corpus.cases[:]
        rng = self.rng.fork()
        while len(pool) > STARTING_POINTS:
            pool.pop(rng.below(len(pool)))
        return pool

    def _over(self) -> bool:
        self.tick()
        return self.recorder.stop.requested or self.budget.spent(self.cases)

    def _next(self) -> Case:
        """The Case to try: a fresh one, or a change to one that was worth keeping."""
        rng = self.rng.fork()
        pool = self.recorder.corpus.cases
        if not pool or rng.chance(FRESH, 100):
            case = generate(rng)
        elif len(pool) > 1 and rng.chance(1, 4):
            case = splice(rng, pool[rng.below(len(pool))], pool[rng.below(len(pool))])
        else:
            case = mutate(rng, pool[rng.below(len(pool))])
        return self.recorder.kernel.dress(case)

    def _try(self, case: Case, schedules: int) -> None:
        """Run ``case`` as it is, then under strategies' schedules, more of them while they show something novel."""
        recorder = self.recorder
        recorder.case()
        self.cases += 1
        outcome = recorder.check(case)
        length = outcome.events
        races = Races(outcome.trace)
        bare = replace(case, schedule=tuple(item for item in case.schedule if item.kind in (EVICT, FILL)))
        # One thread alone has one schedule.
        left = schedules if len(case.vcpus) + len(case.host) > 1 else 0
        spent = 0
        events = length
        while left > 0 and spent < MOST_SCHEDULES and events < MOST_EVENTS and not self._over_time():
            known = recorder.corpus.reached.total
            outcome = self._run(bare, length, races)
            left -= 1
            spent += 1
            events += outcome.events
            if outcome.verdict != OK:
                return
            if recorder.corpus.reached.total > known:
                left = schedules
                races = Races(outcome.trace)

    def _run(self, case: Case, length: int, races: Races) -> Outcome:
        """One run under a schedule aimed at one of ``races``, or under a strategy that knows nothing of them."""
        rng = Rng(self.rng.next64())
        aimed = self.aims.schedule(races, rng)
        if aimed:
            return self.recorder.check(replace(case, schedule=aimed + case.schedule))
        return self.recorder.check(case, portfolio(rng.next64(), length))

    def _over_time(self) -> bool:
        return self.recorder.stop.requested or self.budget.left <= 0
