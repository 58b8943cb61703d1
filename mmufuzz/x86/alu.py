"""Integer arithmetic with flags, shared by the hardware executor and by KVM's emulator.

Every function is pure. Operands are unsigned and already masked to ``size`` bytes (1, 2, 4 or 8), ``flags``
is RFLAGS before the instruction, and the answer is ``(result, RFLAGS after)``. Source: SDM vol. 2, the
"Flags Affected" section of each instruction, and vol. 1, appendix A.

Where the SDM leaves a flag or a result undefined, the model makes one fixed choice:

* AND, OR, XOR, TEST: AF is cleared.
* SHL, SHR, SAR with a count other than 0: AF is cleared.
* OF after a shift or rotate by more than 1: SHL, ROL and RCL give MSB(result) ^ CF; SHR gives the top bit
  of the operand shifted by one less; SAR gives 0; ROR and RCR give the exclusive or of the two top bits of the
  result.
* CF after SHL or SHR by at least the operand width: the last bit shifted out of an unbounded zero-filled
  operand. The bit next to the operand leaves at a count equal to the width, zeros after that.
* RCL, RCR by a nonzero multiple of (width + 1): no flag changes.
* BT, BTS, BTR, BTC: OF, SF, ZF, AF and PF keep their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.x86.state import FLAG_AF, FLAG_CF, FLAG_OF, FLAG_PF, FLAG_SF, FLAG_ZF

ARITHMETIC_FLAGS: Final = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF

_NOT_ARITHMETIC: Final = ~ARITHMETIC_FLAGS
_NOT_CF: Final = ~FLAG_CF
_NOT_OF_CF: Final = ~(FLAG_OF | FLAG_CF)

SHORT: Final = 1 << 62
"""Non-negative numbers below this need no mask in 64 bits, and compiled code keeps them unboxed."""

# Indexed by the operand size in bytes; sizes that do not occur are 0.
_MASKS: Final[list[int]] = [0, 0xFF, 0xFFFF, 0, 0xFFFFFFFF, 0, 0, 0, 0xFFFFFFFFFFFFFFFF]


def mask(size: int) -> int:
    """All ones in ``size`` bytes (1, 2, 4 or 8)."""
    return _MASKS[size]


def sign_extend(value: int, from_size: int, to_size: int) -> int:
    """``value`` of ``from_size`` bytes, sign-extended, as an unsigned value of ``to_size`` >= ``from_size`` bytes."""
    if value >> (8 * from_size - 1) & 1:
        return value | (_MASKS[to_size] ^ _MASKS[from_size])
    return value


def signed(value: int, size: int) -> int:
    """The two's-complement reading of ``value``."""
    if value >> (8 * size - 1) & 1:
        return value - (1 << 8 * size)
    return value


def result_flags(size: int, result: int) -> int:
    """SF, ZF and PF of ``result``."""
    # 0x9669 holds, for each nibble, whether its number of ones is even; bit 2 of RFLAGS is PF.
    low = result & 0xFF
    flags = (0x9669 >> ((low ^ low >> 4) & 0xF) & 1) << 2
    if result == 0:
        flags |= FLAG_ZF
    elif result >> (8 * size - 1):
        flags |= FLAG_SF
    return flags


