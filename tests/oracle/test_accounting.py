"""Each invariant fires on the corruption it is about, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from oracle_vms import DATA, HUGE, MMIO_GVA, PD, PML4, PT, Machine, case, flat32, long4, ran, store

from mmufuzz.host.memory import Pending
from mmufuzz.host.sched import RunStop
from mmufuzz.kvm.requests import REQ_TLB_FLUSH
from mmufuzz.kvm.role import (
    ACC_USER_MASK,
    ROLE_CR0_WP,
    ROLE_DIRECT,
    ROLE_PASSTHROUGH,
    role_access,
    with_level_access,
)
from mmufuzz.kvm.spte import SPTE_HOST_WRITABLE, SPTE_MMU_WRITABLE, SPTE_NX, SPTE_W
from mmufuzz.kvm.structs import ShadowPage
from mmufuzz.kvm.write_track import write_track_address
from mmufuzz.kvm.zap import kvm_mmu_prepare_zap_page
from mmufuzz.x86.paging import PTE_G
from mmufuzz.x86.tlb import TlbEntry


def leaf_of_data(m: Machine) -> int:
    """Address of an SPTE that maps the data frame."""
    return m.kvm.slots[0].rmap[0][DATA][0]


def link_to_pt(m: Machine) -> int:
    """Address of the SPTE that links the shadow page of the page table."""
    return m.page(PT).parent_ptes[0]


def drop_rmap(m: Machine) -> None:
    m.kvm.slots[0].rmap[0][DATA].clear()


def extra_rmap(m: Machine) -> None:
    m.kvm.slots[0].rmap[0].setdefault(DATA + 9, []).append(leaf_of_data(m) + 8)


def drop_parent(m: Machine) -> None:
    m.page(PT).parent_ptes.clear()


def extra_parent(m: Machine) -> None:
    m.page(PT).parent_ptes.append(link_to_pt(m) + 64)


def skip_unaccount(m: Machine) -> None:
    m.poke(m.kvm.indirect_shadow_pages, m.peek(m.kvm.indirect_shadow_pages) + 1)


def lose_used_page(m: Machine) -> None:
    m.kvm.n_used_mmu_pages -= 1


def forget_write_track(m: Machine) -> None:
    m.poke(write_track_address(PD), 0)


def leave_write_track(m: Machine) -> None:
    m.oracles.accounting.check()
    m.poke(write_track_address(PD), 2)


def forget_disallow_lpage(m: Machine) -> None:
    m.kvm.slots[0].disallow_lpage[0].clear()


def duplicate_page(m: Machine) -> None:
    sp = m.page(HUGE, direct=True)
    twin = ShadowPage(sp.pfn + 100, sp.gfn, sp.role, sp.mmu_valid_gen)
    m.kvm.by_pfn[twin.pfn] = twin


def extra_root_count(m: Machine) -> None:
    m.page(PT).root_count += 1


def map_table_writable(m: Machine) -> None:
    m.kvm.slots[0].rmap[0][PT] = m.kvm.slots[0].rmap[0].pop(DATA)
    address = m.kvm.slots[0].rmap[0][PT][0]
    m.page(PT).shadowed_gfn[address >> 3 & 511] = PT
    m.poke(address, m.peek(address) + (PT - DATA << 12))


def invalid_with_children(m: Machine) -> None:
    sp = m.page(PD)
    m.poke(sp.parent_ptes.pop(), 0)
    sp.invalid = True


def invalid_with_parents(m: Machine) -> None:
    sp = m.page(PT)
    m.poke(link_to_pt(m), 0)
    for index in sp.used:
        m.poke(sp.spte_address(index), 0)
    sp.invalid = True


def invalid_and_not_freed(m: Machine) -> None:
    m.kvm.mmu_valid_gen ^= 1
    while m.kvm.active_mmu_pages:
        kvm_mmu_prepare_zap_page(m.kvm, m.kvm.active_mmu_pages[0], [])


def nobodys_root(m: Machine) -> None:
    m.kvm.vcpus[0].mmu.root_sp = None


def global_spte(m: Machine) -> None:
    m.poke(leaf_of_data(m), m.peek(leaf_of_data(m)) | PTE_G)


def restrict_link(m: Machine) -> None:
    m.poke(link_to_pt(m), m.peek(link_to_pt(m)) | SPTE_NX)


def unlike_role(m: Machine) -> None:
    m.page(PT).role ^= ROLE_CR0_WP


def surplus_access(m: Machine) -> None:
    parent = m.page(PD)
    parent.role = with_level_access(parent.role, 2, role_access(parent.role) & ~ACC_USER_MASK)


def link_nothing(m: Machine) -> None:
    m.poke(link_to_pt(m), m.peek(link_to_pt(m)) + (1 << 20))


def host_writable_lost(m: Machine) -> None:
    m.poke(leaf_of_data(m), m.peek(leaf_of_data(m)) & ~SPTE_HOST_WRITABLE)


def writable_without_mmu_writable(m: Machine) -> None:
    m.poke(leaf_of_data(m), m.peek(leaf_of_data(m)) & ~SPTE_MMU_WRITABLE | SPTE_W)


def wrong_frame(m: Machine) -> None:
    m.poke(leaf_of_data(m), m.peek(leaf_of_data(m)) + (1 << 12))


def leaf_without_gfn(m: Machine) -> None:
    m.page(PT).shadowed_gfn.clear()


def direct_child_of_another_range(m: Machine) -> None:
    m.page(PD).role |= ROLE_DIRECT
    m.page(PT).role |= ROLE_DIRECT


def direct_page_above_tables(m: Machine) -> None:
    m.page(PD).role |= ROLE_DIRECT


def pass_through_to_another_table(m: Machine) -> None:
    m.page(PML4).role |= ROLE_PASSTHROUGH


def link_invalid_child(m: Machine) -> None:
    m.page(PT).invalid = True


def missing_from_huge_count(m: Machine) -> None:
    m.kvm.slots[0].disallow_lpage[1][0] = 1


def freed_root(m: Machine) -> None:
    other = m.page(PML4)
    gone = ShadowPage(other.pfn + 50, other.gfn, other.role, other.mmu_valid_gen)
    m.kvm.vcpus[0].mmu.pae_roots.append(gone)


def garbage(m: Machine) -> None:
    m.poke(m.page(PT).spte_address(MMIO_GVA >> 12 & 511), 0x20)


CORRUPTIONS: list[tuple[str, Callable[[Machine], None]]] = [
    ("I1", skip_unaccount),
    ("I2", lose_used_page),
    ("I3", forget_write_track),
    ("I3", leave_write_track),
    ("I4", forget_disallow_lpage),
    ("I5", duplicate_page),
    ("I6", extra_root_count),
    ("I8", map_table_writable),
    ("I15", drop_parent),
    ("I15", extra_parent),
    ("I16", drop_rmap),
    ("I16", extra_rmap),
    ("I18", unlike_role),
    ("I18", surplus_access),
    ("I18", link_nothing),
    ("I20", invalid_with_children),
    ("I20", invalid_with_parents),
    ("I6", invalid_and_not_freed),
    ("I6", nobodys_root),
    ("I22", global_spte),
    ("I22", restrict_link),
    ("I22", garbage),
    ("I23", host_writable_lost),
    ("I23", writable_without_mmu_writable),
    ("I24", wrong_frame),
    ("I16", leaf_without_gfn),
    ("I18", direct_page_above_tables),
    ("I18", pass_through_to_another_table),
    ("I18", link_invalid_child),
    ("I19", direct_child_of_another_range),
    ("I4", missing_from_huge_count),
    ("I6", freed_root),
]


@pytest.mark.parametrize(("invariant", "corrupt"), CORRUPTIONS, ids=[f"{i}-{c.__name__}" for i, c in CORRUPTIONS])
def test_a_corruption_breaks_its_invariant(invariant: str, corrupt: Callable[[Machine], None]) -> None:
    m = ran()
    with pytest.raises(RunStop):
        corrupt(m)
        m.oracles.accounting.check()
    kind, fingerprint = m.found[0]
    assert fingerprint.split(":")[0] == invariant
    assert kind == ("write-protection" if invariant == "I8" else "accounting")


def test_a_healthy_machine_satisfies_every_invariant() -> None:
    m = ran()
    m.oracles.accounting.check()
    assert m.found == []
    assert len(m.kvm.by_pfn) == 5, "one page per level, and one for the large page"


def test_a_write_tracked_gfn_may_not_be_mapped_writable() -> None:
    m = ran()
    m.kvm.options = type(m.kvm.options)(write_track=(DATA,))
    m.oracles.accounting._tracked[DATA] = True
    m.poke(write_track_address(DATA), 1)
    with pytest.raises(RunStop):
        m.oracles.accounting.check()
    assert m.found == [("write-protection", "I7: a write-tracked gfn is mapped writable")]


def test_a_direct_machine_is_accounted_too() -> None:
    m = Machine(case(flat32(b"\x90"), long4(store(HUGE << 12)))).run()
    m.oracles.accounting.check()
    assert m.found == []


def cached_writable_table(m: Machine) -> None:
    m.kvm.vcpus[0].tlb.insert(TlbEntry(0x77, (PT + (1 << 12)), writable=True, user=True, nx=False, dirty=True))


def test_a_writable_tlb_entry_of_a_table_is_found_where_no_flush_is_due() -> None:
    m = ran()
    cached_writable_table(m)
    with pytest.raises(RunStop):
        m.oracles.accounting.check()
    assert m.found == [("write-protection", "I33: a TLB entry for a write-protected gfn outlives mmu_lock")]


def test_a_writable_tlb_entry_of_a_table_is_harmless_before_a_pending_flush() -> None:
    m = ran()
    cached_writable_table(m)
    m.poke(m.kvm.vcpus[0].requests_address, REQ_TLB_FLUSH)
    m.oracles.accounting.check()
    assert m.found == []


def test_the_check_sees_the_holders_buffered_stores_and_leaves_them_alone() -> None:
    m = ran()
    thread = m.host.threads[0]
    count = m.peek(m.kvm.indirect_shadow_pages)
    thread.buffer.pending.append(Pending(0, m.kvm.indirect_shadow_pages, 8, count, True))
    m.poke(m.kvm.indirect_shadow_pages, 0)
    events = len(m.host.trace)
    m.oracles.accounting.check()
    assert (m.found, len(thread.buffer.pending), len(m.host.trace)) == ([], 1, events)
