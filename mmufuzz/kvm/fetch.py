"""Installing translations: FNAME(fetch), direct_map, mmu_set_spte (paging_tmpl.h, mmu.c). All under mmu_lock."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.sites import GPTE_LOAD
from mmufuzz.kvm.counters import RETRY_GPTE, RETRY_TOP
from mmufuzz.kvm.memslots import gpa_to_hpa
from mmufuzz.kvm.page import clear_sp_write_flooding_count, kvm_mmu_get_child_sp, link_shadow_page
from mmufuzz.kvm.requests import REQ_MMU_FREE_OBSOLETE_ROOTS, kvm_flush_remote_tlbs, kvm_make_request
from mmufuzz.kvm.rmap import (
    drop_parent_pte,
    drop_spte,
    mmu_spte_set,
    mmu_spte_update,
    read_spte,
    rmap_add,
    sptep_to_sp,
)
from mmufuzz.kvm.role import ACC_ALL, ACC_WRITE_MASK, role_access, role_level
from mmufuzz.kvm.spte import (
    SPTE_U,
    SPTE_W,
    is_last_spte,
    is_shadow_present,
    make_leaf_spte,
    make_mmio_spte,
    spte_pfn,
)
from mmufuzz.kvm.structs import INVALID_PFN, Kvm, MemSlot, Vcpu
from mmufuzz.kvm.sync import mmu_try_to_unsync_pages
from mmufuzz.kvm.walker import GuestWalker
from mmufuzz.x86.paging import table_index
from mmufuzz.x86.state import PFERR_PRESENT, PFERR_RSVD, PFERR_USER, PFERR_WRITE

# RET_PF_* (mmu_internal.h).
RET_PF_CONTINUE: Final = 0
RET_PF_RETRY: Final = 1
RET_PF_EMULATE: Final = 2
RET_PF_WRITE_PROTECTED: Final = 3
RET_PF_INVALID: Final = 4
RET_PF_FIXED: Final = 5
RET_PF_SPURIOUS: Final = 6

RET_PF_NAMES: Final = ("CONTINUE", "RETRY", "EMULATE", "WRITE_PROTECTED", "INVALID", "FIXED", "SPURIOUS")


class PageFault:
    """struct kvm_page_fault."""

    def __init__(self, gva: int, error_code: int) -> None:
        self.addr = gva
        self.error_code = error_code
        self.write = error_code & PFERR_WRITE != 0
        self.user = error_code & PFERR_USER != 0
        self.present = error_code & PFERR_PRESENT != 0
        self.rsvd = error_code & PFERR_RSVD != 0
        self.gfn = 0
        self.slot: MemSlot | None = None
        self.pfn = INVALID_PFN
        self.map_writable = False
        self.write_fault_to_shadow_pgtable = False
        self.level = 0
        """Of the guest's leaf entry; 0 while no walk has found one. Only counters look at it."""


def gpte_changed(vcpu: Vcpu, walker: GuestWalker, level: int) -> bool:
    """paging_tmpl.h:FNAME(gpte_changed): read the gPTE again, its table being write-protected."""
    gpte = vcpu.kvm.host.current.load(GPTE_LOAD, gpa_to_hpa(walker.pte_gpa[level]))
    return gpte != walker.ptes[level]


def fetch(vcpu: Vcpu, fault: PageFault, walker: GuestWalker) -> int:
    """paging_tmpl.h:FNAME(fetch): shadow each guest table on the way, then map the page; a RET_PF code."""
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    direct_access = walker.pte_access
    top_level = role_level(mmu.cpu_role)
    if gpte_changed(vcpu, walker, top_level):
        kvm.mark("fetch.top_changed")
        kvm.count_retry(RETRY_TOP)
        return RET_PF_RETRY
    if kvm.warn_on(mmu.root_pfn == INVALID_PFN, "FNAME(fetch)", "no root"):
        return RET_PF_RETRY
    if mmu.root_dummy:
        kvm_make_request(vcpu, REQ_MMU_FREE_OBSOLETE_ROOTS)
        return RET_PF_RETRY
    table_pfn = mmu.root_pfn
    level = role_level(mmu.root_role)
    while True:
        address = table_pfn << PAGE_SHIFT | table_index(fault.addr, level) << 3
        sp = sptep_to_sp(kvm, address)
        clear_sp_write_flooding_count(kvm, sp)
        if level == walker.level:
            break
        table_gfn = walker.table_gfn[level - 1]
        child = kvm_mmu_get_child_sp(kvm, sp, address, table_gfn, False, walker.pt_access[level - 1])
        # The read that pairs with account_shadowed's barrier: the table is write-protected by now.
        if gpte_changed(vcpu, walker, level - 1):
            kvm.mark("fetch.gpte_changed")
            kvm.count_retry(RETRY_GPTE)
            return RET_PF_RETRY
        if child is not None:
            link_shadow_page(kvm, address, child)
        if fault.write and table_gfn == fault.gfn and kvm.fixes.self_change_in_fetch:
            fault.write_fault_to_shadow_pgtable = kvm.fixes.write_pf_to_sp
        table_pfn = spte_pfn(read_spte(kvm, address))
        level -= 1
    address = _map_guest_huge_page(kvm, fault, address, level, direct_access)
    return mmu_set_spte(kvm, fault, address, walker.pte_access)


