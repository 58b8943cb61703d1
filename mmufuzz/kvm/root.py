"""Roots: which shadow page hardware walks from (mmu.c, regs.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SHIFT, PAGE_SIZE
from mmufuzz.host.sites import ROLE_LOAD, VALID_GEN_LOAD
from mmufuzz.kvm.page import gfn_is_visible, kvm_mmu_get_shadow_page
from mmufuzz.kvm.requests import REQ_MMU_SYNC, REQ_TLB_FLUSH_CURRENT, REQ_TLB_FLUSH_GUEST, kvm_make_request
from mmufuzz.kvm.role import (
    ACC_ALL,
    ROLE_CR0_WP,
    ROLE_DIRECT,
    ROLE_EFER_NX,
    ROLE_GUEST_MODE,
    ROLE_PASSTHROUGH,
    ROLE_SMAP_ANDNOT_WP,
    ROLE_SMEP_ANDNOT_WP,
    with_level_access,
)
from mmufuzz.kvm.structs import INVALID_PFN, Kvm, ShadowPage, Vcpu
from mmufuzz.kvm.zap import kvm_mmu_commit_zap_page, kvm_mmu_prepare_zap_page, make_mmu_pages_available
from mmufuzz.x86.paging import INVPCID_ADDRESS, INVPCID_CONTEXT, PTE_P, PTE_U, PTE_W
from mmufuzz.x86.state import CR0_AM, CR0_PG, CR0_WP, CR4_SMAP, CR4_SMEP, EFER_NX

PT64_ROOT_5LEVEL: Final = 5
PT64_ROOT_4LEVEL: Final = 4
PT32E_ROOT_LEVEL: Final = 3

TRIPLE_FAULT: Final = 1
"""kvm_mmu_load made a triple-fault request instead of a root."""


def kvm_init_shadow_mmu(vcpu: Vcpu) -> None:
    """mmu.c:kvm_calc_cpu_role, kvm_init_shadow_mmu: roles from the guest's registers.

    KVM forces EFER.NX on for the shadow tables.
    """
    regs = vcpu.regs
    mmu = vcpu.mmu
    if vcpu.guest_mode:
        # kvm_init_shadow_npt_mmu: a host with 5 levels puts a pass-through table in front of L1's 4.
        mmu.direct = False
        mmu.cpu_role = with_level_access(ROLE_GUEST_MODE | ROLE_EFER_NX, PT64_ROOT_4LEVEL, ACC_ALL)
        mmu.root_role = with_level_access(mmu.cpu_role | ROLE_PASSTHROUGH, PT64_ROOT_5LEVEL, ACC_ALL)
        return
    if not regs.cr0 & CR0_PG:
        mmu.direct = True
        mmu.cpu_role = with_level_access(ROLE_DIRECT, 0, ACC_ALL)
        mmu.root_role = with_level_access(ROLE_DIRECT | ROLE_EFER_NX, PT32E_ROOT_LEVEL, ACC_ALL)
        return
    role = 0
    if regs.efer & EFER_NX:
        role |= ROLE_EFER_NX
    if regs.cr0 & CR0_WP:
        role |= ROLE_CR0_WP
    else:
        if regs.cr4 & CR4_SMEP:
            role |= ROLE_SMEP_ANDNOT_WP
        if regs.cr4 & CR4_SMAP:
            role |= ROLE_SMAP_ANDNOT_WP
    mmu.direct = False
    mmu.cpu_role = with_level_access(role, PT64_ROOT_4LEVEL, ACC_ALL)
    mmu.root_role = mmu.cpu_role | ROLE_EFER_NX


def kvm_mmu_load(vcpu: Vcpu) -> int:
    """mmu.c:kvm_mmu_load: give the vCPU a root; 0, a negative errno or TRIPLE_FAULT."""
    kvm = vcpu.kvm
    kvm.mark("mmu_load")
    result = _mmu_alloc_direct_roots(vcpu) if vcpu.mmu.direct else _mmu_alloc_shadow_roots(vcpu)
    if result == 0:
        kvm_mmu_sync_roots(vcpu)
        vcpu.tlb.flush_all()
    return result


def kvm_mmu_sync_roots(vcpu: Vcpu) -> None:
    """mmu.c:kvm_mmu_sync_roots: no page is ever unsync, so all it does is forget the MMIO access."""
    if not vcpu.mmu.direct:
        vcpu.mmio_gva = 0


def _mmu_alloc_shadow_roots(vcpu: Vcpu) -> int:
    """mmu.c:mmu_alloc_shadow_roots; before 6.6 mmu_check_root refuses a root outside all memslots."""
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    root_gfn = vcpu.regs.cr3 >> PAGE_SHIFT
    if not gfn_is_visible(kvm, root_gfn):
        if not kvm.fixes.dummy_root:
            kvm.mark("root.triple_fault")
            return TRIPLE_FAULT
        # Every access of the guest fails in the guest walk.
        kvm.mark("root.dummy")
        if kvm.dummy_root_pfn == INVALID_PFN:
            kvm.dummy_root_pfn = kvm.alloc_frame()
        mmu.root_pfn = kvm.dummy_root_pfn
        mmu.root_sp = None
        mmu.root_dummy = True
        return 0
    kvm.mmu_lock.acquire()
    result = make_mmu_pages_available(kvm)
    if result == 0:
        sp = _mmu_alloc_root(kvm, root_gfn, mmu.root_role)
        mmu.root_pfn = sp.pfn
        mmu.root_sp = sp
        mmu.root_dummy = False
    kvm.mmu_lock.release()
    return result


def _mmu_alloc_direct_roots(vcpu: Vcpu) -> int:
    """mmu.c:mmu_alloc_direct_roots, PAE: four direct level-2 tables under a special root.

    PDPTEs carry no access rights; the modelled hardware reads them as ordinary entries, so they grant everything.
    """
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    kvm.mmu_lock.acquire()
    result = make_mmu_pages_available(kvm)
    if result == 0:
        if mmu.pae_root_pfn == INVALID_PFN:
            mmu.pae_root_pfn = kvm.alloc_frame()
        role = with_level_access(mmu.root_role, PT32E_ROOT_LEVEL - 1, ACC_ALL)
        mmu.pae_roots = [_mmu_alloc_root(kvm, quarter << 18, role) for quarter in range(4)]
        for quarter in range(4):
            entry = mmu.pae_roots[quarter].pfn << PAGE_SHIFT | PTE_P | PTE_W | PTE_U
            kvm.memory.write(mmu.pae_root_pfn << PAGE_SHIFT | quarter << 3, 8, entry)
        mmu.root_pfn = mmu.pae_root_pfn
        mmu.root_sp = None
        mmu.root_dummy = False
    kvm.mmu_lock.release()
    return result


def _mmu_alloc_root(kvm: Kvm, gfn: int, role: int) -> ShadowPage:
    """mmu.c:mmu_alloc_root."""
    sp = kvm_mmu_get_shadow_page(kvm, gfn, role)
    sp.root_count += 1
    return sp


def kvm_mmu_free_roots(vcpu: Vcpu) -> None:
    """mmu.c:kvm_mmu_free_roots: a valid root page stays hashed and can be found again."""
    kvm = vcpu.kvm
    mmu = vcpu.mmu
    if mmu.root_pfn == INVALID_PFN:
        return
    roots = mmu.pae_roots if mmu.root_sp is None else [mmu.root_sp]
    invalid_list: list[ShadowPage] = []
    kvm.mmu_lock.acquire()
    for sp in roots:
        sp.root_count -= 1
        if sp.root_count == 0 and sp.invalid:
            kvm_mmu_prepare_zap_page(kvm, sp, invalid_list)
    mmu.pae_roots = []
    mmu.root_sp = None
    mmu.root_pfn = INVALID_PFN
    mmu.root_dummy = False
    kvm_mmu_commit_zap_page(kvm, invalid_list)
    kvm.mmu_lock.release()


def kvm_mmu_free_obsolete_roots(vcpu: Vcpu) -> None:
    """mmu.c:kvm_mmu_free_obsolete_roots: looks at the root without mmu_lock; a special root counts as obsolete."""
    kvm = vcpu.kvm
    sp = vcpu.mmu.root_sp
    if vcpu.mmu.root_pfn == INVALID_PFN:
        return
    if sp is not None:
        thread = kvm.host.current
        if not thread.load(ROLE_LOAD, sp.invalid_address):
            if thread.load(VALID_GEN_LOAD, kvm.mmu_valid_gen_address) == sp.mmu_valid_gen:
                return
    kvm.mark("root.freed_obsolete")
    kvm_mmu_free_roots(vcpu)


def kvm_mmu_new_pgd(vcpu: Vcpu) -> None:
    """mmu.c:kvm_mmu_new_pgd, without cached previous roots: the next entry loads a root for the new CR3."""
    kvm_mmu_free_roots(vcpu)


def kvm_mmu_reset_context(vcpu: Vcpu) -> None:
    """mmu.c:kvm_mmu_reset_context: roles changed; drop the root and start over."""
    kvm_mmu_free_roots(vcpu)
    vcpu.mmio_gva = 0  # kvm_mmu_unload
    kvm_init_shadow_mmu(vcpu)


def kvm_set_cr3(vcpu: Vcpu, value: int) -> bool:
    """x86.c (6.12: regs.c):kvm_set_cr3 without PCID; False asks for #GP(0)."""
    if value >> 40:
        return False
    if value != vcpu.regs.cr3:
        vcpu.regs.cr3 = value
        kvm_mmu_new_pgd(vcpu)
    # kvm_invalidate_pcid: a load of CR3 flushes, whatever its value.
    kvm_make_request(vcpu, REQ_MMU_SYNC | REQ_TLB_FLUSH_CURRENT)
    return True


