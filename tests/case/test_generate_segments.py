"""The scene with descriptors emulates what it is for, and shows each fix of segmentation that is taken away."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from watched import Watched

from mmufuzz.case.generate import CAMPAIGN, SEGMENTS, generate_shape
from mmufuzz.case.generate_segments import FLAT, descriptor, selector
from mmufuzz.case.generate_vm import DEFAULT, Machines
from mmufuzz.case.model import Case
from mmufuzz.case.rng import Rng
from mmufuzz.outcome import OK
from mmufuzz.run import run
from mmufuzz.x86.segments import Descriptor

N = 250
SS = 2


def made(seed: int) -> Case:
    """The scene as a campaign has it."""
    return generate_shape(Rng(seed), SEGMENTS, CAMPAIGN)


class Emulated(Watched):
    """What the emulator executes, as (name, size of code, CPL), and the selectors that MOV takes to SS."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.seen: Counter[tuple[str, int, int]] = Counter()
        self.stack_selectors: Counter[tuple[int, int, int]] = Counter()

    def emulation_begins(self, vcpu: int) -> None:
        ctxt = self.kvm.vcpus[vcpu].emulate_ctxt
        cpl = ctxt.regs.cpl
        self.seen[ctxt.insn.name, ctxt.bits, cpl] += 1
        if ctxt.insn.name == "mov.to_sreg" and ctxt.insn.modrm_reg == SS and not ctxt.insn.in_memory:
            self.stack_selectors[ctxt.gpr[ctxt.insn.modrm_rm] & 0xFFFF, ctxt.bits, cpl] += 1


class Sums:
    """Over N Cases."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, int, int]] = Counter()
        self.stack_selectors: Counter[tuple[int, int, int]] = Counter()
        self.marks: Counter[str] = Counter()
        self.exits: Counter[str] = Counter()
        for seed in range(N):
            watched = Emulated(made(seed))
            watched.run()
            self.seen += watched.seen
            self.stack_selectors += watched.stack_selectors
            self.marks.update(watched.kvm.marks)
            self.exits.update(watched.kvm.exits)


@pytest.fixture(scope="module")
def sums() -> Sums:
    return Sums()


EVERYWHERE = ("mov.to_sreg", "pop.sreg", "lss", "retf", "sysenter")


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_loads_are_emulated_in_code_of_every_size_and_privilege(sums: Sums, bits: int, cpl: int) -> None:
    names = {name for name, *where in sums.seen if where == [bits, cpl]}
    assert names >= {*EVERYWHERE, *(("sysexit",) if cpl == 0 else ())}


def test_every_kind_of_load_is_emulated(sums: Sums) -> None:
    names = {name for name, _, _ in sums.seen}
    assert names >= {"lds", "les", "lss", "lfs", "lgs", "lldt", "ltr", "sti", "cli"}


def test_the_emulator_is_asked_for_a_null_ss_by_the_user_and_by_the_supervisor(sums: Sums) -> None:
    for cpl in (0, 3):
        asked = {value for value, bits, level in sums.stack_selectors if (bits, level) == (64, cpl) and value <= 3}
        assert asked >= {0, 3}


def test_ss_is_loaded_with_segments_that_it_takes_and_others(sums: Sums) -> None:
    values = {value for value, _, _ in sums.stack_selectors}
    assert values >= {0x18, 0x3B}
    # 64-bit code, code of DPL 3, the first of the random ones, beyond the limit.
    assert values & {0x10, 0x13} and values & {0x30, 0x33} and values & set(range(0x50, 0x54))
    assert any(value >= 0x80 for value in values)


def test_descriptors_are_of_every_type_and_privilege() -> None:
    rng = Rng(1)
    drawn = [Descriptor(0, descriptor(rng)) for _ in range(20000)]
    kinds = {(item.is_system, item.type, item.dpl, item.present) for item in drawn}
    assert len(kinds) == 2 * 16 * 4 * 2
    assert {item.limit for item in drawn} >= {0, 0xFFF, 0xFFFFF, 0xFFFFFFFF}
    assert any(item.base for item in drawn)
    assert not any(item.base for item in drawn if item.is_code)


def test_flat_segments_are_what_their_comments_say() -> None:
    items = [Descriptor(0, word) for word in FLAT]
    assert [(item.is_code, item.dpl) for item in items] == [
        *((True, 0), (False, 0), (True, 0), (True, 0), (True, 3), (False, 3), (True, 3), (True, 3))
    ]
    # L and D.
    assert [item.rights >> 13 & 3 for item in items if item.is_code] == [1, 2, 0, 1, 2, 0]
    assert all(item.present and not item.base and item.limit == 0xFFFFFFFF for item in items)


@pytest.mark.parametrize("cpl", [0, 3])
def test_selectors_are_of_every_kind(cpl: int) -> None:
    vm = Machines(Rng(2), DEFAULT)
    drawn = [selector(vm, cpl) for _ in range(2000)]
    assert {value for value in drawn if value < 4} == {0, 1, 2, 3}
    assert {value & ~3 for value in drawn if 8 <= value < 0x80} == set(range(0x10, 0x80, 8))
    assert any(value & 4 for value in drawn)
    assert any(value >= 0x80 for value in drawn)
    assert sum(value & 3 == cpl for value in drawn) > len(drawn) // 2


def test_interrupts_meet_the_scene(sums: Sums) -> None:
    assert sums.marks["interrupt.delivered"] > N // 20
    assert sums.exits["interrupt-window"] > 0


SHOWN = 40
"""Cases of a campaign of this scene alone. Their seeds are fixed, and with them what is found: of many Cases one in 15
shows the rarest of the fixes.
"""

FIXES = {
    "emulate-null-ss": ("mov:", "lss:"),
    "emulate-sysenter": ("sysenter:",),
    "emulate-segment-privilege": ("mov:", "pop:", "lds:", "les:", "lfs:", "lgs:"),
    "emulate-pop-ss": ("pop: interrupt shadow",),
}


@pytest.mark.parametrize("fix", FIXES)
def test_a_small_campaign_finds_what_a_fix_of_segmentation_fixed(fix: str) -> None:
    found: list[str] = []
    for seed in range(SHOWN):
        case = made(seed)
        for finding in run(replace(case, revert=(fix,))).findings:
            if finding.kind == "emulator":
                found.append(finding.fingerprint)
                assert run(case).verdict == OK
    assert found
    assert all(fingerprint.startswith(FIXES[fix]) for fingerprint in found)


def test_the_same_campaign_finds_nothing_on_the_kernel_as_it_is() -> None:
    outcomes = [run(made(seed)) for seed in range(SHOWN)]
    assert [outcome.findings for outcome in outcomes if outcome.findings] == []
