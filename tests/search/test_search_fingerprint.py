"""The exhaustive search prunes by fingerprint: on the modelled KVM, equal fingerprints mean equal futures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmufuzz.case.generate import GenerateOptions, generate
from mmufuzz.case.model import ZAP_ALL_FAST, Case, HostThread, Slot, Vcpu, Word
from mmufuzz.case.rng import Rng
from mmufuzz.host.sites import THREAD_WAIT, THREAD_WAKE, label_site, label_step, label_thread
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import Outcome
from mmufuzz.run import run
from mmufuzz.search.explore import COMPLETE, explore, explore_case
from mmufuzz.search.strategies import RandomWalk
from mmufuzz.x86.asm import assemble


def generated(seed: int) -> Case:
    return generate(Rng(seed), GenerateOptions(kernel=("v6.1", "v6.8", "v6.9", "v6.12")[seed % 4]))


TABLE = 0x27  # present, writable, user, accessed
PAGE = TABLE | 0x40
NOPS = Vcpu("long4", cr3=0x10, code_gva=0x1000, code_gfn=1, program=(b"\x90", b"\x90", b"\x90"))
STORE = replace(NOPS, regs=((0, 0x1F00),), program=(assemble("mov [rax], ecx"),))
KICKED = Case(
    slots=(Slot(0, 32),),
    memory=(
        Word(0x10, 0, 0x11 << 12 | TABLE),
        Word(0x11, 0, 0x12 << 12 | TABLE),
        Word(0x12, 0, 0x13 << 12 | TABLE),
        Word(0x13, 1, 1 << 12 | PAGE),
    ),
    vcpus=(NOPS, NOPS),
    host=(HostThread((ZAP_ALL_FAST,)),),
)
"""Two vCPUs that a host operation interrupts."""
SEEDS = [seed for seed in range(12) if len(generated(seed).vcpus) + len(generated(seed).host) > 1]


class Witness(Strategy):
    """A random walk that notes the fingerprint at each choice."""

    def __init__(self, seed: int) -> None:
        self.walk = RandomWalk(Rng(seed), 150, 8, 0 if seed % 2 == 0 else 48)
        self.horizon = self.walk.horizon
        self.wants_state = True
        self.seen: list[tuple[int, int]] = []

    def begin(self, threads: int) -> None:
        self.walk.begin(threads)

    def pick(self, current: int, enabled: int, label: int) -> int:
        self.seen.append((self.events, self.state))
        return self.walk.pick(current, enabled, label)

    def hold(self, label: int) -> bool:
        return self.walk.hold(label)


def following(outcome: Outcome, seen: list[tuple[int, int]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(state, thread, its next operation) for each choice; an operation is a step, a site and an address."""
    events = [entry for entry in outcome.trace if entry[0] > 0]
    position = len(events)
    ahead: dict[int, tuple[int, ...]] = {}
    found = []
    for count, state in reversed(seen):
        while position > count:
            position -= 1
            label, address, _ = events[position]
            # A thread that waits looks again whenever it is scheduled: to go on waiting or to wake is no difference.
            site = THREAD_WAIT if label_site(label) == THREAD_WAKE else label_site(label)
            ahead[label_thread(label)] = (label_step(label), site, address)
        found.extend((state, thread, operation) for thread, operation in ahead.items())
    return found


@pytest.mark.parametrize(
    ("case", "runs"),
    [(KICKED, 120), *((generated(seed), 15) for seed in SEEDS)],
    ids=["kicked", *(f"seed {seed}" for seed in SEEDS)],
)
def test_in_equal_states_every_thread_is_about_to_do_the_same(case: Case, runs: int) -> None:
    expected: dict[tuple[int, int], tuple[int, ...]] = {}
    again = 0
    for seed in range(runs):
        witness = Witness(seed)
        outcome = run(case, witness, track=True)
        for state, thread, operation in following(outcome, witness.seen):
            again += (state, thread) in expected
            assert expected.setdefault((state, thread), operation) == operation
    assert again > 0


@pytest.mark.parametrize(
    "case",
    [replace(KICKED, vcpus=(STORE,)), replace(KICKED, vcpus=(STORE, NOPS), host=())],
    ids=["a host operation", "two vcpus"],
)
def test_pruning_loses_no_result_of_the_modelled_kvm(case: Case) -> None:
    pruned = explore_case(case, 1, lambda: False)
    plain = explore(lambda strategy: run(case, strategy), 1, lambda: False, prune=False)
    assert pruned.verdict == plain.verdict == COMPLETE
    assert set(pruned.outcomes) == set(plain.outcomes)
    assert pruned.pruned > plain.pruned == 0
