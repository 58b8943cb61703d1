"""The x87 and MMX registers of Unicorn: set before an instruction that uses them, compared behind it."""

from __future__ import annotations

import unicorn
import unicorn.x86_const as x86
from flatbus import FlatBus

from mmufuzz.case.encodings import edge_value
from mmufuzz.case.rng import Rng
from mmufuzz.x86 import floats
from mmufuzz.x86.execute_x87 import full_tags
from mmufuzz.x86.insn import MMX, Insn
from mmufuzz.x86.opcodes import METHOD_MMX, METHOD_MMX_RM, Form
from mmufuzz.x86.state import Regs

_REGISTERS = [x86.UC_X86_REG_FP0 + index for index in range(8)]
_CONTROL = [x86.UC_X86_REG_FPSW, x86.UC_X86_REG_FPTAG, x86.UC_X86_REG_FPCW]
TOP = 7 << 11
MASKED = 0x3F
# Unicorn sets neither exception flags nor C1 (see ``unicorn_divergences``: x87-flags).
COMPARED_STATUS = 0xFFFF & ~0x27F


def uses_fpu(form: Form) -> bool:
    """Whether an instruction of this form reads or writes x87 or MMX registers."""
    if form.mnemonic in ("wait", "emms"):
        return True
    return form.mnemonic[0] == "f" or METHOD_MMX in form.methods or METHOD_MMX_RM in form.methods


def random_number(rng: Rng) -> int:
    """An 80-bit value: of moderate size, at the edge of a format, an integer, a special one, or anything."""
    kind = rng.below(6)
    sign = rng.below(2) << 79
    significand = edge_value(rng)
    if kind == 0:
        return sign | (0x3FFF + rng.below(70) - 4) << 64 | 1 << 63 | significand
    if kind == 1:
        edges = (0x3FFF - 126, 0x3FFF + 127, 0x3FFF - 1022, 0x3FFF + 1023, 1, 0x7FFE)
        return sign | (edges[rng.below(6)] + rng.below(5) - 2) % 0x8000 << 64 | 1 << 63 | significand
    if kind == 2:
        return floats.from_integer(significand, 8)
    if kind == 3:
        return sign | 0x7FFF << 64 | 1 << 63 | (significand if rng.below(2) else 0)
    if kind == 4:
        return sign | (1 << 63 | significand if rng.below(2) else 0)
    return sign | rng.below(0x8000) << 64 | significand


def prepare(regs: Regs, rng: Rng) -> None:
    """Every exception masked and none raised, and a register changed now and then."""
    regs.fcw |= MASKED
    regs.fsw &= TOP
    if rng.below(4) == 0:
        regs.fcw = 0x37F & ~0xC00 | rng.below(4) << 10
    if rng.below(2) == 0:
        place = rng.below(8)
        regs.fpr[place] = random_number(rng)
        regs.ftw |= 1 << place
    if rng.below(4) == 0:
        regs.ftw ^= 1 << rng.below(8)


def write(uc: unicorn.Uc, regs: Regs) -> None:
    """Give Unicorn these x87 registers."""
    for register, value in zip(_REGISTERS, regs.fpr, strict=True):
        uc.reg_write(register, (value & (1 << 64) - 1, value >> 64))
    uc.reg_write_batch(list(zip(_CONTROL, (regs.fsw, full_tags(regs), regs.fcw), strict=True)))


def differences(uc: unicorn.Uc, insn: Insn, regs: Regs, known: str) -> list[str]:
    """What differs from ``regs``; ``known`` is the divergence that applies, or ""."""
    found = []
    # Of an MMX register Unicorn leaves the upper 16 bits, and with them the kind of number that its tag names.
    mmx = any(operand.kind == MMX for operand in insn.operands)
    mask = (1 << (64 if mmx else 80)) - 1
    for index, (significand, exponent) in enumerate(uc.reg_read_batch(_REGISTERS)):
        value = exponent << 64 | significand
        if (regs.fpr[index] ^ value) & mask:
            found.append(f"fpr {index}: {regs.fpr[index]:#x} {value:#x}")
    status, tags, control = uc.reg_read_batch(_CONTROL)
    filled = sum(1 << place for place in range(8) if tags >> 2 * place & 3 != 3)
    if known != "x87-loaded" and (regs.fsw ^ status) & COMPARED_STATUS:
        found.append(f"fsw {regs.fsw:#x} {status:#x}")
    if known != "x87-empty-destination" and (filled != regs.ftw or not (mmx or tags == full_tags(regs))):
        found.append(f"tags {full_tags(regs):#x} {tags:#x}")
    if regs.fcw != (control & 0x1F7F | 0x40 if known == "x87-loaded" else control):
        found.append(f"fcw {regs.fcw:#x} {control:#x}")
    return found


def random_decimal(rng: Rng) -> int:
    """A packed BCD integer: of any number of digits, all of them valid, or any ten bytes."""
    if rng.below(4) == 0:
        return int.from_bytes(rng.bytes(10), "little")
    image = rng.below(2) << 79
    for place in range(rng.below(19)):
        image |= rng.below(10) << 4 * place
    return image


def settle_decimal(uc: unicorn.Uc, bus: FlatBus, address: int, known: str) -> list[str]:
    """What differs, but for the divergence, in what FBSTP stored. Unicorn gets what the bus has of it."""
    ours = bus.peek(address, 10)
    theirs = int.from_bytes(uc.mem_read(address, 10), "little")
    uc.mem_write(address, ours.to_bytes(10, "little"))
    if known == "x87-decimal-zero":
        expected = ours == 1 << 79 and theirs == 0
    else:
        expected = ours == floats.DECIMAL_INDEFINITE != theirs
    return [] if expected else [f"decimal {ours:#x} {theirs:#x}"]


def settle_environment(uc: unicorn.Uc, bus: FlatBus, address: int, size: int) -> list[str]:
    """What differs in an environment of seven fields of ``size`` bytes. Unicorn gets what the bus has of it."""
    ours = bus.peek(address, 7 * size)
    theirs = int.from_bytes(uc.mem_read(address, 7 * size), "little")
    uc.mem_write(address, ours.to_bytes(7 * size, "little"))
    shown = [(ours >> 8 * size * place & 0xFFFF, theirs >> 8 * size * place & 0xFFFF) for place in range(3)]
    return [f"environment {mine:#x} {other:#x}" for mine, other in shown if mine != other]
