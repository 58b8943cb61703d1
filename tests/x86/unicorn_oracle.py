"""Random instructions, one after the other, executed here and by Unicorn (QEMU): they leave the same state.

Before each instruction registers are moved so that memory operands lie in the data; everything else flows from one
instruction to the next. Every place where the two differ is either undefined (``mmufuzz.x86.undefined``) or on the list
of ``unicorn_divergences``.
"""

from __future__ import annotations

from collections.abc import Collection

import unicorn
import unicorn.x86_const as x86
import unicorn_fpu
from flatbus import FlatBus
from unicorn_divergences import CANNOT_RUN, DIVERGENCES, divergence_of
from unicorn_fpu import random_number, uses_fpu

from mmufuzz.case.encodings import edge_value, encode
from mmufuzz.case.rng import Rng
from mmufuzz.x86 import alu
from mmufuzz.x86.decode import Truncated, decode, decode16
from mmufuzz.x86.execute_operands import bit_offset, effective_address
from mmufuzz.x86.execute_x87 import STACK_FAULT
from mmufuzz.x86.executor import execute
from mmufuzz.x86.floats import INVALID
from mmufuzz.x86.insn import HIGH8, MEM, REG, REP_NONE, RIP, Insn
from mmufuzz.x86.opcodes import (
    FORMS,
    MAP_VEX,
    MAP_VEX38,
    METHOD_SREG,
    METHOD_SREG_OPCODE,
    MNEMONICS,
    ONLY32,
    ONLY64,
    WIDE,
    Form,
)
from mmufuzz.x86.segments import install
from mmufuzz.x86.state import CR0_PE, EFER_LMA, FLAG_DF, FLAG_FIXED, MXCSR_RESET, Fault, Regs
from mmufuzz.x86.undefined import undefined_flags, undefined_result

# 16-bit addressing reaches the data, and the code is where no data access goes.
DATA_SIZE = 0x10000
CODE = 0x100000
CODE_SIZE = 0x100000
# Each instruction gets bytes that Unicorn has not translated yet.
SLOT = 32
STACK_USERS = frozenset(("push", "pop", "call", "ret", "enter", "leave", "pusha", "popa", "pushf", "popf"))
STRINGS = frozenset(("movs", "stos", "lods", "cmps", "scas"))
COMPARED_FLAGS = alu.ARITHMETIC_FLAGS | FLAG_DF

_NAMES = ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI")
GPRS64 = [getattr(x86, "UC_X86_REG_R" + name) for name in _NAMES]
GPRS64 += [getattr(x86, f"UC_X86_REG_R{number}") for number in range(8, 16)]
GPRS32 = [getattr(x86, "UC_X86_REG_E" + name) for name in _NAMES]
XMMS = [getattr(x86, f"UC_X86_REG_XMM{number}") for number in range(16)]


