"""em_ functions on values: moves, arithmetic, logic, bits, flags (emulate.c). The ALU is the architecture's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.kvm.emulate_ctxt import NONE, REG, X86EmulateCtxt, assign_reg
from mmufuzz.kvm.emulate_ops import EmulationFailed
from mmufuzz.x86 import alu, alu_wide
from mmufuzz.x86.execute_operands import MASK32, MASK64, RAX, RBX, RCX, RDX, condition
from mmufuzz.x86.state import (
    FLAG_AF,
    FLAG_CF,
    FLAG_DF,
    FLAG_FIXED,
    FLAG_PF,
    FLAG_SF,
    FLAG_ZF,
    VECTOR_DE,
    Fault,
)

_Binary = Callable[[int, int, int, int], tuple[int, int]]

_SAHF_FLAGS: Final = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF


def em_mov(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_mov: MOV, MOVS, STOS, LODS, XLAT, MOVNTI, the vector moves."""
    ctxt.dst.val = ctxt.src.val


def movsx(ctxt: X86EmulateCtxt) -> None:
    """MOVSX, MOVSXD (emulate.c:em_movsxd)."""
    ctxt.dst.val = alu.sign_extend(ctxt.src.val, ctxt.src.bytes, 8)


def lea(ctxt: X86EmulateCtxt) -> None:
    """LEA."""
    ctxt.dst.val = ctxt.src.ea


# FASTOP2: the two operands of one size.


def _group1(ctxt: X86EmulateCtxt, number: int) -> None:
    dst = ctxt.dst
    size = dst.bytes
    dst.val, ctxt.eflags = alu.group1(number, size, dst.val, ctxt.src.val & alu.mask(size), ctxt.eflags)


def em_add(ctxt: X86EmulateCtxt) -> None:
    """ADD."""
    _group1(ctxt, 0)


def em_or(ctxt: X86EmulateCtxt) -> None:
    """OR."""
    _group1(ctxt, 1)


def em_adc(ctxt: X86EmulateCtxt) -> None:
    """ADC."""
    _group1(ctxt, 2)


def em_sbb(ctxt: X86EmulateCtxt) -> None:
    """SBB."""
    _group1(ctxt, 3)


def em_and(ctxt: X86EmulateCtxt) -> None:
    """AND."""
    _group1(ctxt, 4)


def em_sub(ctxt: X86EmulateCtxt) -> None:
    """SUB."""
    _group1(ctxt, 5)


def em_xor(ctxt: X86EmulateCtxt) -> None:
    """XOR."""
    _group1(ctxt, 6)


def em_cmp(ctxt: X86EmulateCtxt) -> None:
    """CMP."""
    _group1(ctxt, 7)


def em_cmp_r(ctxt: X86EmulateCtxt) -> None:
    """CMPS, SCAS: the source less the destination."""
    size = ctxt.dst.bytes
    ctxt.eflags = alu.cmp(size, ctxt.src.val & alu.mask(size), ctxt.dst.val, ctxt.eflags)[1]


def em_test(ctxt: X86EmulateCtxt) -> None:
    """TEST."""
    size = ctxt.dst.bytes
    ctxt.eflags = alu.test(size, ctxt.dst.val, ctxt.src.val & alu.mask(size), ctxt.eflags)[1]


def em_xadd(ctxt: X86EmulateCtxt) -> None:
    """XADD."""
    dst = ctxt.dst
    old = dst.val
    dst.val, ctxt.eflags = alu.add(dst.bytes, old, ctxt.src.val, ctxt.eflags)
    ctxt.src.val = old


# FASTOP1.


def em_not(ctxt: X86EmulateCtxt) -> None:
    """NOT."""
    ctxt.dst.val, ctxt.eflags = alu.bitwise_not(ctxt.dst.bytes, ctxt.dst.val, ctxt.eflags)


def em_neg(ctxt: X86EmulateCtxt) -> None:
    """NEG."""
    ctxt.dst.val, ctxt.eflags = alu.neg(ctxt.dst.bytes, ctxt.dst.val, ctxt.eflags)


def em_inc(ctxt: X86EmulateCtxt) -> None:
    """INC."""
    ctxt.dst.val, ctxt.eflags = alu.inc(ctxt.dst.bytes, ctxt.dst.val, ctxt.eflags)


