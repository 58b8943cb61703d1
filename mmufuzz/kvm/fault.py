"""From a #PF exit to a RET_PF code, and what is done about a write-protected page (mmu.c, paging_tmpl.h)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SHIFT, PAGE_SIZE
from mmufuzz.host.sites import MODE_ATOMIC, MODE_STORE
from mmufuzz.kvm.counters import RET_PF_BLOCK, RETRY_GUARD, RETRY_MMIO, RETRY_STALE, ZAPPED_WALK
from mmufuzz.kvm.exceptions import kvm_event_needs_reinjection, kvm_inject_emulated_page_fault
from mmufuzz.kvm.fetch import (
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_INVALID,
    RET_PF_NAMES,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
    PageFault,
    direct_map,
    fetch,
)
from mmufuzz.kvm.memslots import gfn_to_memslot, gfn_to_pfn
from mmufuzz.kvm.page import clear_sp_write_flooding_count, read_spte_lockless
from mmufuzz.kvm.requests import REQ_MMU_FREE_OBSOLETE_ROOTS, kvm_ack_ipi, kvm_test_request
from mmufuzz.kvm.role import ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, role_level
from mmufuzz.kvm.spte import SPTE_MMIO_ACCESS, SPTE_W, is_mmio_spte, is_shadow_present, mmio_spte_gfn, spte_pfn
from mmufuzz.kvm.structs import INVALID_PFN, OUTSIDE_GUEST_MODE, READING_SHADOW_PAGE_TABLES, Vcpu
from mmufuzz.kvm.track import kvm_mmu_unprotect_gfn_and_retry, kvm_mmu_unprotect_page
from mmufuzz.kvm.walker import GuestWalker, gva_to_gpa, vcpu_match_mmio_gva, walk_addr
from mmufuzz.kvm.write_track import is_obsolete_sp, kvm_gfn_is_write_tracked
from mmufuzz.kvm.zap import make_mmu_pages_available
from mmufuzz.x86.paging import table_index
from mmufuzz.x86.state import PFERR_PRESENT, PFERR_RSVD

EMULTYPE_PF: Final = 1 << 0
EMULTYPE_ALLOW_RETRY_PF: Final = 1 << 1
EMULTYPE_WRITE_PF_TO_SP: Final = 1 << 2
EMULTYPE_TRAP_UD: Final = 1 << 3
EMULTYPE_TRAP_UD_FORCED: Final = 1 << 4
EMULTYPE_NO_DECODE: Final = 1 << 5
EMULTYPE_SKIP: Final = 1 << 6


class PageFaultResult:
    """What kvm_mmu_page_fault decided: a negative errno, 1 to resume the guest, or emulation with ``emultype``."""

    def __init__(self, code: int, emultype: int) -> None:
        self.code = code
        self.emultype = emultype


RESUME: Final = 1
EMULATE: Final = 2


def kvm_mmu_page_fault(vcpu: Vcpu, gva: int, error_code: int) -> PageFaultResult:
    """mmu.c:kvm_mmu_page_fault, up to the call of the emulator."""
    kvm = vcpu.kvm
    emultype = EMULTYPE_PF
    if not kvm.fixes.retry_rewrite and kvm_event_needs_reinjection(vcpu):
        _unprotect_page_virt(vcpu, gva)
    if kvm.warn_on(vcpu.mmu.root_pfn == INVALID_PFN, "kvm_mmu_page_fault", "no root"):
        return PageFaultResult(RESUME, 0)
    result = RET_PF_INVALID
    level = 0
    if error_code & PFERR_RSVD:
        result = handle_mmio_page_fault(vcpu, gva)
        if result == RET_PF_EMULATE:
            return PageFaultResult(EMULATE, emultype)
    if result == RET_PF_INVALID:
        fault = PageFault(gva, error_code)
        result = direct_page_fault(vcpu, fault) if vcpu.mmu.direct else page_fault(vcpu, fault)
        level = fault.level
        if fault.write_fault_to_shadow_pgtable:
            kvm.mark("page_fault.write_pf_to_sp")
            emultype |= EMULTYPE_WRITE_PF_TO_SP
    if result < 0:
        return PageFaultResult(result, 0)
    kvm.mark("page_fault." + RET_PF_NAMES[result])
    kvm.counters.hit(RET_PF_BLOCK.at(result, vcpu.kind, level))
    kvm.host.note("RET_PF_" + RET_PF_NAMES[result])
    if not kvm.fixes.retry_rewrite:
        return _before_rewrite(vcpu, gva, result, emultype)
    if result == RET_PF_WRITE_PROTECTED:
        return kvm_mmu_write_protect_fault(vcpu, gva, emultype)
    return PageFaultResult(EMULATE if result == RET_PF_EMULATE else RESUME, emultype)


def _unprotect_page_virt(vcpu: Vcpu, gva: int) -> None:
    """6.1 to 6.11, mmu.c:kvm_handle_page_fault, kvm_mmu_unprotect_page_virt: for any #PF during event delivery."""
    if vcpu.mmu.direct:
        return
    gpa, _ = gva_to_gpa(vcpu, gva, 0)
    # Also for INVALID_GPA, which no page shadows.
    if kvm_mmu_unprotect_page(vcpu.kvm, gpa >> PAGE_SHIFT):
        vcpu.kvm.mark("unprotect.reinjection")