class Oracle:
    """Unicorn with code, data and this side's registers before every instruction. ``bits`` is 64, 32 or 16."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        modes = {64: unicorn.UC_MODE_64, 32: unicorn.UC_MODE_32, 16: unicorn.UC_MODE_16}
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, modes[bits])
        self.uc.ctl_set_cpu_model(x86.UC_CPU_X86_ICELAKE_SERVER)
        self.uc.mem_map(0, DATA_SIZE)
        self.uc.mem_map(CODE, CODE_SIZE + 0x10000)
        self.gprs = GPRS64 if bits == 64 else GPRS32
        self.xmms = XMMS if bits == 64 else XMMS[:8]
        self.ip = x86.UC_X86_REG_RIP if bits == 64 else x86.UC_X86_REG_EIP
        self.read = [*self.gprs, x86.UC_X86_REG_EFLAGS, self.ip, *self.xmms]
        self.vector = -1
        self.place = 0
        self.uc.hook_add(unicorn.UC_HOOK_INTR, self._exception)
        self.uc.reg_write(x86.UC_X86_REG_MXCSR, MXCSR_RESET)
        self.pristine = self.uc.context_save()

    def _exception(self, uc: unicorn.Uc, vector: int, data: object) -> None:
        self.vector = vector
        uc.emu_stop()

    def next_slot(self) -> int:
        """An address for one instruction that has not held code since translations were last dropped."""
        self.place += SLOT
        if self.place >= CODE_SIZE:
            self.place = SLOT
            self.uc.ctl_flush_tb()
        return (0x8000 if self.bits == 16 else CODE) + (self.place % 0x4000 if self.bits == 16 else self.place)

    def step(self, regs: Regs, code: bytes, repeats: int, fpu: bool) -> tuple[int, list[int]]:
        """(vector of the exception or -1, the registers of ``read``) after one instruction at ``regs.rip``.

        ``fpu``: it uses x87 or MMX registers.
        """
        uc = self.uc
        if fpu:
            unicorn_fpu.write(uc, regs)
        uc.mem_write(regs.rip, code)
        # What a branch that ran ahead translated here.
        uc.ctl_remove_cache(regs.rip, regs.rip + len(code))
        values = [*regs.gpr[: len(self.gprs)], regs.rflags, regs.rip, *[value & (1 << 128) - 1 for value in regs.xmm]]
        uc.reg_write_batch(list(zip(self.read, values, strict=False)))
        self.vector = -1
        try:
            # Each element of a repeated instruction counts, and so does the end of the repetition.
            uc.emu_start(regs.rip, 1 << 62, count=1)
            while repeats and self.vector < 0 and uc.reg_read(self.ip) == regs.rip:
                repeats -= 1
                uc.emu_start(regs.rip, 1 << 62, count=1)
        except unicorn.UcError as error:
            # A branch out of the code is no fault of the branch.
            if self.vector < 0 and error.errno != unicorn.UC_ERR_FETCH_UNMAPPED:
                self.vector = 6 if error.errno == unicorn.UC_ERR_INSN_INVALID else 1000 + error.errno
        values = list(uc.reg_read_batch(self.read))
        if self.vector >= 0:
            # Otherwise the next exception would count as one during the delivery of this one.
            uc.context_restore(self.pristine)
        return self.vector, values


def usable_forms(bits: int) -> list[Form]:
    """The forms that Unicorn can be asked about."""
    absent = ONLY32 if bits == 64 else ONLY64
    usable = []
    for form in FORMS:
        if form.flags & absent or form.mnemonic in CANNOT_RUN or form.opcode_map == MAP_VEX:
            continue
        # Segment registers have tests of their own.
        if {METHOD_SREG, METHOD_SREG_OPCODE} & set(form.methods):
            continue
        if bits != 64 and form.flags & WIDE:
            continue
        # Unicorn's 16-bit mode has no SSE and no BMI.
        if bits == 16 and (form.opcode_map >= MAP_VEX38 or form.prefix >= 0):
            continue
        usable.append(form)
    return usable


class Walk:
    """A run of random instructions, on both sides."""

    def __init__(self, oracle: Oracle, bus: FlatBus, seed: int) -> None:
        self.oracle = oracle
        self.bus = bus
        self.rng = Rng(seed)
        self.bits = oracle.bits
        self.regs = self.fresh()
        self.seen: dict[str, int] = {}
        """How often each divergence was met."""

    def fresh(self) -> Regs:
        """Random registers."""
        rng = self.rng
        regs = Regs()
        if self.bits == 64:
            regs.efer = EFER_LMA
        if self.bits == 16:
            regs.cr0 &= ~CR0_PE
            for index in range(6):
                install(regs, index, 0, 0, 0xFFFF, regs.segments[index].rights & 0xFF)
        for index in range(16 if self.bits == 64 else 8):
            regs.gpr[index] = edge_value(rng) if self.bits == 64 else edge_value(rng) & 0xFFFFFFFF
            regs.xmm[index] = rng.next64() << 64 | rng.next64()
        regs.fpr = [random_number(rng) for _ in range(8)]
        regs.ftw = rng.below(256)
        regs.fsw = rng.below(8) << 11
        regs.rflags = FLAG_FIXED | rng.next64() & COMPARED_FLAGS
        return regs

    def address(self) -> int:
        """Somewhere in the middle of the data, aligned for every instruction."""
        return 0x2000 + self.rng.below(0x400) * 16

    def instruction(self, forms: list[Form]) -> str | None:
        """One random instruction on both sides: its mnemonic, or None if what was drawn is of no use.

        Raises AssertionError for a difference that no list explains.
        """
        rng = self.rng
        form = forms[rng.below(len(forms))]
        code = encode(rng, form, self.bits == 64)
        regs = self.regs
        regs.rip = self.oracle.next_slot()
        try:
            insn = decode16(code) if self.bits == 16 else decode(code, self.bits == 64)
        except (Fault, Truncated):
            return None
        if insn.mnemonic != form.mnemonic or not self.prepare(insn):
            return None
        code = code[: insn.length]
        fpu = uses_fpu(form)
        if fpu:
            unicorn_fpu.prepare(regs, rng)
        known = divergence_of(insn, code, regs, self.bits)
        if known:
            self.meet(known)
            if DIVERGENCES[known].skip:
                return None
        before = regs.copy()
        vector = -1
        try:
            execute(regs, insn, self.bus)
        except Fault as fault:
            vector = fault.vector
        if insn.mnemonic == "fld" and regs.fsw & (STACK_FAULT | INVALID) == INVALID:
            # Only now is it known what was loaded.
            self.meet("x87-invalid")
        else:
            self.compare(insn, before, code, vector, known, fpu)
        return insn.mnemonic

    def meet(self, divergence: str) -> None:
        """Count it."""
        self.seen[divergence] = self.seen.get(divergence, 0) + 1

    def compare(self, insn: Insn, before: Regs, code: bytes, vector: int, known: str, fpu: bool) -> None:
        """Let Unicorn execute the same and compare registers and flags; memory is compared by ``finish``."""
        regs = self.regs
        theirs, values = self.oracle.step(before, code, before.gpr[1] & 0xFFFF if insn.rep != REP_NONE else 0, fpu)
        text = f"{self.bits}-bit {insn.mnemonic} {code.hex()}"
        assert theirs == vector, (text, "exception", vector, theirs, [hex(value) for value in before.gpr])
        ignored = undefined_flags(insn, before)
        undefined = undefined_result(insn, before, regs.rflags)
        if known:
            ignored |= DIVERGENCES[known].flags
            undefined = undefined or DIVERGENCES[known].result
        count = len(self.oracle.gprs)
        found = unicorn_fpu.differences(self.oracle.uc, insn, regs, known) if fpu else []
        if known == "x87-environment":
            address = self.location(insn, before)
            found += unicorn_fpu.settle_environment(self.oracle.uc, self.bus, address, 2 if insn.size == 2 else 4)
        if known.startswith("x87-decimal"):
            found += unicorn_fpu.settle_decimal(self.oracle.uc, self.bus, self.location(insn, before), known)
        for index in range(count):
            if regs.gpr[index] != values[index]:
                found.append(f"gpr {index}: {regs.gpr[index]:#x} {values[index]:#x}")
        flags = values[count]
        if (regs.rflags ^ flags) & COMPARED_FLAGS & ~ignored:
            found.append(f"flags {regs.rflags & COMPARED_FLAGS:#x} {flags & COMPARED_FLAGS:#x} ignored {ignored:#x}")
        if regs.rip != values[count + 1]:
            found.append(f"rip {regs.rip:#x} {values[count + 1]:#x}")
        for index in range(len(self.oracle.xmms)):
            if regs.xmm[index] != values[count + 2 + index]:
                found.append(f"xmm {index}")
        if undefined and self.adopt(insn, before, values):
            return
        assert not found, (text, found, [hex(value) for value in before.gpr], hex(before.rflags))

    def adopt(self, insn: Insn, before: Regs, values: list[int]) -> bool:
        """Take Unicorn's value of an undefined destination; True if that was the only difference."""
        dst = insn.operands[0]
        if insn.mnemonic == "cmpxchg" and (self.regs.gpr[0] ^ values[0]) & 0xFFFFFFFF == 0:
            self.regs.gpr[0] = values[0]
        if dst.kind in (REG, HIGH8):
            self.regs.gpr[dst.index] = values[dst.index]
        elif insn.mnemonic != "cmpxchg":
            address = self.location(insn, before)
            theirs = int.from_bytes(self.oracle.uc.mem_read(address, dst.size), "little")
            self.bus.poke(address, dst.size, theirs)
        return self.regs.gpr[: len(self.oracle.gprs)] == values[: len(self.oracle.gprs)]

    def location(self, insn: Insn, regs: Regs | None = None) -> int:
        """Offset of the memory operand, in state ``regs`` if not the present one."""
        find = bit_offset if insn.mnemonic in ("bt", "bts", "btr", "btc") else effective_address
        return find(regs or self.regs, insn)

    def finish(self) -> None:
        """Data memory must be equal on both sides."""
        theirs = bytes(self.oracle.uc.mem_read(0, DATA_SIZE if self.bits != 16 else 0x8000))
        ours = bytes(self.bus.memory[: len(theirs)])
        if theirs != ours:
            place = next(index for index in range(len(ours)) if ours[index] != theirs[index])
            raise AssertionError(f"memory at {place:#x}: {ours[place]:#x} {theirs[place]:#x}")

    # Preparation.

    def prepare(self, insn: Insn) -> bool:
        """Move registers so that ``insn`` touches only data and goes only to code; False if that fails."""
        regs = self.regs
        name = insn.mnemonic
        mask = alu.mask(self.bits // 8)
        if name in STACK_USERS:
            regs.gpr[4] = self.address()
            if name in ("enter", "leave"):
                regs.gpr[5] = self.address()
            if name == "popf":
                self.put(regs.gpr[4], 8, FLAG_FIXED | self.rng.next64() & COMPARED_FLAGS)
        if name in STRINGS:
            regs.gpr[6] = self.address()
            regs.gpr[7] = regs.gpr[6] + self.rng.below(64)
            if insn.rep != REP_NONE:
                regs.gpr[1] = self.rng.below(5)
        if name in ("maskmovq", "maskmovdqu"):
            regs.gpr[7] = self.address()
        if name == "xlat":
            regs.gpr[3] = self.address()
        if name in ("fxrstor", "ldmxcsr"):
            return False
        if not self.aim(insn):
            return False
        target = self.oracle.next_slot()
        if name == "ret":
            self.put(regs.gpr[4], 8, target)
        elif name in ("call", "jmp"):
            operand = insn.operands[0]
            if operand.kind == MEM:
                self.put(effective_address(regs, insn), operand.size, target & alu.mask(operand.size))
            elif operand.kind == REG:
                regs.gpr[operand.index] = target & mask
        if name in STACK_USERS and not 0x1000 <= regs.gpr[4] < 0x7000:
            return False
        if name == "fbld":
            self.put(self.location(insn), 10, unicorn_fpu.random_decimal(self.rng))
        if name.startswith("cmpxchg") and self.rng.below(2):
            self.make_equal(insn)
        return True

    def put(self, address: int, size: int, value: int) -> None:
        """Write data on both sides."""
        self.bus.poke(address, size, value & (1 << 8 * size) - 1)
        self.oracle.uc.mem_write(address, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def aim(self, insn: Insn) -> bool:
        """Move the base register so that the memory operand lies in the data."""
        if not insn.has_memory or insn.mnemonic in ("lea", "nop"):
            return True
        regs = self.regs
        if 0x1000 <= self.location(insn) < 0x7000 and self.location(insn) % 16 == 0:
            return True
        if insn.base < 0 or insn.base == RIP:
            return False
        target = self.address()
        regs.gpr[insn.base] = (regs.gpr[insn.base] + target - self.location(insn)) & alu.mask(insn.asize)
        return self.location(insn) == target

    def make_equal(self, insn: Insn) -> None:
        """Let the comparison of a CMPXCHG succeed, unless that would move its operand."""
        dst = insn.operands[0]
        regs = self.regs
        if dst.kind != MEM or insn.base in (0, 2) or insn.index in (0, 2):
            return
        address = effective_address(regs, insn)
        if insn.mnemonic == "cmpxchg":
            self.put(address, dst.size, regs.gpr[0])
        else:
            half = dst.size // 2
            self.put(address, half, regs.gpr[0])
            self.put(address + half, half, regs.gpr[2])


def random_memory() -> FlatBus:
    """A bus over the data."""
    rng = Rng(0)
    bus = FlatBus(DATA_SIZE)
    bus.memory[:] = rng.bytes(DATA_SIZE)
    return bus


def sequences(
    bits: int, count: int, length: int, seed: int, names: Collection[str] = MNEMONICS
) -> tuple[dict[str, int], dict[str, int]]:
    """``count`` sequences of ``length`` instructions among ``names``: (uses by mnemonic, uses by divergence)."""
    oracle = Oracle(bits)
    bus = random_memory()
    oracle.uc.mem_write(0, bytes(bus.memory))
    forms = [form for form in usable_forms(bits) if form.mnemonic in names]
    used: dict[str, int] = {}
    seen: dict[str, int] = {}
    for number in range(count):
        walk = Walk(oracle, bus, seed * 1_000_003 + number)
        done = 0
        while done < length:
            name = walk.instruction(forms)
            if name is not None:
                used[name] = used.get(name, 0) + 1
                done += 1
        walk.finish()
        bus.log.clear()
        for name, times in walk.seen.items():
            seen[name] = seen.get(name, 0) + times
    return used, seen
