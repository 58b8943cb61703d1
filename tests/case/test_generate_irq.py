"""The scene with interrupts is run, and reaches what it is for."""

from __future__ import annotations

from mmufuzz.case.generate import INTERRUPT, generate_shape
from mmufuzz.case.rng import Rng
from mmufuzz.run import run
from mmufuzz.search.strategies import portfolio

N = 300
MARKS = {
    "event.delivery_exited",
    "exit_userspace.irq_window",
    "exit_userspace.mmio",
    "interrupt.delivered",
    "interrupt.queued",
}


def test_the_scene_with_interrupts_reaches_what_it_is_for() -> None:
    marks: set[str] = set()
    exits: set[str] = set()
    kinds: set[str] = set()
    for seed in range(N):
        case = generate_shape(Rng(seed), INTERRUPT)
        for outcome in (run(case), run(case, portfolio(seed, 500))):
            marks |= set(outcome.marks)
            exits |= set(outcome.exits)
            kinds |= {finding.kind for finding in outcome.findings}
    assert marks >= MARKS
    assert exits >= {"interrupt-window", "preemption-timer", "hlt"}
    # The hazards of unreverted kernels, and guest code that loops.
    assert kinds <= {"architecture", "livelock", "coherence", "suspect"}
