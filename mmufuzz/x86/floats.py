"""Conversions between the 80-bit extended format and the others (SDM vol. 1, 4.2, 4.7 and 4.8)."""

from __future__ import annotations

from typing import Final

# Exception flags, as in FSW.
INVALID: Final = 1
DENORMAL: Final = 2
OVERFLOW: Final = 8
UNDERFLOW: Final = 16
INEXACT: Final = 32
ROUNDED_UP: Final = 1 << 9
"""C1 of FSW: the result's magnitude was rounded up."""

DEFAULT_NAN: Final = 0xFFFFC000000000000000
DECIMAL_INDEFINITE: Final = 0xFFFFC000000000000000
"""The packed BCD integer indefinite (SDM vol. 1, 4.7)."""

_DIGITS: Final = 18
_DECIMAL_END: Final = 10**18
_MASK64: Final = (1 << 64) - 1


def _rounds_up(kept: int, rest: int, half: int, negative: bool, rounding: int) -> bool:
    """Rounding control: 0 nearest even, 1 down, 2 up, 3 toward zero."""
    if rounding == 0:
        return rest > half or (rest == half and kept & 1 != 0)
    return rest != 0 and ((rounding == 1 and negative) or (rounding == 2 and not negative))


def narrow(value: int, exponent_bits: int, fraction_bits: int, rounding: int) -> tuple[int, int]:
    """An 80-bit value as an IEEE 754 binary value, and the flags that raises.

    A signalling NaN is made quiet and NaNs are truncated; encodings that the x87 does not support (unnormals,
    pseudo-NaNs, pseudo-infinities) give the default NaN.
    """
    exponent = value >> 64 & 0x7FFF
    significand = value & _MASK64
    negative = value >> 79 != 0
    sign = (value >> 79) << (exponent_bits + fraction_bits)
    top = (1 << exponent_bits) - 1
    infinity = top << fraction_bits
    quiet = 1 << (fraction_bits - 1)
    if exponent != 0 and significand >> 63 == 0:
        return 1 << (exponent_bits + fraction_bits) | infinity | quiet, INVALID
    if exponent == 0x7FFF:
        fraction = significand & (1 << 63) - 1
        if fraction == 0:
            return sign | infinity, 0
        flags = 0 if fraction >> 62 else INVALID
        return sign | infinity | quiet | fraction >> (63 - fraction_bits), flags
    if significand == 0:
        return sign, 0
    # Denormals have the exponent of the smallest normal, and so do pseudo-denormals.
    exponent = max(exponent, 1)
    # The target's biased exponent of a significand whose bit 63 is worth 1.0.
    target = exponent - 0x3FFF + (top >> 1)
    shift = 63 - fraction_bits
    tiny = target < 1
    if tiny:
        shift += 1 - target
        target = 1
    kept = significand >> shift
    rest = significand & (1 << shift) - 1
    up = _rounds_up(kept, rest, 1 << (shift - 1), negative, rounding)
    flags = INEXACT if rest else 0
    # Tininess is detected after rounding, as if the exponent had no lower bound.
    if tiny and rest and not _reaches_normal(significand, 63 - fraction_bits, negative, rounding, exponent, top):
        flags |= UNDERFLOW
    if up:
        kept += 1
        flags |= ROUNDED_UP
    # The kept integer bit adds 1 to the exponent field below it, and so does a carry out of the
    # fraction; without an integer bit the value is denormal and the field stays 0.
    result = ((target - 1) << fraction_bits) + kept
    if result < infinity:
        return sign | result, flags
    return _overflowed(sign, infinity, negative, rounding)


def _reaches_normal(significand: int, shift: int, negative: bool, rounding: int, exponent: int, top: int) -> bool:
    """Whether a value just below the normal range rounds up to the smallest normal at full precision."""
    if exponent - 0x3FFF + (top >> 1) != 0 or significand >> 63 == 0:
        return False
    kept = significand >> shift
    rest = significand & (1 << shift) - 1
    if not _rounds_up(kept, rest, 1 << (shift - 1), negative, rounding):
        return False
    return (kept + 1) >> (64 - shift) != 0


