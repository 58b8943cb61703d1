"""The hardware page walker: caching, staleness, A/D updates and faults (SDM vol. 3, 4.8 and 4.10)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paging_phys import ALL, PAGE, ROOT, chain, slot

from mmufuzz.x86.mmu import HardwareMmu, HostPhys
from mmufuzz.x86.page_walk import PageTableReader, walk_tables
from mmufuzz.x86.paging import (
    ACCESS_FETCH,
    ACCESS_READ,
    ACCESS_USER,
    ACCESS_WRITE,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    PagingConfig,
)
from mmufuzz.x86.state import (
    PFERR_FETCH,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_USER,
    PFERR_WRITE,
    VECTOR_PF,
    Fault,
)
from mmufuzz.x86.tlb import Tlb

CONFIG = PagingConfig(4, pge=True)
OTHER = PAGE + 1
GVA = 0x0000_1234_5678_9ABC
VPN = GVA >> 12


PML4E, PDPTE, PDE, PTE = (slot(table, GVA, 5 - table) for table in range(1, 5))


class Phys(HostPhys):
    """Tables in a dictionary. ``loads`` and ``locked`` record what the walker did; ``races`` are writes by others."""

    def __init__(self, entries: dict[int, int]) -> None:
        self.entries = entries
        self.loads: list[int] = []
        self.locked: list[tuple[int, int]] = []
        self.races: list[tuple[int, int]] = []

    def load_entry(self, hpa: int) -> int:
        self.loads.append(hpa)
        return self.entries.get(hpa, 0)

    def set_entry_bits(self, hpa: int, expected: int, bits: int) -> bool:
        if self.races and self.races[0][0] == hpa:
            self.entries[hpa] = self.races.pop(0)[1]
        if self.entries[hpa] != expected:
            return False
        self.entries[hpa] |= bits
        self.locked.append((hpa, bits))
        return True


class Machine:
    """One processor over the tables 1 → 2 → 3 → 4 → ``PAGE`` for ``GVA``; flags per level may be given."""

    def __init__(self, pml4e: int = ALL, pdpte: int = ALL, pde: int = ALL, pte: int = ALL) -> None:
        self.phys = Phys(chain(GVA, {4: pml4e, 3: pdpte, 2: pde, 1: pte}))
        self.tlb = Tlb()
        self.mmu = HardwareMmu(self.tlb, self.phys)

    def access(self, access: int = ACCESS_READ, gva: int = GVA, config: PagingConfig = CONFIG) -> int:
        self.phys.loads.clear()
        self.phys.locked.clear()
        return self.mmu.translate(config, ROOT, 4, gva, access)

    def fault(self, access: int = ACCESS_READ, gva: int = GVA, config: PagingConfig = CONFIG) -> int:
        with pytest.raises(Fault) as caught:
            self.access(access, gva, config)
        assert (caught.value.vector, caught.value.address) == (VECTOR_PF, gva)
        return caught.value.error_code

    def fill(self, access: int = ACCESS_READ) -> bool:
        self.phys.loads.clear()
        self.phys.locked.clear()
        return self.mmu.fill(CONFIG, ROOT, 4, GVA, access)


# Translations and the TLB.


def test_translation_is_the_page_and_the_offset() -> None:
    machine = Machine()
    assert machine.access() == PAGE << 12 | 0xABC
    assert machine.phys.loads == [PML4E, PDPTE, PDE, PTE]


def test_hit_touches_no_memory() -> None:
    machine = Machine()
    machine.access(ACCESS_WRITE)
    assert machine.access(ACCESS_WRITE, GVA + 1) == PAGE << 12 | 0xABD
    assert (machine.phys.loads, machine.phys.locked) == ([], [])


def test_entry_remembers_where_its_leaf_lies() -> None:
    machine = Machine()
    machine.access()
    entry = machine.tlb.lookup(VPN)
    assert entry is not None
    assert entry.tag == PTE


@pytest.mark.parametrize("change", [0, PTE_P, OTHER << 12 | ALL])
def test_stale_entry_serves_until_it_is_invalidated(change: int) -> None:
    machine = Machine()
    machine.access()
    machine.phys.entries[PTE] = change
    assert machine.access() == PAGE << 12 | 0xABC
    machine.tlb.invalidate(VPN)
    if change & PTE_P:
        assert machine.access() != PAGE << 12 | 0xABC
    else:
        assert machine.fault() == 0


@pytest.mark.parametrize(("hpa", "size"), [(PDE, 1 << 21), (PDPTE, 1 << 30)])
def test_large_page_is_cached_in_4k_pieces(hpa: int, size: int) -> None:
    frame = 0x8000_0000
    machine = Machine()
    machine.phys.entries[hpa] = frame | ALL | PTE_PS | 1 << 12
    assert machine.access() == frame + GVA % size
    assert machine.access(gva=GVA ^ 0x1000) == frame + (GVA ^ 0x1000) % size
    entries = machine.tlb.entries()
    assert [entry.vpn for entry in entries] == [VPN, VPN ^ 1]
    assert [entry.tag for entry in entries] == [hpa, hpa]


def test_all_pieces_of_a_large_page_are_invalidated_together() -> None:
    """SDM 4.10.4.1: of a page larger than 4K, INVLPG invalidates all TLB entries there are."""
    machine = Machine()
    machine.phys.entries[PDE] = 0x20_0000 | ALL | PTE_PS
    machine.access()
    machine.access(gva=GVA ^ 0x1000)
    machine.phys.entries[PDE] = 0x40_0000 | ALL | PTE_PS
    machine.tlb.invalidate(VPN)
    assert machine.access(gva=GVA ^ 0x1000) == 0x40_0000 + (GVA ^ 0x1000) % (1 << 21)


def test_five_level_root() -> None:
    gva = 0x00AB_1234_5678_9ABC
    phys = Phys({slot(9, gva, 5): 1 << 12 | ALL, **Machine().phys.entries})
    mmu = HardwareMmu(Tlb(), phys)
    assert mmu.translate(PagingConfig(5), 9, 5, gva, ACCESS_READ) == PAGE << 12 | 0xABC
    assert phys.loads[0] == slot(9, gva, 5)


def test_without_paging_nothing_is_walked_or_cached() -> None:
    machine = Machine()
    assert machine.access(config=PagingConfig(0)) == GVA
    assert not machine.mmu.fill(PagingConfig(0), ROOT, 4, GVA, ACCESS_READ)
    assert machine.phys.loads == []
    assert machine.tlb.entries() == []


def test_global_pages_need_cr4_pge() -> None:
    for pge in (False, True):
        machine = Machine(pte=ALL | PTE_G)
        machine.access(config=PagingConfig(4, pge=pge))
        machine.tlb.flush_all(keep_global=True)
        assert (machine.tlb.lookup(VPN) is not None) == pge


# Accessed and dirty flags.


def test_read_sets_accessed_from_the_root_down() -> None:
    machine = Machine()
    machine.access()
    assert machine.phys.locked == [(PML4E, PTE_A), (PDPTE, PTE_A), (PDE, PTE_A), (PTE, PTE_A)]


def test_write_sets_accessed_and_dirty_of_the_leaf_in_one_operation() -> None:
    machine = Machine()
    machine.access(ACCESS_WRITE)
    assert machine.phys.locked[-1] == (PTE, PTE_A | PTE_D)
    assert machine.phys.entries[PDE] & PTE_D == 0


def test_flags_that_are_set_cost_no_locked_operation() -> None:
    flags = ALL | PTE_A | PTE_D
    machine = Machine(flags, flags, flags, flags)
    machine.access(ACCESS_WRITE)
    assert machine.phys.locked == []


def test_write_through_a_clean_entry_walks_from_the_root_to_set_dirty() -> None:
    machine = Machine()
    machine.access()
    machine.access(ACCESS_WRITE)
    assert machine.phys.loads == [PML4E, PDPTE, PDE, PTE]
    assert machine.phys.locked == [(PTE, PTE_D)]
    machine.access(ACCESS_WRITE)
    assert machine.phys.loads == []


def test_write_through_a_dirty_entry_sets_nothing_even_if_dirty_was_cleared() -> None:
    machine = Machine()
    machine.access(ACCESS_WRITE)
    machine.phys.entries[PTE] &= ~PTE_D
    machine.access(ACCESS_WRITE)
    assert machine.phys.entries[PTE] & PTE_D == 0


def test_forbidden_access_marks_the_upper_entries_but_not_the_leaf() -> None:
    machine = Machine(pte=PTE_P | PTE_U)
    machine.fault(ACCESS_WRITE)
    assert machine.phys.entries[PDE] & PTE_A
    assert machine.phys.entries[PTE] & (PTE_A | PTE_D) == 0


@pytest.mark.parametrize("hpa", [PML4E, PDPTE, PDE, PTE])
def test_lost_race_for_a_flag_walks_again(hpa: int) -> None:
    machine = Machine()
    replacement = machine.phys.entries[hpa] | 1 << 58
    machine.phys.races = [(hpa, replacement)]
    assert machine.access(ACCESS_WRITE) == PAGE << 12 | 0xABC
    assert machine.phys.entries[hpa] == replacement | PTE_A | (PTE_D if hpa == PTE else 0)
    assert machine.phys.loads.count(hpa) == 2


def test_lost_race_never_caches_the_value_that_lost() -> None:
    machine = Machine()
    machine.phys.races = [(PTE, OTHER << 12 | ALL)]
    assert machine.access() == OTHER << 12 | 0xABC
    machine.tlb.flush_all()
    machine.phys.entries[PTE] = PAGE << 12 | ALL
    machine.phys.races = [(PTE, 0)]
    assert machine.fault() == 0
    assert machine.tlb.lookup(VPN) is None


class Halves(HostPhys):
    """One word, and what another processor writes there before the first locked operations on it."""

    def __init__(self, word: int, interference: list[int]) -> None:
        self.word = word
        self.interference = interference

    def load_entry(self, hpa: int) -> int:
        return self.word

    def set_entry_bits(self, hpa: int, expected: int, bits: int) -> bool:
        if self.interference:
            self.word = self.interference.pop(0)
        if self.word != expected:
            return False
        self.word |= bits
        return True


@pytest.mark.parametrize("hpa", [0x1000, 0x1004])
def test_a_write_to_the_other_half_of_the_word_is_no_race(hpa: int) -> None:
    shift = (hpa & 4) * 8
    other = 0x1234_5678 << (32 - shift)
    phys = Halves(0x7007 << shift, [0x7007 << shift | other])
    assert phys.set_entry_bits_32(hpa, 0x7007, PTE_A)
    assert phys.word == 0x7027 << shift | other


@pytest.mark.parametrize("hpa", [0x1000, 0x1004])
def test_a_write_to_the_entry_itself_is_one(hpa: int) -> None:
    shift = (hpa & 4) * 8
    phys = Halves(0x7007 << shift, [0x8007 << shift])
    assert not phys.set_entry_bits_32(hpa, 0x7007, PTE_A)
    assert phys.word == 0x8007 << shift


# Faults and staleness.

P, W, U, RSVD, I = PFERR_PRESENT, PFERR_WRITE, PFERR_USER, PFERR_RSVD, PFERR_FETCH  # noqa: E741


@pytest.mark.parametrize(
    ("machine", "access", "code"),
    [
        (Machine(pte=0), ACCESS_READ, 0),
        (Machine(pde=0), ACCESS_WRITE | ACCESS_USER, W | U),
        (Machine(pte=ALL | 1 << 51), ACCESS_READ, P | RSVD),
        (Machine(pml4e=ALL | PTE_PS), ACCESS_FETCH, P | RSVD | I),
        (Machine(pdpte=PTE_P | PTE_U), ACCESS_WRITE, P | W),
        (Machine(pte=PTE_P | PTE_W), ACCESS_USER, P | U),
        (Machine(pte=ALL | PTE_NX), ACCESS_FETCH, P | I),
    ],
)
def test_fault_code(machine: Machine, access: int, code: int) -> None:
    assert machine.fault(access) == code
    assert machine.tlb.canonical() == ((), ())


def test_stale_denial_is_checked_against_the_tables() -> None:
    machine = Machine(pte=PTE_P | PTE_U)
    machine.access()
    machine.phys.entries[PTE] |= PTE_W
    assert machine.access(ACCESS_WRITE) == PAGE << 12 | 0xABC


def test_a_spurious_fault_after_a_permission_upgrade_does_not_recur() -> None:
    machine = Machine(pte=PTE_P | PTE_U)
    machine.mmu.spurious = True
    machine.access()
    machine.phys.entries[PTE] |= PTE_W
    assert machine.fault(ACCESS_WRITE) == P | W
    assert machine.access(ACCESS_WRITE) == PAGE << 12 | 0xABC


def test_a_spurious_fault_by_a_stale_pointer_does_not_recur() -> None:
    machine = Machine()
    machine.mmu.spurious = True
    machine.access()
    machine.tlb.evict(VPN)
    machine.phys.entries[slot(5, GVA, 1)] = OTHER << 12 | ALL
    machine.phys.entries[PDE] = 5 << 12 | ALL
    machine.phys.entries[PTE] = 0
    assert machine.fault() == 0
    assert machine.access() == OTHER << 12 | 0xABC


def test_a_write_to_a_clean_page_is_no_spurious_fault() -> None:
    machine = Machine()
    machine.mmu.spurious = True
    machine.access()
    assert machine.access(ACCESS_WRITE) == PAGE << 12 | 0xABC


def test_denial_by_the_tables_drops_the_entry_that_denied() -> None:
    machine = Machine(pte=PTE_P | PTE_U)
    machine.access()
    assert machine.fault(ACCESS_WRITE) == P | W
    assert machine.tlb.canonical() == ((), ())


def test_denied_walk_sees_that_the_page_is_gone() -> None:
    machine = Machine(pte=PTE_P | PTE_U)
    machine.access()
    machine.phys.entries[PTE] = 0
    assert machine.fault(ACCESS_WRITE) == W
    assert machine.fault() == 0


def test_fault_spares_the_neighbours() -> None:
    machine = Machine()
    machine.phys.entries[slot(4, GVA ^ 0x1000, 1)] = OTHER << 12 | ALL | PTE_NX
    machine.access()
    machine.fault(ACCESS_FETCH, GVA ^ 0x1000)
    machine.phys.entries.clear()
    assert machine.access() == PAGE << 12 | 0xABC


# Paging-structure caches.


def test_walk_begins_at_the_deepest_cached_table() -> None:
    machine = Machine()
    machine.access()
    machine.tlb.evict(VPN)
    machine.access()
    assert machine.phys.loads == [PTE]
    machine.tlb.evict(VPN)
    machine.tlb.psc_evict(GVA, 1)
    machine.access()
    assert machine.phys.loads == [PDE, PTE]


@pytest.mark.parametrize("hpa", [PML4E, PDPTE, PDE])
def test_changed_upper_entry_is_not_seen_until_invlpg(hpa: int) -> None:
    machine = Machine()
    machine.access()
    machine.tlb.evict(VPN)
    machine.phys.entries[hpa] = 0
    assert machine.access() == PAGE << 12 | 0xABC
    machine.tlb.invalidate(VPN + 99)  # any address: INVLPG drops all table pointers
    machine.tlb.evict(VPN)
    assert machine.fault() == 0


def test_cached_pointer_carries_the_rights_of_the_levels_above() -> None:
    machine = Machine(pml4e=PTE_P | PTE_U)
    machine.access()
    machine.tlb.evict(VPN)
    machine.phys.entries[PML4E] |= PTE_W
    machine.access()
    entry = machine.tlb.lookup(VPN)
    assert entry is not None
    assert not entry.writable


def test_fault_by_a_stale_pointer_is_checked_from_the_root() -> None:
    machine = Machine()
    machine.access()
    machine.tlb.evict(VPN)
    machine.phys.entries[slot(5, GVA, 1)] = OTHER << 12 | ALL
    machine.phys.entries[PDE] = 5 << 12 | ALL
    machine.phys.entries[PTE] = 0
    assert machine.access() == OTHER << 12 | 0xABC
    assert machine.phys.loads == [PTE, PML4E, PDPTE, PDE, slot(5, GVA, 1)]


def test_walk_from_the_root_replaces_stale_pointers() -> None:
    machine = Machine()
    machine.access()
    machine.phys.entries[slot(5, GVA, 1)] = OTHER << 12 | ALL
    machine.phys.entries[PDE] = 5 << 12 | ALL
    machine.access(ACCESS_WRITE)  # clean entry: walks from the root
    machine.tlb.evict(VPN)
    assert machine.access() == OTHER << 12 | 0xABC
    assert machine.phys.loads == [slot(5, GVA, 1)]


# Speculative fills.


def test_fill_caches_a_translation_without_dirtying_it() -> None:
    machine = Machine()
    assert machine.fill(ACCESS_WRITE)
    assert machine.phys.entries[PTE] & (PTE_A | PTE_D) == PTE_A
    machine.phys.entries[PTE] = 0
    assert machine.access() == PAGE << 12 | 0xABC


def test_write_after_a_fill_still_sets_dirty() -> None:
    machine = Machine()
    machine.fill(ACCESS_WRITE)
    machine.access(ACCESS_WRITE)
    assert machine.phys.locked == [(PTE, PTE_D)]


def test_fill_of_a_dirty_page_lets_a_write_hit() -> None:
    machine = Machine(pte=ALL | PTE_D)
    machine.fill()
    machine.access(ACCESS_WRITE)
    assert machine.phys.loads == []


def test_fill_leaves_a_cached_page_alone() -> None:
    machine = Machine()
    machine.access()
    assert not machine.fill()
    assert machine.phys.loads == []


@pytest.mark.parametrize("pte", [0, ALL | 1 << 51, PTE_P | PTE_U])
def test_fill_that_fails_is_silent_and_keeps_the_upper_levels(pte: int) -> None:
    machine = Machine(pte=pte)
    assert not machine.fill(ACCESS_WRITE)
    assert machine.tlb.lookup(VPN) is None
    assert machine.tlb.psc_lookup(GVA) is not None


def test_fill_gives_up_when_it_loses_a_race() -> None:
    machine = Machine()
    machine.phys.races = [(PTE, OTHER << 12 | ALL)]
    assert not machine.fill()
    assert machine.phys.loads == [PML4E, PDPTE, PDE, PTE]


class Reader(PageTableReader):
    def __init__(self, phys: Phys) -> None:
        self.phys = phys

    def read_entry(self, gpa: int) -> int:
        return self.phys.entries.get(gpa, 0)


FLAGS = st.sampled_from([ALL] * 6 + [ALL | PTE_A, ALL | PTE_NX, PTE_P | PTE_U, PTE_P | PTE_W, ALL | 1 << 45, 0])
KINDS = st.sampled_from([ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH])
MODES = st.sampled_from([0, ACCESS_USER])


@given(
    st.tuples(FLAGS, FLAGS, FLAGS, FLAGS),
    st.lists(st.tuples(KINDS, MODES, st.booleans()), min_size=1, max_size=5),
    st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_while_the_tables_stand_still_caches_change_no_outcome(
    flags: tuple[int, int, int, int], accesses: list[tuple[int, int, bool]], wp: bool
) -> None:
    """Each access ends as the reference walk says, D included, whatever accesses and fills came before."""
    config = PagingConfig(4, cr0_wp=wp)
    machine = Machine(*flags)
    for kind, mode, speculate in accesses:
        if speculate:
            machine.fill(kind | mode)
        expected = walk_tables(config, ROOT, GVA, kind | mode, Reader(machine.phys))
        if expected.fault:
            assert machine.fault(kind | mode, config=config) == expected.error_code
        else:
            assert machine.access(kind | mode, config=config) == expected.gpa
            assert walk_tables(config, ROOT, GVA, kind | mode, Reader(machine.phys)).ad_updates == []
