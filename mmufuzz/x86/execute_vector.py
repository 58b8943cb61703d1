"""Vector and x87 data movement: stores that KVM's emulator mostly lacks.

CR0.EM, CR0.TS, CR4.OSFXSR and XCR0 are taken to be as an operating system sets them for SSE and AVX use, and all
x87 exceptions to be masked.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import advance, load_operand, operand_address, store_operand
from mmufuzz.x86.insn import MEM, XMM, Insn, Operand
from mmufuzz.x86.state import VECTOR_GP, Fault, Regs

_UPPER_HALF: Final = ((1 << 128) - 1) << 128
_ALL: Final = (1 << 256) - 1


def _low(value: int, size: int) -> int:
    return value & ((1 << 8 * size) - 1)


def _check_alignment(regs: Regs, insn: Insn, operand: Operand) -> None:
    """#GP(0) unless a memory operand is aligned to its size. A canonical violation comes first: it may be #SS(0)."""
    if operand.kind == MEM and operand_address(regs, insn, operand.size) % operand.size != 0:
        raise Fault(VECTOR_GP, 0)


def _move(regs: Regs, insn: Insn, bus: Bus, aligned: bool, vex: bool) -> None:
    """A whole-register move. Legacy SSE keeps bits 255..128 of its destination, VEX clears them (SDM vol. 1, 14.3)."""
    dst = insn.operands[0]
    src = insn.operands[1]
    if aligned:
        _check_alignment(regs, insn, dst)
        _check_alignment(regs, insn, src)
    if src.kind == XMM:
        value = _low(regs.xmm[src.index], src.size)
    else:
        value = load_operand(regs, insn, bus, src)
    if dst.kind == MEM:
        store_operand(regs, insn, bus, dst, value)
    elif vex:
        regs.xmm[dst.index] = value
    else:
        regs.xmm[dst.index] = regs.xmm[dst.index] & _UPPER_HALF | value
    advance(regs, insn)


def move_aligned(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVAPS, MOVDQA."""
    _move(regs, insn, bus, True, False)


def move_unaligned(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVUPS, MOVDQU."""
    _move(regs, insn, bus, False, False)


def vex_move_unaligned(regs: Regs, insn: Insn, bus: Bus) -> None:
    """VMOVDQU."""
    _move(regs, insn, bus, False, True)


def move_single(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVSS: a load clears the rest of bits 127..0, a register move keeps it."""
    dst = insn.operands[0]
    src = insn.operands[1]
    if dst.kind == MEM:
        store_operand(regs, insn, bus, dst, _low(regs.xmm[src.index], dst.size))
    elif src.kind == MEM:
        value = load_operand(regs, insn, bus, src)
        regs.xmm[dst.index] = regs.xmm[dst.index] & _UPPER_HALF | value
    else:
        ones = (1 << 8 * src.size) - 1
        regs.xmm[dst.index] = regs.xmm[dst.index] & (_ALL ^ ones) | regs.xmm[src.index] & ones
    advance(regs, insn)


def store_x87(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FSTP to memory of 4, 8 or 10 bytes. Only the top of the stack is modelled, so the pop leaves it in place."""
    dst = insn.operands[0]
    value = regs.st0
    if dst.size == 8:
        value = round_extended(value, 11, 52)
    elif dst.size == 4:
        value = round_extended(value, 8, 23)
    store_operand(regs, insn, bus, dst, value)
    advance(regs, insn)


def round_extended(value: int, exponent_bits: int, fraction_bits: int) -> int:
    """An 80-bit extended value as an IEEE 754 binary value, rounded to nearest, ties to even (SDM vol. 1, 4.2, 4.8).

    Overflow gives infinity, a NaN is made quiet and truncated, and encodings that the x87 does not
    support (unnormals, pseudo-NaNs, pseudo-infinities) give the default NaN.
    """
    exponent = value >> 64 & 0x7FFF
    significand = value & alu.mask(8)
    integer_bit = significand >> 63
    sign = (value >> 79) << (exponent_bits + fraction_bits)
    top = (1 << exponent_bits) - 1
    infinity = top << fraction_bits
    quiet = 1 << (fraction_bits - 1)
    if exponent != 0 and integer_bit == 0:
        return 1 << (exponent_bits + fraction_bits) | infinity | quiet
    if exponent == 0x7FFF:
        fraction = significand & (1 << 63) - 1
        if fraction == 0:
            return sign | infinity
        return sign | infinity | quiet | fraction >> (63 - fraction_bits)
    if exponent == 0:
        # Denormals have the exponent of the smallest normal, and so do pseudo-denormals.
        exponent = 1
    # The target's biased exponent of a significand whose bit 63 is worth 1.0.
    target = exponent - 0x3FFF + (top >> 1)
    shift = 63 - fraction_bits
    if target < 1:
        shift += 1 - target
        target = 1
    kept = significand >> shift
    rest = significand & (1 << shift) - 1
    half = 1 << (shift - 1)
    if rest > half or (rest == half and kept & 1):
        kept += 1
    # The kept integer bit adds 1 to the exponent field below it, and so does a carry out of the
    # fraction; without an integer bit the value is denormal and the field stays 0.
    result = ((target - 1) << fraction_bits) + kept
    return sign | (infinity if result > infinity else result)