def _overflowed(sign: int, infinity: int, negative: bool, rounding: int) -> tuple[int, int]:
    """Infinity, or the largest finite value if rounding goes the other way."""
    flags = OVERFLOW | INEXACT
    if rounding == 3 or (rounding == 1 and not negative) or (rounding == 2 and negative):
        return sign | (infinity - 1), flags
    return sign | infinity, flags | ROUNDED_UP


def widen(value: int, exponent_bits: int, fraction_bits: int) -> tuple[int, int]:
    """An IEEE 754 binary value as an 80-bit value, which is exact, and the flags that raises."""
    sign = (value >> (exponent_bits + fraction_bits)) << 79
    top = (1 << exponent_bits) - 1
    exponent = value >> fraction_bits & top
    fraction = value & (1 << fraction_bits) - 1
    if exponent == top:
        if fraction == 0:
            return sign | 0x7FFF << 64 | 1 << 63, 0
        flags = 0 if fraction >> (fraction_bits - 1) else INVALID
        return sign | 0x7FFF << 64 | 3 << 62 | fraction << (63 - fraction_bits), flags
    if exponent == 0:
        if fraction == 0:
            return sign, 0
        shift = 64 - fraction.bit_length()
        biased = 0x3FFF - (top >> 1) + 1 - (shift - (63 - fraction_bits))
        return sign | biased << 64 | fraction << shift, DENORMAL
    biased = exponent - (top >> 1) + 0x3FFF
    return sign | biased << 64 | 1 << 63 | fraction << (63 - fraction_bits), 0


def from_integer(value: int, size: int) -> int:
    """A two's complement integer of ``size`` bytes as an 80-bit value, which is exact."""
    sign = 0
    if value >> (8 * size - 1):
        sign = 1 << 79
        value = (1 << 8 * size) - value
    if value == 0:
        return 0
    shift = 64 - value.bit_length()
    return sign | (0x3FFF + 63 - shift) << 64 | value << shift


def to_integer(value: int, size: int, rounding: int) -> tuple[int, int]:
    """An 80-bit value as a two's complement integer of ``size`` bytes, and the flags that raises.

    What does not fit becomes the integer indefinite, the smallest value.
    """
    exponent = value >> 64 & 0x7FFF
    significand = value & _MASK64
    negative = value >> 79 != 0
    indefinite = 1 << (8 * size - 1)
    if exponent == 0x7FFF or (exponent != 0 and significand >> 63 == 0) or exponent > 0x3FFF + 64:
        return indefinite, INVALID
    shift = 0x3FFF + 63 - max(exponent, 1)
    if shift <= 0:
        magnitude = significand << -shift
        rest = 0
        up = False
    else:
        shift = min(shift, 66)
        magnitude = significand >> shift
        rest = significand & (1 << shift) - 1
        up = _rounds_up(magnitude, rest, 1 << (shift - 1), negative, rounding)
    if up:
        magnitude += 1
    if magnitude > (indefinite if negative else indefinite - 1):
        return indefinite, INVALID
    flags = (INEXACT if rest else 0) | (ROUNDED_UP if up else 0)
    return (-magnitude if negative else magnitude) & (1 << 8 * size) - 1, flags


def from_decimal(image: int) -> int:
    """A packed BCD integer, 18 digits and a sign in bit 79, as an 80-bit value, which is exact.

    Bits 78 to 72 mean nothing. A digit above 9, which the SDM leaves undefined, counts as what it is in binary.
    """
    number = 0
    for place in range(_DIGITS):
        number = 10 * number + (image >> 4 * (_DIGITS - 1 - place) & 0xF)
    return (image >> 79) << 79 | from_integer(number, 8)


def to_decimal(value: int, rounding: int) -> tuple[int, int]:
    """An 80-bit value as a packed BCD integer, and the flags that raises.

    The sign is the value's even where it rounds to zero. What has more than 18 digits becomes the indefinite.
    """
    integer, flags = to_integer(value, 8, rounding)
    sign = value >> 79
    number = (1 << 64) - integer if sign and integer else integer
    if flags & INVALID or number >= _DECIMAL_END:
        return DECIMAL_INDEFINITE, INVALID
    image = sign << 79
    for place in range(_DIGITS):
        image |= number % 10 << 4 * place
        number //= 10
    return image, flags
