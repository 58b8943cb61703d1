"""The x87: its stack, constants, integer stores and saved images."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.x86 import Execution, execute
from mmufuzz.x86.asm import assemble
from mmufuzz.x86.floats import from_integer, narrow, to_integer, widen

DATA = 0x8000
NEAREST, DOWN, UP, ZERO = range(4)


def run(*lines: str, data: bytes = b"", **registers: int) -> Execution:
    code = b"".join(assemble(line) for line in lines)
    memory = {DATA: data.ljust(0x400, b"\0")}
    return execute(code, registers={"rbx": DATA, **registers}, memory=memory)


def value(extended: int) -> Fraction:
    """The number that a finite 80-bit value stands for."""
    exponent = max(extended >> 64 & 0x7FFF, 1)
    magnitude = Fraction(extended & (1 << 64) - 1) * Fraction(2) ** (exponent - 0x3FFF - 63)
    return -magnitude if extended >> 79 else magnitude


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("fldpi", math.pi),
        ("fldl2t", math.log2(10)),
        ("fldl2e", math.log2(math.e)),
        ("fldlg2", math.log10(2)),
        ("fldln2", math.log(2)),
    ],
)
def test_constants_differ_by_rounding_only(line: str, number: float) -> None:
    down, nearest, up = (
        run(line, fcw=0x37F | rounding << 10).registers["fpr7"] for rounding in (DOWN, NEAREST, UP)
    )
    assert up == down + 1
    assert nearest in (down, up)
    assert run(line, fcw=0x37F | ZERO << 10).registers["fpr7"] == down
    assert abs(float(value(nearest)) - number) <= 2**-50


@pytest.mark.parametrize(
    ("line", "significand"),
    [("fldpi", 0xC90FDAA22168C235), ("fldlg2", 0x9A209A84FBCFF799), ("fldl2t", 0xD49A784BCD1B8AFE)],
)
def test_constants_to_nearest(line: str, significand: int) -> None:
    assert run(line).registers["fpr7"] & (1 << 64) - 1 == significand


def test_a_push_onto_a_full_stack_is_a_stack_overflow() -> None:
    made = run("fld1", ftw=0xFF)
    assert (made.registers["fpr7"], made.registers["fsw"]) == (0xFFFFC000000000000000, 7 << 11 | 0x241)


def test_a_store_from_an_empty_stack_is_a_stack_underflow() -> None:
    made = run("fstp qword [rbx]")
    assert made.memory[DATA][:8] == (0xFFF8000000000000).to_bytes(8, "little")
    assert made.registers["fsw"] == 1 << 11 | 0x41


def test_an_unmasked_exception_stores_nothing_and_waits_for_the_next_instruction() -> None:
    made = run("fistp word [rbx]", "fld1", fcw=0x37E, fpr0=0x401E8000000000000000, ftw=1, data=b"\x55\x55")
    assert (made.stop, made.vector, made.memory[DATA][:2]) == ("exception", 16, b"\x55\x55")
    assert made.registers["ftw"] == 1


def test_fnsave_and_frstor_are_inverse() -> None:
    numbers = {f"fpr{index}": from_integer(index + 1, 8) for index in range(8)}
    made = run("fnsave [rbx]", "frstor [rbx]", fsw=5 << 11, ftw=0xF7, fcw=0x27F, **numbers)
    for name, number in numbers.items():
        assert made.registers[name] == number
    assert (made.registers["fsw"], made.registers["ftw"], made.registers["fcw"]) == (5 << 11, 0xF7, 0x27F)


@pytest.mark.parametrize(("word", "loaded"), [(0xFFFF, 0x1F7F), (0, 0x40)])
def test_reserved_bits_of_the_control_word_do_not_change(word: int, loaded: int) -> None:
    assert run("fldcw word [rbx]", data=word.to_bytes(2, "little")).registers["fcw"] == loaded


def test_fxsave_has_the_registers_from_the_top_of_the_stack() -> None:
    made = run("fxsave [rbx]", fsw=5 << 11, fpr5=0x1234, ymm3=0xABC, mxcsr=0x1FBF)
    image = made.memory[DATA]
    assert int.from_bytes(image[32:42], "little") == 0x1234
    assert int.from_bytes(image[160 + 48 : 160 + 64], "little") == 0xABC
    assert int.from_bytes(image[24:28], "little") == 0x1FBF


def test_xsave_writes_what_was_asked_for_and_xrstor_initializes_the_rest() -> None:
    made = run("xsave [rbx]", "xrstor [rbx]", rax=4, ymm1=5 << 128 | 7)
    image = made.memory[DATA]
    assert (image[512], image[576 + 16], image[160 + 16]) == (4, 5, 0)
    assert made.registers["ymm1"] == 5 << 128 | 7
    # SSE is not in the image, so asking for it back clears it.
    again = run("xsave [rbx]", "mov eax, 6", "xrstor [rbx]", rax=4, ymm1=5 << 128 | 7)
    assert again.registers["ymm1"] == 5 << 128


@pytest.mark.parametrize("line", ["fxsave [rbx+8]", "xsave [rbx+16]", "movaps xmm0, [rbx+8]"])
def test_save_areas_are_aligned(line: str) -> None:
    assert run(line).vector == 13


@pytest.mark.parametrize(("line", "vector"), [("fld1", 7), ("movups xmm0, [rbx]", 7), ("fxsave [rbx]", 7)])
def test_task_switched_is_nm(line: str, vector: int) -> None:
    assert run(line, cr0=0x9).vector == vector


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.floats(allow_nan=False), st.sampled_from([NEAREST, DOWN, UP, ZERO]))
def test_a_double_survives_the_stack(number: float, rounding: int) -> None:
    bits = struct.unpack("<Q", struct.pack("<d", number))[0]
    assert narrow(widen(bits, 11, 52)[0], 11, 52, rounding)[0] == bits


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.sampled_from([2, 4, 8]))
def test_an_integer_survives_the_stack_or_is_indefinite(number: int, size: int) -> None:
    result, flags = to_integer(from_integer(number % (1 << 64), 8), size, NEAREST)
    bits = 8 * size
    if -(1 << (bits - 1)) <= number < 1 << (bits - 1):
        assert (result, flags) == (number % (1 << bits), 0)
    else:
        assert (result, flags) == (1 << (bits - 1), 1)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(0x3FFF - 3, 0x3FFF + 20), st.integers(1 << 63, (1 << 64) - 1), st.booleans())
def test_integer_stores_round_as_asked(exponent: int, significand: int, negative: bool) -> None:
    extended = negative << 79 | exponent << 64 | significand
    number = value(extended)
    expected = {NEAREST: round(number), DOWN: math.floor(number), UP: math.ceil(number), ZERO: math.trunc(number)}
    for rounding, integer in expected.items():
        assert to_integer(extended, 4, rounding)[0] == integer % (1 << 32)


NAN = 0xFFFFC000000000000000
ONE = 0x3FFF8000000000000000
INVALID_STACK = 0x41
UNMASKED = 0x37E
"""FCW with the invalid-operation exception unmasked."""


def test_the_load_of_an_empty_register_pushes_the_default_nan() -> None:
    made = run("fld st0")
    assert (made.registers["fpr7"], made.registers["fsw"]) == (NAN, 7 << 11 | INVALID_STACK)


@pytest.mark.parametrize(
    ("size", "bits", "pushed", "status"),
    [
        ("dword", 0x7F800001, 0x7FFFC000010000000000, 1),
        ("qword", 0x7FF0000000000001, 0x7FFFC000000000000800, 1),
        ("dword", 0xFFC00000, 0xFFFFC000000000000000, 0),
        ("qword", 0x7FF0000000000000, 0x7FFF8000000000000000, 0),
        ("dword", 1, 0x3F6A8000000000000000, 2),
        ("qword", 1, 0x3BCD8000000000000000, 2),
        ("dword", 0x80000000, 0x80000000000000000000, 0),
    ],
    ids=["SNaN", "SNaN double", "QNaN", "infinity", "denormal", "denormal double", "minus zero"],
)
def test_loads_widen_and_raise_what_they_should(size: str, bits: int, pushed: int, status: int) -> None:
    made = run(f"fld {size} [rbx]", data=bits.to_bytes(8, "little"))
    assert (made.registers["fpr7"], made.registers["fsw"] & 0x3F) == (pushed, status)


def test_an_unmasked_invalid_operation_pushes_nothing() -> None:
    made = run("fld dword [rbx]", data=b"\x01\0\x80\x7f", fcw=UNMASKED, ftw=0)
    assert (made.registers["ftw"], made.registers["fsw"] >> 11 & 7, made.registers["fsw"] & 0x80) == (0, 0, 0x80)


def test_an_exchange_with_an_empty_register_exchanges_the_default_nan() -> None:
    made = run("fxch st1", fpr0=ONE, ftw=1)
    assert (made.registers["fpr0"], made.registers["fpr1"], made.registers["ftw"]) == (NAN, ONE, 3)
    stopped = run("fxch st1", fpr0=ONE, ftw=1, fcw=UNMASKED)
    assert (stopped.registers["fpr0"], stopped.registers["ftw"]) == (ONE, 1)


@pytest.mark.parametrize("line", ["fchs", "fabs"])
def test_the_sign_of_an_empty_register_is_that_of_the_default_nan(line: str) -> None:
    assert run(line).registers["fpr0"] == NAN
    assert run(line, fcw=UNMASKED).registers["ftw"] == 0
    assert run(line, fpr0=ONE | 1 << 79, ftw=1, fsw=0x200).registers["fsw"] == 0


def test_a_register_store_from_an_empty_stack_stores_the_default_nan_if_masked() -> None:
    assert run("fst st3").registers["fpr3"] == NAN
    assert run("fst st3", fcw=UNMASKED).registers["ftw"] == 0


def test_wait_looks_for_a_switched_task_and_a_pending_exception() -> None:
    assert run("wait", cr0=0xB).vector == 7
    assert run("wait", cr0=0x9).stop == "end"
    assert run("wait", fsw=0x81, fcw=UNMASKED).vector == 16


@pytest.mark.parametrize(
    ("extended", "single"),
    [
        (0x407F8000000000000000, 0x7F800000),
        (0x407EFFFFFF8000000000, 0x7F800000),
        (0x3F818000000000000000, 0x00800000),
        (0x3F80FFFFFF8000000000, 0x00800000),
        (0x3F808000000000000000, 0x00400000),
        (0x3FFF0000000000000001, 0xFFC00000),
        (0x7FFF8000000000000001, 0x7FC00000),
        (0x00018000000000000001, 0),
    ],
    ids=["too large", "rounds to infinity", "least normal", "rounds to normal", "denormal", "unnormal", "SNaN", "tiny"],
)
def test_a_store_narrows(extended: int, single: int) -> None:
    made = run("fstp dword [rbx]", fpr0=extended, ftw=1)
    assert int.from_bytes(made.memory[DATA][:4], "little") == single


UNDERFLOW, INEXACT = 0x10, 0x20


@pytest.mark.parametrize(
    ("extended", "single", "flags"),
    [
        (0x3F7F8000000000000000, 0x00200000, 0),
        (0x3F7F8000000000000001, 0x00200000, UNDERFLOW | INEXACT),
        (0x3F80FFFFFF0000000000, 0x00800000, UNDERFLOW | INEXACT),
        (0x3F80FFFFFF8000000000, 0x00800000, INEXACT),
    ],
    ids=["exact", "inexact", "rounds to normal as a denormal", "rounds to normal"],
)
def test_tininess_is_detected_after_rounding_to_full_precision(extended: int, single: int, flags: int) -> None:
    made = run("fstp dword [rbx]", fpr0=extended, ftw=1)
    assert int.from_bytes(made.memory[DATA][:4], "little") == single
    assert made.registers["fsw"] & (UNDERFLOW | INEXACT) == flags


@pytest.mark.parametrize(
    ("rounding", "single"), [(NEAREST, 0x7F800000), (DOWN, 0x7F7FFFFF), (UP, 0x7F800000), (ZERO, 0x7F7FFFFF)]
)
def test_an_overflow_is_infinity_or_the_largest_number_as_fcw_rounds(rounding: int, single: int) -> None:
    made = run("fstp dword [rbx]", fpr0=0x407F8000000000000000, ftw=1, fcw=0x37F | rounding << 10)
    assert int.from_bytes(made.memory[DATA][:4], "little") == single
    assert made.registers["fsw"] & 0x28 == 0x28


@pytest.mark.parametrize(
    ("extended", "stored"),
    [(0x403F8000000000000000, 0x8000), (0x400E8000000000000000, 0x8000), (0xC00E8000000000000000, 0x8000),
     (0x7FFF8000000000000000, 0x8000), (0x3F008000000000000000, 0), (0x3FFEC000000000000000, 1)],
)  # fmt: skip
def test_an_integer_store_rounds_and_answers_the_indefinite(extended: int, stored: int) -> None:
    made = run("fistp word [rbx]", fpr0=extended, ftw=1)
    assert int.from_bytes(made.memory[DATA][:2], "little") == stored
