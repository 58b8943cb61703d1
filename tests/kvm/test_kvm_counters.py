"""Semantic counters: the table's layout, and that runs count what the blocks say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from machines import CODE2, DATA, Machine, gva, long4, usual
from machines import run as run_machine

from mmufuzz.case import toml
from mmufuzz.host.sites import (
    COUNT_LOAD,
    COUNT_STORE,
    EMUL_STORE,
    GPTE_LOAD,
    GUEST_STORE,
    N_SITES,
    SITE_NAMES,
    SPTE_ATOMIC,
    label,
)
from mmufuzz.host.trace import Trace
from mmufuzz.kvm import counters, exits
from mmufuzz.kvm.counters import (
    BLOCKS,
    BOTH_MISSED,
    BUFFERED_BOOKS,
    COUNT_ZERO,
    EXITS,
    HALF_SPENT,
    LOCK_STATES,
    N_COUNTERS,
    NEAR_BLOCK,
    NEAR_MISSES,
    PAGE_BLOCK,
    PAIR_BLOCK,
    RET_PF,
    RETRIES,
    RETRY_BLOCK,
    RETRY_GUARD,
    STALE_HARDWARE,
    STALLS,
    STATE_AGAIN,
    STORE_IN_FLIGHT,
    UNTRACKED_STORE,
    WRITABLE_TLB,
    Counters,
    describe,
    stall_class,
)
from mmufuzz.kvm.fetch import RET_PF_NAMES
from mmufuzz.kvm.marks import MARKS
from mmufuzz.oracle.interleaving import count_interleavings
from mmufuzz.outcome import Outcome
from mmufuzz.run import run

REGRESSIONS = Path(__file__).resolve().parents[2] / "corpus" / "regressions"


def outcome_of(name: str) -> Outcome:
    """A run of a Case in corpus/regressions."""
    return run(toml.load(REGRESSIONS / f"{name}.toml"))


def test_the_blocks_fill_the_table_one_behind_the_other() -> None:
    assert BLOCKS[0].base == 0
    for one, other in pairwise(BLOCKS):
        assert one.base + one.size == other.base
    assert BLOCKS[-1].base + BLOCKS[-1].size == N_COUNTERS


def test_every_counter_has_words_of_its_own() -> None:
    assert len({describe(index) for index in range(N_COUNTERS)}) == N_COUNTERS
    with pytest.raises(IndexError):
        describe(N_COUNTERS)


def test_an_index_is_where_its_words_say() -> None:
    index = PAIR_BLOCK.at(COUNT_STORE, COUNT_LOAD, 1, 0)
    assert describe(index) == (
        "interleaving: indirect_shadow_pages.store, indirect_shadow_pages.load, missed, lower thread first"
    )
    assert index == PAIR_BLOCK.base + ((COUNT_STORE * N_SITES + COUNT_LOAD) * 2 + 1) * 2


def test_the_axes_are_what_the_model_has() -> None:
    assert RET_PF == RET_PF_NAMES
    assert BLOCKS[0].axes == (MARKS,)
    reasons = [value for name, value in vars(exits).items() if name.startswith("EXIT_")]
    assert sorted(reasons) == sorted(EXITS)


def test_each_decision_has_one_constant() -> None:
    constants = [value for name, value in vars(counters).items() if name.startswith("RETRY_")]
    positions = [value for value in constants if isinstance(value, int)]
    assert sorted(positions) == list(range(len(RETRIES)))


def test_stalls_are_counted_in_classes() -> None:
    assert [STALLS[stall_class(entries)] for entries in (1, 4, 5, 8, 9, 16, 17, 10**6)] == [
        "1", "4", "5 to 8", "5 to 8", "9 to 16", "9 to 16", "more", "more",
    ]  # fmt: skip


WORD = 0x5000


def recorded(*events: tuple[int, int, int, int]) -> Trace:
    """A trace of (thread, site, address, value)."""
    trace = Trace()
    for thread, site, address, value in events:
        trace.event(label(thread, 0, site, 1))
        trace.detail(label(thread, 0, site, 1), address, value)
    return trace


def pairs(*events: tuple[int, int, int, int]) -> list[str]:
    """The interleavings of a trace of (thread, site, address, value), each in words."""
    made = Counters()
    count_interleavings(recorded(*events), 2, made)
    return [", ".join(PAIR_BLOCK.values(index)) for index in made.hits if index >= PAIR_BLOCK.base]


def test_a_pair_is_two_threads_at_a_word_that_one_of_them_writes() -> None:
    store, load = (0, COUNT_STORE, WORD, 1), (1, COUNT_LOAD, WORD, 1)
    names = f"{SITE_NAMES[COUNT_STORE]}, {SITE_NAMES[COUNT_LOAD]}"
    assert pairs(store, load) == [f"{names}, seen, lower thread first"]
    assert pairs((1, GPTE_LOAD, WORD, 1), (0, GPTE_LOAD, WORD, 1)) == []
    assert pairs(store, (0, COUNT_LOAD, WORD, 1)) == []
    assert pairs(store, (1, COUNT_LOAD, WORD + 8, 1)) == []


def test_the_two_orders_of_a_pair_are_two_counters() -> None:
    store, load = (0, COUNT_STORE, WORD, 1), (1, COUNT_LOAD, WORD, 1)
    (one,) = pairs(store, load)
    (other,) = pairs(load, store)
    assert one != other
    (mirrored,) = pairs((1, *store[1:]), (0, *load[1:]))
    assert mirrored not in (one, other)


def test_a_load_that_does_not_read_what_was_stored_missed_it() -> None:
    (missed,) = pairs((0, EMUL_STORE, WORD, 7), (1, GPTE_LOAD, WORD, 0))
    assert "missed" in missed
    # What a locked operation writes is not in the trace: there is nothing to compare with.
    assert all("missed" not in pair for pair in pairs((0, SPTE_ATOMIC, WORD, 7), (1, GPTE_LOAD, WORD, 0)))


def test_two_threads_that_miss_each_other_are_a_near_miss() -> None:
    made = Counters()
    x, y = WORD, WORD + 8
    events = [(0, GUEST_STORE, x, 1), (1, GUEST_STORE, y, 1), (0, GPTE_LOAD, y, 0), (1, GPTE_LOAD, x, 0)]
    count_interleavings(recorded(*events[:3]), 2, made)
    assert NEAR_BLOCK.base + BOTH_MISSED not in made.hits
    count_interleavings(recorded(*events), 2, made)
    assert made.hits[NEAR_BLOCK.base + BOTH_MISSED] == 1


def test_one_thread_has_no_interleavings() -> None:
    made = Counters()
    count_interleavings(recorded((0, COUNT_STORE, WORD, 1), (0, COUNT_STORE, WORD, 1)), 1, made)
    assert made.hits == {}


def near_misses(outcome: Outcome) -> set[str]:
    """Near misses of a run, by name."""
    hits = [index - NEAR_BLOCK.base for index in outcome.counters]
    return {NEAR_MISSES[position] for position in hits if 0 <= position < len(NEAR_MISSES)}


def test_a_run_counts_its_marks_and_exits() -> None:
    outcome = outcome_of("retry-guard-own-page-table")
    for position, name in enumerate(MARKS):
        assert outcome.counters.get(position, 0) == outcome.marks.get(name, 0)
    for position, name in enumerate(EXITS):
        assert outcome.counters.get(len(MARKS) + position, 0) == outcome.exits.get(name, 0)


def test_equal_cases_count_alike() -> None:
    one, other = outcome_of("track-write-barrier-fixed"), outcome_of("track-write-barrier-fixed")
    assert list(one.counters.items()) == list(other.counters.items())
    assert all(0 <= index < N_COUNTERS and count > 0 for index, count in one.counters.items())


NEAR = {
    "track-write-barrier-account": (STALE_HARDWARE, UNTRACKED_STORE, COUNT_ZERO, BUFFERED_BOOKS),
    "track-write-barrier-emulator": (STORE_IN_FLIGHT, BUFFERED_BOOKS),
    "track-write-barrier-fixed": (BUFFERED_BOOKS,),
    "retry-guard-own-root": (STATE_AGAIN,),
    "retry-guard-own-root-fixed": (),
}


@pytest.mark.parametrize("name, expected", NEAR.items(), ids=NEAR)
def test_near_misses_of_the_regressions(name: str, expected: tuple[int, ...]) -> None:
    assert near_misses(outcome_of(name)) == {NEAR_MISSES[position] for position in expected}


def near(machine: Machine, which: int) -> bool:
    """Whether a machine has counted a near miss."""
    return NEAR_BLOCK.base + which in machine.kvm.counters.hits


def test_a_table_that_a_tlb_can_still_write_as_it_is_shadowed_is_a_near_miss() -> None:
    far = 1 << 30
    tables = usual().map(far, DATA)
    for text, expected in (("mov [rbx], rcx", True), ("nop", False)):
        vcpu = long4(text, "mov rax, [rsi]", rbx=gva(tables.next - 1, 100), rsi=far)
        assert near(run_machine(tables.identity([tables.next - 1]), vcpu), WRITABLE_TLB) == expected


def test_a_run_that_needs_more_than_half_of_its_events_is_a_near_miss() -> None:
    case = toml.load(REGRESSIONS / "retry-guard-own-root-fixed.toml")
    events = run(case).events
    for limit, expected in ((2 * events, set()), (2 * events - 1, {NEAR_MISSES[HALF_SPENT]})):
        assert near_misses(run(replace(case, options=replace(case.options, event_limit=limit)))) == expected


def test_a_decision_is_counted_with_the_state_of_mmu_lock() -> None:
    m = run_machine(usual(), long4("nop"), long4("nop", code=CODE2))
    kvm = m.kvm
    kvm.counters.hits.clear()
    here = m.host.current.index
    for owner, waits in ((-1, False), (1 - here, False), (here, False), (here, True)):
        kvm.mmu_lock.owner = owner
        m.host.threads[1 - here].waiting = kvm.mmu_lock if waits else None
        kvm.count_retry(RETRY_GUARD)
    states = [RETRY_BLOCK.values(index)[1] for index in kvm.counters.hits]
    assert states == list(LOCK_STATES)


def test_shadow_pages_are_counted_by_what_became_of_them() -> None:
    m = run_machine(usual(), long4("nop"))
    created = [PAGE_BLOCK.at(0, 1, level) for level in (1, 2, 3, 4)]
    assert [m.kvm.counters.hits.get(index, 0) for index in created] == [1, 1, 1, 1]


def test_the_retry_guard_is_counted_with_the_state_of_mmu_lock() -> None:
    decisions = {
        tuple(RETRY_BLOCK.values(index))
        for index in outcome_of("retry-guard-own-page-table-fixed").counters
        if RETRY_BLOCK.base <= index < RETRY_BLOCK.base + RETRY_BLOCK.size
    }
    assert ("retry guard", "free") in decisions
