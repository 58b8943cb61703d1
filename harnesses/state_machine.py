"""A Hypothesis state machine that writes a Case rule by rule: guest instructions, page-table edits, CR3 loads, host
operations, schedule choices. ``python harnesses/state_machine.py [--time 10s] …``

Every rule is total: it can be taken in every state and leaves a valid Case. The Case under construction is what runs,
so a failure always leaves one. The model checks its invariants at every visible operation of a run; so one run of the
finished Case checks every step of it, and runs of its prefixes would only repeat the beginning.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mmufuzz.campaign.harness import run_hypothesis_harness, test_recorder
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case.model import (
    FLAT32,
    LONG4,
    SC,
    TSO,
    ZAP_ALL_FAST,
    Case,
    HostThread,
    Options,
    Slot,
    Vcpu,
    Word,
)
from mmufuzz.case.repair import repair
from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, N_SITES, STORE_SITES, label

STEPS: Final = 20
"""Rules per example."""

FRAMES: Final = 64
ROOTS: Final = (0x10, 0x14)
"""gfns of two root tables; each has its L3, L2 and L1 in the three frames behind it."""
CODE: Final = 0x20
DATA: Final = (0x30, 0x31, 0x32)
MAPPED: Final = (*range(ROOTS[0], ROOTS[1] + 4), *range(CODE, CODE + 3), *DATA)
"""Mapped one to one, so that a gva and the frame behind it have the same number; the tables are mapped too."""
MAX_PROGRAM: Final = 64
RW: Final = 0x67
"""P, W, U, A, D."""

FEP: Final = bytes.fromhex("0f0b6b766d")

STORES_64: Final = (
    "488904 25",  # mov [address], rax
    "488704 25",  # xchg [address], rax
    "f0480fb10c 25",  # lock cmpxchg [address], rcx
    "480fc70c 25",  # cmpxchg16b [address], which KVM cannot emulate
    "f30f1104 25",  # movss [address], xmm0, nor this
    "db3c 25",  # fstp tbyte [address], nor this
    "f048810c 25",  # lock or qword [address], imm32
)
STORES_32: Final = ("8905", "8705", "f00fb10d", "f00fc70d", "f30f1105", "db3d", "f0810d")
LOADS: Final = ("488b14 25", "8b15")
INVLPGS: Final = ("0f013c 25", "0f013d")
SET_EFER: Final = "b9800000c0b8{}31d20f30"  # mov ecx, EFER; mov eax, imm32; xor edx, edx; wrmsr
EXITING: Final = (
    "0fa2",  # cpuid
    "e660",  # out 0x60, al
    "e560",  # in eax, 0x60
    "f4",  # hlt
    SET_EFER.format("00050000"),  # LME and LMA, without NX
    SET_EFER.format("000d0000"),  # with it
)

SITES: Final = st.integers(0, N_SITES - 1)
ADDRESSES: Final = st.tuples(
    st.sampled_from([*ROOTS, ROOTS[0] + 1, ROOTS[0] + 2, ROOTS[0] + 3, ROOTS[1] + 3, *DATA]),
    st.sampled_from([0, 1, *DATA, *ROOTS, ROOTS[0] + 3, 511]),
)
ENTRIES: Final = st.tuples(
    st.sampled_from([*DATA, *ROOTS, ROOTS[0] + 1, ROOTS[0] + 2, ROOTS[0] + 3, CODE, FRAMES + 1]),
    st.sampled_from([RW, RW, RW, 0, 0x65, 0x63, 0x27, 0x07, 0xE7, 1 << 63 | RW]),
)
VCPU: Final = st.integers(0, 2)


def encoded(form: str, address: int) -> bytes:
    """An instruction with an absolute 32-bit memory operand."""
    code = bytes.fromhex(form) + address.to_bytes(4, "little")
    return code + b"\x21\0\0\0" if form.startswith(("f04881", "f081")) else code


class Builder:
    """The Case as far as it is written."""

    def __init__(self) -> None:
        self.modes = [LONG4, LONG4]
        self.cpls = [0, 0]
        self.memory_model = TSO
        self.fep = False
        self.programs: list[list[bytes]] = [[], [], []]
        self.words: dict[tuple[int, int], int] = {}
        for root in ROOTS:
            for level in range(3):
                self.words[root + level, 0] = (root + level + 1) << 12 | RW
            for gfn in MAPPED:
                self.words[root + 3, gfn] = gfn << 12 | RW
        self.host: list[list[str]] = []
        self.schedule: list[Deviation] = []

    def step(self, vcpu: int, codes: tuple[str, str], address: int, forced: bool = False) -> None:
        """Append the instruction that fits the vCPU's mode."""
        index = vcpu % len(self.modes)
        form = codes[0] if self.modes[index] == LONG4 else codes[1]
        self.append(index, (FEP if forced and self.fep else b"") + encoded(form.replace(" ", ""), address))

    def append(self, index: int, code: bytes) -> None:
        """Append raw bytes, unless the program is full."""
        if len(self.programs[index]) < MAX_PROGRAM:
            self.programs[index].append(code)

    def load_rax(self, vcpu: int, value: int) -> None:
        """mov rax, imm64; mov eax, imm32."""
        index = vcpu % len(self.modes)
        if self.modes[index] == LONG4:
            self.append(index, b"\x48\xb8" + value.to_bytes(8, "little"))
        else:
            self.append(index, b"\xb8" + (value & 0xFFFFFFFF).to_bytes(4, "little"))

    def case(self) -> Case:
        """What has been written, as a Case without a kernel of its own."""
        vcpus = tuple(
            Vcpu(
                mode=mode,
                cpl=self.cpls[index] if mode == LONG4 else 0,
                cr3=ROOTS[0] if mode == LONG4 else 0,
                code_gva=(CODE + index) << 12,
                code_gfn=CODE + index,
                regs=((0, RW | DATA[0] << 12), (1, RW | DATA[1] << 12)),
                program=tuple(self.programs[index]),
            )
            for index, mode in enumerate(self.modes)
        )
        words = tuple(Word(gfn, index, value) for (gfn, index), value in sorted(self.words.items()) if value)
        hosts = tuple(HostThread(tuple(ops)) for ops in self.host)
        written = Case(
            memory_model=self.memory_model,
            options=Options(fep=self.fep),
            slots=(Slot(0, FRAMES),),
            memory=words,
            vcpus=vcpus,
            host=hosts,
            schedule=tuple(self.schedule),
        )
        # Deviations may name threads that no rule has made, and programs may be empty.
        return repair(written)


