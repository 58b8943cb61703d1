"""Integer functions beside those of ``alu``: multiplication and division, bit scans, BMI, decimal adjustment.

As there, every function is pure and operands are unsigned and masked to ``size`` bytes. Where the SDM leaves a flag or
a result undefined, the model makes one fixed choice (``undefined`` lists which those are):

* MUL, IMUL: SF and PF follow the low half, ZF and AF are cleared.
* BSF, BSR: the destination is kept if the source is zero, and CF, PF, AF, SF and OF are cleared.
* TZCNT, LZCNT: PF, AF, SF and OF are cleared. BLSR, BLSMSK, BLSI, BZHI, ANDN, BEXTR: PF and AF are cleared.
* SHLD, SHRD by more than the width of 16-bit operands: the bits shifted in come from the source and then from the
  destination again. AF is cleared, and OF tells whether the sign changed in the last step.
* DAA, DAS: OF is cleared. AAA, AAS: OF is cleared, SF, ZF and PF are those of the adjusted AL.
* AAM, AAD: OF, AF and CF are cleared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.x86.alu import ARITHMETIC_FLAGS, mask, result_flags, signed
from mmufuzz.x86.state import FLAG_AF, FLAG_CF, FLAG_OF, FLAG_SF, FLAG_ZF, VECTOR_DE, Fault

_NOT_ARITHMETIC: Final = ~ARITHMETIC_FLAGS


def multiply(is_signed: bool, size: int, a: int, b: int, flags: int) -> tuple[int, int, int]:
    """MUL and IMUL: (low half, high half, flags). CF and OF say that the high half is not just the sign, or zero."""
    product = signed(a, size) * signed(b, size) if is_signed else a * b
    low = product & mask(size)
    high = product >> 8 * size & mask(size)
    new = flags & _NOT_ARITHMETIC | result_flags(size, low) & ~FLAG_ZF
    if product != (signed(low, size) if is_signed else low):
        new |= FLAG_CF | FLAG_OF
    return low, high, new


def divide(is_signed: bool, size: int, dividend: int, divisor: int) -> tuple[int, int]:
    """DIV and IDIV of a ``dividend`` of twice ``size``: (quotient, remainder), truncated toward zero. Raises #DE."""
    if divisor == 0:
        raise Fault(VECTOR_DE)
    bits = 8 * size
    if not is_signed:
        quotient = dividend // divisor
        if quotient >> bits:
            raise Fault(VECTOR_DE)
        return quotient, dividend - quotient * divisor
    if dividend >> (2 * bits - 1):
        dividend -= 1 << 2 * bits
    divisor = signed(divisor, size)
    quotient = abs(dividend) // abs(divisor)
    if (dividend < 0) != (divisor < 0):
        quotient = -quotient
    if not -(1 << (bits - 1)) <= quotient < 1 << (bits - 1):
        raise Fault(VECTOR_DE)
    return quotient & mask(size), dividend - quotient * divisor & mask(size)


def double_shift(left: bool, size: int, a: int, b: int, count: int, flags: int) -> tuple[int, int]:
    """SHLD and SHRD: ``a`` shifted, filled from ``b``. A masked ``count`` of 0 changes nothing."""
    count &= 0x3F if size == 8 else 0x1F
    if count == 0:
        return a, flags
    bits = 8 * size
    # Three operands side by side: beyond the width of 16-bit operands the destination comes round again.
    if left:
        wide = (a << bits | b) << bits | a
        shifted = wide << count
        result = shifted >> 2 * bits & mask(size)
        carry = shifted >> 3 * bits & 1
        before = wide << (count - 1) >> 2 * bits
    else:
        wide = (a << bits | b) << bits | a
        shifted = wide >> count
        result = shifted & mask(size)
        carry = wide >> (count - 1) & 1
        before = wide >> (count - 1)
    new = flags & _NOT_ARITHMETIC | result_flags(size, result) | carry
    if (before ^ result) >> (bits - 1) & 1:
        new |= FLAG_OF
    return result, new


def swap_bytes(value: int, size: int) -> int:
    """The bytes of ``value`` in the opposite order."""
    return int.from_bytes(value.to_bytes(size, "little"), "big")


def crc32(crc: int, value: int, size: int) -> int:
    """CRC32 of ``size`` bytes more (SDM vol. 2, CRC32); the polynomial and both values bit-reflected."""
    for place in range(size):
        crc ^= value >> 8 * place & 0xFF
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


def _trailing_zeros(value: int) -> int:
    return (value & -value).bit_length() - 1


