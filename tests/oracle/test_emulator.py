"""The oracle of emulated instructions: what it compares, over what, and that it is asked in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmufuzz.case import toml
from mmufuzz.kvm.emulate import EMULATION_OK, x86_decode_insn, x86_emulate_insn
from mmufuzz.kvm.emulate_ctxt import CMPXCHG, READ, SYSTEM, WRITE, Access, X86EmulateCtxt
from mmufuzz.kvm.emulate_ops import BusOps
from mmufuzz.kvm.fixes import FIXES, behaviours
from mmufuzz.kvm.switches import Fixes
from mmufuzz.kvm.x86 import toggle_interruptibility
from mmufuzz.oracle.emulator import changes_general_registers_only
from mmufuzz.oracle.emulator_compare import Comparison, replay
from mmufuzz.oracle.emulator_replay import Replay
from mmufuzz.run import run
from mmufuzz.x86.asm import assemble
from mmufuzz.x86.flat import FlatBus, Region
from mmufuzz.x86.flat_registers import initial_registers
from mmufuzz.x86.state import VECTOR_GP, VECTOR_PF, Fault, Regs

RAX, RCX = 0, 1
CODE, DATA = 0x1000, 0x2000
CORPUS = Path(__file__).parents[2] / "corpus" / "regressions"


class Emulated:
    """An instruction that the emulator has executed on a bare machine; what it left may be tampered with."""

    def __init__(self, text: str, cpl: int = 0) -> None:
        self.code = assemble(text)
        self.regs = initial_registers(64)
        self.regs.rip = CODE
        self.regs.cpl = cpl
        self.regs.gpr[RAX] = DATA
        self.regs.gpr[RCX] = 5
        self.memory = Region(DATA, (7).to_bytes(64, "little"))
        self.before = self.regs.copy()
        self.ctxt = X86EmulateCtxt(self.regs, Fixes(behaviours("latest", (), ())))
        self.ctxt.ops = BusOps(self.regs, FlatBus([Region(CODE, self.code.ljust(16, b"\x90")), self.memory]))
        x86_decode_insn(self.ctxt, False)
        assert x86_emulate_insn(self.ctxt) == EMULATION_OK
        self.regs.rip = self.ctxt.eip
        self.regs.rflags = self.ctxt.eflags
        toggle_interruptibility(self.regs, self.ctxt.interruptibility)
        self.fault: Fault | None = None

    @property
    def accesses(self) -> list[Access]:
        return self.ctxt.accesses

    def differences(self) -> list[str]:
        """What the oracle sees."""
        made = Comparison(self.ctxt.insn, self.before, self.regs)
        made.fault = self.fault
        replay(made, self.ctxt.code, self.accesses, Replay())
        return made.differences


@pytest.mark.parametrize(
    "text", ["mov [rax], rcx", "add [rax], rcx", "lock xadd [rax], rcx", "mov rcx, [rax]", "sgdt [rax]", "jmp rax"]
)
def test_an_instruction_that_is_emulated_right_shows_no_difference(text: str) -> None:
    assert Emulated(text).differences() == []


def test_a_wrong_register_flag_or_rip_is_seen() -> None:
    made = Emulated("add rcx, rax")
    made.regs.gpr[3] += 1
    made.regs.rflags ^= 1
    made.regs.rip += 1
    assert made.differences() == ["registers", "rip", "flags"]


def test_a_wrong_value_in_memory_is_seen() -> None:
    made = Emulated("add [rax], rcx")
    made.accesses[-1].value += 1
    assert made.differences() == ["memory"]


def test_a_store_that_is_missing_or_too_many_is_seen() -> None:
    made = Emulated("mov [rax], rcx")
    made.accesses.append(Access(WRITE, DATA + 8, 8, 0))
    assert made.differences() == ["memory"]
    made = Emulated("mov [rax], rcx")
    made.accesses.clear()
    assert made.differences()


def test_a_plain_store_where_hardware_locks_is_seen() -> None:
    made = Emulated("lock add [rax], rcx")
    assert made.accesses[-1].kind == CMPXCHG
    made.accesses[-1].kind = WRITE
    assert made.differences() == ["memory"]


def test_a_supervisor_access_of_a_user_is_seen_and_of_the_supervisor_is_the_same() -> None:
    for cpl, seen in ((3, ["privilege"]), (0, [])):
        made = Emulated("sgdt [rax]", cpl)
        made.accesses[-1].kind |= SYSTEM
        assert made.differences() == seen


@pytest.mark.parametrize("stored", [True, False])
def test_a_store_faults_where_the_emulator_failed_unless_it_was_made_before(stored: bool) -> None:
    """REP MOVS may store to a page, and come to read it when another CPU has unmapped it."""
    made = [Access(WRITE, DATA, 8, 5)] if stored else []
    bus = Replay()
    bus.begin([*made, Access(READ, DATA, 8, 0)], Fault(VECTOR_PF, 0, DATA), Regs(), True)
    if stored:
        bus.store(Regs(), DATA, 8, 5, False)
    with pytest.raises(Fault):
        bus.store(Regs(), DATA, 8, 5, False)


def test_an_exception_that_hardware_does_not_raise_is_seen() -> None:
    made = Emulated("nop")
    made.fault = Fault(VECTOR_GP, 0)
    made.regs.rip = CODE
    assert made.differences() == ["exception", "rip"]


def test_what_others_write_in_the_meantime_does_not_matter() -> None:
    made = Emulated("add [rax], rcx")
    made.memory.store(DATA, 8, 0x55)
    assert made.differences() == []


def test_a_result_that_does_not_follow_from_what_was_read_is_seen() -> None:
    made = Emulated("add [rax], rcx")
    made.accesses[0].value += 1
    assert made.differences() == ["memory", "flags"]


@pytest.mark.parametrize(
    ("text", "general"), [("add [rax], rcx", True), ("movups [rax], xmm0", False), ("sgdt [rax]", False)]
)
def test_only_instructions_on_general_registers_are_compared_in_part(text: str, general: bool) -> None:
    assert changes_general_registers_only(Emulated(text).ctxt) == general


EMULATOR_FIXES = [fix.id for fix in FIXES if fix.citation.startswith("emulate.c") and fix.shows != "benign"]


@pytest.mark.parametrize("fix", EMULATOR_FIXES)
def test_reverting_a_fix_of_the_emulator_is_a_finding_of_the_run_and_the_fix_is_none(fix: str) -> None:
    expected = next(known.shows for known in FIXES if known.id == fix)
    outcome = run(toml.load(CORPUS / f"{fix}.toml"))
    assert [finding.kind for finding in outcome.findings] == [expected]
    assert run(toml.load(CORPUS / f"{fix}-fixed.toml")).findings == []
