"""What ``validate`` refuses, and how it says so. What can be written in TOML is tested in test_toml.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case, Expect, HostThread, Options, Slot, Vcpu, Word
from mmufuzz.case.repair import repair
from mmufuzz.case.validate import validate
from mmufuzz.host.deviation import EVICT, HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, EMUL_STORE, MODE_LOAD, label

VCPU = Vcpu("long4", cr3=8, code_gva=0x1000, code_gfn=1, program=(b"\x90",))
CASE = Case(slots=(Slot(0, 16),), vcpus=(VCPU, VCPU))
STORE = label(1, 0, EMUL_STORE, 1)


def vcpu(**changes: object) -> Case:
    return replace(CASE, vcpus=(replace(VCPU, **changes),))  # type: ignore[arg-type]


def interrupts(op: str) -> Case:
    return replace(CASE, vcpus=(VCPU,), host=(HostThread((op,)),))


def schedule(deviation: Deviation) -> Case:
    return replace(CASE, schedule=(deviation,))


BAD = [
    (replace(CASE, kernel=""), "kernel", "expected a kernel profile of 1..100 characters"),
    (replace(CASE, revert=("a b",)), "revert[0]", "expected the id of a fix"),
    (replace(CASE, apply=("a",) * 65), "apply", "expected 0..64 fixes, got 65"),
    (replace(CASE, slots=()), "slots", "expected 1..32 memory slots, got 0"),
    (replace(CASE, slots=(Slot(-1, 3),)), "slots[0].base_gfn", "expected a gfn in 0..65535, got -1"),
    (replace(CASE, slots=(Slot(0xFFFF, 2),)), "slots[0].npages", "expected a number of frames in 1..1, got 2"),
    (replace(CASE, slots=(Slot(4, 4), Slot(0, 5))), "slots[1]", "slots[0] overlaps"),
    (replace(CASE, options=Options(event_limit=0)), "options.event_limit", "in 1..1000000, got 0"),
    (replace(CASE, options=Options(tsc=1 << 64)), "options.tsc", "a 64-bit value"),
    (replace(CASE, options=Options(write_track=(1, 1))), "options.write_track[1]", "expected each gfn once"),
    (replace(CASE, memory=(Word(0, -1, 0),)), "memory[0].index", "in 0..511, got -1"),
    (replace(CASE, memory=(Word(0, 0, 1 << 64),)), "memory[0].value", "in 0x0..0xffffffffffffffff"),
    (replace(CASE, memory=(Word(16, 0, 0),)), "memory[0].gfn", "expected a gfn inside a slot, got 0x10"),
    (replace(CASE, vcpus=()), "vcpu", "expected 1..16 vCPUs, got 0"),
    (replace(CASE, vcpus=(VCPU,) * 17), "vcpu", "got 17"),
    (vcpu(mode="pae"), "vcpu[0].mode", "expected one of long4, flat32, npt4, got 'pae'"),
    (replace(CASE, vcpus=(VCPU, replace(VCPU, mode="npt4"))), "vcpu[1].mode", "expected no npt4 beside long4"),
    (vcpu(mode="npt4", code_gva=1 << 32), "vcpu[0].code_gva", "expected 32-bit addresses"),
    (vcpu(flags=("wp", "wp")), "vcpu[0].flags", "expected each flag once"),
    (vcpu(regs=((16, 0),)), "vcpu[0].regs", "expected a register number in 0..15, got 16"),
    (vcpu(regs=((1, -1),)), "vcpu[0].regs", "expected a 64-bit value"),
    (vcpu(regs=((1, 0), (1, 0))), "vcpu[0].regs", "expected each register once"),
    (vcpu(program=(b"",)), "vcpu[0].program[0]", "expected 1..15 bytes, got 0"),
    (vcpu(program=(bytes(16),)), "vcpu[0].program[0]", "expected 1..15 bytes, got 16"),
    (vcpu(program=(b"\x90",) * 2049), "vcpu[0].program", "expected 0..2048 steps, got 2049"),
    (vcpu(code_gfn=15, program=(b"\x90",) * 257), "vcpu[0].code_gfn", "but 0x10 is in none"),
    (vcpu(code_gva=(1 << 47) - 4096, program=(b"\x90",) * 257), "vcpu[0].code_gva", "expected canonical addresses"),
    (vcpu(mode="flat32", code_gva=0), "vcpu[0].code_gva", "expected code_gfn * 4096 = 0x1000, got 0x0"),
    (replace(CASE, host=(HostThread(),) * 5), "host", "expected 0..4 host threads, got 5"),
    (interrupts("interrupt vcpu0 0x1f"), "host[0].ops[0]", "expected zap_all_fast or 'interrupt vcpuN 0x20..0xff'"),
    (interrupts("interrupt vcpu0 32"), "host[0].ops[0]", "expected zap_all_fast or 'interrupt vcpuN 0x20..0xff'"),
    (interrupts("interrupt vcpu2 0x20"), "host[0].ops[0]", "expected one of 1 vCPUs, got vcpu2"),
    (
        replace(interrupts("interrupt vcpu0 0x20"), vcpus=(replace(VCPU, mode="npt4"),)),
        "host[0].ops[0]",
        "expected no interrupt for an L2 guest",
    ),
    (schedule(Deviation(7, BOOT)), "schedule[0]", "expected a kind of deviation"),
    (schedule(Deviation(RUN, BOOT, 2)), "schedule[0]", "expected an actor in 0..1, got 2"),
    (schedule(Deviation(RUN, label(2, 0, 0, 1), 0)), "schedule[0]", "one of 2 threads, got thread 2"),
    (schedule(Deviation(RUN, label(0, 0, 99, 1), 0)), "schedule[0]", "expected a site below"),
    (schedule(Deviation(RUN, label(0, 5, 4, 0), 0)), "schedule[0]", "expected an occurrence from 1 at step 5"),
    (schedule(Deviation(RUN, -1, 0)), "schedule[0]", "got thread -1"),
    (schedule(Deviation(RUN, BOOT, 0, STORE)), "schedule[0]", "expected 'until' only in a hold"),
    (schedule(Deviation(RUN, BOOT, 0, BOOT, 1)), "schedule[0]", "expected an address only in"),
    (schedule(Deviation(HOLD, BOOT)), "schedule[0]", "expected the label of a store to hold, got 'start'"),
    (schedule(Deviation(HOLD, label(0, 0, MODE_LOAD, 1))), "schedule[0]", "got 'mode.load'"),
    (schedule(Deviation(HOLD, STORE, 0)), "schedule[0]", "expected as actor the storing thread, got 0"),
    (schedule(Deviation(EVICT, BOOT, 0, BOOT, 1 << 64)), "schedule[0]", "expected a 64-bit address"),
    (
        replace(CASE, host=(HostThread(),), schedule=(Deviation(EVICT, BOOT, 2),)),
        "schedule[0]",
        "expected an actor in 0..1, got 2",
    ),
    (
        replace(CASE, vcpus=(*CASE.vcpus, CASE.vcpus[0]), options=Options(n_max_mmu_pages=27)),
        "options.n_max_mmu_pages",
        "28..65535, got 27",
    ),
    (replace(CASE, expect=Expect("finding", "No")), "expect.kind", "expected a kind of finding"),
    (replace(CASE, expect=Expect("finding", "", "a\nb")), "expect.fingerprint", "expected one line"),
    (replace(CASE, expect=Expect(reach=("a b",))), "expect.reach[0]", "expected the name of a mark"),
    (replace(CASE, expect=Expect(reach=("a" * 101,))), "expect.reach[0]", "expected the name of a mark"),
    (replace(CASE, revert=("a" * 101,)), "revert[0]", "expected the id of a fix"),
    (replace(CASE, expect=Expect("finding", "", "a" * 501)), "expect.fingerprint", "expected one line"),
    (replace(CASE, expect=Expect("finding", "", "é\x85")), "expect.fingerprint", "expected one line"),
    (replace(CASE, expect=Expect("finding", "", "é\u2028")), "expect.fingerprint", "expected one line"),
    (replace(CASE, expect=Expect("finding", "", "é\ud800")), "expect.fingerprint", "expected one line"),
    (replace(CASE, comment="a" * 65537), "comment", "65536"),
    (replace(CASE, comment="\ud800"), "comment", "without surrogates"),
]


@pytest.mark.parametrize(("case", "place", "expected"), BAD)
def test_a_case_out_of_range_is_refused(case: Case, place: str, expected: str) -> None:
    with pytest.raises(CaseError) as error:
        validate(case)
    assert error.value.place == place
    assert expected in error.value.expected


@pytest.mark.parametrize("case", [case for case, _, _ in BAD])
def test_repair_makes_it_valid(case: Case) -> None:
    validate(repair(case))


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        vcpu(cr3=0xFFFF),  # a root outside every slot is the guest's mistake, and KVM has to live with it
        vcpu(code_gva=(1 << 64) - 4096, program=(b"\x90",) * 256),
        replace(CASE, slots=(Slot(1, 1), Slot(0xFFFF, 1), Slot(2, 3, True))),
        schedule(Deviation(HOLD, STORE, 1)),
        # KVM's own least budget is enough for any number of vCPUs.
        replace(CASE, vcpus=CASE.vcpus * 8, options=Options(n_max_mmu_pages=64)),
    ],
)
def test_unusual_cases_are_accepted(case: Case) -> None:
    validate(case)