def bsf(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """BSF."""
    new = flags & _NOT_ARITHMETIC
    if source == 0:
        return old, new | FLAG_ZF
    return _trailing_zeros(source), new


def bsr(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """BSR."""
    new = flags & _NOT_ARITHMETIC
    if source == 0:
        return old, new | FLAG_ZF
    return source.bit_length() - 1, new


def _count_flags(result: int, source: int, flags: int) -> int:
    """Of TZCNT and LZCNT: CF for a zero source, ZF for a zero result."""
    new = flags & _NOT_ARITHMETIC
    if source == 0:
        new |= FLAG_CF
    if result == 0:
        new |= FLAG_ZF
    return new


def tzcnt(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """TZCNT."""
    result = _trailing_zeros(source) if source else 8 * size
    return result, _count_flags(result, source, flags)


def lzcnt(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """LZCNT."""
    result = 8 * size - source.bit_length()
    return result, _count_flags(result, source, flags)


def popcnt(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """POPCNT: ZF for a zero source, the other flags cleared."""
    return source.bit_count(), flags & _NOT_ARITHMETIC | (0 if source else FLAG_ZF)


def _bmi_flags(size: int, result: int, carry: bool, flags: int) -> int:
    new = flags & _NOT_ARITHMETIC | result_flags(size, result) & (FLAG_ZF | FLAG_SF)
    return new | FLAG_CF if carry else new


def blsr(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """BLSR."""
    result = source & (source - 1) & mask(size)
    return result, _bmi_flags(size, result, source == 0, flags)


def blsmsk(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """BLSMSK."""
    result = (source ^ (source - 1)) & mask(size)
    return result, _bmi_flags(size, result, source == 0, flags)


def blsi(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """BLSI."""
    result = source & -source
    return result, _bmi_flags(size, result, source != 0, flags)


def adcx(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """ADCX: ADC that touches only CF."""
    total = old + source + (flags & FLAG_CF)
    return total & mask(size), flags & ~FLAG_CF | (FLAG_CF if total >> 8 * size else 0)


def adox(size: int, old: int, source: int, flags: int) -> tuple[int, int]:
    """ADOX: ADC with OF for a carry."""
    total = old + source + (1 if flags & FLAG_OF else 0)
    return total & mask(size), flags & ~FLAG_OF | (FLAG_OF if total >> 8 * size else 0)


SOURCE_ONLY: Final[dict[str, Callable[[int, int, int, int], tuple[int, int]]]] = {
    "bsf": bsf,
    "bsr": bsr,
    "tzcnt": tzcnt,
    "lzcnt": lzcnt,
    "popcnt": popcnt,
    "blsr": blsr,
    "blsmsk": blsmsk,
    "blsi": blsi,
    "adcx": adcx,
    "adox": adox,
}
"""Functions of (size, destination before, source, flags) by mnemonic."""


def three(mnemonic: str, size: int, a: int, b: int, flags: int) -> tuple[int, int]:
    """The BMI instructions with two sources, by mnemonic: (result, flags)."""
    bits = 8 * size
    count = b & (bits - 1)
    if mnemonic == "andn":
        result = (a ^ mask(size)) & b
        return result, _bmi_flags(size, result, False, flags)
    if mnemonic == "bzhi":
        keep = b & 0xFF
        result = a & (1 << keep) - 1 if keep < bits else a
        return result, _bmi_flags(size, result, keep >= bits, flags)
    if mnemonic == "bextr":
        result = a >> (b & 0xFF) & (1 << (b >> 8 & 0xFF)) - 1 & mask(size)
        # SF is undefined here, unlike in the others.
        return result, _bmi_flags(size, result, False, flags) & ~FLAG_SF
    if mnemonic == "shlx":
        return a << count & mask(size), flags
    if mnemonic == "shrx":
        return a >> count, flags
    if mnemonic == "sarx":
        return signed(a, size) >> count & mask(size), flags
    if mnemonic == "rorx":
        return (a >> count | a << (bits - count)) & mask(size), flags
    if mnemonic == "pext":
        return _extract(a, b), flags
    assert mnemonic == "pdep"
    return _deposit(a, b), flags


def _extract(value: int, chosen: int) -> int:
    result = 0
    place = 0
    while chosen:
        lowest = chosen & -chosen
        if value & lowest:
            result |= 1 << place
        chosen ^= lowest
        place += 1
    return result


def _deposit(value: int, chosen: int) -> int:
    result = 0
    while chosen:
        lowest = chosen & -chosen
        if value & 1:
            result |= lowest
        value >>= 1
        chosen ^= lowest
    return result


def decimal(mnemonic: str, ax: int, operand: int, flags: int) -> tuple[int, int]:
    """DAA, DAS, AAA, AAS, AAM and AAD by mnemonic: (AX, flags). ``operand`` is the base of the last two."""
    al = ax & 0xFF
    if mnemonic == "aam":
        low = al % operand
        return al // operand << 8 | low, flags & _NOT_ARITHMETIC | result_flags(1, low)
    if mnemonic == "aad":
        low = al + (ax >> 8) * operand & 0xFF
        return low, flags & _NOT_ARITHMETIC | result_flags(1, low)
    low_digit = al & 0xF > 9 or flags & FLAG_AF != 0
    sign = -1 if mnemonic in ("das", "aas") else 1
    if mnemonic in ("aaa", "aas"):
        if low_digit:
            ax = ax + sign * 0x106 & 0xFFFF
            flags |= FLAG_AF | FLAG_CF
        else:
            flags &= ~(FLAG_AF | FLAG_CF)
        kept = flags & (FLAG_AF | FLAG_CF)
        return ax & 0xFF0F, flags & _NOT_ARITHMETIC | kept | result_flags(1, ax & 0xF)
    carry = flags & FLAG_CF
    high_digit = al > 0x99 or carry != 0
    new = flags & _NOT_ARITHMETIC
    result = al
    if low_digit:
        result += sign * 6
        new |= FLAG_AF
        if result < 0 and mnemonic == "das":
            # The borrow of the first step counts even if the second is not made.
            new |= FLAG_CF
    if high_digit:
        result += sign * 0x60
        new |= FLAG_CF
    result &= 0xFF
    return ax & 0xFF00 | result, new | result_flags(1, result)