def _before_rewrite(vcpu: Vcpu, gva: int, result: int, emultype: int) -> PageFaultResult:
    """6.1 to 6.11: a write-protected gfn is RET_PF_EMULATE, and every emulation that is not MMIO may be retried."""
    if result not in (RET_PF_EMULATE, RET_PF_WRITE_PROTECTED):
        return PageFaultResult(RESUME, 0)
    if not mmio_info_in_cache(vcpu, gva) and not vcpu.guest_mode:
        emultype |= EMULTYPE_ALLOW_RETRY_PF
    return PageFaultResult(EMULATE, emultype)


def kvm_mmu_write_protect_fault(vcpu: Vcpu, gva: int, emultype: int) -> PageFaultResult:
    """mmu.c:kvm_mmu_write_protect_fault (6.12): guard against unprotecting for the same instruction for ever."""
    kvm = vcpu.kvm
    if kvm.fixes.retry_check and vcpu.last_retry_eip == vcpu.regs.rip and vcpu.last_retry_addr == gva:
        kvm.mark("retry_guard.hit")
        kvm.count_retry(RETRY_GUARD)
        kvm.host.note("retry guard: emulate, do not unprotect again")
        return PageFaultResult(EMULATE, emultype)
    vcpu.last_retry_eip = 0
    vcpu.last_retry_addr = 0
    cached = mmio_info_in_cache(vcpu, gva)
    if kvm.warn_on(cached, "kvm_mmu_write_protect_fault", "write-protected gfn in the MMIO cache"):
        return PageFaultResult(EMULATE, emultype)
    if not vcpu.mmu.direct and kvm_event_needs_reinjection(vcpu) and kvm_mmu_unprotect_gfn_and_retry(vcpu, gva, False):
        kvm.mark("unprotect.reinjection")
        return PageFaultResult(RESUME, 0)
    if not vcpu.guest_mode:
        emultype |= EMULTYPE_ALLOW_RETRY_PF
    return PageFaultResult(EMULATE, emultype)


def page_fault(vcpu: Vcpu, fault: PageFault) -> int:
    """paging_tmpl.h:FNAME(page_fault): the indirect MMU."""
    kvm = vcpu.kvm
    walker = walk_addr(vcpu, fault.addr, fault.error_code & ~(PFERR_PRESENT | PFERR_RSVD))
    if walker.failed:
        kvm_inject_emulated_page_fault(vcpu, fault.addr, walker.error_code)
        return RET_PF_RETRY
    fault.gfn = walker.gfn
    fault.level = walker.level
    fault.slot = gfn_to_memslot(kvm, fault.gfn)
    if page_fault_handle_page_track(vcpu, fault):
        shadow_page_table_clear_flood(vcpu, fault.addr)
        return RET_PF_WRITE_PROTECTED
    if not kvm.fixes.self_change_in_fetch and kvm.fixes.write_pf_to_sp:
        fault.write_fault_to_shadow_pgtable = is_self_change_mapping(vcpu, walker, fault)
    result = kvm_faultin_pfn(vcpu, fault, walker.pte_access)
    if result != RET_PF_CONTINUE:
        return result
    _adjust_for_cr0_wp(vcpu, fault, walker)
    kvm.mmu_lock.acquire()
    result = make_mmu_pages_available(kvm)
    if result == 0:
        if is_page_fault_stale(vcpu):
            kvm.mark("page_fault.stale")
            kvm.count_retry(RETRY_STALE)
            result = RET_PF_RETRY
        else:
            result = fetch(vcpu, fault, walker)
    kvm.mmu_lock.release()
    return result


