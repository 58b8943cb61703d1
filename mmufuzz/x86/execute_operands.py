"""Registers, conditions, addresses and operands: what every instruction handler is made of."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu, paging
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.insn import CS, FS, HIGH8, IMM, NO_REG, REG, RIP, SS, TR, Insn, Operand
from mmufuzz.x86.segments import table_address
from mmufuzz.x86.state import (
    CR4_UMIP,
    FLAG_CF,
    FLAG_OF,
    FLAG_PF,
    FLAG_SF,
    FLAG_ZF,
    RIGHTS_DB,
    RIGHTS_UNUSABLE,
    VECTOR_GP,
    VECTOR_SS,
    VECTOR_UD,
    Fault,
    Regs,
    Segment,
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

_LOW_HALF_END: Final = 1 << 47


def read_reg(regs: Regs, index: int, size: int, high8: bool = False) -> int:
    """The low ``size`` bytes (1, 2, 4 or 8) of general register ``index``, or with ``high8`` its bits 15..8."""
    if high8:
        return regs.gpr[index] >> 8 & 0xFF
    return regs.gpr[index] if size == 8 else regs.gpr[index] & alu.mask(size)


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
    """Offset of the memory operand in its segment, masked to the address size.

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
    asize = insn.asize
    if asize == 8:
        return address if 0 <= address < alu.SHORT else address & MASK64
    return address & (MASK32 if asize == 4 else 0xFFFF)


def is_canonical(regs: Regs, address: int) -> bool:
    """True if bits 63..47 (63..56 with CR4.LA57) of ``address`` are equal; always true outside long mode."""
    if address < _LOW_HALF_END or not regs.long_mode:
        return True
    return paging.is_canonical(address, 57 if regs.cr4 & paging.CR4_LA57 else 48)


def check_canonical(regs: Regs, address: int, size: int, stack: bool) -> None:
    """Raise #GP(0), or #SS(0) for a ``stack`` access, unless all ``size`` bytes (1..32) are canonical."""
    # An access that wraps past 2^64 continues in the canonical low half.
    last = address if regs.only_first_byte_canonical else address + size - 1 & MASK64
    if not is_canonical(regs, address) or not is_canonical(regs, last):
        raise Fault(VECTOR_SS if stack else VECTOR_GP, 0)


def linear(regs: Regs, segment: int, offset: int, size: int, write: bool) -> int:
    """Linear address of ``size`` bytes at ``offset`` in ``segment``, checked (SDM vol. 3, 5.3, 5.5; vol. 1, 3.3.7.1).

    Raises #SS(0) if the segment is SS, else #GP(0): for a non-canonical address in 64-bit code, else for a segment
    that is unusable, not writable or not readable, or ends before the last byte.
    """
    if regs.long_mode:
        if segment >= FS:
            offset = offset + regs.segments[segment].base & MASK64
        if offset + size > _LOW_HALF_END:
            check_canonical(regs, offset, size, segment == SS)
        return offset
    if regs.flat and segment < FS and not (write and segment == CS):
        return offset
    descriptor = regs.segments[segment]
    if not _allows(descriptor, offset, size, write, regs.real_mode):
        raise Fault(VECTOR_SS if segment == SS else VECTOR_GP, 0)
    return offset + descriptor.base & MASK32


def _allows(descriptor: Segment, offset: int, size: int, write: bool, real_mode: bool) -> bool:
    """Whether type and limit of a segment let an access pass.

    One that runs past 4 GiB passes where the segment ends there, as a CPU may have it (SDM vol. 3, 5.3).
    """
    rights = descriptor.rights
    if rights & RIGHTS_UNUSABLE:
        return False
    last = min(offset + size - 1, MASK32)
    if rights & 8:
        # Code: readable by bit 1, writable in real-address mode only.
        return (not write or real_mode) and rights & 2 != 0 and last <= descriptor.limit
    if write and rights & 2 == 0:
        return False
    if rights & 4:
        return offset > descriptor.limit and last <= (MASK32 if rights & RIGHTS_DB else 0xFFFF)
    return last <= descriptor.limit


def operand_address(regs: Regs, insn: Insn, size: int, write: bool = False) -> int:
    """Linear address of an operand of ``size`` bytes, checked."""
    return linear(regs, insn.segment, effective_address(regs, insn), size, write)


