"""MMX, SSE and AVX data movement: mostly stores that KVM's emulator lacks.

CR4.OSFXSR and CR4.OSXSAVE are taken to be as an operating system sets them for SSE and AVX use.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    RDI,
    advance,
    check_vex,
    linear,
    load_operand,
    operand_address,
    read_reg,
    store_operand,
    write_reg,
)
from mmufuzz.x86.execute_x87 import SUMMARY
from mmufuzz.x86.insn import MEM, MMX, REG, XMM, Insn, Operand
from mmufuzz.x86.opcodes import MAP_VEX
from mmufuzz.x86.state import CR0_EM, CR0_TS, VECTOR_GP, VECTOR_MF, VECTOR_NM, VECTOR_UD, Fault, Regs

_UPPER_HALF: Final = ((1 << 128) - 1) << 128
_MASK64: Final = (1 << 64) - 1
_MASK128: Final = (1 << 128) - 1
_XCR0_AVX: Final = 6
_MXCSR_RESERVED: Final = 0xFFFF0000
# An MMX register is the significand of an x87 register whose sign and exponent are all ones (SDM vol. 1, 9.2.1).
_MMX_TOP: Final = 0xFFFF << 64

_ALIGNED: Final = frozenset(
    (
        *("movaps", "movapd", "movdqa", "movntps", "movntpd", "movntdq"),
        *("vmovaps", "vmovapd", "vmovdqa", "vmovntps", "vmovntpd", "vmovntdq"),
    )
)
_HIGH: Final = frozenset(("movhps", "movhpd", "movlhps", "vmovhps", "vmovhpd", "vmovlhps"))


def _low(value: int, size: int) -> int:
    return value & ((1 << 8 * size) - 1)


def check_enabled(regs: Regs, insn: Insn) -> None:
    """#UD with CR0.EM, or for VEX in real-address mode and without AVX in XCR0; #NM with CR0.TS."""
    if insn.opcode_map >= MAP_VEX:
        check_vex(regs)
        if regs.xcr0 & _XCR0_AVX != _XCR0_AVX:
            raise Fault(VECTOR_UD)
    elif regs.cr0 & CR0_EM:
        raise Fault(VECTOR_UD)
    if regs.cr0 & CR0_TS:
        raise Fault(VECTOR_NM)


def check_mmx(regs: Regs, insn: Insn) -> None:
    """``check_enabled``, and #MF for a pending exception of the x87 if an MMX register is among the operands."""
    check_enabled(regs, insn)
    if regs.fsw & SUMMARY:
        for operand in insn.operands:
            if operand.kind == MMX:
                raise Fault(VECTOR_MF)


def _check_alignment(regs: Regs, insn: Insn, operand: Operand) -> None:
    """#GP(0) unless a memory operand is aligned to its size. A canonical violation comes first: it may be #SS(0)."""
    if operand.kind == MEM and operand_address(regs, insn, operand.size) % operand.size != 0:
        raise Fault(VECTOR_GP, 0)


def _load(regs: Regs, insn: Insn, bus: Bus, operand: Operand) -> int:
    """The low ``size`` bytes of a vector, MMX or general register, or memory."""
    if operand.kind == XMM:
        return _low(regs.xmm[operand.index], operand.size)
    if operand.kind == MMX:
        return _low(regs.fpr[operand.index], operand.size)
    return load_operand(regs, insn, bus, operand)


def _write_vector(regs: Regs, insn: Insn, index: int, value: int) -> None:
    """A whole register. Legacy SSE keeps bits 255..128, VEX clears them (SDM vol. 1, 14.3)."""
    if insn.opcode_map >= MAP_VEX:
        regs.xmm[index] = value
    else:
        regs.xmm[index] = regs.xmm[index] & _UPPER_HALF | value


def write_mmx(regs: Regs, index: int, value: int) -> None:
    """Write an MMX register: any MMX instruction makes all x87 registers valid and register 0 the top."""
    regs.fpr[index] = _MMX_TOP | value
    enter_mmx(regs)


def enter_mmx(regs: Regs) -> None:
    """What every MMX instruction but EMMS does to the x87 state."""
    regs.fsw &= ~0x3800
    regs.ftw = 0xFF


def move(regs: Regs, insn: Insn, bus: Bus) -> None:
    """Moves that copy the source and clear what lies above it: whole registers, MOVD, MOVQ and their relatives."""
    check_mmx(regs, insn)
    dst = insn.operands[0]
    src = insn.operands[1]
    if insn.mnemonic in _ALIGNED:
        _check_alignment(regs, insn, dst)
        _check_alignment(regs, insn, src)
    value = _load(regs, insn, bus, src)
    if dst.kind == XMM:
        _write_vector(regs, insn, dst.index, value)
    elif dst.kind == MMX:
        write_mmx(regs, dst.index, value)
    elif dst.kind == REG:
        write_reg(regs, dst.index, dst.size, value)
    else:
        store_operand(regs, insn, bus, dst, value)
    if src.kind == MMX and dst.kind != MMX:
        enter_mmx(regs)
    advance(regs, insn)