def em_dec(ctxt: X86EmulateCtxt) -> None:
    """DEC."""
    ctxt.dst.val, ctxt.eflags = alu.dec(ctxt.dst.bytes, ctxt.dst.val, ctxt.eflags)


# FASTOP2CL, FASTOP3WCL, FASTOP2W.


def shift(ctxt: X86EmulateCtxt) -> None:
    """ROL, ROR, RCL, RCR, SHL, SHR, SAR; the count is the second source."""
    dst = ctxt.dst
    function = alu.BINARY[ctxt.insn.name]
    dst.val, ctxt.eflags = function(dst.bytes, dst.val, ctxt.src2.val & 0xFF, ctxt.eflags)


def double_shift(ctxt: X86EmulateCtxt) -> None:
    """SHLD, SHRD."""
    dst = ctxt.dst
    left = ctxt.insn.name == "shld"
    count = ctxt.src2.val & 0xFF
    dst.val, ctxt.eflags = alu_wide.double_shift(left, dst.bytes, dst.val, ctxt.src.val, count, ctxt.eflags)


def bit(ctxt: X86EmulateCtxt) -> None:
    """BT, BTS, BTR, BTC; emulate.c:fetch_bit_operand keeps the low bits of the offset."""
    dst = ctxt.dst
    offset = ctxt.src.val & (dst.bytes << 3) - 1
    dst.val, ctxt.eflags = alu.BINARY[ctxt.insn.name](dst.bytes, dst.val, offset, ctxt.eflags)