def _adjust_for_cr0_wp(vcpu: Vcpu, fault: PageFault, walker: GuestWalker) -> None:
    """The part of paging_tmpl.h:FNAME(page_fault) that lets a supervisor write a read-only page while CR0.WP is 0.

    The SPTE becomes a supervisor one; under SMEP it must not become executable by that.
    """
    config = vcpu.paging
    if (
        fault.write
        and not walker.pte_access & ACC_WRITE_MASK
        and not config.cr0_wp
        and not fault.user
        and fault.slot is not None
    ):
        vcpu.kvm.mark("page_fault.cr0_wp")
        walker.pte_access |= ACC_WRITE_MASK
        walker.pte_access &= ~ACC_USER_MASK
        if config.smep:
            walker.pte_access &= ~ACC_EXEC_MASK


def direct_page_fault(vcpu: Vcpu, fault: PageFault) -> int:
    """mmu.c:direct_page_fault, for a guest without paging (nonpaging_page_fault)."""
    kvm = vcpu.kvm
    fault.gfn = fault.addr >> PAGE_SHIFT
    fault.slot = gfn_to_memslot(kvm, fault.gfn)
    if page_fault_handle_page_track(vcpu, fault):
        return RET_PF_WRITE_PROTECTED
    result = fast_page_fault(vcpu, fault)
    if result != RET_PF_INVALID:
        return result
    result = kvm_faultin_pfn(vcpu, fault, ACC_WRITE_MASK | ACC_USER_MASK | ACC_EXEC_MASK)
    if result != RET_PF_CONTINUE:
        return result
    kvm.mmu_lock.acquire()
    result = make_mmu_pages_available(kvm)
    if result == 0:
        if is_page_fault_stale(vcpu):
            kvm.mark("page_fault.stale")
            kvm.count_retry(RETRY_STALE)
            result = RET_PF_RETRY
        else:
            result = direct_map(vcpu, fault)
    kvm.mmu_lock.release()
    return result


def fast_page_fault(vcpu: Vcpu, fault: PageFault) -> int:
    """mmu.c:fast_page_fault: here only the spurious case; nothing clears W and keeps MMU_W without a dirty log."""
    if fault.rsvd or not (fault.present and fault.write):
        return RET_PF_INVALID
    walk_shadow_page_lockless_begin(vcpu)
    spte = get_walk(vcpu, fault.addr)
    walk_shadow_page_lockless_end(vcpu)
    if is_shadow_present(spte) and spte & SPTE_W:
        return RET_PF_SPURIOUS
    return RET_PF_INVALID


def page_fault_handle_page_track(vcpu: Vcpu, fault: PageFault) -> bool:
    """mmu.c:page_fault_handle_page_track: a write to a write-tracked gfn, seen without mmu_lock."""
    if fault.rsvd or not fault.present or not fault.write or fault.slot is None:
        return False
    if kvm_gfn_is_write_tracked(vcpu.kvm, fault.gfn):
        vcpu.kvm.mark("page_fault.write_tracked")
        return True
    return False


def shadow_page_table_clear_flood(vcpu: Vcpu, gva: int) -> None:
    """mmu.c:shadow_page_table_clear_flood: the tables on the way to ``gva`` are in use."""
    kvm = vcpu.kvm
    walk_shadow_page_lockless_begin(vcpu)
    table_pfn = vcpu.mmu.root_pfn
    level = role_level(vcpu.mmu.root_role)
    while level >= 1:
        spte = read_spte_lockless(kvm, table_pfn << PAGE_SHIFT | table_index(gva, level) << 3)
        sp = kvm.by_pfn[table_pfn]
        if sp.invalid:
            kvm.counters.near(ZAPPED_WALK)
        clear_sp_write_flooding_count(kvm, sp)
        if not is_shadow_present(spte):
            break
        table_pfn = spte_pfn(spte)
        level -= 1
    walk_shadow_page_lockless_end(vcpu)


def is_page_fault_stale(vcpu: Vcpu) -> bool:
    """mmu.c:is_page_fault_stale: the root went away, or is about to, since the walk."""
    sp = vcpu.mmu.root_sp
    if sp is not None:
        return is_obsolete_sp(vcpu.kvm, sp)
    return kvm_test_request(vcpu, REQ_MMU_FREE_OBSOLETE_ROOTS)


def kvm_faultin_pfn(vcpu: Vcpu, fault: PageFault, access: int) -> int:
    """mmu.c:kvm_faultin_pfn: what backs the gfn. RET_PF_CONTINUE unless the fault ends here."""
    slot = fault.slot
    if slot is None:
        # kvm_handle_noslot_fault: remember the access for the MMIO exit that follows.
        vcpu_cache_mmio_info(vcpu, fault.addr, fault.gfn, access)
        fault.pfn = INVALID_PFN
        fault.map_writable = False
        vcpu.kvm.mark("faultin.noslot")
        return RET_PF_CONTINUE
    if slot.readonly and fault.write:
        vcpu.kvm.mark("faultin.readonly")
        return RET_PF_EMULATE
    fault.pfn = gfn_to_pfn(fault.gfn)
    fault.map_writable = not slot.readonly
    return RET_PF_CONTINUE


