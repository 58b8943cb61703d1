"""The scenes around exits are run, and reach what they are for."""

from __future__ import annotations

from mmufuzz.case.generate import generate_shape
from mmufuzz.case.rng import Rng
from mmufuzz.run import run

N = 400
MARKS = {
    "efer.role",
    "emulate.code_breakpoint",
    "emulate.fault",
    "event.delivery_exited",
    "exception.double_fault",
    "exit_userspace.internal_error",
    "exit_userspace.io",
    "exit_userspace.mmio",
    "exit_userspace.shutdown",
    "guest.idt",
    "unprotect.reinjection",
}
EXITS = {"cpuid", "debug", "io", "triple-fault", "wrmsr"}


def test_the_scenes_around_exits_reach_what_they_are_for() -> None:
    marks: set[str] = set()
    exits: set[str] = set()
    findings: set[str] = set()
    for seed in range(N):
        outcome = run(generate_shape(Rng(seed), "exits"))
        marks |= set(outcome.marks)
        exits |= set(outcome.exits)
        findings |= {finding.kind for finding in outcome.findings}
    assert marks >= MARKS
    assert exits >= EXITS
    # The hazards of unreverted kernels, and guest code that loops.
    assert findings <= {"livelock", "coherence", "suspect"}
