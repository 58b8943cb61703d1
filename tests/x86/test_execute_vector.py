"""Vector moves and FSTP."""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest
from flatbus import DATA, FlatBus, machine, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.x86.floats import narrow
from mmufuzz.x86.state import Regs


@pytest.fixture
def bus() -> FlatBus:
    return FlatBus(0x4000)


def push_x87(regs: Regs, value: int) -> None:
    """Make ``value`` the top of the x87 stack."""
    top = (regs.fsw >> 11) - 1 & 7
    regs.fsw = regs.fsw & ~0x3800 | top << 11
    regs.fpr[top] = value
    regs.ftw |= 1 << top


def test_legacy_sse_keeps_the_upper_half_of_the_ymm_register_and_vex_clears_it(bus: FlatBus) -> None:
    regs = machine()
    for text in ("movups xmm1, [rbx]", "movaps xmm1, xmm2", "movss xmm1, dword [rbx]"):
        regs.xmm[1] = (1 << 256) - 1
        run(text, regs, bus)
        assert regs.xmm[1] == ((1 << 128) - 1) << 128
    regs.xmm[1] = (1 << 256) - 1
    run("vmovdqu xmm1, [rbx]", regs, bus)
    assert regs.xmm[1] == 0


def test_vmovdqu_moves_32_bytes_in_one_access(bus: FlatBus) -> None:
    regs = machine()
    regs.xmm[3] = 0xABC << 240 | 0xDEF
    run("vmovdqu [rbx], ymm3", regs, bus)
    run("vmovdqu ymm4, [rbx]", regs, bus)
    assert regs.xmm[4] == regs.xmm[3]
    assert [entry[:3] for entry in bus.log] == [("store", DATA, 32), ("load", DATA, 32)]


def test_movss_between_registers_merges_and_a_load_clears(bus: FlatBus) -> None:
    regs = machine()
    regs.xmm[0], regs.xmm[1] = (1 << 128) - 1, 0
    run("movss xmm0, xmm1", regs, bus)
    assert regs.xmm[0] == (1 << 128) - (1 << 32)
    run("movss xmm0, dword [rbx]", regs, bus)
    assert regs.xmm[0] == 0


def test_fstp_stores_80_bits_exactly(bus: FlatBus) -> None:
    regs = machine()
    push_x87(regs, 0x4000_C90FDAA22168C235)
    run("fstp tword [rbx]", regs, bus)
    assert bus.log == [("store", DATA, 10, 0x4000_C90FDAA22168C235, False)]


def test_fstp_rounds_pi_to_double_and_single(bus: FlatBus) -> None:
    regs = machine()
    push_x87(regs, 0x4000_C90FDAA22168C235)
    run("fstp qword [rbx]", regs, bus)
    assert bus.peek(DATA, 8) == 0x400921FB54442D18
    push_x87(regs, 0x4000_C90FDAA22168C235)
    run("fstp dword [rbx]", regs, bus)
    assert bus.peek(DATA, 4) == 0x40490FDB


def nearest(value: Fraction, form: str) -> int:
    """The encoding of the binary value nearest to ``value`` >= 0, ties to even, found by bisection over encodings."""
    size = struct.calcsize(form)
    infinity = 0x7F800000 if size == 4 else 0x7FF0000000000000

    def decoded(bits: int) -> Fraction:
        if bits == infinity:
            # Rounding treats the binade above the largest finite value as if it were representable.
            return Fraction(2) ** (128 if size == 4 else 1024)
        return Fraction(struct.unpack(form, bits.to_bytes(size, "little"))[0])

    low, high = 0, infinity
    if value >= decoded(infinity):
        return infinity
    while high - low > 1:
        middle = (low + high) // 2
        if decoded(middle) <= value:
            low = middle
        else:
            high = middle
    below, above = value - decoded(low), decoded(high) - value
    if below == above:
        return low if low % 2 == 0 else high
    return low if below < above else high


EXPONENTS = st.one_of(
    st.integers(0, 0x7FFE),
    st.integers(0x3FFF - 160, 0x3FFF + 130),
    st.integers(0x3FFF - 1080, 0x3FFF - 1015),
    st.integers(0x3FFF + 1020, 0x3FFF + 1026),
)
SIGNIFICANDS = st.one_of(
    st.integers(1 << 63, (1 << 64) - 1),
    st.builds(
        lambda kept, bits, rest: (1 << 63 | kept << bits | 1 << (bits - 1)) + rest & (1 << 64) - 1 | 1 << 63,
        st.integers(0, (1 << 24) - 1),
        st.sampled_from([11, 12, 20, 39, 40, 41]),
        st.integers(-1, 1),
    ),
)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(EXPONENTS, SIGNIFICANDS, st.integers(0, 1))
def test_rounding_gives_the_nearest_value_with_ties_to_even(exponent: int, significand: int, sign: int) -> None:
    value = Fraction(significand) * Fraction(2) ** (max(exponent, 1) - 0x3FFF - 63)
    extended = sign << 79 | exponent << 64 | significand
    assert narrow(extended, 11, 52, 0)[0] == sign << 63 | nearest(value, "<d")
    assert narrow(extended, 8, 23, 0)[0] == sign << 31 | nearest(value, "<f")


@pytest.mark.parametrize(
    ("extended", "double"),
    [
        (0, 0),
        (1 << 79, 1 << 63),
        (1, 0),
        (0x7FFF_8000000000000000, 0x7FF0000000000000),
        (0xFFFF_8000000000000000, 0xFFF0000000000000),
        (0x7FFF_C000000000000000, 0x7FF8000000000000),
        (0x7FFF_8000000000000001, 0x7FF8000000000000),
        (0x7FFF_8000000000000800, 0x7FF8000000000001),
        (0x7FFF_0000000000000000, 0xFFF8000000000000),
        (0x4000_4000000000000000, 0xFFF8000000000000),
    ],
    ids=["+0", "-0", "tiny", "+inf", "-inf", "qnan", "snan", "payload", "pseudo-inf", "unnormal"],
)
def test_special_extended_values(extended: int, double: int) -> None:
    assert narrow(extended, 11, 52, 0)[0] == double
