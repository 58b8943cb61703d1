"""Registers, conditions, addresses and operands: what every instruction handler is made of."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.insn import HIGH8, IMM, NO_REG, REG, RIP, Insn, Operand
from mmufuzz.x86.state import (
    FLAG_CF,
    FLAG_OF,
    FLAG_PF,
    FLAG_SF,
    FLAG_ZF,
    VECTOR_GP,
    VECTOR_SS,
    Fault,
    Regs,
)

RAX: Final = 0
RCX: Final = 1
RDX: Final = 2
RBX: Final = 3
RSP: Final = 4
RBP: Final = 5
RSI: Final = 6
RDI: Final = 7

MASK32: Final = 0xFFFFFFFF
MASK64: Final = 0xFFFFFFFFFFFFFFFF

_CR4_LA57: Final = 1 << 12
_LOW_HALF_END: Final = 1 << 47


def read_reg(regs: Regs, index: int, size: int, high8: bool = False) -> int:
    """The low ``size`` bytes (1, 2, 4 or 8) of general register ``index``, or with ``high8`` its bits 15..8."""
    if high8:
        return regs.gpr[index] >> 8 & 0xFF
    return regs.gpr[index] & alu.mask(size)


def write_reg(regs: Regs, index: int, size: int, value: int, high8: bool = False) -> None:
    """Write ``value`` of ``size`` bytes: 4 bytes clear the upper half, 1 and 2 keep the rest (SDM vol. 1, 3.4.1.1)."""
    if size >= 4:
        regs.gpr[index] = value
    elif high8:
        regs.gpr[index] = regs.gpr[index] & ~0xFF00 | value << 8
    else:
        regs.gpr[index] = regs.gpr[index] & ~alu.mask(size) | value


def condition(rflags: int, cc: int) -> bool:
    """Whether condition ``cc`` (0..15, as encoded in Jcc, SETcc, CMOVcc) holds (SDM vol. 1, appendix B)."""
    kind = cc >> 1
    if kind == 0:
        met = rflags & FLAG_OF != 0
    elif kind == 1:
        met = rflags & FLAG_CF != 0
    elif kind == 2:
        met = rflags & FLAG_ZF != 0
    elif kind == 3:
        met = rflags & (FLAG_CF | FLAG_ZF) != 0
    elif kind == 4:
        met = rflags & FLAG_SF != 0
    elif kind == 5:
        met = rflags & FLAG_PF != 0
    else:
        met = (rflags & FLAG_SF != 0) != (rflags & FLAG_OF != 0)
        if kind == 7 and rflags & FLAG_ZF:
            met = True
    return met != (cc & 1 != 0)


def effective_address(regs: Regs, insn: Insn) -> int:
    """Linear address of the memory operand, masked to the address size.

    No check is made. BT and its kin add a register offset: see ``bit_address``.
    """
    address = insn.displacement
    base = insn.base
    if base == RIP:
        address += regs.rip + insn.length
    elif base != NO_REG:
        address += regs.gpr[base]
    if insn.index != NO_REG:
        address += regs.gpr[insn.index] * insn.scale
    return address & alu.mask(insn.asize)


def uses_stack_segment(insn: Insn) -> bool:
    """True if the memory operand defaults to SS, whose violations are #SS(0) (SDM vol. 1, table 3-5)."""
    return insn.base in (RSP, RBP)


def is_canonical(regs: Regs, address: int) -> bool:
    """True if bits 63..47 (63..56 with CR4.LA57) of ``address`` are equal; always true outside long mode."""
    if address < _LOW_HALF_END or not regs.long_mode:
        return True
    if regs.cr4 & _CR4_LA57:
        top = address >> 56
        return top in (0, 0xFF)
    return address >> 47 == 0x1FFFF


def check_canonical(regs: Regs, address: int, size: int, stack: bool) -> None:
    """Raise #GP(0), or #SS(0) for a ``stack`` access, unless all ``size`` bytes (1..32) are canonical."""
    if address + size <= _LOW_HALF_END or not regs.long_mode:
        return
    # An access that wraps past 2^64 continues in the canonical low half.
    if not is_canonical(regs, address) or not is_canonical(regs, address + size - 1 & MASK64):
        raise Fault(VECTOR_SS if stack else VECTOR_GP, 0)


def operand_address(regs: Regs, insn: Insn, size: int) -> int:
    """``effective_address`` of an operand of ``size`` bytes, with the canonical check."""
    address = effective_address(regs, insn)
    check_canonical(regs, address, size, uses_stack_segment(insn))
    return address


def bit_address(regs: Regs, insn: Insn) -> int:
    """Linear address of the memory operand of BT, BTS, BTR, BTC.

    A register offset is signed and reaches any operand before or after the addressed one; an
    immediate offset stays within it (SDM vol. 2, BT). No check is made.
    """
    address = effective_address(regs, insn)
    offset = insn.operands[1]
    if offset.kind != REG:
        return address
    size = offset.size
    return address + alu.bit_displacement(size, read_reg(regs, offset.index, size)) & alu.mask(insn.asize)


def rip_mask(regs: Regs) -> int:
    """All ones in the width of RIP and RSP."""
    return MASK64 if regs.long_mode else MASK32


def load_operand(regs: Regs, insn: Insn, bus: Bus, operand: Operand, rmw: bool = False, locked: bool = False) -> int:
    """Value of a REG, HIGH8, IMM or MEM operand."""
    kind = operand.kind
    if kind == REG:
        return read_reg(regs, operand.index, operand.size)
    if kind == IMM:
        return operand.value
    if kind == HIGH8:
        return read_reg(regs, operand.index, 1, True)
    return bus.load(regs, operand_address(regs, insn, operand.size), operand.size, rmw, locked)


def store_operand(regs: Regs, insn: Insn, bus: Bus, operand: Operand, value: int, locked: bool = False) -> None:
    """Write a REG, HIGH8 or MEM operand. Only the last can fault, so callers commit other registers afterwards."""
    kind = operand.kind
    if kind == REG:
        write_reg(regs, operand.index, operand.size, value)
    elif kind == HIGH8:
        write_reg(regs, operand.index, 1, value, True)
    else:
        bus.store(regs, operand_address(regs, insn, operand.size), operand.size, value, locked)


def advance(regs: Regs, insn: Insn) -> None:
    """RIP goes to the next instruction."""
    regs.rip = regs.rip + insn.length & rip_mask(regs)


def require_cpl0(regs: Regs) -> None:
    """Raise #GP(0) unless the current privilege level is 0."""
    if regs.cpl != 0:
        raise Fault(VECTOR_GP, 0)
