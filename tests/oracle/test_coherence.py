"""An access is right if some TLB that the architecture allows would allow it."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_vms import (
    CODE,
    DATA,
    DATA_GVA,
    HUGE,
    HUGE_GVA,
    LEAF,
    OTHER_DATA,
    OTHER_PT,
    PD,
    PT,
    READONLY,
    READONLY_GVA,
    TABLE,
    Machine,
    case,
    entry,
    flat32,
    load,
    long4,
    word_hpa,
)

from mmufuzz.host.memory import Pending
from mmufuzz.host.sched import RunStop
from mmufuzz.host.sites import GUEST_STORE
from mmufuzz.kvm.memslots import gfn_to_pfn
from mmufuzz.oracle.walks import ANY_RIGHTS, Walks
from mmufuzz.x86.page_walk import PageTableReader, walk_tables
from mmufuzz.x86.paging import (
    ACCESS_FETCH,
    ACCESS_USER,
    ACCESS_WRITE,
    PTE_A,
    PTE_NX,
    PTE_P,
    PTE_U,
    PTE_W,
)

PTE_OF_DATA = word_hpa(PT, DATA_GVA >> 12 & 511)
PDE = word_hpa(PD, 0)
EVERYTHING = -1


def machine(flags: tuple[str, ...] = ("wp", "nx")) -> Machine:
    """A VM whose only thread is current but does nothing."""
    m = Machine(case(long4(b"\x90", flags=flags)))
    m.host._current = m.host.threads[0]
    return m


def access(m: Machine, gva: int, gfn: int, kind: int = 0, emulated: bool = False) -> None:
    """Report an access that ended at ``gfn``."""
    m.oracles.observer.guest_access(0, gva, gfn_to_pfn(gfn) << 12 | gva & 0xFFF, kind, emulated)


def refused(m: Machine, gva: int, gfn: int, kind: int = 0) -> str:
    """The fingerprint with which an access is refused; empty if it is allowed."""
    try:
        access(m, gva, gfn, kind)
    except RunStop:
        return m.oracles.findings[-1].fingerprint
    return ""


def test_what_the_tables_say_is_allowed() -> None:
    m = machine()
    access(m, DATA_GVA, DATA, ACCESS_WRITE | ACCESS_USER)
    access(m, HUGE_GVA + 0x5000, HUGE + 5, ACCESS_WRITE, emulated=True)
    assert m.found == []


@pytest.mark.parametrize(
    ("gva", "gfn", "kind", "why"),
    [
        (DATA_GVA, OTHER_DATA, 0, "supervisor read to a frame that the tables never named for it"),
        (0x23000, DATA, 0, "supervisor read to a frame that the tables never named for it"),
        (READONLY_GVA, READONLY, ACCESS_WRITE, "supervisor write without the right: W"),
        (DATA_GVA, DATA, ACCESS_FETCH, "supervisor fetch without the right: X"),
        (0x22000, DATA, ACCESS_USER, "user read without the right: U"),
        (HUGE_GVA, HUGE + 1, ACCESS_USER | ACCESS_FETCH, "user fetch to a frame that the tables never named for it"),
    ],
)
def test_what_no_table_ever_allowed_is_refused(gva: int, gfn: int, kind: int, why: str) -> None:
    assert refused(machine(), gva, gfn, kind) == "hardware " + why


def test_smap_forbids_supervisor_data_accesses_to_user_pages() -> None:
    why = refused(machine(("wp", "smap")), HUGE_GVA, HUGE)
    assert why == "hardware supervisor read without the right: SMAP or SMEP"


def test_a_reserved_bit_forbids_every_access() -> None:
    """DATA_GVA has NX set, which is reserved while EFER.NX is clear."""
    why = refused(machine(("wp",)), DATA_GVA, DATA)
    assert why == "hardware access through an entry with a reserved bit set"


def test_an_old_value_is_allowed_until_the_vcpu_invalidates_it() -> None:
    m = machine()
    m.kvm.memory.write(PTE_OF_DATA, 8, entry(OTHER_DATA, LEAF))
    assert refused(m, DATA_GVA, DATA) == ""
    assert refused(m, DATA_GVA, OTHER_DATA) == ""
    m.oracles.observer.guest_invalidated(0, EVERYTHING)
    assert refused(m, DATA_GVA, OTHER_DATA) == ""
    assert refused(m, DATA_GVA, DATA) == "hardware access through a stale translation: nobody wrote the entry"


def test_invlpg_concerns_its_page_alone() -> None:
    m = machine()
    m.kvm.memory.write(PDE, 8, entry(OTHER_PT, TABLE))
    m.oracles.observer.guest_invalidated(0, DATA_GVA)
    assert refused(m, READONLY_GVA, READONLY) == ""
    assert refused(m, DATA_GVA, DATA).startswith("hardware access through a stale translation")


def test_values_of_different_moments_may_mix_across_levels() -> None:
    """A paging-structure cache may hold the old table while its entry is read afresh."""
    m = machine()
    m.kvm.memory.write(PDE, 8, 0)
    m.kvm.memory.write(PTE_OF_DATA, 8, entry(OTHER_DATA, LEAF))
    assert refused(m, DATA_GVA, OTHER_DATA) == ""


def test_a_processor_may_see_its_own_buffered_store_early() -> None:
    m = machine()
    buffer = m.host.threads[0].buffer
    buffer.pending.append(Pending(0, PTE_OF_DATA, 4, entry(OTHER_DATA, LEAF), True))
    assert refused(m, DATA_GVA, OTHER_DATA, ACCESS_WRITE) == ""


def test_another_processors_buffered_store_is_not_there_yet() -> None:
    m = Machine(case(long4(b"\x90"), flat32(b"\x90")))
    m.host._current = m.host.threads[0]
    m.host.threads[1].buffer.pending.append(Pending(0, PTE_OF_DATA, 8, entry(OTHER_DATA, LEAF), True))
    assert refused(m, DATA_GVA, OTHER_DATA) != ""


def test_a_loaded_register_takes_away_what_was_found_allowed() -> None:
    m = machine(("nx",))
    assert refused(m, READONLY_GVA, READONLY, ACCESS_WRITE) == ""
    m.kvm.vcpus[0].regs.cr0 |= 1 << 16
    assert refused(m, READONLY_GVA, READONLY, ACCESS_WRITE) == "hardware supervisor write without the right: W"


def test_without_paging_the_gpa_is_the_gva() -> None:
    m = Machine(case(flat32(b"\x90")))
    m.host._current = m.host.threads[0]
    assert refused(m, DATA << 12, DATA) == ""
    assert refused(m, DATA << 12, CODE) == "hardware supervisor read to a frame that is not the one at its gpa"


# Faults.


def fault(m: Machine, gva: int, code: int) -> str:
    """The fingerprint with which a #PF is refused; empty if it is justified."""
    try:
        m.oracles.observer.guest_fault(0, gva, code)
    except RunStop:
        return m.oracles.findings[-1].fingerprint
    return ""


