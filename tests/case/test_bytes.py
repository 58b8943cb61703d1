"""The bytes form: total, lossless, and stable under small changes."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from mmufuzz.case.bytes import HEADER, MAGIC, RECORD, decode, decode_strict, encode
from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case, Slot, Vcpu
from mmufuzz.case.repair import repair
from mmufuzz.case.validate import validate

SMALL = Case(slots=(Slot(0, 4),), vcpus=(Vcpu("flat32", code_gva=0x1000, code_gfn=1, program=(b"\x90",)),))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(cases())
def test_every_valid_case_survives_encoding(case: Case) -> None:
    validate(case)
    assert decode(encode(case)) == case
    assert decode_strict(encode(case), "file") == case
    assert repair(case) == case


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.binary(max_size=40 * RECORD))
def test_any_bytes_decode_to_a_valid_case(data: bytes) -> None:
    case = decode(data)
    validate(case)
    assert decode(encode(case)) == case


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 12), st.binary(min_size=RECORD - 1, max_size=RECORD - 1)), max_size=40))
def test_any_records_of_known_types_decode_to_a_valid_case(records: list[tuple[int, bytes]]) -> None:
    case = decode(bytes(HEADER) + b"".join(bytes([kind]) + rest for kind, rest in records))
    validate(case)
    assert decode(encode(case)) == case


@settings(derandomize=True, deadline=None, max_examples=150)
@given(cases(), st.data())
def test_one_changed_byte_leaves_most_of_the_case(case: Case, data: st.DataObject) -> None:
    encoded = bytearray(encode(case))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    changed = decode(bytes(encoded))
    validate(changed)
    kind = case_record_kind(encode(case), place)
    if kind not in ("slot", "vcpu", "host"):  # what other records refer to
        after = case_record_kind(bytes(encoded), place)
        if after not in ("slot", "vcpu", "host"):
            same = sum(getattr(case, field.name) == getattr(changed, field.name) for field in fields(Case))
            # An OPTIONS record fills three fields; turned into a record of another type it changes a fourth.
            assert same >= len(fields(Case)) - 4


def case_record_kind(encoded: bytes, place: int) -> str:
    if place < HEADER:
        return "header"
    start = place - (place - HEADER) % RECORD
    return {2: "slot", 4: "vcpu", 7: "host"}.get(encoded[start] & 15, "other")


def test_the_tail_and_unknown_records_are_ignored() -> None:
    assert decode(encode(SMALL) + b"\x0f" * RECORD + b"\x03" * (RECORD - 1)) == SMALL


def test_a_garbled_header_does_not_matter() -> None:
    assert decode(b"\xff" * HEADER + encode(SMALL)[HEADER:]) == SMALL


def test_no_bytes_give_one_idle_vcpu_and_default_memory() -> None:
    case = decode(b"")
    assert case.slots == (Slot(0, 32),)
    assert [vcpu.mode for vcpu in case.vcpus] == ["flat32"]


def test_decoding_can_be_bounded() -> None:
    assert decode(encode(SMALL), 2).vcpus[0].program == ()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "starts with MMUZ"),
        (b"ELF!" + bytes(100), "starts with MMUZ"),
        (MAGIC, "truncated"),
        (MAGIC + b"\x02\x00" + bytes(6), "version 1, got 2"),
        (encode(SMALL)[:-1], "expected 4 records, got 3"),
    ],
)
def test_files_that_are_not_whole_cases_are_refused(data: bytes, expected: str) -> None:
    with pytest.raises(CaseError, match=expected) as error:
        decode_strict(data, "a.case")
    assert error.value.place == "a.case"