def _map_guest_huge_page(kvm: Kvm, fault: PageFault, address: int, level: int, access: int) -> int:
    """The part of FNAME(fetch) below the guest's leaf: direct pages, down to 4K. Address of the leaf SPTE."""
    while level > 1:
        kvm.mark("fetch.guest_huge_page")
        _validate_direct_spte(kvm, address, access)
        child_gfn = fault.gfn & -(1 << 9 * (level - 1))
        child = kvm_mmu_get_child_sp(kvm, sptep_to_sp(kvm, address), address, child_gfn, True, access)
        if child is not None:
            link_shadow_page(kvm, address, child)
        table_pfn = spte_pfn(read_spte(kvm, address))
        level -= 1
        address = table_pfn << PAGE_SHIFT | table_index(fault.gfn << PAGE_SHIFT, level) << 3
    return address


def _validate_direct_spte(kvm: Kvm, address: int, access: int) -> None:
    """mmu.c:validate_direct_spte: a direct child made for other permissions is unlinked first."""
    spte = read_spte(kvm, address)
    if not is_shadow_present(spte) or is_last_spte(spte, role_level(sptep_to_sp(kvm, address).role)):
        return
    child = kvm.by_pfn[spte_pfn(spte)]
    if role_access(child.role) == access:
        return
    kvm.mark("fetch.direct_relinked")
    drop_parent_pte(kvm, child, address)
    kvm_flush_remote_tlbs(kvm)


def direct_map(vcpu: Vcpu, fault: PageFault) -> int:
    """mmu.c:direct_map: gpa equals gva; every table is direct."""
    kvm = vcpu.kvm
    sp = vcpu.mmu.pae_roots[fault.addr >> 30]
    level = role_level(sp.role)
    while True:
        address = sp.spte_address(table_index(fault.addr, level))
        if level == 1:
            return mmu_set_spte(kvm, fault, address, ACC_ALL)
        base_gfn = fault.gfn & -(1 << 9 * (level - 1))
        child = kvm_mmu_get_child_sp(kvm, sp, address, base_gfn, True, ACC_ALL)
        if child is not None:
            link_shadow_page(kvm, address, child)
        sp = kvm.by_pfn[spte_pfn(read_spte(kvm, address))]
        level -= 1


def mmu_set_spte(kvm: Kvm, fault: PageFault, address: int, access: int) -> int:
    """mmu.c:mmu_set_spte: install or update the leaf for ``fault``; a RET_PF code."""
    old = read_spte(kvm, address)
    was_rmapped = False
    flush = False
    if is_shadow_present(old):
        if spte_pfn(old) != fault.pfn:
            drop_spte(kvm, address)
            flush = True
        else:
            was_rmapped = True
    if fault.pfn == INVALID_PFN:
        return _set_mmio_spte(kvm, fault, address, access, flush)
    spte, write_protected = _make_spte(kvm, fault, access, read_spte(kvm, address))
    result = RET_PF_FIXED
    if spte == read_spte(kvm, address):
        result = RET_PF_SPURIOUS
    else:
        flush |= mmu_spte_update(kvm, address, spte)
    if write_protected and fault.write:
        result = RET_PF_WRITE_PROTECTED
    if flush:
        kvm_flush_remote_tlbs(kvm)
    if result != RET_PF_SPURIOUS:
        rights = ("--", "W-", "-U", "WU")[(spte & (SPTE_W | SPTE_U)) >> 1]
        kvm.host.note("spte gva {0:#x} = gfn {1:#x} " + rights, fault.addr & ~0xFFF, fault.gfn)
    if not was_rmapped:
        rmap_add(kvm, address, fault.gfn)
    return result


def _set_mmio_spte(kvm: Kvm, fault: PageFault, address: int, access: int, flush: bool) -> int:
    """mmu.c:mark_mmio_spte, and what mmu_set_spte does around it."""
    kvm.mark("mmio_spte")
    mmu_spte_set(kvm, address, make_mmio_spte(fault.gfn, access))
    if flush:
        kvm_flush_remote_tlbs(kvm)
    return RET_PF_EMULATE


def _make_spte(kvm: Kvm, fault: PageFault, access: int, old: int) -> tuple[int, bool]:
    """spte.c:make_spte for a 4K page: the SPTE, and whether write protection took W from it.

    KVM looks no further if the SPTE that is replaced has W. It does not ask whether that one was present, so an MMIO
    SPTE with W passes as well.
    """
    writable = access & ACC_WRITE_MASK != 0 and fault.map_writable
    write_protected = False
    if writable and not old & SPTE_W and not mmu_try_to_unsync_pages(kvm, fault.gfn):
        writable = False
        write_protected = True
    return make_leaf_spte(fault.pfn, access, fault.map_writable, writable, False), write_protected