@pytest.mark.parametrize(
    ("gva", "code"), [(0x23000, 0), (0x23000, 2), (READONLY_GVA, 3), (0x22000, 5), (DATA_GVA, 0x11), (0x40000000, 4)]
)
def test_a_fault_with_the_right_error_code_is_justified(gva: int, code: int) -> None:
    assert fault(machine(), gva, code) == ""


@pytest.mark.parametrize(("gva", "code"), [(DATA_GVA, 0), (DATA_GVA, 2), (READONLY_GVA, 2), (0x23000, 1), (0x23000, 9)])
def test_a_fault_with_another_error_code_is_not(gva: int, code: int) -> None:
    assert fault(machine(), gva, code) == f"unjustified #PF: error code {code:#x}"


def test_a_fault_from_an_entry_that_was_cleared_and_set_again_is_justified() -> None:
    m = machine()
    old = m.peek(PTE_OF_DATA)
    m.kvm.memory.write(PTE_OF_DATA, 8, 0)
    m.kvm.memory.write(PTE_OF_DATA, 8, old)
    assert fault(m, DATA_GVA, 0) == ""
    m.oracles.observer.guest_invalidated(0, EVERYTHING)
    assert fault(m, DATA_GVA, 0) == "unjustified #PF: error code 0x0"