def bit_scan(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_bsf_c, em_bsr_c: a zero source leaves the destination alone. TZCNT and LZCNT come here too."""
    dst = ctxt.dst
    function = alu_wide.bsf if ctxt.insn.name == "bsf" else alu_wide.bsr
    if ctxt.src.val == 0:
        dst.type = NONE
    dst.val, ctxt.eflags = function(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)


def em_imul(ctxt: X86EmulateCtxt) -> None:
    """IMUL of the destination by the source."""
    dst = ctxt.dst
    dst.val, _, ctxt.eflags = alu_wide.multiply(True, dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)


def em_imul_3op(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_imul_3op."""
    ctxt.dst.val = ctxt.src2.val & alu.mask(ctxt.dst.bytes)
    em_imul(ctxt)


# FASTOP1SRC2: RDX:RAX, or AX.


def multiply(ctxt: X86EmulateCtxt) -> None:
    """MUL, and IMUL with one operand."""
    size = ctxt.src2.bytes
    one = ctxt.gpr[RAX] & alu.mask(size)
    signed = ctxt.insn.name == "imul"
    low, high, ctxt.eflags = alu_wide.multiply(signed, size, one, ctxt.src2.val, ctxt.eflags)
    _set_pair(ctxt, size, low, high)


def divide(ctxt: X86EmulateCtxt) -> None:
    """DIV and IDIV."""
    size = ctxt.src2.bytes
    if size == 1:
        dividend = ctxt.gpr[RAX] & 0xFFFF
    else:
        dividend = ctxt.src.val << 8 * size | ctxt.dst.val
    quotient, remainder = alu_wide.divide(ctxt.insn.name == "idiv", size, dividend, ctxt.src2.val)
    _set_pair(ctxt, size, quotient, remainder)


def _set_pair(ctxt: X86EmulateCtxt, size: int, low: int, high: int) -> None:
    if size == 1:
        ctxt.dst.val = high << 8 | low
    else:
        ctxt.dst.val = low
        ctxt.src.val = high


# Others.


def em_xchg(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_xchg: with memory it locks, prefix or not."""
    src = ctxt.src
    src.val = ctxt.dst.val
    if src.high8:
        ctxt.gpr[src.reg] = ctxt.gpr[src.reg] & ~0xFF00 | src.val << 8
    else:
        assign_reg(ctxt.gpr, src.reg, src.val, src.bytes)
    ctxt.dst.val = src.orig_val
    ctxt.lock_prefix = True


def xchg_accumulator(ctxt: X86EmulateCtxt) -> None:
    """90 to 97: XCHG with RAX, which of RAX itself is NOP."""
    if ctxt.dst.reg == RAX:
        ctxt.dst.type = NONE
    else:
        em_xchg(ctxt)


def em_cmpxchg(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_cmpxchg: the destination is written either way."""
    dst = ctxt.dst
    src = ctxt.src
    size = dst.bytes
    seen = dst.val
    ctxt.eflags = alu.cmp(size, ctxt.gpr[RAX] & alu.mask(size), seen, ctxt.eflags)[1]
    dst.orig_val = seen
    if ctxt.eflags & FLAG_ZF:
        src.type = NONE
        dst.val = src.val
    else:
        src.type = REG
        src.reg = RAX
        src.high8 = False
        src.val = seen


def em_cmpxchg8b(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_cmpxchg8b; CMPXCHG16B has been read by now, and fails."""
    dst = ctxt.dst
    if dst.bytes == 16:
        raise EmulationFailed
    gpr = ctxt.gpr
    old = dst.orig_val
    if old != (gpr[RDX] & MASK32) << 32 | gpr[RAX] & MASK32:
        gpr[RAX] = old & MASK32
        gpr[RDX] = old >> 32
        ctxt.eflags &= ~FLAG_ZF
    else:
        dst.val = (gpr[RCX] & MASK32) << 32 | gpr[RBX] & MASK32
        ctxt.eflags |= FLAG_ZF


def em_bswap(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_bswap: 16 bits are swapped as 32, of which the low half is zero."""
    dst = ctxt.dst
    dst.val = alu_wide.swap_bytes(dst.val, dst.bytes) if dst.bytes > 2 else 0


def em_movbe(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_movbe. The guest's CPUID has MOVBE."""
    ctxt.dst.val = alu_wide.swap_bytes(ctxt.src.val & alu.mask(ctxt.op_bytes), ctxt.op_bytes)


def cbw(ctxt: X86EmulateCtxt) -> None:
    """CBW, CWDE, CDQE."""
    half = ctxt.op_bytes // 2
    ctxt.dst.val = alu.sign_extend(ctxt.dst.val & alu.mask(half), half, ctxt.op_bytes)


def em_cwd(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_cwd: CWD, CDQ, CQO."""
    src = ctxt.src
    sign = src.val >> (8 * src.bytes - 1)
    assign_reg(ctxt.gpr, RDX, MASK64 if sign else 0, src.bytes)


def cmovcc(ctxt: X86EmulateCtxt) -> None:
    """CMOVcc: 32 bits are written, and so extended, in any case."""
    if condition(ctxt.eflags, ctxt.insn.b & 15):
        ctxt.dst.val = ctxt.src.val
    elif ctxt.op_bytes != 4:
        ctxt.dst.type = NONE


def setcc(ctxt: X86EmulateCtxt) -> None:
    """SETcc."""
    ctxt.dst.val = 1 if condition(ctxt.eflags, ctxt.insn.b & 15) else 0


def em_das(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_das."""
    ax, ctxt.eflags = alu_wide.decimal("das", ctxt.dst.val, 0, ctxt.eflags)
    ctxt.dst.val = ax & 0xFF


def adjust(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_aam, em_aad: #DE for AAM of base 0."""
    name = ctxt.insn.name
    base = ctxt.src.val
    if name == "aam" and base == 0:
        raise Fault(VECTOR_DE)
    value = ctxt.dst.val
    ax, ctxt.eflags = alu_wide.decimal(name, value & 0xFFFF, base, ctxt.eflags)
    ctxt.dst.val = value & 0xFFFF0000 | ax


def em_salc(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_salc."""
    ctxt.dst.val = 0xFF if ctxt.eflags & FLAG_CF else 0


def em_sahf(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_sahf."""
    ctxt.eflags = ctxt.eflags & ~0xFF | ctxt.gpr[RAX] >> 8 & _SAHF_FLAGS | FLAG_FIXED


def em_lahf(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_lahf."""
    ctxt.gpr[RAX] = ctxt.gpr[RAX] & ~0xFF00 | (ctxt.eflags & 0xFF) << 8


def carry(ctxt: X86EmulateCtxt) -> None:
    """CLC, STC, CMC, CLD, STD."""
    name = ctxt.insn.name
    if name == "cmc":
        ctxt.eflags ^= FLAG_CF
    elif name == "clc":
        ctxt.eflags &= ~FLAG_CF
    elif name == "stc":
        ctxt.eflags |= FLAG_CF
    elif name == "cld":
        ctxt.eflags &= ~FLAG_DF
    else:
        ctxt.eflags |= FLAG_DF


def nop(ctxt: X86EmulateCtxt) -> None:
    """Hints, prefetches, CLFLUSH, CLFLUSHOPT: what there is to it has been checked and read."""
