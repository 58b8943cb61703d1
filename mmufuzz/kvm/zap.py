"""Taking shadow pages away: zap, free, reclaim, zap-all-fast (mmu.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import ROLE_STORE, VALID_GEN_STORE
from mmufuzz.kvm.counters import ZAPPED, ZAPPED_ROOT
from mmufuzz.kvm.requests import REQ_MMU_FREE_OBSOLETE_ROOTS, kvm_flush_remote_tlbs, kvm_make_all_cpus_request
from mmufuzz.kvm.rmap import (
    drop_parent_pte,
    drop_spte,
    is_leaf,
    mmu_spte_clear_no_track,
    read_spte,
)
from mmufuzz.kvm.role import ROLE_GUEST_MODE, role_text
from mmufuzz.kvm.spte import is_shadow_present, spte_pfn
from mmufuzz.kvm.structs import Kvm, ShadowPage
from mmufuzz.kvm.write_track import is_obsolete_sp, sp_has_gptes, unaccount_shadowed

KVM_MIN_FREE_MMU_PAGES: Final = 5
KVM_REFILL_PAGES: Final = 25
ENOSPC: Final = -28


def mmu_page_zap_pte(kvm: Kvm, address: int, invalid_list: list[ShadowPage] | None) -> bool:
    """mmu.c:mmu_page_zap_pte: clear one SPTE of any kind, without a flush; True if it was present.

    With ``invalid_list`` a page of a nested page table that this leaves without a parent is zapped as well.
    """
    spte = read_spte(kvm, address)
    if is_shadow_present(spte):
        if is_leaf(kvm, address, spte):
            drop_spte(kvm, address)
            return True
        child = kvm.by_pfn[spte_pfn(spte)]
        drop_parent_pte(kvm, child, address)
        orphan = not child.root_count and not child.parent_ptes
        if invalid_list is not None and child.role & ROLE_GUEST_MODE and orphan:
            kvm_mmu_prepare_zap_page(kvm, child, invalid_list)
        return True
    if spte:
        mmu_spte_clear_no_track(kvm, address)
    return False


def kvm_mmu_prepare_zap_page(kvm: Kvm, sp: ShadowPage, invalid_list: list[ShadowPage]) -> None:
    """mmu.c:__kvm_mmu_prepare_zap_page. Under mmu_lock; ``kvm_mmu_commit_zap_page`` must follow before unlock."""
    thread = kvm.host.current
    for index in sorted(sp.used):
        mmu_page_zap_pte(kvm, sp.spte_address(index), invalid_list)
    for parent in sp.parent_ptes[:]:
        drop_parent_pte(kvm, sp, parent)
    if not sp.invalid and sp_has_gptes(sp):
        unaccount_shadowed(kvm, sp)
    sp.unsync = False
    zapped_root = False
    kvm.count_page(ZAPPED_ROOT if sp.root_count else ZAPPED, sp.role)
    if sp.active:
        kvm.active_mmu_pages.remove(sp)
        sp.active = False
    if sp.root_count == 0:
        invalid_list.append(sp)
        kvm.n_used_mmu_pages -= 1
    else:
        zapped_root = not is_obsolete_sp(kvm, sp)
    sp.invalid = True
    thread.store(ROLE_STORE, sp.invalid_address, 1)
    text = "zap gfn {0:#x} " + role_text(sp.role)
    kvm.host.note(text + " (root)" if sp.root_count else text, sp.gfn)
    if zapped_root:
        # After the page is marked: whoever sees the request must find the root invalid.
        kvm.mark("zap.root")
        kvm_make_all_cpus_request(kvm, REQ_MMU_FREE_OBSOLETE_ROOTS)


def kvm_mmu_commit_zap_page(kvm: Kvm, invalid_list: list[ShadowPage]) -> None:
    """mmu.c:kvm_mmu_commit_zap_page: flush, then free. The flush also waits for lockless walkers."""
    if not invalid_list:
        return
    kvm_flush_remote_tlbs(kvm)
    for sp in invalid_list:
        kvm.warn_on(sp.root_count != 0, "kvm_mmu_commit_zap_page", "freed a shadow page that is a root")
        kvm.mmu_page_hash[sp.gfn].remove(sp)
        del kvm.by_pfn[sp.pfn]
        kvm.memory.free_frame(sp.pfn)
    invalid_list.clear()


def kvm_mmu_remote_flush_or_zap(kvm: Kvm, invalid_list: list[ShadowPage], flush: bool) -> None:
    """mmu.c:kvm_mmu_remote_flush_or_zap."""
    if invalid_list:
        kvm_mmu_commit_zap_page(kvm, invalid_list)
    elif flush:
        kvm_flush_remote_tlbs(kvm)


def make_mmu_pages_available(kvm: Kvm) -> int:
    """mmu.c:make_mmu_pages_available: reclaim the oldest pages that are no roots; 0 or ENOSPC."""
    limit = kvm.options.n_max_mmu_pages
    available = max(limit - kvm.n_used_mmu_pages, 0)
    if available >= KVM_MIN_FREE_MMU_PAGES:
        return 0
    kvm.mark("reclaim")
    invalid_list: list[ShadowPage] = []
    wanted = KVM_REFILL_PAGES - available
    for sp in kvm.active_mmu_pages[::-1]:
        if len(invalid_list) >= wanted:
            break
        # A page may be gone already, with the parent it had in a nested page table.
        if sp.root_count == 0 and sp.active:
            kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
    kvm_mmu_commit_zap_page(kvm, invalid_list)
    if kvm.n_used_mmu_pages >= limit:
        kvm.mark("reclaim.enospc")
        return ENOSPC
    return 0


def kvm_mmu_zap_all_fast(kvm: Kvm) -> None:
    """mmu.c:kvm_mmu_zap_all_fast: what a memslot update causes. Takes slots_lock as the ioctl does, then mmu_lock."""
    kvm.slots_lock.acquire()
    kvm.mmu_lock.acquire()
    kvm.mmu_valid_gen ^= 1
    kvm.host.current.store(VALID_GEN_STORE, kvm.mmu_valid_gen_address, kvm.mmu_valid_gen)
    kvm.host.note("mmu_valid_gen = {0}", kvm.mmu_valid_gen)
    kvm_make_all_cpus_request(kvm, REQ_MMU_FREE_OBSOLETE_ROOTS)
    kvm_zap_obsolete_pages(kvm)
    kvm.mmu_lock.release()
    kvm.slots_lock.release()


def kvm_zap_obsolete_pages(kvm: Kvm) -> None:
    """mmu.c:kvm_zap_obsolete_pages: from the oldest page on, until one of the current generation."""
    for sp in kvm.active_mmu_pages[::-1]:
        if not is_obsolete_sp(kvm, sp):
            break
        if sp.active:  # not zapped with its parent in a nested page table
            kvm_mmu_prepare_zap_page(kvm, sp, kvm.zapped_obsolete_pages)
    kvm_mmu_commit_zap_page(kvm, kvm.zapped_obsolete_pages)


def zap_gfn(kvm: Kvm, gfn: int, invalid_list: list[ShadowPage]) -> int:
    """Zap every valid gSP at ``gfn``; how many there were (mmu.c:kvm_mmu_unprotect_page and its successors)."""
    count = 0
    for sp in gsps_at(kvm, gfn):
        if not sp.invalid:  # not zapped with its parent in a nested page table
            kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
            count += 1
    return count


def gsps_at(kvm: Kvm, gfn: int) -> list[ShadowPage]:
    """mmu_internal.h:for_each_gfn_valid_sp_with_gptes."""
    bucket = kvm.mmu_page_hash.get(gfn, [])
    return [sp for sp in bucket if not is_obsolete_sp(kvm, sp) and sp_has_gptes(sp)]
