"""FBLD and FBSTP: packed BCD integers on the x87."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.x86 import Execution, execute
from mmufuzz.x86.asm import assemble
from mmufuzz.x86.floats import from_decimal, from_integer, to_decimal
from mmufuzz.x86.undefined import undefined_decimal

DATA = 0x8000
NEAREST, DOWN, UP, ZERO = range(4)
NAN = 0xFFFFC000000000000000
INDEFINITE = "ffffc000000000000000"
BEFORE = "55555555555555555555"
MASKED = 0x37F
INVALID_UNMASKED = 0x37E
INEXACT_UNMASKED = 0x35F
C1, SUMMARY, INEXACT, STACK_FAULT, INVALID = 0x200, 0x8080, 0x20, 0x40, 1
ONE = 0x3FFF8000000000000000
MINUS = 1 << 79


def run(*lines: str, image: str = BEFORE, **registers: int) -> Execution:
    """Run ``lines`` with ten bytes at [rbx], given with the most significant one first."""
    code = b"".join(assemble(line) for line in lines)
    memory = {DATA: bytes.fromhex(image)[::-1]}
    return execute(code, registers={"rbx": DATA, **registers}, memory=memory)


def store(value: int, fcw: int = MASKED) -> Execution:
    """FBSTP of the only number on the stack."""
    return run("fbstp [rbx]", fpr0=value, ftw=1, fcw=fcw)


def stored(made: Execution) -> str:
    return made.memory[DATA][::-1].hex()


def status(made: Execution) -> int:
    """FSW without TOP."""
    return made.registers["fsw"] & ~0x3800


def top(made: Execution) -> int:
    return made.registers["fsw"] >> 11 & 7


def number(negative: bool, exponent: int, significand: int) -> int:
    return negative << 79 | 0x3FFF + exponent << 64 | significand


# FBLD.


@pytest.mark.parametrize(
    ("image", "integer"),
    [
        ("00000000000000000000", 0),
        ("00000000000000000012", 12),
        ("80000000000000000001", -1),
        ("00123456789012345678", 123456789012345678),
        ("00999999999999999999", 10**18 - 1),
        ("80999999999999999999", 1 - 10**18),
    ],
)
def test_fbld_pushes_a_decimal_integer(image: str, integer: int) -> None:
    made = run("fbld [rbx]", image=image)
    assert made.registers["fpr7"] == from_integer(integer % (1 << 64), 8)
    assert (made.registers["ftw"], top(made), status(made)) == (0x80, 7, 0)


def test_fbld_of_a_negative_zero_keeps_the_sign() -> None:
    assert run("fbld [rbx]", image="80000000000000000000").registers["fpr7"] == MINUS


def test_the_bits_between_sign_and_digits_mean_nothing_to_fbld() -> None:
    assert run("fbld [rbx]", image="7f000000000000000001").registers["fpr7"] == ONE
    assert run("fbld [rbx]", image="ff000000000000000001").registers["fpr7"] == ONE | MINUS


@pytest.mark.parametrize(
    ("digits", "integer"),
    [("00000000000000000f", 15), ("0000000000000000a0", 100), ("f00000000000000000", 15 * 10**17)],
)
def test_a_digit_above_nine_is_undefined_and_counts_as_in_binary(digits: str, integer: int) -> None:
    assert undefined_decimal(int(digits, 16))
    assert run("fbld [rbx]", image="00" + digits).registers["fpr7"] == from_integer(integer, 8)


def test_only_the_digits_make_a_decimal_undefined() -> None:
    assert not undefined_decimal(0xFF << 72 | 0x999999999999999999)
    assert undefined_decimal(int(INDEFINITE, 16))


def test_fbld_onto_a_full_stack_pushes_the_default_nan_if_masked() -> None:
    made = run("fbld [rbx]", image="00" * 10, ftw=0xFF)
    assert (made.registers["fpr7"], top(made), status(made)) == (NAN, 7, INVALID | STACK_FAULT | C1)
    stopped = run("fbld [rbx]", image="00" * 10, ftw=0xFF, fpr7=ONE, fcw=INVALID_UNMASKED)
    assert (stopped.registers["fpr7"], top(stopped)) == (ONE, 0)
    assert status(stopped) == SUMMARY | INVALID | STACK_FAULT | C1


def test_fbld_clears_c1() -> None:
    assert status(run("fbld [rbx]", image="00" * 10, fsw=C1)) == 0


# FBSTP.


@pytest.mark.parametrize(
    ("integer", "image"),
    [
        (0, "00000000000000000000"),
        (7, "00000000000000000007"),
        (-10, "80000000000000000010"),
        (123456789012345678, "00123456789012345678"),
        (10**18 - 1, "00999999999999999999"),
        (1 - 10**18, "80999999999999999999"),
    ],
)
def test_fbstp_stores_a_decimal_integer_and_pops(integer: int, image: str) -> None:
    made = store(from_integer(integer % (1 << 64), 8))
    assert (stored(made), status(made), top(made), made.registers["ftw"]) == (image, 0, 1, 0)


HALVES = {
    # value: digits to nearest, down, up, toward zero; then whether C1 is set.
    "2.5": (number(False, 1, 5 << 61), (2, 2, 3, 2), (False, False, True, False)),
    "3.5": (number(False, 1, 7 << 61), (4, 3, 4, 3), (True, False, True, False)),
    "-2.5": (number(True, 1, 5 << 61), (2, 3, 2, 2), (False, True, False, False)),
    "0.5": (number(False, -1, 1 << 63), (0, 0, 1, 0), (False, False, True, False)),
    "0.75": (number(False, -1, 3 << 62), (1, 0, 1, 0), (True, False, True, False)),
    "-0.75": (number(True, -1, 3 << 62), (1, 1, 0, 0), (True, True, False, False)),
    "least denormal": (1, (0, 0, 1, 0), (False, False, True, False)),
}


@pytest.mark.parametrize("rounding", [NEAREST, DOWN, UP, ZERO])
@pytest.mark.parametrize("name", list(HALVES))
def test_fbstp_rounds_as_fcw_says_and_keeps_the_sign(name: str, rounding: int) -> None:
    value, digits, up = HALVES[name]
    made = store(value, MASKED | rounding << 10)
    sign = "80" if name.startswith("-") else "00"
    assert stored(made) == f"{sign}{digits[rounding]:018}"
    assert status(made) == INEXACT | (C1 if up[rounding] else 0)


def test_fbstp_of_a_negative_zero_stores_one() -> None:
    made = store(MINUS)
    assert (stored(made), status(made)) == ("80000000000000000000", 0)


def test_a_value_that_rounds_to_19_digits_does_not_fit() -> None:
    # 999,999,999,999,999,999.5 is just representable.
    value = number(False, 59, (2 * 10**18 - 1) << 3)
    for rounding in (NEAREST, UP):
        made = store(value, MASKED | rounding << 10)
        assert (stored(made), status(made)) == (INDEFINITE, INVALID)
    for rounding in (DOWN, ZERO):
        made = store(value, MASKED | rounding << 10)
        assert (stored(made), status(made)) == ("00999999999999999999", INEXACT)


INVALID_VALUES = {
    "ten to the 18th": from_integer(10**18, 8),
    "minus ten to the 18th": from_integer(-(10**18) % (1 << 64), 8),
    "fits 64 bits": from_integer(2**63 - 1, 8),
    "huge": number(False, 1000, 1 << 63),
    "infinity": 0x7FFF8000000000000000,
    "minus infinity": 0xFFFF8000000000000000,
    "QNaN": 0x7FFFC000000000000001,
    "SNaN": 0x7FFF8000000000000001,
    "unnormal": 0x3FFF0000000000000001,
}


@pytest.mark.parametrize("name", list(INVALID_VALUES))
def test_fbstp_of_what_has_no_18_digits_stores_the_indefinite(name: str) -> None:
    made = store(INVALID_VALUES[name])
    assert (stored(made), status(made), top(made), made.registers["ftw"]) == (INDEFINITE, INVALID, 1, 0)


@pytest.mark.parametrize("name", list(INVALID_VALUES))
def test_an_unmasked_invalid_fbstp_leaves_memory_and_stack(name: str) -> None:
    made = store(INVALID_VALUES[name], INVALID_UNMASKED)
    assert (stored(made), status(made), top(made), made.registers["ftw"]) == (BEFORE, SUMMARY | INVALID, 0, 1)
    assert (made.stop, made.registers["fpr0"]) == ("end", INVALID_VALUES[name])


def test_fbstp_of_an_empty_stack_is_a_stack_underflow() -> None:
    made = run("fbstp [rbx]", fpr0=ONE, fsw=C1)
    assert (stored(made), status(made), top(made)) == (INDEFINITE, INVALID | STACK_FAULT, 1)
    stopped = run("fbstp [rbx]", fpr0=ONE, fcw=INVALID_UNMASKED)
    assert (stored(stopped), status(stopped), top(stopped)) == (BEFORE, SUMMARY | INVALID | STACK_FAULT, 0)


def test_an_unmasked_inexact_fbstp_stores_pops_and_waits_for_the_next_instruction() -> None:
    made = run("fbstp [rbx]", "fbld [rbx]", fpr0=number(False, 1, 7 << 61), ftw=1, fcw=INEXACT_UNMASKED)
    assert (made.stop, made.vector, made.instructions) == ("exception", 16, 1)
    assert (stored(made), status(made), top(made)) == ("00000000000000000004", SUMMARY | INEXACT | C1, 1)


# Faults.


@pytest.mark.parametrize(("code", "vector", "ax"), [("d400", 0, 0x1234), ("d40a", -1, 0x0502), ("d500", -1, 0x0034)])
def test_aam_of_base_0_divides_by_zero_and_aad_does_not(code: str, vector: int, ax: int) -> None:
    made = execute(bytes.fromhex(code), mode=32, registers={"eax": 0x1234})
    assert (made.vector, made.registers["eax"]) == (vector, ax)


@pytest.mark.parametrize("line", ["fbld [rbx]", "fbstp [rbx]"])
@pytest.mark.parametrize(
    ("registers", "vector"),
    [({"cr0": 0x5}, 7), ({"cr0": 0x9}, 7), ({"fsw": 0x8081, "fcw": INVALID_UNMASKED}, 16), ({}, 13)],
    ids=["emulation", "task switched", "pending exception", "address"],
)
def test_faults_come_in_this_order_and_change_nothing(line: str, registers: dict[str, int], vector: int) -> None:
    value = number(False, 1, 5 << 61)
    made = run(line, **{"fpr0": value, "ftw": 1, "rbx": 1 << 63, "fsw": C1, **registers})
    assert (made.stop, made.vector) == ("exception", vector)
    assert (made.registers["ftw"], made.registers["fpr0"]) == (1, value)
    assert made.registers["fsw"] == registers.get("fsw", C1)


# Against exact arithmetic.


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(-(10**18) + 1, 10**18 - 1))
def test_a_decimal_survives_the_stack(integer: int) -> None:
    image = int(f"{abs(integer):018}", 16) | (MINUS if integer < 0 else 0)
    value = from_decimal(image)
    assert value == from_integer(integer % (1 << 64), 8)
    assert to_decimal(value, NEAREST) == (image, 0)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(-3, 62), st.integers(1 << 63, (1 << 64) - 1), st.booleans())
def test_decimal_stores_round_as_asked(exponent: int, significand: int, negative: bool) -> None:
    exact = Fraction(significand) * Fraction(2) ** (exponent - 63) * (-1 if negative else 1)
    expected = {NEAREST: round(exact), DOWN: math.floor(exact), UP: math.ceil(exact), ZERO: math.trunc(exact)}
    for rounding, integer in expected.items():
        image, flags = to_decimal(number(negative, exponent, significand), rounding)
        if abs(integer) >= 10**18:
            assert (image, flags) == (int(INDEFINITE, 16), INVALID)
        else:
            assert image == negative << 79 | int(f"{abs(integer):018}", 16)
            assert flags == (INEXACT if integer != exact else 0) | (C1 if abs(integer) > abs(exact) else 0)