def add(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """ADD."""
    return _add_carry(size, a, b, 0, flags)


def adc(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """ADC."""
    return _add_carry(size, a, b, flags & FLAG_CF, flags)


def _add_carry(size: int, a: int, b: int, carry: int, flags: int) -> tuple[int, int]:
    total = a + b + carry
    result = total if total < SHORT and size == 8 else total & _MASKS[size]
    new = flags & _NOT_ARITHMETIC | result_flags(size, result) | (a ^ b ^ result) & FLAG_AF
    if total != result:
        new |= FLAG_CF
    if ((a ^ result) & (b ^ result)) >> (8 * size - 1):
        new |= FLAG_OF
    return result, new


def sub(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """SUB."""
    return _sub_borrow(size, a, b, 0, flags)


def sbb(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """SBB."""
    return _sub_borrow(size, a, b, flags & FLAG_CF, flags)


def cmp(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """CMP: the flags of SUB; the result is ``a``, which a caller may write back or drop."""
    return a, _sub_borrow(size, a, b, 0, flags)[1]


def _sub_borrow(size: int, a: int, b: int, borrow: int, flags: int) -> tuple[int, int]:
    result = a - b - borrow
    if result < 0 or result >= SHORT:
        result &= _MASKS[size]
    new = flags & _NOT_ARITHMETIC | result_flags(size, result) | (a ^ b ^ result) & FLAG_AF
    if a < b + borrow:
        new |= FLAG_CF
    if ((a ^ b) & (a ^ result)) >> (8 * size - 1):
        new |= FLAG_OF
    return result, new


def bitwise_and(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """AND."""
    result = a & b
    return result, flags & _NOT_ARITHMETIC | result_flags(size, result)


def bitwise_or(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """OR."""
    result = a | b
    return result, flags & _NOT_ARITHMETIC | result_flags(size, result)


def bitwise_xor(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """XOR."""
    result = a ^ b
    return result, flags & _NOT_ARITHMETIC | result_flags(size, result)


def test(size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """TEST: the flags of AND; the result is ``a``."""
    return a, flags & _NOT_ARITHMETIC | result_flags(size, a & b)


def inc(size: int, a: int, flags: int) -> tuple[int, int]:
    """INC: ADD of 1 that keeps CF."""
    result, new = _add_carry(size, a, 1, 0, flags)
    return result, new & _NOT_CF | flags & FLAG_CF


def dec(size: int, a: int, flags: int) -> tuple[int, int]:
    """DEC: SUB of 1 that keeps CF."""
    result, new = _sub_borrow(size, a, 1, 0, flags)
    return result, new & _NOT_CF | flags & FLAG_CF


def neg(size: int, a: int, flags: int) -> tuple[int, int]:
    """NEG: the flags of 0 - ``a``."""
    return _sub_borrow(size, 0, a, 0, flags)


def bitwise_not(size: int, a: int, flags: int) -> tuple[int, int]:
    """NOT: changes no flag."""
    return a ^ _MASKS[size], flags


def _count(size: int, count: int) -> int:
    """Shift counts have 6 significant bits with 64-bit operands, else 5 (SDM vol. 2, SAL/SAR/SHL/SHR)."""
    return count & (0x3F if size == 8 else 0x1F)


def _shift_flags(size: int, result: int, carry: int, overflow: int, flags: int) -> int:
    new = flags & _NOT_ARITHMETIC | result_flags(size, result) | carry
    return new | FLAG_OF if overflow else new


def shl(size: int, a: int, count: int, flags: int) -> tuple[int, int]:
    """SHL (and SAL). A masked ``count`` of 0 changes nothing."""
    count = _count(size, count)
    if count == 0:
        return a, flags
    wide = a << count
    result = wide & _MASKS[size]
    carry = wide >> 8 * size & 1
    return result, _shift_flags(size, result, carry, carry ^ result >> (8 * size - 1), flags)


def shr(size: int, a: int, count: int, flags: int) -> tuple[int, int]:
    """SHR. A masked ``count`` of 0 changes nothing."""
    count = _count(size, count)
    if count == 0:
        return a, flags
    before = a >> (count - 1)
    result = before >> 1
    return result, _shift_flags(size, result, before & 1, before >> (8 * size - 1), flags)


def sar(size: int, a: int, count: int, flags: int) -> tuple[int, int]:
    """SAR. A masked ``count`` of 0 changes nothing."""
    count = _count(size, count)
    if count == 0:
        return a, flags
    before = signed(a, size) >> (count - 1)
    result = before >> 1 & _MASKS[size]
    return result, _shift_flags(size, result, before & 1, 0, flags)


def _rotate_flags(carry: int, overflow: int, flags: int) -> int:
    new = flags & _NOT_OF_CF | carry
    return new | FLAG_OF if overflow else new


def rol(size: int, a: int, count: int, flags: int) -> tuple[int, int]:
    """ROL. CF and OF change whenever the masked ``count`` is not 0, even by a full turn."""
    count = _count(size, count)
    if count == 0:
        return a, flags
    bits = 8 * size
    turn = count & (bits - 1)
    result = (a << turn | a >> (bits - turn)) & _MASKS[size]
    carry = result & 1
    return result, _rotate_flags(carry, carry ^ result >> (bits - 1), flags)


def ror(size: int, a: int, count: int, flags: int) -> tuple[int, int]:
    """ROR. CF and OF change whenever the masked ``count`` is not 0, even by a full turn."""
    count = _count(size, count)
    if count == 0:
        return a, flags
    bits = 8 * size
    turn = count & (bits - 1)
    result = (a >> turn | a << (bits - turn)) & _MASKS[size]
    carry = result >> (bits - 1)
    return result, _rotate_flags(carry, carry ^ result >> (bits - 2) & 1, flags)


def rcl(size: int, a: int, count: int, flags: int) -> tuple[int, int]:
    """RCL: rotates the operand with CF above it, width + 1 bits."""
    bits = 8 * size
    turn = _count(size, count) % (bits + 1)
    if turn == 0:
        return a, flags
    wide = (flags & FLAG_CF) << bits | a
    wide = wide << turn | wide >> (bits + 1 - turn)
    result = wide & _MASKS[size]
    carry = wide >> bits & 1
    return result, _rotate_flags(carry, carry ^ result >> (bits - 1), flags)


def rcr(size: int, a: int, count: int, flags: int) -> tuple[int, int]:
    """RCR: rotates the operand with CF above it, width + 1 bits."""
    bits = 8 * size
    turn = _count(size, count) % (bits + 1)
    if turn == 0:
        return a, flags
    wide = (flags & FLAG_CF) << bits | a
    wide = wide >> turn | wide << (bits + 1 - turn)
    result = wide & _MASKS[size]
    carry = wide >> bits & 1
    return result, _rotate_flags(carry, (result >> (bits - 1) ^ result >> (bits - 2)) & 1, flags)


def bt(size: int, a: int, offset: int, flags: int) -> tuple[int, int]:
    """BT: CF is bit ``offset`` modulo the width. The result is ``a``."""
    return a, flags & _NOT_CF | a >> (offset & (8 * size - 1)) & 1


def bts(size: int, a: int, offset: int, flags: int) -> tuple[int, int]:
    """BTS."""
    bit = offset & (8 * size - 1)
    return a | 1 << bit, flags & _NOT_CF | a >> bit & 1


def btr(size: int, a: int, offset: int, flags: int) -> tuple[int, int]:
    """BTR."""
    bit = offset & (8 * size - 1)
    return a & ~(1 << bit), flags & _NOT_CF | a >> bit & 1


def btc(size: int, a: int, offset: int, flags: int) -> tuple[int, int]:
    """BTC."""
    bit = offset & (8 * size - 1)
    return a ^ 1 << bit, flags & _NOT_CF | a >> bit & 1


def bit_displacement(size: int, offset: int) -> int:
    """Signed bytes from the address of a bit string in memory to the operand that holds bit ``offset``.

    ``offset`` is an unsigned register value of ``size`` bytes, read as signed (SDM vol. 2, BT).
    """
    return signed(offset, size) // (8 * size) * size


GROUP1: Final = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
"""The eight operations in the order of their opcodes."""


def group1(number: int, size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """The operation at place ``number`` of ``GROUP1``: what most instructions are, without a call through a table."""
    if number == 0:
        return add(size, a, b, flags)
    if number == 7:
        return cmp(size, a, b, flags)
    if number == 5:
        return sub(size, a, b, flags)
    if number == 6:
        return bitwise_xor(size, a, b, flags)
    if number == 4:
        return bitwise_and(size, a, b, flags)
    if number == 1:
        return bitwise_or(size, a, b, flags)
    if number == 2:
        return adc(size, a, b, flags)
    return sbb(size, a, b, flags)


BINARY: Final[dict[str, Callable[[int, int, int, int], tuple[int, int]]]] = {
    "add": add,
    "or": bitwise_or,
    "adc": adc,
    "sbb": sbb,
    "and": bitwise_and,
    "sub": sub,
    "xor": bitwise_xor,
    "cmp": cmp,
    "test": test,
    "shl": shl,
    "shr": shr,
    "sar": sar,
    "rol": rol,
    "ror": ror,
    "rcl": rcl,
    "rcr": rcr,
    "bt": bt,
    "bts": bts,
    "btr": btr,
    "btc": btc,
}
"""Functions of (size, destination, source, flags) by mnemonic: arithmetic, logic, shifts, rotates, bit tests."""

UNARY: Final[dict[str, Callable[[int, int, int], tuple[int, int]]]] = {
    "inc": inc,
    "dec": dec,
    "neg": neg,
    "not": bitwise_not,
}
"""Functions of (size, destination, flags) by mnemonic."""
