"""The decoder against iced-x86, and the rules of prefixes and lengths that it has to keep."""

from __future__ import annotations

import iced_reference as iced
import iced_x86
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.case.encodings import encode
from mmufuzz.case.rng import Rng
from mmufuzz.x86 import decode as decode_module
from mmufuzz.x86.decode import FEP, Truncated, decode
from mmufuzz.x86.executor import supported as executable
from mmufuzz.x86.insn import HIGH8, IMM, MEM, NO_REG, REG, REL, REP_F2, REP_F3, REP_NONE, RIP, Insn, Operand
from mmufuzz.x86.opcodes import FORMS, entries
from mmufuzz.x86.state import NO_ERROR_CODE, VECTOR_GP, VECTOR_UD, Fault

UD = (VECTOR_UD, NO_ERROR_CODE)
GP = (VECTOR_GP, 0)

# Every length class, both opcode maps and VEX; mutation reaches their neighbours.
VALID = [
    "4889440b10", "f0480fc10b", "67668b00", "8d848b78563412", "48b88877665544332211", "a18877665544332211",
    "f3a4", "66f348ab", "0f22d8", "0f0138", "f30f1101", "660f7f4110", "0f2801", "db7908", "dd18", "c5fe7f00",
    "c4417e7f21", "480fc70e", "f00fc708", "83480801", "f0480fba2805", "0f8500010000", "ff10", "8f0424", "6810000000",
    "c20800", "0faef0", "0f1f440000", "6641d3e0", "480fbec4", "63c8", "0f95c4",
]  # fmt: skip