def kvm_set_cr0(vcpu: Vcpu, value: int) -> bool:
    """regs.c:kvm_set_cr0, kvm_post_set_cr0 (6.1: x86.c): only CR0.WP and AM may change here; False asks for #GP(0).

    The TLB is flushed when the next root is loaded. Without paging nothing happens (6.1 drops the root even so).
    """
    regs = vcpu.regs
    changed = value ^ regs.cr0
    if changed & ~(CR0_WP | CR0_AM):
        return False
    regs.cr0 = value
    # KVM_MMU_CR0_ROLE_BITS
    if changed & CR0_WP and value & CR0_PG:
        kvm_mmu_reset_context(vcpu)
    return True


def kvm_set_cr4(vcpu: Vcpu, value: int) -> bool:
    """regs.c:kvm_set_cr4, kvm_post_set_cr4 (6.1: x86.c): only SMEP and SMAP may change here; False asks for #GP(0).

    Setting SMEP flushes, as the architecture has it.
    """
    regs = vcpu.regs
    if (value ^ regs.cr4) & ~(CR4_SMEP | CR4_SMAP):
        return False
    old = regs.cr4
    if value != old:
        regs.cr4 = value
        kvm_mmu_reset_context(vcpu)
        if value & ~old & CR4_SMEP:
            kvm_make_request(vcpu, REQ_TLB_FLUSH_CURRENT)
    return True