def move_scalar(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVSS and MOVSD: a load clears the rest of bits 127..0, a register move takes it from the second operand."""
    check_enabled(regs, insn)
    dst = insn.operands[0]
    src = insn.operands[len(insn.operands) - 1]
    value = _load(regs, insn, bus, src)
    if dst.kind == MEM:
        store_operand(regs, insn, bus, dst, value)
    else:
        if src.kind != MEM:
            # Without VEX the destination is its own second operand.
            rest = regs.xmm[insn.operands[len(insn.operands) - 2].index]
            value |= rest & (_MASK128 ^ (1 << 8 * src.size) - 1)
        _write_vector(regs, insn, dst.index, value)
    advance(regs, insn)


def move_half(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVLPS, MOVHPS, MOVLPD, MOVHPD, MOVHLPS, MOVLHPS: one half of a vector register."""
    check_enabled(regs, insn)
    dst = insn.operands[0]
    src = insn.operands[len(insn.operands) - 1]
    high = insn.mnemonic in _HIGH
    if dst.kind == MEM:
        value = regs.xmm[src.index]
        store_operand(regs, insn, bus, dst, value >> 64 & _MASK64 if high else value & _MASK64)
    else:
        other = regs.xmm[insn.operands[len(insn.operands) - 2].index if len(insn.operands) == 3 else dst.index]
        if src.kind == MEM:
            half = load_operand(regs, insn, bus, src)
        else:
            # The two register forms cross: MOVHLPS takes the high half, MOVLHPS the low one.
            half = regs.xmm[src.index] & _MASK64 if high else regs.xmm[src.index] >> 64 & _MASK64
        if high:
            value = other & _MASK64 | half << 64
        else:
            value = other & _MASK128 ^ other & _MASK64 | half
        _write_vector(regs, insn, dst.index, value)
    advance(regs, insn)


def duplicate(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVDDUP, MOVSLDUP, MOVSHDUP: each second element twice."""
    check_enabled(regs, insn)
    dst = insn.operands[0]
    src = insn.operands[1]
    if insn.opcode_map < MAP_VEX and src.size == 16:
        _check_alignment(regs, insn, src)
    source = _load(regs, insn, bus, src)
    width = 64 if insn.mnemonic.endswith("ddup") else 32
    odd = insn.mnemonic.endswith("shdup")
    ones = (1 << width) - 1
    value = 0
    for place in range(8 * dst.size // width):
        chosen = place | 1 if odd else place & ~1
        value |= (source >> width * chosen & ones) << width * place
    _write_vector(regs, insn, dst.index, value)
    advance(regs, insn)


def masked_store(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MASKMOVQ and MASKMOVDQU: the bytes at rDI whose mask byte has its top bit set. No byte, no fault."""
    check_mmx(regs, insn)
    src = insn.operands[0]
    value = _load(regs, insn, bus, src)
    mask = _load(regs, insn, bus, insn.operands[1])
    offset = read_reg(regs, RDI, insn.asize)
    for place in range(src.size):
        if mask >> (8 * place + 7) & 1:
            at = linear(regs, insn.segment, offset + place & (1 << 8 * insn.asize) - 1, 1, True)
            bus.store(regs, at, 1, value >> 8 * place & 0xFF, False)
    if src.kind == MMX:
        enter_mmx(regs)
    advance(regs, insn)


def zero_upper(regs: Regs, insn: Insn, bus: Bus) -> None:
    """VZEROUPPER and VZEROALL, of 16 registers in 64-bit code and 8 elsewhere."""
    check_enabled(regs, insn)
    kept = 0 if insn.mnemonic == "vzeroall" else _MASK128
    for index in range(16 if regs.long_mode else 8):
        regs.xmm[index] &= kept
    advance(regs, insn)


def empty_mmx(regs: Regs, insn: Insn, bus: Bus) -> None:
    """EMMS."""
    check_enabled(regs, insn)
    if regs.fsw & SUMMARY:
        raise Fault(VECTOR_MF)
    regs.ftw = 0
    advance(regs, insn)


def control_word(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LDMXCSR and STMXCSR."""
    check_enabled(regs, insn)
    operand = insn.operands[0]
    if insn.mnemonic.endswith("stmxcsr"):
        store_operand(regs, insn, bus, operand, regs.mxcsr)
    else:
        regs.mxcsr = checked_mxcsr(load_operand(regs, insn, bus, operand))
    advance(regs, insn)


def checked_mxcsr(value: int) -> int:
    """``value``, or #GP(0) for reserved bits."""
    if value & _MXCSR_RESERVED:
        raise Fault(VECTOR_GP, 0)
    return value