LEGACY_PREFIXES = [0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid instruction with up to three bytes changed."""
    code = bytearray(bytes.fromhex(draw(st.sampled_from(VALID))))
    for place in draw(st.lists(st.integers(0, len(code) - 1), max_size=3)):
        code[place] = draw(st.integers(0, 255))
    return bytes(code) + draw(st.binary(max_size=8))


@st.composite
def prefixed(draw: st.DrawFn) -> bytes:
    """Any prefixes, an opcode of either map, any tail."""
    prefixes = draw(st.lists(st.sampled_from([*LEGACY_PREFIXES, *range(0x40, 0x50)]), max_size=14))
    escape = draw(st.sampled_from([b"", b"\x0f"]))
    return bytes(prefixes) + escape + draw(st.binary(max_size=12))


CODES = st.one_of(st.binary(max_size=18), mutated(), prefixed())


def outcome(code: bytes, mode64: bool = True, fep: bool = False) -> Insn | tuple[int, int] | None:
    """The Insn, (vector, error code) of the fault, or None if the instruction is truncated."""
    try:
        return decode(code, mode64, fep)
    except Truncated:
        return None
    except Fault as fault:
        return (fault.vector, fault.error_code)


def decoded(code: str, mode64: bool = True) -> Insn:
    """The instruction whose bytes, all of them, are ``code``."""
    insn = decode(bytes.fromhex(code), mode64)
    assert insn.length == len(bytes.fromhex(code))
    return insn


def fields(operand: Operand) -> tuple[int, int, int, int]:
    return (operand.kind, operand.size, operand.index, operand.value)


def everything(insn: Insn) -> tuple[object, ...]:
    """All that an Insn says."""
    return (
        insn.mnemonic, insn.length, insn.size, insn.asize, [fields(operand) for operand in insn.operands],
        insn.condition, insn.lock, insn.rep, insn.fep, insn.base, insn.index, insn.scale, insn.displacement,
        insn.opcode_map, insn.opcode, insn.reg_field, insn.prefix,
    )  # fmt: skip


def check_against_iced(code: bytes, mode64: bool) -> None:
    result = outcome(code, mode64)
    decoder = iced.decoder(code, mode64)
    expected = decoder.decode()
    if expected.is_invalid:
        if result is None:
            assert decoder.last_error == iced_x86.DecoderError.NO_MORE_BYTES
        else:
            assert isinstance(result, tuple)
        return
    if not iced.supported(expected):
        assert result == UD or (result is None and len(code) < 15)
        return
    assert isinstance(result, Insn)
    assert result.mnemonic == iced.mnemonic(expected)
    assert result.length == expected.len
    assert result.lock == expected.has_lock_prefix
    assert [fields(operand) for operand in result.operands] == iced.operands(expected, result)
    modulus = 1 << (8 * result.asize)
    place = (result.base, result.index, result.scale, result.displacement % modulus)
    assert (place if result.has_memory else None) == iced.memory(expected, result)
    if result.has_memory:
        assert result.segment == iced.segment(expected, mode64)
    if result.mnemonic in ("jcc", "setcc", "cmovcc"):
        assert result.condition == expected.condition_code - iced_x86.ConditionCode.O


# Against iced-x86.


@settings(derandomize=True, deadline=None, max_examples=3000)
@given(CODES, st.booleans())
def test_agrees_with_iced(code: bytes, mode64: bool) -> None:
    check_against_iced(code, mode64)


@pytest.mark.parametrize("mode64", [False, True])
@pytest.mark.parametrize("escape", ["", "0f"])
def test_agrees_with_iced_on_every_opcode_and_extension(escape: str, mode64: bool) -> None:
    tail = bytes.fromhex("2511223344556677")
    for prefix in ("", "66", "f2", "f3", "f0", "67", "f066", "48" if mode64 else "2e"):
        for opcode in range(256):
            for modrm in (*range(0x04, 0x40, 8), *range(0xC4, 0x100, 8)):
                code = bytes.fromhex(prefix + escape) + bytes([opcode, modrm]) + tail
                check_against_iced(code, mode64)


@pytest.mark.parametrize("mode64", [False, True])
@pytest.mark.parametrize("address_prefix", ["", "67"])
def test_agrees_with_iced_on_every_addressing_form(address_prefix: str, mode64: bool) -> None:
    for rex in ("", "41", "42", "4f") if mode64 else ("",):
        for modrm in range(256):
            for sib in range(256) if modrm in (0x04, 0x44, 0x84) else (0x24,):
                tail = bytes([modrm, sib]) + bytes.fromhex("f1e2d3c4b5")
                check_against_iced(bytes.fromhex(address_prefix + rex + "89") + tail, mode64)


def random_code(rng: Rng, number: int) -> tuple[bytes, bool]:
    """By turns: random bytes; a form of the tables; the same with up to three bytes changed."""
    mode64 = rng.below(2) == 0
    if number % 3 == 0:
        return rng.bytes(15), mode64
    code = bytearray(encode(rng, FORMS[rng.below(len(FORMS))], mode64))
    if number % 3 == 2:
        for _ in range(1 + rng.below(3)):
            code[rng.below(min(len(code), 6))] = rng.below(256)
    return bytes(code[:15]), mode64


def test_agrees_with_iced_on_random_and_mutated_forms() -> None:
    rng = Rng(0)
    for number in range(6000):
        check_against_iced(*random_code(rng, number))


@pytest.mark.oracle
def test_agrees_with_iced_on_a_million_strings() -> None:
    rng = Rng(1)
    for number in range(1_000_000):
        check_against_iced(*random_code(rng, number))


def test_every_decodable_mnemonic_can_be_executed() -> None:
    assert [form.mnemonic for form in FORMS if not executable(form.mnemonic)] == []


# Length.


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(CODES, st.booleans())
def test_bytes_after_the_instruction_do_not_matter(code: bytes, mode64: bool) -> None:
    result = outcome(code, mode64)
    if isinstance(result, Insn):
        exact = outcome(code[: result.length], mode64)
        assert isinstance(exact, Insn)
        assert everything(exact) == everything(result)


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(CODES, st.booleans())
def test_a_proper_part_of_an_instruction_is_truncated(code: bytes, mode64: bool) -> None:
    result = outcome(code, mode64)
    if isinstance(result, Insn):
        assert all(outcome(code[:length], mode64) is None for length in range(result.length))


@settings(derandomize=True, deadline=None, max_examples=1000)
@given(CODES, st.binary(min_size=1, max_size=8), st.booleans())
def test_more_bytes_do_not_change_a_fault(code: bytes, more: bytes, mode64: bool) -> None:
    result = outcome(code, mode64)
    if isinstance(result, tuple):
        assert outcome(code + more, mode64) == result


def test_fifteen_bytes_are_the_most() -> None:
    assert decoded("66" * 14 + "90").length == 15
    assert outcome(b"\x66" * 15 + b"\x90") == GP


def test_a_long_instruction_is_truncated_until_fifteen_bytes_are_given() -> None:
    code = bytes.fromhex("2e" * 8 + "48b8" + "1122334455667788")
    assert outcome(code[:14]) is None
    assert outcome(code[:15]) == GP


# Prefixes.


def test_rex_counts_only_directly_before_the_opcode() -> None:
    assert decoded("4866b80000").operands[0].size == 2
    assert decoded("6648b80000000000000000").operands[0].size == 8


def test_rex_w_overrides_the_operand_size_prefix() -> None:
    assert decoded("664889c8").size == 8


def test_rex_bytes_are_inc_and_dec_in_32_bit_code() -> None:
    assert [decoded(code, False).mnemonic for code in ("40", "48")] == ["inc", "dec"]


def test_the_last_repeat_prefix_wins() -> None:
    assert decoded("f2f3a4").rep == REP_F3
    assert decoded("f3f2a4").rep == REP_F2


def test_a_mandatory_prefix_is_no_repeat_prefix() -> None:
    store = decoded("f30f1101")
    assert (store.prefix, store.rep) == (0xF3, REP_NONE)


def test_a_repeat_prefix_outranks_66_as_mandatory_prefix() -> None:
    assert [decoded(code).mnemonic for code in ("660f6f00", "66f30f6f00")] == ["movdqa", "movdqu"]


@pytest.mark.parametrize("code", ["f00108", "f0480fc70e", "f08700", "f00fab08", "f0f610"])
def test_lock_is_allowed_with_a_memory_destination(code: str) -> None:
    assert decoded(code).lock


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("f001c8", "register destination"),
        ("f00308", "memory is the source"),
        ("f08908", "MOV"),
        ("f03908", "CMP"),
        ("f00fa308", "BT"),
        ("f0d120", "shift"),
        ("f090", "NOP"),
        ("f0a4", "MOVS"),
    ],
)
def test_lock_is_undefined_elsewhere(code: str, why: str) -> None:
    assert outcome(bytes.fromhex(code)) == UD, why


@pytest.mark.parametrize("prefix", ["66", "f2", "f3", "f0", "48"])
def test_vex_takes_no_operand_repeat_lock_or_rex_prefix(prefix: str) -> None:
    assert outcome(bytes.fromhex(prefix + "c5fe7f00")) == UD


def test_vex_with_a_register_that_the_instruction_lacks_is_undefined() -> None:
    assert decoded("c5fe7f00").operands[1].size == 32
    assert outcome(bytes.fromhex("c5ee7f00")) == UD


def test_les_and_lds_are_not_vex() -> None:
    assert decoded("c57e7f", False).mnemonic == "lds"
    assert decoded("c5fe7f00", False).mnemonic == "vmovdqu"


# The forced-emulation prefix.


def test_forced_emulation_prefix_is_recognised_only_on_request() -> None:
    code = FEP + b"\x89\x08"
    plain, forced = decode(code, True), decode(code, True, fep=True)
    assert (plain.mnemonic, plain.length, plain.fep) == ("ud2", 2, False)
    assert (forced.mnemonic, forced.length, forced.fep) == ("mov", 7, True)


def test_forced_emulation_prefix_does_not_count_against_fifteen_bytes() -> None:
    assert decode(FEP + b"\x66" * 14 + b"\x90", True, fep=True).length == 20
    assert outcome(FEP + b"\x66" * 15, fep=True) == GP


def test_forced_emulation_prefix_counts_once() -> None:
    assert decode(FEP + FEP, True, fep=True).mnemonic == "ud2"


def test_an_incomplete_forced_emulation_prefix_is_ud2() -> None:
    assert decode(FEP[:4], True, fep=True).mnemonic == "ud2"


# Single instructions.


def test_exchange_of_the_accumulator_with_itself_is_nop() -> None:
    names = [decoded(code).mnemonic for code in ("90", "4890", "4190", "f390", "f34190")]
    assert names == ["nop", "nop", "xchg", "nop", "nop"]


def test_long_nop_accesses_no_memory() -> None:
    assert not decoded("0f1f440000").has_memory


@pytest.mark.parametrize(
    ("code", "known"), [("0f20c0", True), ("0f20c8", False), ("0f20e0", True), ("440f20c0", True), ("440f20c8", False)]
)
def test_control_registers_are_0_2_3_4_and_8(code: str, known: bool) -> None:
    assert isinstance(outcome(bytes.fromhex(code)), Insn) == known


@pytest.mark.parametrize("code", ["0f01ca", "0f01cb", "0f01d0", "0f01d1", "0f01ee", "0f01ef"])
def test_instructions_that_a_whole_modrm_names_take_no_mandatory_prefix(code: str) -> None:
    assert isinstance(outcome(bytes.fromhex(code)), Insn)
    for prefix in ("66", "f2", "f3"):
        assert outcome(bytes.fromhex(prefix + code)) == UD
        check_against_iced(bytes.fromhex(prefix + code), True)


def test_mov_cr_ignores_mod_and_operand_size() -> None:
    (register, control) = decoded("660f2018").operands
    assert (register.kind, register.size, register.index, control.index) == (REG, 8, 0, 3)


def test_byte_registers_4_to_7_depend_on_rex() -> None:
    assert fields(decoded("88e0").operands[1]) == (HIGH8, 1, 0, 0)
    assert fields(decoded("4088e0").operands[1]) == (REG, 1, 4, 0)


def test_short_immediates_are_sign_extended() -> None:
    assert fields(decoded("48830880").operands[1]) == (IMM, 8, 0, 0xFFFF_FFFF_FFFF_FF80)
    assert fields(decoded("c00880").operands[1]) == (IMM, 1, 0, 0x80)


def test_moffs_has_a_full_address_and_no_base() -> None:
    insn = decoded("a1f0ffffffffffffff")
    assert (insn.base, insn.index, insn.displacement) == (NO_REG, NO_REG, 0xFFFF_FFFF_FFFF_FFF0)
    assert decoded("67a1f0ffffff").displacement == 0xFFFF_FFF0


def test_rip_relative_addressing_exists_only_in_64_bit_code() -> None:
    assert decoded("8b0510000000").base == RIP
    assert decoded("8b0510000000", False).base == NO_REG


def test_near_branches_ignore_the_operand_size_prefix_in_64_bit_code() -> None:
    assert fields(decoded("66e800000080").operands[0]) == (REL, 8, 0, -0x8000_0000)
    assert fields(decoded("66e80080", False).operands[0]) == (REL, 2, 0, -0x8000)


def test_stack_operands_are_8_or_2_bytes_in_64_bit_code() -> None:
    assert [decoded(code).size for code in ("50", "6650", "4850", "ff30")] == [8, 2, 8, 8]


def test_addresses_that_are_not_accessed_have_size_0() -> None:
    assert fields(decoded("488d03").operands[1]) == (MEM, 0, 0, 0)
    assert fields(decoded("0f013b").operands[0]) == (MEM, 0, 0, 0)


@pytest.mark.parametrize(
    ("code", "identity"),
    [
        ("8908", (0, 0x89, 1, 0)),
        ("b000", (0, 0xB0, -1, 0)),
        ("838a0000000001", (0, 0x83, 1, 0)),
        ("0fc708", (1, 0xC7, 1, 0)),
        ("66410f7f00", (1, 0x7F, 0, 0x66)),
        ("66418900", (0, 0x89, 0, 0)),
        ("c5fe7f00", (4, 0x7F, 0, 0xF3)),
    ],
)
def test_opcode_identity(code: str, identity: tuple[int, int, int, int]) -> None:
    insn = decoded(code)
    assert (insn.opcode_map, insn.opcode, insn.reg_field, insn.prefix) == identity


# The tables.


def test_the_entries_of_all_modes_are_the_whole_table() -> None:
    assert {form.number for bits in (64, 32, 16) for form in entries(bits)} == set(range(len(FORMS)))
    assert [form.number for form in FORMS] == list(range(len(FORMS)))


def test_entries_that_a_mode_lacks_are_not_expected_there() -> None:
    names = {bits: {form.mnemonic for form in entries(bits)} for bits in (64, 32, 16)}
    assert "daa" in names[32] and "daa" not in names[64]
    assert "syscall" in names[64] and "syscall" not in names[32]
    assert "cmpxchg16b" in names[64] and "cmpxchg16b" not in names[16]


# The cache.


def test_cached_and_fresh_answers_are_equal() -> None:
    codes = [bytes([0x83, 0xC0, number & 255, number >> 8]) for number in range(5000)]
    first = [everything(decode(code, True)) for code in codes]
    assert [everything(decode(code, True)) for code in codes] == first
    assert len(decode_module._cache64) <= 4096
