"""Emulated writes to guest page tables, and giving up the shadow pages of a gfn (mmu.c, x86.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.sites import COUNT_LOAD, MB
from mmufuzz.kvm.counters import COUNT_ZERO, RETRY_COUNT_ZERO, RETRY_NOTHING, RETRY_ZAPPED, UNTRACKED_STORE
from mmufuzz.kvm.role import role_level
from mmufuzz.kvm.structs import INVALID_GPA, Kvm, ShadowPage, Vcpu
from mmufuzz.kvm.walker import gva_to_gpa
from mmufuzz.kvm.write_track import sp_has_gptes
from mmufuzz.kvm.zap import (
    gsps_at,
    kvm_mmu_commit_zap_page,
    kvm_mmu_prepare_zap_page,
    kvm_mmu_remote_flush_or_zap,
    mmu_page_zap_pte,
    zap_gfn,
)
from mmufuzz.x86.paging import ACCESS_WRITE
from mmufuzz.x86.state import CR4_PAE

FLOOD_LIMIT: Final = 3
"""Emulated writes to a table, with no fault through it in between, that cost it its shadow page."""


def kvm_mmu_track_write(vcpu: Vcpu, gpa: int, size: int) -> None:
    """mmu.c:kvm_mmu_track_write (6.1: kvm_mmu_pte_write): the emulator has stored ``size`` bytes at ``gpa``.

    Zaps the SPTEs derived from what was overwritten. The barrier orders the store before the read of the count; it
    pairs with the one in account_shadowed. Before the direct call, the SRCU read lock around the notifier list
    held a full barrier in the same place (srcutree.c:__srcu_read_lock); an external user of write tracking, whose
    notifier is called first (page_track.c:__kvm_page_track_write), brings that one back.

    A guest with CR4.PAE is taken to write a gPTE in two halves, so that 4 bytes count as the 8 they lie in
    (mmu_pte_write_fetch_gpte) - also 4 bytes that straddle two gPTEs, the second of which is then overlooked.
    """
    kvm = vcpu.kvm
    thread = kvm.host.current
    if kvm.fixes.barrier_emulator or not kvm.fixes.track_direct_call or kvm.options.write_track:
        thread.fence(MB)
    if thread.load(COUNT_LOAD, kvm.indirect_shadow_pages) == 0:
        kvm.mark("track_write.skipped")
        _count_of_zero(kvm, gpa >> PAGE_SHIFT)
        return
    kvm.mmu_lock.acquire()
    kvm.mark("track_write.locked")
    if size == 4 and vcpu.regs.cr4 & CR4_PAE:
        gpa &= ~7
        size = 8
    invalid_list: list[ShadowPage] = []
    flush = False
    for sp in gsps_at(kvm, gpa >> PAGE_SHIFT):
        if sp.invalid:
            continue  # zapped with its parent in a nested page table
        if detect_write_misaligned(gpa, size) or detect_write_flooding(kvm, sp):
            kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
            continue
        index = (gpa & 0xFFF) >> 3
        if index in sp.used and mmu_page_zap_pte(kvm, sp.spte_address(index), None):
            kvm.host.note("track_write: zap spte {0} of gfn {1:#x}", index, sp.gfn)
            flush = True
    kvm_mmu_remote_flush_or_zap(kvm, invalid_list, flush)
    kvm.mmu_lock.release()


def _count_of_zero(kvm: Kvm, gfn: int) -> None:
    """How near a store to ``gfn`` came to a table's that is not tracked, the count being read as zero."""
    if gsps_at(kvm, gfn):
        kvm.counters.near(UNTRACKED_STORE)
    for sp in kvm.by_pfn.values():
        if not sp.invalid and sp_has_gptes(sp):
            kvm.counters.near(COUNT_ZERO)
            return


def detect_write_misaligned(gpa: int, size: int) -> bool:
    """mmu.c:detect_write_misaligned, for 8-byte gPTEs: the write is not one of a whole gPTE, or of its low half."""
    offset = gpa & 0xFFF
    if not offset & 7 and size == 1:
        return False
    return (offset ^ (offset + size - 1)) & ~7 != 0 or size < 4


def detect_write_flooding(kvm: Kvm, sp: ShadowPage) -> bool:
    """mmu.c:detect_write_flooding: an upper-level table that is written over and over is probably no table any more."""
    if role_level(sp.role) == 1:
        return False
    count = kvm.memory.read(sp.flooding_address, 8) + 1
    kvm.memory.write(sp.flooding_address, 8, count)
    kvm.host.current.observed(count)
    if count >= FLOOD_LIMIT:
        kvm.mark("track_write.flooding")
        return True
    return False


def kvm_mmu_unprotect_page(kvm: Kvm, gfn: int) -> bool:
    """mmu.c:kvm_mmu_unprotect_page (6.1 to 6.11): zap every gSP at ``gfn``; True if there was one."""
    invalid_list: list[ShadowPage] = []
    kvm.mmu_lock.acquire()
    count = zap_gfn(kvm, gfn, invalid_list)
    kvm_mmu_commit_zap_page(kvm, invalid_list)
    kvm.mmu_lock.release()
    kvm.mark("unprotect.zapped" if count else "unprotect.nothing")
    kvm.count_retry(RETRY_ZAPPED if count else RETRY_NOTHING)
    kvm.host.note("unprotect gfn {0:#x}: {1} zapped", gfn, count)
    return count > 0


def kvm_mmu_unprotect_gfn_and_retry(vcpu: Vcpu, gva: int, always_retry: bool) -> bool:
    """mmu.c:__kvm_mmu_unprotect_gfn_and_retry (6.12): True if a gSP was zapped.

    Only pages that can be freed count: a zapped page that is some vCPU's root stays alive and does not.
    """
    kvm = vcpu.kvm
    zapped = False
    if kvm.host.current.load(COUNT_LOAD, kvm.indirect_shadow_pages) == 0:
        kvm.mark("unprotect.count_zero")
        kvm.count_retry(RETRY_COUNT_ZERO)
    else:
        gpa, _ = gva_to_gpa(vcpu, gva, ACCESS_WRITE)
        if gpa != INVALID_GPA:
            invalid_list: list[ShadowPage] = []
            kvm.mmu_lock.acquire()
            count = zap_gfn(kvm, gpa >> PAGE_SHIFT, invalid_list)
            zapped = bool(invalid_list)
            kvm_mmu_commit_zap_page(kvm, invalid_list)
            kvm.mmu_lock.release()
            kvm.mark("unprotect.zapped" if count else "unprotect.nothing")
            kvm.count_retry(RETRY_ZAPPED if count else RETRY_NOTHING)
            kvm.host.note("unprotect gfn {0:#x}: {1} zapped", gpa >> PAGE_SHIFT, count)
    record = kvm.fixes.retry_record_failure if always_retry else kvm.fixes.retry_record_fault
    if (zapped or always_retry) and record:
        vcpu.last_retry_eip = vcpu.regs.rip
        vcpu.last_retry_addr = gva
    return zapped
