"""Labels and deviations as text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import deviations, labels

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case, HostThread, Vcpu
from mmufuzz.case.text import (
    deviation_line,
    deviation_text,
    label_text,
    parse_deviation,
    parse_label,
    thread_names,
)
from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, COUNT_STORE, EMUL_STORE, GPTE_LOAD, GUEST_STORE, N_SITES, VCPU_ENTRY, label

CASE = Case(vcpus=(Vcpu("flat32"), Vcpu("long4")), host=(HostThread(),))
NAMES = ("vcpu0", "vcpu1", "host0")
STORE = label(0, 0, EMUL_STORE, 1)
LOAD = label(1, 0, GPTE_LOAD, 2)
ENTRY = label(0, 1, VCPU_ENTRY, 1)
WORDS = ("after", "run", "hold", "until", "evict", "fill", "vcpu0", "start", "vcpu0@0.emul.store", "1", "0x", "²")


def test_vcpus_come_before_host_threads() -> None:
    assert thread_names(CASE) == NAMES


@pytest.mark.parametrize(
    ("deviation", "text"),
    [
        (
            Deviation(RUN, label(1, 0, COUNT_STORE, 1), 0),
            "after vcpu1@0.indirect_shadow_pages.store 1 run vcpu0",
        ),
        (Deviation(RUN, BOOT, 2), "after start run host0"),
        (Deviation(HOLD, STORE, 0, LOAD), "hold vcpu0@0.emul.store 1 until vcpu1@0.gpte.load 2"),
        (Deviation(HOLD, STORE), "hold vcpu0@0.emul.store 1"),
        (Deviation(EVICT, ENTRY, 0, BOOT, 0x5000), "evict vcpu0 0x5000 after vcpu0@1.vcpu.entry 1"),
        (Deviation(FILL, ENTRY, 1, BOOT, 0), "fill vcpu1 0x0 after vcpu0@1.vcpu.entry 1"),
    ],
)
def test_deviations_read_as_sentences(deviation: Deviation, text: str) -> None:
    assert deviation_text(deviation, CASE) == text
    assert parse_deviation(text, NAMES) == deviation


@settings(derandomize=True, deadline=None, max_examples=200)
@given(labels(3, st.integers(0, N_SITES - 1)))
def test_every_label_survives_its_text(packed: int) -> None:
    assert parse_label(label_text(packed, NAMES), NAMES) == packed


@settings(derandomize=True, deadline=None, max_examples=200)
@given(deviations(2, 1))
def test_every_deviation_survives_its_text(deviation: Deviation) -> None:
    assert parse_deviation(deviation_line(deviation, NAMES), NAMES) == deviation


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(max_size=30) | st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_any_other_text_is_refused_with_a_place(text: str) -> None:
    try:
        deviation = parse_deviation(text, NAMES, "here")
    except CaseError as error:
        assert error.place == "here"
        assert error.expected.startswith("expected ")
    else:
        assert parse_deviation(deviation_line(deviation, NAMES), NAMES) == deviation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hold start", "expected the label of a store after 'hold', got 'start'"),
        ("hold vcpu0@0.emul.store 1 until start", "expected the label of an event after 'until', got 'start'"),
        ("evict vcpu0 0x10000000000000000 after start", "expected a 64-bit address"),
        ("run vcpu0", "expected 'after"),
        ("", "expected 'after"),
    ],
)
def test_a_wrong_deviation_is_explained(text: str, expected: str) -> None:
    with pytest.raises(CaseError) as error:
        parse_deviation(text, NAMES, "here")
    assert expected in error.value.expected


def test_labels_out_of_range_can_still_be_printed() -> None:
    assert label_text(label(7, 3, GUEST_STORE, 2), NAMES) == "thread7@3.guest.store 2"
    assert label_text(label(0, 3, 200, 2), NAMES) == "vcpu0@3.site200 2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vcpu0.guest.store 1", "expected a label such as 'vcpu0@2.guest.store 1', or 'start'"),
        ("vcpu0@0.guest.store", "expected a label"),
        ("vcpu2@0.guest.store 1", "expected a thread of this case (vcpu0, vcpu1, host0), got 'vcpu2'"),
        ("vcpu0@0.guest.write 1", "expected the name of a site such as 'guest.store', got 'guest.write'"),
        ("vcpu0@4096.guest.store 1", "expected a step in 0..4095, got '4096'"),
        ("vcpu0@0.guest.store 65536", "expected an occurrence in 1..65535, got '65536'"),
        ("vcpu0@0.guest.store 1_0", "expected an occurrence"),
    ],
)
def test_a_wrong_label_is_explained(text: str, expected: str) -> None:
    with pytest.raises(CaseError) as error:
        parse_label(text, NAMES, "here")
    assert expected in error.value.expected
