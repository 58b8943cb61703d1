"""After the last thread has ended, no SPTE may say more than its gPTE."""

from __future__ import annotations

from dataclasses import replace

import pytest
from oracle_vms import (
    CODE,
    CODE_GVA,
    DATA,
    DATA_GVA,
    HUGE,
    HUGE_GVA,
    LEAF,
    MMIO_GVA,
    OTHER_DATA,
    OTHER_PT,
    PD,
    PT,
    READONLY_GVA,
    RELOAD_CR3,
    TABLE,
    Machine,
    case,
    entry,
    flat32,
    forced_store32,
    load,
    long4,
    ran,
    store,
    word_hpa,
)

from mmufuzz.case.model import SC, TSO, Case, Slot, Word
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sched import ENDED
from mmufuzz.host.sites import BOOT, COUNT_LOAD, EMUL_STORE, THREAD_YIELD, label
from mmufuzz.kvm.role import ACC_WRITE_MASK, role_access, with_level_access
from mmufuzz.kvm.spte import SPTE_MMU_WRITABLE, SPTE_NX, SPTE_U, SPTE_W
from mmufuzz.run import run
from mmufuzz.x86.paging import PTE_A, PTE_D, PTE_NX, PTE_P, PTE_PS, PTE_U, PTE_W

PTE_OF_DATA = word_hpa(PT, DATA_GVA >> 12 & 511)
PTE_OF_READONLY = word_hpa(PT, READONLY_GVA >> 12 & 511)
PTE_OF_MMIO = word_hpa(PT, MMIO_GVA >> 12 & 511)
PDE = word_hpa(PD, 0)
HUGE_PDE = word_hpa(PD, 1)

STALE = [
    (PTE_OF_DATA, 0, "the gPTE is not present"),
    (PTE_OF_DATA, entry(OTHER_DATA, LEAF | PTE_NX), "the gPTE names another gfn"),
    (PTE_OF_DATA, entry(DATA, (LEAF | PTE_NX) & ~PTE_W), "the gPTE does not grant W"),
    (PTE_OF_DATA, entry(DATA, (LEAF | PTE_NX) & ~PTE_D), "the gPTE does not grant W"),
    (PTE_OF_DATA, entry(DATA, PTE_P | PTE_A | PTE_NX), "the gPTE does not grant WU"),
    (PTE_OF_DATA, entry(DATA, (LEAF | PTE_NX) & ~PTE_A), "the gPTE has A clear"),
    (PTE_OF_DATA, entry(DATA, LEAF | 1 << 45), "the gPTE has a reserved bit set"),
    (PTE_OF_READONLY, entry(17, LEAF | PTE_NX), "the gPTE does not grant X"),
    (PTE_OF_MMIO, entry(DATA, LEAF), "an MMIO SPTE for another gfn"),
    (PDE, entry(OTHER_PT, TABLE), "the gPTE names another table"),
    (PDE, entry(PT, TABLE & ~PTE_U), "the gPTE does not grant U"),
    (PDE, entry(HUGE, LEAF | PTE_PS), "the gPTE maps another large page"),
    (HUGE_PDE, entry(2 * HUGE, LEAF | PTE_PS), "the gPTE maps another large page"),
    (HUGE_PDE, entry(HUGE, (LEAF | PTE_PS) & ~PTE_W), "the gPTE does not grant W"),
    (HUGE_PDE, entry(OTHER_PT, TABLE), "the gPTE names another table"),
]


@pytest.mark.parametrize(("hpa", "gpte", "why"), STALE)
def test_a_gpte_changed_behind_kvms_back_leaves_a_stale_spte(hpa: int, gpte: int, why: str) -> None:
    m = ran()
    m.poke(hpa, gpte)
    m.oracles.at_end(ENDED)
    assert m.found == [("coherence", f"stale SPTE after quiescence: {why}")]


def test_a_more_permissive_gpte_is_no_stale_spte() -> None:
    """The SPTE then only costs a fault that KVM fixes."""
    m = ran()
    m.poke(PTE_OF_READONLY, entry(17, LEAF))
    m.oracles.at_end(ENDED)
    assert m.found == []


def test_an_emulated_store_to_a_gpte_leaves_nothing_stale() -> None:
    """The vCPU takes away the mapping of its data page through the mapping of its own page table, then reads."""
    clear = b"\x48\xc7\x04\x25" + (0x30000 + (DATA_GVA >> 12 & 511) * 8).to_bytes(4, "little") + bytes(4)
    m = ran(store(DATA_GVA), clear, store(DATA_GVA))
    assert m.found == []
    assert m.kvm.marks["track_write.locked"] == 1


def test_a_supervisors_write_with_wp_clear_may_exceed_the_gpte() -> None:
    m = Machine(case(long4(store(READONLY_GVA), flags=("nx",)))).run()
    assert m.kvm.marks["page_fault.cr0_wp"] == 1
    assert m.found == []


def test_only_the_supervisor_may_exceed_it_so() -> None:
    m = Machine(case(long4(store(READONLY_GVA), flags=("nx",)))).run()
    address = m.page(PT).spte_address(READONLY_GVA >> 12 & 511)
    m.poke(address, m.peek(address) | SPTE_U)
    m.oracles.at_end(ENDED)
    assert m.found == [("coherence", "stale SPTE after quiescence: the gPTE does not grant W")]


