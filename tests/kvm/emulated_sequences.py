"""Random instruction sequences, each instruction executed twice from the same state: by the emulator, every access of
it forced through the emulator's operations, and by the hardware executor.

The two results are compared register by register and byte by byte. The emulation is also replayed over its record of
accesses, as the oracle of a run does it. Either difference has to be on the list of deviations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flatbus import RSP, FlatBus

from mmufuzz.case.encodings import edge_value, encode
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.emulate import EMULATION_FAILED, EMULATION_OK, EMULATION_RESTART, x86_decode_insn, x86_emulate_insn
from mmufuzz.kvm.emulate_ctxt import X86EmulateCtxt
from mmufuzz.kvm.emulate_ops import BusOps, EmulationFailed
from mmufuzz.kvm.fixes import behaviours
from mmufuzz.kvm.opcode_table import STRING
from mmufuzz.kvm.switches import Fixes
from mmufuzz.kvm.x86 import toggle_interruptibility
from mmufuzz.oracle.emulator_compare import (
    ERROR_CODE,
    EXCEPTION,
    MEMORY,
    Comparison,
    compare_registers,
    hardware_decode,
    replay,
)
from mmufuzz.oracle.emulator_deviations import explain
from mmufuzz.oracle.emulator_replay import Replay
from mmufuzz.x86 import alu
from mmufuzz.x86.decode import Truncated, Unsupported
from mmufuzz.x86.execute_operands import bit_offset, effective_address
from mmufuzz.x86.executor import execute
from mmufuzz.x86.flat_registers import initial_registers
from mmufuzz.x86.insn import MEM, Insn
from mmufuzz.x86.opcodes import FORMS, MAP_VEX, ONLY32, ONLY64, Form
from mmufuzz.x86.opcodes import STRING as STRING_FORM
from mmufuzz.x86.state import (
    CR0_AM,
    CR0_PE,
    CR0_PG,
    CR4_UMIP,
    EFER_SCE,
    FLAG_AC,
    MSR_FMASK,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    PFERR_FETCH,
    PFERR_WRITE,
    VECTOR_GP,
    Fault,
    Regs,
)

SIZE = 0x10000
DATA = 0x1000
DATA_END = 0x4000
GDT = 0x7000
CODE = 0x8000
LATEST = Fixes(behaviours("latest", (), ()))
PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\xf0\xf2\xf3\x66"
RIGHTS = (0x9B, 0x93, 0x92, 0x9A, 0xF3, 0xFB, 0xF2, 0x9F, 0x97, 0x91, 0x99, 0x13, 0x82, 0x89, 0x8B, 0x81, 0xB3, 0xD3)
"""Of the descriptors in the table: code, data and system, of several privileges, present or not, accessed or not."""


class Memory(FlatBus):
    """Flat memory that also holds code, with the checks of CR0 that the bare machine makes."""

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        if rmw:
            self._check(gva, size, self.no_store + self.no_load, PFERR_WRITE)
        return super().load(regs, gva, size, rmw, locked)

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        self._check(gva, size, [], PFERR_FETCH)
        return bytes(self.memory[gva : gva + size])

    def poke(self, gva: int, size: int, value: int) -> None:
        if gva >= 0 and gva + size <= SIZE:
            super().poke(gva, size, value)

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        if number == 0:
            if value & CR0_PG or (not value & CR0_PE and regs.long_mode):
                raise Fault(VECTOR_GP, 0)
            regs.cr0 = value
        elif number == 3:
            regs.cr3 = value
        else:
            regs.cr4 = value


def emulate(ctxt: X86EmulateCtxt) -> int:
    """One trip through the emulator, as x86_emulate_instruction makes it; RIP, RFLAGS and the shadow are committed."""
    try:
        x86_decode_insn(ctxt, False)
    except (EmulationFailed, Fault):
        return EMULATION_FAILED
    result = EMULATION_RESTART
    while result == EMULATION_RESTART:
        result = x86_emulate_insn(ctxt)
    if result == EMULATION_OK and not ctxt.have_exception:
        ctxt.regs.rip = ctxt.eip
        ctxt.regs.rflags = ctxt.eflags
        toggle_interruptibility(ctxt.regs, ctxt.interruptibility)
    return result


def emulator(regs: Regs, bus: FlatBus, fixes: Fixes = LATEST) -> X86EmulateCtxt:
    """An emulator of the CPU ``regs`` on ``bus``."""
    ctxt = X86EmulateCtxt(regs, fixes)
    ctxt.ops = BusOps(regs, bus)
    return ctxt


class Comparer:
    """Runs random instructions of ``bits``-bit code (64, 32 or 16: real-address mode) on both sides."""

    def __init__(self, bits: int, seed: int, fixes: Fixes = LATEST) -> None:
        self.bits = bits
        self.fixes = fixes
        self.rng = Rng(seed)
        absent = ONLY32 if bits == 64 else ONLY64
        self.all_forms = [form for form in FORMS if not form.flags & absent and form.opcode_map < MAP_VEX]
        self.forms = self.all_forms
        self.ours = Memory(SIZE)
        self.theirs = Memory(SIZE)
        self.ours.memory[:] = self.rng.bytes(SIZE)
        self.used: dict[str, int] = {}
        """Emulated instructions by name of their table entry."""
        self.explained: dict[str, int] = {}
        """Deviations met."""
        self.unexplained: list[str] = []

    def only(self, names: Sequence[str]) -> None:
        """Draw from the forms with these mnemonics only."""
        self.forms = [form for form in self.all_forms if form.mnemonic in names]

    # State.

    def registers(self) -> Regs:
        """Random registers of any privilege, with a table of segments."""
        rng = self.rng
        regs = initial_registers(self.bits)
        for index in range(16 if self.bits == 64 else 8):
            regs.gpr[index] = edge_value(rng) if self.bits == 64 else edge_value(rng) & 0xFFFFFFFF
            regs.xmm[index] = rng.next64() << 64 | rng.next64()
        regs.rflags = 2 | rng.next64() & (alu.ARITHMETIC_FLAGS | 0x4600)
        if self.bits != 16 and rng.below(3) == 0:
            regs.cpl = rng.below(4)
            for index in (1, 2):
                regs.segments[index].rights |= regs.cpl << 5
                regs.segments[index].selector = regs.cpl
        if regs.cpl == 3 and rng.below(2):
            regs.cr0 |= CR0_AM
            regs.rflags |= FLAG_AC
        if rng.below(4) == 0:
            regs.cr4 |= CR4_UMIP
        if self.bits == 16:
            regs.idt_limit = 0x3FF
        regs.gdt_base = GDT
        regs.gdt_limit = 255
        regs.efer |= EFER_SCE
        for number in (MSR_STAR, MSR_LSTAR, MSR_FMASK, MSR_SYSENTER_CS, MSR_SYSENTER_EIP, MSR_SYSENTER_ESP):
            regs.msr[number] = rng.below(0x8000) if rng.below(4) else 0
        return regs

    def descriptors(self) -> None:
        """Fill the table of segments."""
        for place in range(1, 32):
            rights = RIGHTS[self.rng.below(len(RIGHTS))]
            size = 0xC if self.rng.below(4) else 8 | self.rng.below(4) << 1
            self.ours.poke(GDT + 8 * place, 8, 0xFFFF | rights << 40 | (0xF | size << 4) << 48)

    def aim(self, regs: Regs, insn: Insn) -> None:
        """Move the base register so that the memory operand lies in the data, most of the time aligned."""
        if not any(operand.kind == MEM for operand in insn.operands) or not 0 <= insn.base < 16:
            return
        target = 0x1000 + (self.rng.below(0x600) * 8 if self.rng.below(4) else self.rng.below(0x3000))
        find = bit_offset if insn.mnemonic in ("bt", "bts", "btr", "btc") else effective_address
        mask = alu.mask(max(insn.asize, 4))
        regs.gpr[insn.base] = regs.gpr[insn.base] + target - find(regs, insn) & mask

    def prepare(self, regs: Regs, form: Form, code: bytes) -> None:
        """Stack, strings, operands, and pages that fault."""
        rng = self.rng
        if rng.below(3):
            regs.gpr[4] = 0x2000 + rng.below(0x100) * 8
        if rng.below(2):
            regs.gpr[5] = 0x2000 + rng.below(0x100) * 8
        if form.flags & STRING_FORM:
            regs.gpr[6] = 0x1000 + rng.below(0x2000)
            regs.gpr[7] = 0x1000 + rng.below(0x2000)
            if rng.below(4):
                regs.gpr[1] = rng.below(5)
            elif rng.below(4) == 0:
                regs.gpr[1] = rng.below(4) * 1024 + rng.below(3)
        try:
            insn = hardware_decode(code, self.bits)
        except (Fault, Truncated):
            insn = None
        if insn is not None:
            self.aim(regs, insn)
            if insn.asize == 4 and form.flags & STRING_FORM and rng.below(2):
                # Upper halves that addresses and count do not have.
                for index in (1, 6, 7):
                    regs.gpr[index] |= rng.next64() << 32 & alu.mask(self.bits // 8)
        # Branch targets, and selectors, among them null ones.
        for place in range(3):
            value = rng.below(0x8000) if rng.below(2) else (rng.below(32) if rng.below(4) else 0) * 8 + rng.below(4)
            if rng.below(2):
                self.ours.poke(regs.gpr[4] + 8 * place, 8 if self.bits == 64 else 4, value)
            if insn is not None and 0 <= insn.base < 16 and rng.below(2):
                self.ours.poke(effective_address(regs, insn) + 2 * place, 2, value & 0xFFFF)
        self.ours.poke(regs.rip, len(code), int.from_bytes(code, "little"))
        self.ours.no_load = []
        self.ours.no_store = []
        if rng.below(6) == 0:
            page = 0x1000 * (1 + rng.below(3))
            self.ours.no_store = [range(page, page + 0x1000)]
            self.ours.no_load = self.ours.no_store if rng.below(2) else []

    # Comparison.

    def sequence(self, length: int) -> None:
        """``length`` emulated instructions, each from the memory that the one before left, and fresh registers."""
        self.descriptors()
        done = 0
        while done < length:
            done += self.instruction()
        self.ours.log.clear()
        self.theirs.log.clear()

    def instruction(self) -> bool:
        """One random instruction; False if it is not emulated, or has no model to compare with."""
        rng = self.rng
        form = self.forms[rng.below(len(self.forms))]
        code = encode(rng, form, self.bits == 64)
        if rng.below(20) == 0:
            code = PREFIXES[rng.below(len(PREFIXES)) :][:1] + code
        code = code[:15]
        regs = self.registers()
        regs.rip = CODE + rng.below(16)
        self.prepare(regs, form, code)
        before = regs.copy()
        memory = bytes(self.ours.memory)
        ctxt = emulator(regs, self.ours, self.fixes)
        if emulate(ctxt) == EMULATION_FAILED:
            self.ours.memory[:] = memory
            return False
        made = self.replayed(ctxt, before)
        if made.unmodelled:
            return False
        name = ctxt.insn.entry.mnemonic
        self.used[name] = self.used.get(name, 0) + 1
        known = self.guest_goes_on(ctxt, before, code, self.judge(made, code, "replayed"))
        if known is None:
            self.ours.memory[:] = memory
            return True
        self.theirs.memory[:] = memory
        self.execute(made, ctxt, before, code, known)
        if rng.below(2):
            self.ours.memory[:] = memory
        return True

    def replayed(self, ctxt: X86EmulateCtxt, before: Regs) -> Comparison:
        """What the emulator has done from the state ``before``, over its own accesses."""
        made = Comparison(ctxt.insn, before.copy(), ctxt.regs.copy())
        made.fault = ctxt.exception if ctxt.have_exception else None
        replay(made, ctxt.code, ctxt.accesses, Replay())
        return made

    def guest_goes_on(self, ctxt: X86EmulateCtxt, before: Regs, code: bytes, known: str) -> str | None:
        """Execute a repeated instruction until RIP is behind it, as the guest does.

        The deviation that explains one of the emulations, ``known`` that of the first; None if the instruction
        changed itself.
        """
        while ctxt.insn.rep and ctxt.d & STRING and not ctxt.have_exception and ctxt.regs.rip == before.rip:
            insn = ctxt.insn
            paused = ctxt.regs.copy()
            if emulate(ctxt) == EMULATION_FAILED or ctxt.insn is not insn:
                return None
            again = self.judge(self.replayed(ctxt, paused), code, "replayed")
            known = again if known in ("", "rep-end") else known
        return known

    def execute(self, made: Comparison, ctxt: X86EmulateCtxt, before: Regs, code: bytes, known: str) -> None:
        """The executor on a copy of the memory; ``known`` explains the replay, and therefore this."""
        self.theirs.no_load = self.ours.no_load
        self.theirs.no_store = self.ours.no_store
        side = Comparison(ctxt.insn, before, ctxt.regs)
        side.fault = ctxt.exception if ctxt.have_exception else None
        side.expected = before.copy()
        side.insn = made.insn
        side.accesses = made.accesses
        try:
            execute(side.expected, hardware_decode(code, self.bits), self.theirs)
        except (Unsupported, Truncated):
            return
        except Fault as fault:
            side.expected_fault = fault
        found = side.differences
        if side.emulated_vector != side.expected_vector:
            found.append(EXCEPTION)
        elif side.fault is not None and side.expected_fault is not None:
            if side.fault.error_code != side.expected_fault.error_code:
                found.append(ERROR_CODE)
        if self.ours.memory != self.theirs.memory:
            found.append(MEMORY)
        compare_registers(side)
        if known in ("", "rep-end"):
            self.judge(side, code, "executed")

    def judge(self, made: Comparison, code: bytes, how: str) -> str:
        """Count a difference; the name of the deviation that explains it."""
        if not made.differences:
            return ""
        name = explain(made)
        if name:
            self.explained[name] = self.explained.get(name, 0) + 1
        else:
            what = f"{made.differences} {made.emulated_vector} {made.expected_vector} cpl {made.before.cpl}"
            self.unexplained.append(f"{self.bits}-bit {code.hex()} {made.decoded.name} {how}: {what}")
        return name


# One instruction.


class Shown:
    """One instruction, ``code``, after ``setup``."""

    def __init__(self, bits: int, code: str, setup: Callable[[Regs, Memory], None]) -> None:
        self.bits = bits
        self.code = bytes.fromhex(code)
        self.setup = setup


def no_plant(ctxt: X86EmulateCtxt) -> None:
    """The emulator as it is."""


def compared(shown: Shown, plant: Callable[[X86EmulateCtxt], None] = no_plant) -> Comparison:
    """The instruction on both sides; ``plant`` adds an error to what the emulator has done."""
    regs = initial_registers(shown.bits)
    regs.rip = CODE
    regs.gpr[RSP] = 0x2000
    regs.gdt_base = GDT
    regs.gdt_limit = 0xFF
    bus = Memory(SIZE)
    bus.poke(CODE, len(shown.code), int.from_bytes(shown.code, "little"))
    shown.setup(regs, bus)
    before = regs.copy()
    ctxt = emulator(regs, bus)
    assert emulate(ctxt) == EMULATION_OK
    plant(ctxt)
    made = Comparison(ctxt.insn, before, regs)
    made.fault = ctxt.exception if ctxt.have_exception else None
    replay(made, ctxt.code, ctxt.accesses, Replay())
    return made
