"""Flags and results of the ALU, from definitions that do not share its bit tricks.

tests/x86/test_execute_oracle.py compares the same functions with Unicorn.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.x86 import alu
from mmufuzz.x86.state import FLAG_AF, FLAG_CF, FLAG_DF, FLAG_FIXED, FLAG_IF, FLAG_OF, FLAG_PF, FLAG_SF, FLAG_ZF

SIZES = st.sampled_from([1, 2, 4, 8])
WORDS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(lambda bit, delta: (1 << bit) + delta & 2**64 - 1, st.integers(0, 64), st.integers(-2, 2)),
)
FLAGS = st.integers(0, 2**22 - 1).map(lambda value: value | FLAG_FIXED)
COUNTS = st.integers(0, 255)
property_test = settings(derandomize=True, deadline=None, max_examples=150)


def to_signed(value: int, size: int) -> int:
    return int.from_bytes(value.to_bytes(size, "little"), "little", signed=True)


def result_flags(value: int, size: int) -> int:
    """SF, ZF, PF by their definitions."""
    flags = FLAG_PF if bin(value & 0xFF).count("1") % 2 == 0 else 0
    flags |= FLAG_ZF if value == 0 else 0
    return flags | (FLAG_SF if to_signed(value, size) < 0 else 0)


def reference_add(size: int, a: int, b: int, carry: int, sign: int) -> tuple[int, int]:
    """ADC for ``sign`` 1, SBB for -1: result and arithmetic flags from unbounded integers."""
    unsigned = a + sign * (b + carry)
    whole = to_signed(a, size) + sign * (to_signed(b, size) + carry)
    nibble = (a & 0xF) + sign * ((b & 0xF) + carry)
    result = unsigned % 2 ** (8 * size)
    flags = result_flags(result, size)
    flags |= FLAG_CF if unsigned != result else 0
    flags |= FLAG_OF if whole != to_signed(result, size) else 0
    return result, flags | (FLAG_AF if not 0 <= nibble < 16 else 0)


def arithmetic(flags: int) -> int:
    return flags & alu.ARITHMETIC_FLAGS


@property_test
@given(SIZES, WORDS, WORDS, FLAGS)
def test_additions_and_subtractions_follow_the_definition_of_each_flag(size: int, a: int, b: int, flags: int) -> None:
    a &= alu.mask(size)
    b &= alu.mask(size)
    carry = flags & FLAG_CF
    for function, borrowed, sign in ((alu.add, 0, 1), (alu.adc, carry, 1), (alu.sub, 0, -1), (alu.sbb, carry, -1)):
        result, after = function(size, a, b, flags)
        assert (result, arithmetic(after)) == reference_add(size, a, b, borrowed, sign)


def test_8_bit_additions_and_subtractions_are_right_for_every_operand() -> None:
    for a in range(256):
        for b in range(256):
            for carry in (0, 1):
                assert alu.adc(1, a, b, carry) == reference_add(1, a, b, carry, 1)
                assert alu.sbb(1, a, b, carry) == reference_add(1, a, b, carry, -1)


@property_test
@given(SIZES, WORDS, WORDS, FLAGS)
def test_cmp_and_test_set_the_flags_of_sub_and_and_but_keep_the_operand(size: int, a: int, b: int, flags: int) -> None:
    a &= alu.mask(size)
    b &= alu.mask(size)
    assert alu.cmp(size, a, b, flags) == (a, alu.sub(size, a, b, flags)[1])
    assert alu.test(size, a, b, flags) == (a, alu.bitwise_and(size, a, b, flags)[1])


@property_test
@given(SIZES, WORDS, WORDS, FLAGS)
def test_logic_clears_carry_overflow_and_by_choice_adjust(size: int, a: int, b: int, flags: int) -> None:
    a &= alu.mask(size)
    b &= alu.mask(size)
    for function, expected in ((alu.bitwise_and, a & b), (alu.bitwise_or, a | b), (alu.bitwise_xor, a ^ b)):
        result, after = function(size, a, b, flags)
        assert (result, arithmetic(after)) == (expected, result_flags(expected, size))


@property_test
@given(SIZES, WORDS, FLAGS)
def test_inc_and_dec_are_add_and_sub_of_one_that_keep_the_carry(size: int, a: int, flags: int) -> None:
    a &= alu.mask(size)
    for function, other in ((alu.inc, alu.add), (alu.dec, alu.sub)):
        result, after = other(size, a, 1, flags)
        assert function(size, a, flags) == (result, after & ~FLAG_CF | flags & FLAG_CF)


@property_test
@given(SIZES, WORDS, FLAGS)
def test_neg_subtracts_from_zero_and_not_changes_no_flag(size: int, a: int, flags: int) -> None:
    a &= alu.mask(size)
    assert alu.neg(size, a, flags) == alu.sub(size, 0, a, flags)
    assert alu.bitwise_not(size, a, flags) == (alu.mask(size) - a, flags)


@property_test
@given(SIZES, WORDS, COUNTS, FLAGS)
def test_shifts_multiply_and_divide_by_powers_of_two(size: int, a: int, count: int, flags: int) -> None:
    a &= alu.mask(size)
    power = 2 ** (count % (64 if size == 8 else 32))
    assert alu.shl(size, a, count, flags)[0] == a * power % 2 ** (8 * size)
    assert alu.shr(size, a, count, flags)[0] == a // power
    assert alu.sar(size, a, count, flags)[0] == to_signed(a, size) // power % 2 ** (8 * size)


@property_test
@given(SIZES, WORDS, st.integers(1, 31), FLAGS)
def test_a_shift_is_its_single_steps(size: int, a: int, count: int, flags: int) -> None:
    a &= alu.mask(size)
    for function in (alu.shl, alu.shr, alu.sar):
        stepped = (a, flags)
        for _ in range(count):
            stepped = function(size, stepped[0], 1, stepped[1])
        assert function(size, a, count, flags) == stepped


@property_test
@given(SIZES, WORDS, st.integers(1, 31), FLAGS)
def test_a_rotate_is_its_single_steps(size: int, a: int, count: int, flags: int) -> None:
    a &= alu.mask(size)
    for function in (alu.rol, alu.ror, alu.rcl, alu.rcr):
        if function in (alu.rcl, alu.rcr) and count % (8 * size + 1) == 0:
            continue
        stepped = (a, flags)
        for _ in range(count):
            stepped = function(size, stepped[0], 1, stepped[1])
        assert function(size, a, count, flags) == stepped


def test_overflow_of_single_bit_shifts_and_rotates_tells_of_a_sign_change() -> None:
    for a in range(256):
        for carry in (0, 1):
            top_two = (a >> 7 ^ a >> 6) & 1
            for function in (alu.shl, alu.rol, alu.rcl):
                assert bool(function(1, a, 1, carry)[1] & FLAG_OF) == bool(top_two)
            assert bool(alu.shr(1, a, 1, carry)[1] & FLAG_OF) == bool(a >> 7)
            assert not alu.sar(1, a, 1, carry)[1] & FLAG_OF
            assert bool(alu.ror(1, a, 1, carry)[1] & FLAG_OF) == bool((a ^ a >> 7) & 1)
            assert bool(alu.rcr(1, a, 1, carry)[1] & FLAG_OF) == bool((carry ^ a >> 7) & 1)


@property_test
@given(SIZES, WORDS, COUNTS, FLAGS)
def test_rotates_through_carry_undo_each_other(size: int, a: int, count: int, flags: int) -> None:
    a &= alu.mask(size)
    left, between = alu.rcl(size, a, count, flags)
    back, after = alu.rcr(size, left, count, between)
    assert (back, after & FLAG_CF) == (a, flags & FLAG_CF)


@property_test
@given(SIZES, WORDS, FLAGS)
def test_a_count_of_zero_after_masking_changes_nothing(size: int, a: int, flags: int) -> None:
    a &= alu.mask(size)
    for function in (alu.shl, alu.shr, alu.sar, alu.rol, alu.ror, alu.rcl, alu.rcr):
        assert function(size, a, 64, flags) == (a, flags)


@property_test
@given(SIZES, WORDS, FLAGS)
def test_a_full_turn_sets_the_carry_of_rol_and_ror_but_not_the_operand(size: int, a: int, flags: int) -> None:
    a &= alu.mask(size)
    turn = 8 * size % (64 if size == 8 else 32)
    if turn:
        assert alu.rol(size, a, turn, flags)[0] == a
        assert alu.rol(size, a, turn, flags)[1] & FLAG_CF == a & 1
        assert alu.ror(size, a, turn, flags)[1] & FLAG_CF == a >> (8 * size - 1)


@property_test
@given(st.sampled_from([2, 4, 8]), WORDS, st.integers(0, 255), FLAGS)
def test_bit_instructions_copy_the_bit_to_carry_and_change_only_it(size: int, a: int, offset: int, flags: int) -> None:
    a &= alu.mask(size)
    power = 2 ** (offset % (8 * size))
    bit = a // power % 2
    after = flags & ~FLAG_CF | bit
    assert alu.bt(size, a, offset, flags) == (a, after)
    assert alu.bts(size, a, offset, flags) == (a + (1 - bit) * power, after)
    assert alu.btr(size, a, offset, flags) == (a - bit * power, after)
    assert alu.btc(size, a, offset, flags) == (a + (1 - 2 * bit) * power, after)


def test_a_register_bit_offset_moves_by_whole_operands_in_both_directions() -> None:
    assert alu.bit_displacement(4, 31) == 0
    assert alu.bit_displacement(4, 32) == 4
    assert alu.bit_displacement(2, 0xFFFF) == -2
    assert alu.bit_displacement(8, 2**64 - 65) == -16


@property_test
@given(SIZES, WORDS, WORDS, FLAGS)
def test_flags_that_are_no_arithmetic_flags_pass_through(size: int, a: int, b: int, flags: int) -> None:
    a &= alu.mask(size)
    b &= alu.mask(size)
    for function in alu.BINARY.values():
        assert function(size, a, b, flags)[1] & ~alu.ARITHMETIC_FLAGS == flags & ~alu.ARITHMETIC_FLAGS
    for unary in alu.UNARY.values():
        assert unary(size, a, flags)[1] & (FLAG_DF | FLAG_IF) == flags & (FLAG_DF | FLAG_IF)


@property_test
@given(SIZES, SIZES, WORDS)
def test_sign_extension_keeps_the_signed_value(from_size: int, to_size: int, a: int) -> None:
    if from_size <= to_size:
        a &= alu.mask(from_size)
        assert alu.signed(a, from_size) == to_signed(a, from_size)
        assert to_signed(alu.sign_extend(a, from_size, to_size), to_size) == to_signed(a, from_size)