def test_a_guest_without_paging_gets_no_page_fault() -> None:
    m = Machine(case(flat32(b"\x90")))
    m.host._current = m.host.threads[0]
    assert fault(m, DATA << 12, 4) == "unjustified #PF: error code 0x4"


def test_a_fetch_fault_is_justified_where_the_error_code_cannot_tell_fetches() -> None:
    m = machine(("wp",))
    m.kvm.memory.write(PTE_OF_DATA, 8, entry(DATA, LEAF & ~PTE_U))
    m.oracles.observer.guest_invalidated(0, EVERYTHING)
    assert fault(m, DATA_GVA, 5) == ""


# The search against brute force.


class Snapshot(PageTableReader):
    """Guest memory with some words replaced."""

    def __init__(self, m: Machine, words: dict[int, int]) -> None:
        self.m = m
        self.words = words

    def read_entry(self, gpa: int) -> int:
        """-1 outside the slot."""
        if gpa >> 12 >= 1024:
            return -1
        hpa = gfn_to_pfn(gpa >> 12) << 12 | gpa & 0xFFF
        return self.words.get(hpa, self.m.peek(hpa))


RIGHTS = st.sampled_from([0, PTE_P, PTE_P | PTE_W, PTE_P | PTE_U, PTE_P | PTE_W | PTE_U | PTE_NX, TABLE, PTE_P | PTE_A])
VALUES = {
    PDE: st.builds(entry, st.sampled_from([PT, OTHER_PT, 2000]), RIGHTS),
    PTE_OF_DATA: st.builds(entry, st.sampled_from([DATA, OTHER_DATA, PT]), RIGHTS),
    word_hpa(OTHER_PT, DATA_GVA >> 12 & 511): st.builds(entry, st.sampled_from([DATA, READONLY]), RIGHTS),
}
INVALIDATE = st.tuples(st.sampled_from([0, 1, 2]), st.just(0))
STEP = st.one_of([INVALIDATE] + [st.tuples(st.just(hpa), values) for hpa, values in VALUES.items()])
KIND = st.sampled_from([0, ACCESS_WRITE, ACCESS_USER, ACCESS_USER | ACCESS_WRITE, ACCESS_FETCH])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(STEP, max_size=8), KIND)
def test_the_search_finds_exactly_the_walks_of_all_choices_of_values(steps: list[tuple[int, int]], kind: int) -> None:
    m = machine()
    held = {hpa: [m.peek(hpa)] for hpa in VALUES}
    for hpa, value in steps:
        if hpa in (0, 1):
            m.oracles.observer.guest_invalidated(0, EVERYTHING if hpa == 0 else DATA_GVA)
            held = {address: [values[-1]] for address, values in held.items()}
        elif hpa == 2:
            m.oracles.observer.guest_invalidated(0, READONLY_GVA)
        else:
            m.kvm.memory.write(hpa, 8, value)
            held[hpa].append(value)
    vcpu = m.kvm.vcpus[0]
    root = vcpu.regs.cr3 >> 12
    reached, mapped, codes = set(), set(), set()
    for choice in product(*held.values()):
        result = walk_tables(vcpu.paging, root, DATA_GVA, kind, Snapshot(m, dict(zip(held, choice, strict=True))))
        if result.gfn >= 0:
            mapped.add(result.gfn)
        if result.fault:
            codes.add(result.error_code)
        else:
            reached.add(result.gfn)

    def ask() -> Walks:
        history = m.oracles.history
        return Walks(m.kvm, history, vcpu.paging, DATA_GVA, history.invalidations[0].since(DATA_GVA), None)

    for gfn in (DATA, OTHER_DATA, READONLY, PT):
        assert ask().reaches(root, kind, gfn_to_pfn(gfn)) == (gfn in reached)
        assert ask().reaches(root, ANY_RIGHTS, gfn_to_pfn(gfn)) == (gfn in mapped)
    assert [code for code in range(32) if ask().faults(root, kind, code)] == sorted(codes)