def test_under_smep_what_the_supervisor_writes_so_is_not_executable() -> None:
    """Without U, SMEP would no longer keep the supervisor from executing the user's page (paging_tmpl.h:page_fault)."""
    code = Word(PT, CODE_GVA >> 12 & 511, entry(CODE, LEAF & ~PTE_U))
    plain = case(long4(store(READONLY_GVA), flags=("nx", "smep")))
    memory = tuple(code if (word.gfn, word.index) == (code.gfn, code.index) else word for word in plain.memory)
    m = Machine(replace(plain, memory=memory)).run()
    assert m.kvm.marks["page_fault.cr0_wp"] == 1
    assert m.found == []
    address = m.page(PT).spte_address(READONLY_GVA >> 12 & 511)
    assert m.peek(address) & SPTE_NX
    m.poke(address, m.peek(address) & ~SPTE_NX)
    m.oracles.at_end(ENDED)
    assert m.found == [("coherence", "stale SPTE after quiescence: the gPTE does not grant W")]


def test_a_direct_page_may_not_exceed_the_access_it_was_made_for() -> None:
    m = ran()
    sp = m.page(HUGE, direct=True)
    sp.role = with_level_access(sp.role, 1, role_access(sp.role) & ~ACC_WRITE_MASK)
    m.oracles.at_end(ENDED)
    assert m.found == [("coherence", "stale SPTE after quiescence: the gPTE does not grant W")]


def test_obsolete_pages_are_nobodys_hazard() -> None:
    m = ran()
    m.poke(PTE_OF_DATA, 0)
    m.kvm.mmu_valid_gen ^= 1
    m.oracles.at_end(ENDED)
    assert m.found == []


def test_accessed_and_dirty_stay_clear_in_a_table_in_a_read_only_slot() -> None:
    what = case(long4(store(DATA_GVA), store(HUGE_GVA)))
    clear = PTE_A | PTE_D
    words = [Word(w.gfn, w.index, w.value & ~clear if w.gfn in (PD, PT) else w.value) for w in what.memory]
    slots = (Slot(0, PD), Slot(PD, 2, True), Slot(OTHER_PT, 1016))
    m = Machine(Case(options=what.options, slots=slots, memory=tuple(words), vcpus=what.vcpus)).run()
    assert m.found == []
    assert m.peek(m.page(PT).spte_address(DATA_GVA >> 12 & 511)) & (SPTE_W | SPTE_MMU_WRITABLE)


# The race of the seed: an emulated store, and the first shadow page of the VM.


def seed_race(revert: tuple[str, ...], held: bool = True, memory_model: str = TSO, reader: bytes = b"\x90") -> Case:
    """vCPU0 stores to an entry of the table that vCPU1 is about to have shadowed as the first of the VM."""
    schedule = [
        Deviation(RUN, label(0, 0, THREAD_YIELD, 1), 0),
        Deviation(RUN, label(0, 0, COUNT_LOAD, 1), 1),
    ]
    if held:
        # Until vCPU1 has installed its first SPTEs.
        schedule.append(Deviation(HOLD, label(0, 0, EMUL_STORE, 1), 0, label(1, 0, THREAD_YIELD, 1)))
    writer = flat32(forced_store32(4 << 12), eax=entry(OTHER_PT, TABLE))
    return case(writer, long4(reader), revert=revert, schedule=tuple(schedule), memory_model=memory_model)


@pytest.mark.parametrize("revert", ["track-write-barrier", "track-write-barrier.emulator"])
def test_without_the_emulators_barrier_the_emulated_store_is_missed(revert: str) -> None:
    outcome = run(seed_race((revert,)))
    assert [(finding.kind, finding.fingerprint) for finding in outcome.findings] == [
        ("coherence", "stale SPTE after quiescence: the emulated store was not tracked")
    ]


def test_a_guest_that_flushes_can_see_that_the_store_was_missed() -> None:
    outcome = run(seed_race(("track-write-barrier",), reader=RELOAD_CR3 + b"\x90"))
    assert [(finding.kind, finding.fingerprint) for finding in outcome.findings] == [
        ("coherence", "hardware access through a stale translation: the emulated store was not tracked")
    ]


def test_a_flush_between_an_emulated_store_and_its_tracking_is_told_apart_from_a_missed_store() -> None:
    """Between emulator_write_phys's store and kvm_mmu_track_write the gPTE is new and the SPTE old."""
    writer = flat32(b"\x90", forced_store32(4 << 12), eax=entry(OTHER_PT, TABLE))
    schedule = (Deviation(RUN, label(0, 1, EMUL_STORE, 1), 1),)
    outcome = run(case(writer, long4(b"\x90", RELOAD_CR3, b"\x90"), schedule=schedule))
    assert [(finding.kind, finding.fingerprint) for finding in outcome.findings] == [
        ("coherence", "hardware access through a stale translation: the emulated store is not tracked yet")
    ]


def test_a_store_that_the_emulator_never_tracks_is_told_apart() -> None:
    """SGDT over the entry that the other vCPU has used."""
    place = (PT << 12 | (DATA_GVA >> 12 & 511) << 3) - 2
    sgdt = b"\x0f\x0bkvm\x0f\x01\x05" + place.to_bytes(4, "little")
    schedule = (Deviation(RUN, BOOT, 1),)
    outcome = run(case(flat32(sgdt), long4(load(DATA_GVA)), schedule=schedule))
    assert [(finding.kind, finding.fingerprint) for finding in outcome.findings] == [
        ("coherence", "stale SPTE after quiescence: the emulator does not track such a store")
    ]


def test_with_the_barrier_the_same_schedule_is_harmless() -> None:
    assert run(seed_race(())).findings == []


def test_without_a_store_buffer_there_is_no_race() -> None:
    assert run(seed_race(("track-write-barrier",), held=False)).findings == []
    assert run(seed_race(("track-write-barrier",), memory_model=SC)).findings == []
