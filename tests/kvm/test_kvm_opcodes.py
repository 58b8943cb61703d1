"""Which encodings KVM's emulator has (emulate.c:opcode_table, twobyte_table, opcode_map_0f_38), row by row."""

from __future__ import annotations

import pytest

from mmufuzz.kvm.emulate_decode import decode
from mmufuzz.kvm.emulate_handlers import EXECUTE, cannot_emulate
from mmufuzz.kvm.emulate_ops import EmulationFailed

# Samples in 64-bit code; memory operands are [rax].
KNOWN = """
0000 0801 1000 1818 2000 2828 3030 3838 50 58 6800000000 6a00 8f00 ff30 6300 690000000000 6b0000 f628 0fafc0 6c 6e
e400 ee 7000 0f8000000000 e000 e100 e200 e300 e800000000 e900000000 eb00 800000 830000 8400 a800 f60000 f60800 8600 90
93 f390 8900 8b00 b000 c60000 c7000000000000 8c00 8e00 8d00 98 99 9c 9d 9e 9f a4 a5 a6 a7 aa ab ac ad ae af c000ff
d320 c3 c20000 cb ca0000 c8000000 c9 d7 d938 dbe3 dd38 f4 f5 f8 f9 fa fb fc fd f610 f618 f620 f628 f630 f638 fe00 ff08
ff10 ff20 ff18 ff28 0f0000 0f0008 0f0010 0f0018 0f0100 0f0108 0f0110 0f0118 0f0120 0f0130 0f0138 0f01d1 0f05 0f34 0f35
0f06 0f08 0f09 0f0d00 0f1800 0f1f00 0f1000 660f1000 0f1100 660f1100 0f2000 0f22c0 0f21c0 0f23c0 0f2800 660f2900 0f2b00
660f2b00 0f30 0f31 0f32 0f33 0f4000 0f9000 0f6f00 660f6f00 f30f6f00 0f7f00 660f7f00 f30f7f00 660fe700 0fa0 0fa1 0fa8
0fa9 0fb200 0fb400 0fb500 0fa2 0fa300 0fab00 0fb300 0fbb00 0fba2000 0fba2800 0fa40000 0fa500 0fac0000 0fad00 0fae38
660fae38 0fb000 0fb100 0fc000 0fc100 0fb600 0fb700 0fbe00 0fbf00 0fbc00 0fbd00 f30fbc00 f30fbd00 0fc8 0fc300 0fc708
480fc708 f30fc7f8 0f38f000 0f38f100 660f38f000
"""
UNKNOWN = """
9b d900 d910 d918 db28 db38 dd10 dd18 d930 dd30 df00 df20 df30 dfe0 f1 0f0020 0f0028 0f01ca 0f01cb 0f01f8 0f01f9 0f01ee
0f01ef 0f0200 0f0300 0f07 0f0b 0f19c0 0f1c00 0f1d00 0f1ec8 f30f1000 f20f1000 f30f1100 f20f1100 0f1200 0f1300 0f1600
0f1700 660f1200 660f1300 f30f1200 0f6e00 660f6e00 0f7e00 660f7e00 f30f7e00 660fd600 0fe700 0ff7c0 660ff7c0 f20ff000
0f77 0fae10 0fae18 0fae20 0fae28 0fae30 0faee8 0faef0 0faef8 660fae30 f30faec0 f30fb800 0fc720 f20f38f000 f20f38f100
660f38f600 0f38f900 c5f81000 c5f81100 c5fe7f00 c5f97f00 c4e278f2c0 c4e279f7c0 c4e37bf0c000
"""


def samples(text: str) -> list[bytes]:
    return [bytes.fromhex(word) for word in text.split()]


def known(code: bytes, bits: int = 64) -> bool:
    """The tables have an entry, and the entry a function."""
    try:
        return EXECUTE[decode(code, bits).entry.operation] is not cannot_emulate
    except EmulationFailed:
        return False


@pytest.mark.parametrize("code", samples(KNOWN), ids=bytes.hex)
def test_the_emulator_has_an_entry(code: bytes) -> None:
    assert known(code)


@pytest.mark.parametrize("code", samples(UNKNOWN), ids=bytes.hex)
def test_the_emulator_has_no_entry(code: bytes) -> None:
    assert not known(code)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [(("27", "37", "3f", "6200", "6300"), False), (("2f", "60", "61", "d400", "d500", "d6", "c500", "06", "1f"), True)],
    ids=["unknown", "known"],
)
def test_entries_of_32_bit_code(texts: tuple[str, ...], expected: bool) -> None:
    assert [known(bytes.fromhex(text), 32) for text in texts] == [expected] * len(texts)


@pytest.mark.parametrize(("text", "name"), [("f30fbcc1", "bsf"), ("f30fbdc1", "bsr"), ("0fbcc1", "bsf")])
def test_tzcnt_and_lzcnt_are_taken_for_bsf_and_bsr(text: str, name: str) -> None:
    assert decode(bytes.fromhex(text), 64).name == name


@pytest.mark.parametrize("text", ["660ff30f38f000", "f2660f1000", "66f30f6f00"])
def test_two_mandatory_prefixes_are_one_too_many(text: str) -> None:
    assert not known(bytes.fromhex(text))


@pytest.mark.parametrize(
    ("code", "sizes"),
    [("50", (8, 8)), ("6650", (2, 8)), ("66eb00", (8, 8)), ("6789c0", (4, 4)), ("66480fc300", (8, 8))],
)
def test_operand_and_address_sizes_in_64_bit_code(code: str, sizes: tuple[int, int]) -> None:
    insn = decode(bytes.fromhex(code), 64)
    assert (insn.op_bytes, insn.ad_bytes) == sizes


def test_a_rex_prefix_counts_only_before_the_opcode() -> None:
    assert decode(bytes.fromhex("486689c0"), 64).op_bytes == 2
    assert decode(bytes.fromhex("664889c0"), 64).op_bytes == 8


def test_the_last_segment_prefix_counts() -> None:
    assert decode(bytes.fromhex("64268b00"), 64).segment == 0
    assert decode(bytes.fromhex("26648b00"), 64).segment == 4
