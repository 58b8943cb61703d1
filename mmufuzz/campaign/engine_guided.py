"""The engine of our own, in this process: it learns from every run which Cases and which schedules are worth more.

A Case, fresh or a change of one that was worth keeping, is first run as it is. That run shows its races; schedules are
aimed at those. How many depends on what there is to aim at, and on what they reach: a kind of race that had few turns,
or a counter that nobody reached before, earns more of them.

The seed, and the corpus it starts from, decide everything this engine does, case by case; time only decides where it
ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mmufuzz.campaign.budget import Budget
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case.generate import CAMPAIGN, generate
from mmufuzz.case.model import Case
from mmufuzz.case.mutate import mutate, splice
from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import EVICT, FILL
from mmufuzz.outcome import OK, Outcome
from mmufuzz.search.racing import Aims, Races
from mmufuzz.search.strategies import portfolio

SCHEDULES: Final = 3
"""Schedules of a Case whose races are all of kinds that had their turns."""

RARE_SCHEDULES: Final = 6
"""Schedules of a Case with a critical cycle of a kind that seldom had a turn."""

REWARD: Final = 1
"""More schedules for each one that reached a counter for the first time."""

MOST_SCHEDULES: Final = 24

MOST_EVENTS: Final = 15_000
"""Events of one Case's runs after which it gets no more schedules: one that runs long costs as much as fifty others."""

FRESH: Final = 80
"""Cases, of a hundred, that are not derived from others."""

STARTING_POINTS: Final = 200
"""Cases of the corpus that are run first."""


class GuidedEngine:
    """One loop over ``recorder``'s corpus."""

    def __init__(self, recorder: Recorder, seed: int, budget: Budget, tick: Callable[[], None]) -> None:
        self.recorder = recorder
        self.fresh = Rng(seed)
        self.rng = self.fresh.fork()
        self.budget = budget
        self.tick = tick
        self.cases = 0
        self.aims = Aims()

    def run(self) -> None:
        """Go on until the budget is spent or the campaign is stopped."""
        for case in self._starting_points():
            if self._over():
                return
            self._try(self.recorder.kernel.dress(case), False)
        while not self._over():
            self._try(self._next(), True)

    def _starting_points(self) -> list[Case]:
        """What the corpus holds, or a sample of it: to run all of a big one would take all the time there is."""
        corpus = self.recorder.corpus
        pool = list(range(len(corpus)))
        rng = self.rng.fork()
        while len(pool) > STARTING_POINTS:
            pool.pop(rng.below(len(pool)))
        return [corpus.at(index) for index in pool]

    def _over(self) -> bool:
        self.tick()
        return self.recorder.stop.requested or self.budget.spent(self.cases)

    def _next(self) -> Case:
        """The Case to try: a fresh one, or a change to one that was worth keeping."""
        rng = self.rng.fork()
        corpus = self.recorder.corpus
        if len(corpus) == 0 or rng.chance(FRESH, 100):
            case = generate(self.fresh.fork(), CAMPAIGN)
        elif rng.chance(1, 4):
            case = splice(rng, corpus.choose(rng), corpus.choose(rng))
        else:
            case = mutate(rng, corpus.choose(rng))
        return self.recorder.kernel.dress(case)

    def _try(self, case: Case, explore: bool) -> None:
        """Run ``case`` as it is, then, with ``explore``, under schedules that its races call for."""
        recorder = self.recorder
        recorder.case()
        self.cases += 1
        outcome = recorder.check(case)
        # One thread alone has one schedule.
        if len(case.vcpus) + len(case.host) == 1 or outcome.verdict != OK:
            return
        races = Races(outcome.trace)
        if explore:
            left = RARE_SCHEDULES if self.aims.rare(races) else SCHEDULES
        else:
            left = 1
        bare = replace(case, schedule=tuple(item for item in case.schedule if item.kind in (EVICT, FILL)))
        length = outcome.events
        events = length
        spent = 0
        while left > 0 and spent < MOST_SCHEDULES and events < MOST_EVENTS and not self._over_time():
            known = recorder.corpus.reached.total
            outcome = self._run(bare, length, races)
            left -= 1
            spent += 1
            events += outcome.events
            if outcome.verdict != OK:
                return
            if recorder.corpus.reached.total > known:
                left += REWARD
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