def handle_mmio_page_fault(vcpu: Vcpu, gva: int) -> int:
    """mmu.c:handle_mmio_page_fault: a reserved bit in an SPTE, which KVM sets only for MMIO."""
    if mmio_info_in_cache(vcpu, gva):
        return RET_PF_EMULATE
    walk_shadow_page_lockless_begin(vcpu)
    spte = get_walk(vcpu, gva)
    walk_shadow_page_lockless_end(vcpu)
    if is_mmio_spte(spte):
        vcpu_cache_mmio_info(vcpu, 0 if vcpu.mmu.direct else gva, mmio_spte_gfn(spte), spte & SPTE_MMIO_ACCESS)
        return RET_PF_EMULATE
    # Another CPU replaced the SPTE meanwhile: let the hardware walk again.
    vcpu.kvm.count_retry(RETRY_MMIO)
    return RET_PF_RETRY


def mmio_info_in_cache(vcpu: Vcpu, gva: int) -> bool:
    """mmu.c:mmio_info_in_cache: by gpa for a direct MMU, by gva for an indirect one, never for a nested guest."""
    if vcpu.mmu.direct:
        return vcpu.mmio_gfn != 0 and vcpu.mmio_gfn == gva >> PAGE_SHIFT
    return vcpu_match_mmio_gva(vcpu, gva)


def vcpu_cache_mmio_info(vcpu: Vcpu, gva: int, gfn: int, access: int) -> None:
    """x86.h:vcpu_cache_mmio_info. What a nested guest faults on is no gva, so none is kept."""
    vcpu.mmio_gva = 0 if vcpu.guest_mode else gva & -PAGE_SIZE
    vcpu.mmio_gfn = gfn
    vcpu.mmio_access = access & (ACC_WRITE_MASK | ACC_USER_MASK)


def is_self_change_mapping(vcpu: Vcpu, walker: GuestWalker, fault: PageFault) -> bool:
    """paging_tmpl.h:FNAME(is_self_change_mapping) (6.1): is the faulting gfn a table walked, the root included?"""
    config = vcpu.paging
    if not walker.pte_access & ACC_WRITE_MASK and (config.cr0_wp or fault.user):
        return False
    for level in range(walker.level, config.level + 1):
        if walker.table_gfn[level] == fault.gfn:
            return True
    return False


def walk_shadow_page_lockless_begin(vcpu: Vcpu) -> None:
    """mmu.c:walk_shadow_page_lockless_begin: interrupts off, then announce the walk with a full barrier."""
    vcpu.irqs_disabled = True
    vcpu.kvm.host.current.xchg(MODE_ATOMIC, vcpu.mode_address, READING_SHADOW_PAGE_TABLES)


def walk_shadow_page_lockless_end(vcpu: Vcpu) -> None:
    """mmu.c:walk_shadow_page_lockless_end."""
    vcpu.kvm.host.current.store(MODE_STORE, vcpu.mode_address, OUTSIDE_GUEST_MODE)
    vcpu.irqs_disabled = False
    kvm_ack_ipi_if_sent(vcpu)


def kvm_ack_ipi_if_sent(vcpu: Vcpu) -> None:
    """Interrupts are on again: a pending one is taken at once."""
    if vcpu.kvm.memory.read(vcpu.ipi_address, 8):
        kvm_ack_ipi(vcpu)


def get_walk(vcpu: Vcpu, gva: int) -> int:
    """mmu.c:get_walk, shadow_walk_init: the SPTE at which the walk of ``gva`` ends; present only at level 1."""
    kvm = vcpu.kvm
    table_pfn = vcpu.mmu.root_pfn
    level = role_level(vcpu.mmu.root_role)
    if vcpu.mmu.direct:
        # KVM keeps the PDPTEs outside the tables, as they are no SPTEs.
        table_pfn = vcpu.mmu.pae_roots[gva >> 30].pfn
        level -= 1
    while True:
        spte = read_spte_lockless(kvm, table_pfn << PAGE_SHIFT | table_index(gva, level) << 3)
        if level == 1 or not is_shadow_present(spte):
            return spte
        table_pfn = spte_pfn(spte)
        level -= 1
