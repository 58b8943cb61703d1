"""Edits that merge page tables or carry over what a deleted step did."""

from __future__ import annotations

from dataclasses import replace

from mmufuzz.case.model import Case, HostThread, Slot, Vcpu, Word
from mmufuzz.case.tables import A, P, U, W, entry
from mmufuzz.host.deviation import RUN, Deviation
from mmufuzz.host.sites import EMUL_ATOMIC, EMUL_STORE, GPTE_LOAD, label
from mmufuzz.kvm.memslots import gpa_to_hpa
from mmufuzz.search.edits import drop_thread, merge_frames, table_levels, vcpu_first
from mmufuzz.search.trace_edits import stored

INTERRUPTED = Case(
    vcpus=(Vcpu("long4"), Vcpu("flat32"), Vcpu("flat32", cpl=3)),
    host=(HostThread(("interrupt vcpu1 0x20", "zap_all_fast", "interrupt vcpu2 0x21")),),
)
TABLE = P | W | U | A
ROOT = 4
CASE = Case(
    slots=(Slot(0, 32),),
    memory=(
        Word(ROOT, 0, entry(5, TABLE)),
        Word(5, 0, entry(6, TABLE)),
        Word(6, 0, entry(7, TABLE)),
        Word(7, 18, entry(2, TABLE)),
        Word(ROOT, 3, entry(8, TABLE)),
        Word(8, 0, entry(9, TABLE)),
        Word(9, 0, entry(10, TABLE)),
        Word(10, 50, entry(1, TABLE)),
    ),
    vcpus=(Vcpu("long4", cr3=ROOT, program=(b"\x90", b"\x90")),),
)


def test_levels_are_counted_from_the_roots() -> None:
    assert table_levels(CASE) == {ROOT: 4, 5: 3, 8: 3, 6: 2, 9: 2, 7: 1, 10: 1}


def test_merging_two_tables_merges_what_the_same_entries_of_both_lead_to() -> None:
    merged = merge_frames(CASE, 8, 5)
    assert merged.memory == (
        *CASE.memory[:4],
        Word(ROOT, 3, entry(5, TABLE)),
        Word(7, 50, entry(1, TABLE)),
    )


def test_a_root_moves_with_its_table() -> None:
    assert merge_frames(CASE, ROOT, 20).vcpus[0].cr3 == 20


def test_the_interrupts_of_a_deleted_vcpu_go_and_the_others_follow_theirs() -> None:
    after = drop_thread(INTERRUPTED, 1)
    assert after.host == (HostThread(("zap_all_fast", "interrupt vcpu1 0x21")),)


def test_the_labels_of_a_host_thread_follow_when_interrupts_go() -> None:
    run_at = Deviation(RUN, label(3, 1, GPTE_LOAD, 1), 0)
    after = drop_thread(replace(INTERRUPTED, schedule=(run_at,)), 1)
    assert after.schedule == (Deviation(RUN, label(2, 0, GPTE_LOAD, 1), 0),)


def test_interrupts_follow_a_vcpu_that_moves_to_the_front() -> None:
    after = vcpu_first(INTERRUPTED, 2)
    assert after.host == (HostThread(("interrupt vcpu2 0x20", "zap_all_fast", "interrupt vcpu0 0x21")),)


def test_what_a_deleted_step_stored_is_there_from_the_start() -> None:
    old = CASE.memory[3].value
    trace = [
        (label(0, 0, EMUL_STORE, 1), gpa_to_hpa(7 << 12 | 18 << 3 | 7), 0x80),
        (label(0, 0, EMUL_STORE, 2), gpa_to_hpa(11 << 12), 5),
        (label(0, 0, GPTE_LOAD, 1), gpa_to_hpa(12 << 12), 6),
        (label(0, 1, EMUL_STORE, 1), gpa_to_hpa(13 << 12), 7),
    ]
    changed = stored(CASE, trace, 0, 0, 1)
    assert set(changed.memory) - set(CASE.memory) == {Word(7, 18, old | 1 << 63), Word(11, 0, 5)}


def test_what_is_next_read_as_an_entry_tells_what_a_locked_store_left() -> None:
    place = gpa_to_hpa(11 << 12)
    trace = [(label(0, 0, EMUL_ATOMIC, 1), place, 0), (label(1, 0, GPTE_LOAD, 1), place, 0x9001)]
    assert set(stored(CASE, trace, 0, 0, 1).memory) - set(CASE.memory) == {Word(11, 0, 0x9001)}