def test_the_search_stays_small_when_a_table_maps_itself_in_many_ways() -> None:
    m = machine()
    for level_word in (word_hpa(4, 0), word_hpa(5, 0), PDE, PTE_OF_DATA):
        for gfn in range(20, 60):
            m.kvm.memory.write(level_word, 8, entry(gfn, TABLE))
    for gfn in range(20, 60):
        for index in (0, DATA_GVA >> 12 & 511):
            for target in range(20, 60):
                m.kvm.memory.write(word_hpa(gfn, index), 8, entry(target, TABLE))
    walks = Walks(m.kvm, m.oracles.history, m.kvm.vcpus[0].paging, DATA_GVA, -1, None)
    assert not walks.reaches(4, 0, gfn_to_pfn(999))
    assert len(walks._failed) < 500


# What observers remember is part of the state of an exhaustive search.


def past(m: Machine) -> int:
    """The fingerprint of the past."""
    return m.oracles.boundary_watcher.fingerprint()


def test_pasts_that_allow_the_same_have_one_fingerprint() -> None:
    first, second = machine(), machine()
    for m, order in ((first, (OTHER_DATA, READONLY)), (second, (READONLY, OTHER_DATA))):
        for gfn in order:
            m.kvm.memory.write(PTE_OF_DATA, 8, entry(gfn, LEAF))
        m.kvm.memory.write(PTE_OF_DATA, 8, entry(CODE, LEAF))
    assert past(first) == past(second)


def test_pasts_that_allow_different_things_have_different_fingerprints() -> None:
    prints = []
    for invalidate in (None, EVERYTHING, DATA_GVA):
        m = machine()
        m.kvm.memory.write(PTE_OF_DATA, 8, entry(OTHER_DATA, LEAF))
        if invalidate is not None:
            m.oracles.observer.guest_invalidated(0, invalidate)
        prints.append(past(m))
    assert len(set(prints)) == 3


def test_an_invalidation_that_takes_nothing_away_leaves_the_past_alone() -> None:
    """Between a flush of everything and the next change of a table there is nothing that INVLPG could drop."""
    prints = []
    for invalidated in ((EVERYTHING,), (EVERYTHING, DATA_GVA), (DATA_GVA, EVERYTHING)):
        m = machine()
        m.kvm.memory.write(PTE_OF_DATA, 8, entry(OTHER_DATA, LEAF))
        for gva in invalidated:
            m.oracles.observer.guest_invalidated(0, gva)
        m.kvm.memory.write(PTE_OF_DATA, 8, entry(READONLY, LEAF))
        prints.append(past(m))
    assert len(set(prints)) == 1


def test_a_whole_run_of_loads_and_stores_is_coherent() -> None:
    m = Machine(case(long4(load(DATA_GVA), load(HUGE_GVA), load(0x23000)))).run()
    assert m.found == []
    assert [fault[:2] for fault in m.kvm.vcpus[0].exceptions] == [(14, 0)]


def test_a_store_by_hardware_into_a_table_is_told_apart_from_an_emulated_one() -> None:
    m = machine()
    m.host.threads[0].store(GUEST_STORE, PTE_OF_DATA, entry(OTHER_DATA, LEAF))
    m.oracles.observer.guest_invalidated(0, EVERYTHING)
    why = refused(m, DATA_GVA, DATA)
    assert why == "hardware access through a stale translation: a store by hardware, which KVM cannot see"


def test_every_access_of_a_nested_guest_is_a_user_access() -> None:
    m = machine()
    m.kvm.vcpus[0].guest_mode = True
    assert refused(m, DATA_GVA, DATA) == ""
    assert refused(m, 0x22000, DATA) == "hardware user read without the right: U"


def test_the_tables_of_a_guest_may_lie_outside_its_memory() -> None:
    m = machine()
    m.kvm.memory.write(PDE, 8, entry(5000, TABLE))
    m.oracles.observer.guest_invalidated(0, EVERYTHING)
    assert fault(m, DATA_GVA, 0) == ""
