"""Write tracking of guest page tables, and what is accounted per shadow page (mmu.c, page_track.c)."""

from __future__ import annotations

from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.sites import COUNT_STORE, MB, WRITE_TRACK_LOAD, WRITE_TRACK_STORE
from mmufuzz.kvm.counters import STORE_IN_FLIGHT, WRITABLE_TLB
from mmufuzz.kvm.memslots import gfn_to_memslot, gfn_to_pfn
from mmufuzz.kvm.requests import kvm_flush_remote_tlbs
from mmufuzz.kvm.rmap import rmap_write_protect
from mmufuzz.kvm.role import ROLE_DIRECT, ROLE_PASSTHROUGH, role_level
from mmufuzz.kvm.structs import WRITE_TRACK_BASE, Kvm, MemSlot, ShadowPage


def sp_has_gptes(sp: ShadowPage) -> bool:
    """mmu_internal.h:sp_has_gptes: the page shadows a guest table (a gSP)."""
    return not sp.role & (ROLE_DIRECT | ROLE_PASSTHROUGH)


def is_obsolete_sp(kvm: Kvm, sp: ShadowPage) -> bool:
    """mmu.c:is_obsolete_sp, under mmu_lock."""
    return sp.invalid or sp.mmu_valid_gen != kvm.mmu_valid_gen


def write_track_address(gfn: int) -> int:
    """Address of gfn's arch.gfn_write_track counter."""
    return WRITE_TRACK_BASE + (gfn << 3)


def kvm_gfn_is_write_tracked(kvm: Kvm, gfn: int) -> bool:
    """page_track.c:kvm_gfn_is_write_tracked: a lockless READ_ONCE."""
    return kvm.host.current.load(WRITE_TRACK_LOAD, write_track_address(gfn)) != 0


def update_gfn_write_track(kvm: Kvm, gfn: int, count: int) -> None:
    """page_track.c:update_gfn_write_track: under mmu_lock."""
    thread = kvm.host.current
    value = thread.peek(write_track_address(gfn)) + count
    if kvm.warn_on(value < 0 or value > 0xFFFF, "update_gfn_write_track", "write-track count out of range"):
        return
    thread.store(WRITE_TRACK_STORE, write_track_address(gfn), value)


def update_gfn_disallow_lpage_count(slot: MemSlot, gfn: int, count: int) -> None:
    """mmu.c:update_gfn_disallow_lpage_count, for 2M and 1G alike."""
    for level in (2, 3):
        info = slot.disallow_lpage[level - 2]
        index = gfn >> 9 * (level - 1)
        info[index] = info.get(index, 0) + count


def account_shadowed(kvm: Kvm, sp: ShadowPage) -> None:
    """mmu.c:account_shadowed: a fresh gSP. Under mmu_lock.

    The barrier makes the count visible before any gPTE of the frame is read again; it pairs with the one in
    kvm_mmu_track_write.
    """
    thread = kvm.host.current
    count = thread.peek(kvm.indirect_shadow_pages)
    thread.store(COUNT_STORE, kvm.indirect_shadow_pages, count + 1)
    if kvm.fixes.barrier_account:
        thread.fence(MB)
    if count == 0:
        kvm.mark("account_shadowed.first")
    slot = gfn_to_memslot(kvm, sp.gfn)
    assert slot is not None, "the walker found the table in a memslot"
    if role_level(sp.role) > 1:
        update_gfn_write_track(kvm, sp.gfn, 1)
    update_gfn_disallow_lpage_count(slot, sp.gfn, 1)
    _count_writers(kvm, gfn_to_pfn(sp.gfn))
    if rmap_write_protect(kvm, slot, sp.gfn):
        kvm.mark("account_shadowed.flush")
        kvm_flush_remote_tlbs(kvm)


def _count_writers(kvm: Kvm, pfn: int) -> None:
    """The guest frame ``pfn`` becomes a shadowed table: what could still write it unseen."""
    for thread in kvm.host.threads:
        for entry in thread.buffer.pending:
            if entry.address >> PAGE_SHIFT == pfn:
                kvm.counters.near(STORE_IN_FLIGHT)
    for vcpu in kvm.vcpus:
        for cached in vcpu.tlb.entries():
            if cached.pfn == pfn and cached.writable:
                kvm.counters.near(WRITABLE_TLB)


def unaccount_shadowed(kvm: Kvm, sp: ShadowPage) -> None:
    """mmu.c:unaccount_shadowed: the gSP becomes invalid. Under mmu_lock; no barrier."""
    thread = kvm.host.current
    thread.store(COUNT_STORE, kvm.indirect_shadow_pages, thread.peek(kvm.indirect_shadow_pages) - 1)
    slot = gfn_to_memslot(kvm, sp.gfn)
    assert slot is not None, "the walker found the table in a memslot"
    if role_level(sp.role) > 1:
        update_gfn_write_track(kvm, sp.gfn, -1)
    update_gfn_disallow_lpage_count(slot, sp.gfn, -1)