class ShadowPaging(RuleBasedStateMachine):
    """The rules. ``recorder`` runs the Case; with ``raising`` a new finding fails the test."""

    recorder: Recorder
    raising = True
    over: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self) -> None:
        super().__init__()
        self.builder = Builder()

    @initialize(
        second=st.sampled_from([LONG4, LONG4, FLAT32]),
        third=st.sampled_from(["", "", LONG4, FLAT32]),
        cpl=st.sampled_from([0, 0, 3]),
        model=st.sampled_from([TSO, TSO, TSO, SC]),
        fep=st.booleans(),
    )
    def begin(self, second: str, third: str, cpl: int, model: str, fep: bool) -> None:
        """The machine: two or three vCPUs."""
        builder = self.builder
        builder.modes = [LONG4, second, third] if third else [LONG4, second]
        builder.cpls = [0, cpl, 0]
        builder.memory_model = model
        builder.fep = fep

    @rule(vcpu=VCPU, at=ADDRESSES)
    def load(self, vcpu: int, at: tuple[int, int]) -> None:
        """A guest load."""
        self.builder.step(vcpu, LOADS, at[0] << 12 | at[1] << 3)

    @rule(vcpu=VCPU, at=ADDRESSES, kind=st.integers(0, len(STORES_64) - 1), forced=st.booleans())
    def store(self, vcpu: int, at: tuple[int, int], kind: int, forced: bool) -> None:
        """A guest store of any kind, possibly into a table."""
        self.builder.step(vcpu, (STORES_64[kind], STORES_32[kind]), at[0] << 12 | at[1] << 3, forced)

    @rule(vcpu=VCPU, at=ADDRESSES, entry=ENTRIES, kind=st.integers(0, 1), forced=st.booleans())
    def edit_table(self, vcpu: int, at: tuple[int, int], entry: tuple[int, int], kind: int, forced: bool) -> None:
        """The guest writes a page-table entry."""
        self.builder.load_rax(vcpu, entry[0] << 12 | entry[1])
        self.builder.step(vcpu, (STORES_64[kind], STORES_32[kind]), at[0] << 12 | at[1] << 3, forced)

    @rule(vcpu=VCPU, gfn=st.sampled_from([*DATA, *ROOTS, CODE]))
    def invlpg(self, vcpu: int, gfn: int) -> None:
        """INVLPG."""
        self.builder.step(vcpu, INVLPGS, gfn << 12)

    @rule(vcpu=VCPU, root=st.sampled_from([*ROOTS, ROOTS[0] + 3, DATA[0]]))
    def load_cr3(self, vcpu: int, root: int) -> None:
        """MOV to CR3, of a root table or of a frame that is none."""
        self.builder.load_rax(vcpu, root << 12)
        self.builder.append(vcpu % len(self.builder.modes), b"\x0f\x22\xd8")

    @rule(vcpu=VCPU, code=st.sampled_from(EXITING))
    def exiting(self, vcpu: int, code: str) -> None:
        """An instruction that exits by itself."""
        self.builder.append(vcpu % len(self.builder.modes), bytes.fromhex(code))

    @rule(at=ADDRESSES, entry=ENTRIES)
    def initial_entry(self, at: tuple[int, int], entry: tuple[int, int]) -> None:
        """An entry of the initial tables."""
        self.builder.words[at] = entry[0] << 12 | entry[1]

    @rule(thread=st.integers(0, 1))
    def zap_all(self, thread: int) -> None:
        """A host thread zaps everything, as a memslot update does."""
        hosts = self.builder.host
        if thread >= len(hosts):
            hosts.append([])
        hosts[-1].append(ZAP_ALL_FAST)

    @rule(thread=st.integers(0, 3), step=st.integers(0, 12), site=SITES, nth=st.integers(1, 3), actor=st.integers(0, 3))
    def preempt(self, thread: int, step: int, site: int, nth: int, actor: int) -> None:
        """After some operation another thread runs."""
        self.builder.schedule.append(Deviation(RUN, label(thread, step, site, nth), actor))

    @rule(thread=st.integers(0, 3), step=st.integers(0, 12), site=st.sampled_from(STORE_SITES), until=SITES)
    def hold(self, thread: int, step: int, site: int, until: int) -> None:
        """A store stays in the store buffer until another thread's operation."""
        end = label((thread + 1) % 3, step, until, 1) if until else BOOT
        self.builder.schedule.append(Deviation(HOLD, label(thread, step, site, 1), thread, end))

    @rule(vcpu=VCPU, step=st.integers(0, 12), gfn=st.sampled_from(DATA), fill=st.booleans())
    def tlb(self, vcpu: int, step: int, gfn: int, fill: bool) -> None:
        """A TLB entry goes, or comes by speculation."""
        actor = vcpu % len(self.builder.modes)
        at = label(actor, step, 4, 1)
        self.builder.schedule.append(Deviation(FILL if fill else EVICT, at, actor, BOOT, gfn << 12))

    @invariant()
    def the_case_stays_within_its_limits(self) -> None:
        """What makes every prefix of the rules a Case; the rest is checked where it runs."""
        assert all(len(program) <= MAX_PROGRAM for program in self.builder.programs)

    def teardown(self) -> None:
        """Run what was written."""
        if self.over():
            return
        case = self.recorder.kernel.dress(self.builder.case())
        self.recorder.case()
        outcome = self.recorder.check(case)
        if self.raising:
            for finding in outcome.findings:
                record = self.recorder.store.records.get(finding.fingerprint)
                assert record is None or not record.new, (
                    f"{finding.kind}: {finding.fingerprint}; the Case is in {record.case}"
                )


def batch(recorder: Recorder, over: Callable[[], bool], number: int, examples: int) -> None:
    """Run so many examples; findings are recorded, not raised."""
    run_batch(ShadowPaging, recorder, over, number, examples)


def run_batch(
    machine: type[ShadowPaging], recorder: Recorder, over: Callable[[], bool], number: int, examples: int
) -> None:
    """``batch`` for a variant of the machine."""
    machine.recorder = recorder
    machine.raising = False
    machine.over = staticmethod(over)
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def main(arguments: list[str]) -> int:
    """The harness as a program."""
    return run_hypothesis_harness("state_machine", batch, arguments)


class TestShadowPaging(ShadowPaging.TestCase):  # type: ignore[misc, valid-type]
    """For pytest: ``pytest harnesses/state_machine.py``."""

    settings = settings(max_examples=50, stateful_step_count=STEPS, deadline=None)

    def runTest(self) -> None:
        ShadowPaging.recorder = test_recorder("state_machine")
        ShadowPaging.raising = True
        super().runTest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