def kvm_mmu_invalidate_addr(vcpu: Vcpu, gva: int) -> None:
    """mmu.c:kvm_mmu_invalidate_addr (6.1: kvm_mmu_invalidate_gva): flush the address, sync its SPTE if that is unsync.

    None is, but the indirect MMU takes mmu_lock to see that. For INVLPG (kvm_mmu_invlpg) and for an injected #PF.
    """
    vcpu.tlb.invalidate(gva >> PAGE_SHIFT)
    if vcpu.mmu.direct:
        return
    if vcpu.mmio_gva == gva & -PAGE_SIZE:
        vcpu.mmio_gva = 0
    vcpu.kvm.mmu_lock.acquire()
    vcpu.kvm.mmu_lock.release()


def kvm_handle_invpcid(vcpu: Vcpu, kind: int, gva: int) -> None:
    """x86.c:kvm_handle_invpcid, behind its checks, for PCID 0: a guest has no other while CR4.PCIDE is clear."""
    if kind == INVPCID_ADDRESS:
        # kvm_mmu_invpcid_gva
        kvm_mmu_invalidate_addr(vcpu, gva)
    elif kind == INVPCID_CONTEXT:
        # kvm_invalidate_pcid
        kvm_make_request(vcpu, REQ_MMU_SYNC | REQ_TLB_FLUSH_CURRENT)
    else:
        # Shadow tables have no global entries, so that both of the other types flush them.
        kvm_make_request(vcpu, REQ_TLB_FLUSH_GUEST)