def bit_offset(regs: Regs, insn: Insn) -> int:
    """Offset of the memory operand of BT, BTS, BTR, BTC in its segment.

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
    """All ones in the width of RIP."""
    return MASK64 if regs.long_mode else MASK32


def load_operand(regs: Regs, insn: Insn, bus: Bus, operand: Operand, rmw: bool = False, locked: bool = False) -> int:
    """Value of a REG, HIGH8, IMM or MEM operand."""
    kind = operand.kind
    if kind == REG:
        value = regs.gpr[operand.index]
        return value if operand.size == 8 else value & alu.mask(operand.size)
    if kind == IMM:
        return operand.value
    if kind == HIGH8:
        return regs.gpr[operand.index] >> 8 & 0xFF
    size = operand.size
    return bus.load(regs, operand_address(regs, insn, size, rmw), size, rmw, locked)


def store_operand(regs: Regs, insn: Insn, bus: Bus, operand: Operand, value: int, locked: bool = False) -> None:
    """Write a REG, HIGH8 or MEM operand. Only the last can fault, so callers commit other registers afterwards."""
    kind = operand.kind
    if kind == REG:
        write_reg(regs, operand.index, operand.size, value)
    elif kind == HIGH8:
        write_reg(regs, operand.index, 1, value, True)
    else:
        bus.store(regs, operand_address(regs, insn, operand.size, True), operand.size, value, locked)


def advance(regs: Regs, insn: Insn) -> None:
    """RIP goes to the next instruction."""
    rip = regs.rip + insn.length
    if rip > MASK32:
        rip &= MASK64 if regs.long_mode else MASK32
    regs.rip = rip


def require_cpl0(regs: Regs) -> None:
    """Raise #GP(0) unless the current privilege level is 0."""
    if regs.cpl != 0:
        raise Fault(VECTOR_GP, 0)


def check_umip(regs: Regs) -> None:
    """#GP(0) for SGDT, SIDT, SLDT, STR and SMSW of a user, if CR4.UMIP is set (SDM vol. 3, 2.5)."""
    if regs.cr4 & CR4_UMIP and regs.cpl != 0:
        raise Fault(VECTOR_GP, 0)


def check_vex(regs: Regs) -> None:
    """Real-address mode has no VEX: #UD (SDM vol. 2, 2.3)."""
    if regs.real_mode:
        raise Fault(VECTOR_UD)


# The stack.


def stack_offset(regs: Regs, delta: int) -> int:
    """The stack pointer plus ``delta``, wrapped to the width of the stack (SDM vol. 1, 6.2.3)."""
    value = regs.gpr[RSP] + delta
    if regs.long_mode:
        return value & MASK64
    return value & (0xFFFF if regs.stack16 else MASK32)


def set_stack(regs: Regs, offset: int) -> None:
    """Move the stack pointer; a 16-bit stack leaves the upper half of ESP alone."""
    if regs.stack16 and not regs.long_mode:
        write_reg(regs, RSP, 2, offset)
    else:
        regs.gpr[RSP] = offset


def store_stack(regs: Regs, bus: Bus, delta: int, size: int, value: int) -> None:
    """Store ``size`` bytes at the stack pointer plus ``delta``, which stays where it is."""
    bus.store(regs, linear(regs, SS, stack_offset(regs, delta), size, True), size, value, False)


def load_stack(regs: Regs, bus: Bus, delta: int, size: int) -> int:
    """Load ``size`` bytes at the stack pointer plus ``delta``."""
    return bus.load(regs, linear(regs, SS, stack_offset(regs, delta), size, False), size, False, False)


def push(regs: Regs, bus: Bus, size: int, value: int) -> None:
    """Store below the stack pointer, which moves only if the store succeeded."""
    store_stack(regs, bus, -size, size, value)
    set_stack(regs, stack_offset(regs, -size))


def check_io(regs: Regs, bus: Bus, port: int, size: int) -> None:
    """#GP(0) unless CPL <= IOPL or the I/O bitmap of the TSS allows all ``size`` ports (SDM vol. 1, 19.5)."""
    if regs.real_mode or regs.cpl <= regs.rflags >> 12 & 3:
        return
    tss = regs.segments[TR]
    # Only 32-bit and 64-bit TSSs, of types 9 and 11, have a bitmap.
    if tss.rights & RIGHTS_UNUSABLE or tss.rights & 0xD != 9 or tss.limit < 0x67:
        raise Fault(VECTOR_GP, 0)
    place = bus.load_system(regs, table_address(regs, tss.base + 0x66), 2) + (port >> 3)
    if place + 1 > tss.limit:
        raise Fault(VECTOR_GP, 0)
    if bus.load_system(regs, table_address(regs, tss.base + place), 2) >> (port & 7) & (1 << size) - 1:
        raise Fault(VECTOR_GP, 0)
