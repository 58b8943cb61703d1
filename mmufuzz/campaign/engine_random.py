"""The blind engine: generated Cases under random schedules, with nothing learned from any run.

It is the control for what guidance is worth (bench/guidance.py): the guided engine makes the same fresh Cases from the
same seed, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.campaign.budget import Budget
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case.generate import CAMPAIGN, generate
from mmufuzz.case.rng import Rng
from mmufuzz.outcome import OK
from mmufuzz.search.strategies import portfolio

SCHEDULES: Final = 12
"""Schedules per Case of several threads, besides the default one."""


class RandomEngine:
    """One loop; the seed decides everything it does, time only where it ends."""

    def __init__(self, recorder: Recorder, seed: int, budget: Budget, tick: Callable[[], None]) -> None:
        self.recorder = recorder
        self.fresh = Rng(seed)
        self.rng = self.fresh.fork()
        self.budget = budget
        self.tick = tick
        self.cases = 0

    def run(self) -> None:
        """Go on until the budget is spent or the campaign is stopped."""
        while not self._over():
            self._try()

    def _over(self) -> bool:
        self.tick()
        return self.recorder.stop.requested or self.budget.spent(self.cases)

    def _try(self) -> None:
        """A generated Case as it is, then under schedules that know nothing of it but its length."""
        recorder = self.recorder
        case = recorder.kernel.dress(generate(self.fresh.fork(), CAMPAIGN))
        recorder.case()
        self.cases += 1
        outcome = recorder.check(case)
        length = outcome.events
        left = SCHEDULES if len(case.vcpus) + len(case.host) > 1 else 0
        while left > 0 and outcome.verdict == OK and not self._over_time():
            outcome = recorder.check(case, portfolio(self.rng.next64(), length))
            left -= 1

    def _over_time(self) -> bool:
        return self.recorder.stop.requested or self.budget.left <= 0
