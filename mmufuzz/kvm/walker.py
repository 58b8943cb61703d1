"""KVM's walk of the guest's own tables: FNAME(walk_addr_generic) and gva_to_gpa (paging_tmpl.h)."""

from __future__ import annotations

from mmufuzz.host.memory import PAGE_SHIFT, PAGE_SIZE
from mmufuzz.host.sites import GPTE_ATOMIC, GPTE_LOAD
from mmufuzz.kvm.counters import RETRY_WALK
from mmufuzz.kvm.memslots import gfn_to_memslot, gpa_to_hpa
from mmufuzz.kvm.role import ACC_ALL, ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK
from mmufuzz.kvm.structs import INVALID_GPA, Vcpu
from mmufuzz.x86.paging import (
    ACCESS_USER,
    ACCESS_WRITE,
    PTE_A,
    PTE_D,
    PTE_NX,
    PTE_P,
    PTE_U,
    PTE_W,
    entry_address,
    fault_code,
    is_leaf,
    leaf_frame,
    permitted,
    pte_frame,
    reserved_bits,
)
from mmufuzz.x86.state import PFERR_PRESENT, PFERR_RSVD


class GuestWalker:
    """struct guest_walker. Lists are indexed by level; level 0 is unused."""

    def __init__(self) -> None:
        self.level = 0
        self.ptes: list[int] = [0] * 6
        self.table_gfn: list[int] = [0] * 6
        self.pte_gpa: list[int] = [0] * 6
        self.pt_access: list[int] = [ACC_ALL] * 6
        """Access inherited by the table at that level."""
        self.pte_access = 0
        self.gfn = 0
        self.failed = False
        self.error_code = 0
        self.table_writable: list[bool] = [True] * 6


def gpte_access(gpte: int) -> int:
    """paging_tmpl.h:FNAME(gpte_access): ACC_* bits of one entry."""
    access = 0
    if gpte & PTE_W:
        access |= ACC_WRITE_MASK
    if gpte & PTE_U:
        access |= ACC_USER_MASK
    if not gpte & PTE_NX:
        access |= ACC_EXEC_MASK
    return access


def walk_addr(vcpu: Vcpu, gva: int, access: int) -> GuestWalker:
    """paging_tmpl.h:FNAME(walk_addr_generic): translate ``gva`` for ``access`` (bits of a #PF error code, P ignored).

    Reads each gPTE with one load, sets A and D by cmpxchg on guest memory and starts over when it loses. On failure
    ``failed`` is set and ``error_code`` is what the guest's #PF gets.
    """
    if vcpu.guest_mode:
        access |= ACCESS_USER  # every nested walk is a user access (APM vol. 2, 15.25.5)
    while True:
        walker = _walk_once(vcpu, gva, access)
        if walker.failed or _update_accessed_dirty_bits(vcpu, walker, access):
            return walker
        vcpu.kvm.mark("walk.retry")
        vcpu.kvm.count_retry(RETRY_WALK)


def _walk_once(vcpu: Vcpu, gva: int, access: int) -> GuestWalker:
    kvm = vcpu.kvm
    thread = kvm.host.current
    config = vcpu.paging
    walker = GuestWalker()
    table_gfn = vcpu.regs.cr3 >> PAGE_SHIFT
    level = config.level
    accumulated = ACC_ALL
    while True:
        gpa = entry_address(table_gfn, gva, level)
        slot = gfn_to_memslot(kvm, table_gfn)
        if slot is None:
            return _failed(vcpu, walker, access, 0)
        pte = thread.load(GPTE_LOAD, gpa_to_hpa(gpa))
        walker.ptes[level] = pte
        walker.table_gfn[level] = table_gfn
        walker.pte_gpa[level] = gpa
        walker.table_writable[level] = not slot.readonly
        walker.pt_access[level] = accumulated
        if not pte & PTE_P:
            return _failed(vcpu, walker, access, 0)
        if reserved_bits(config, level, pte):
            return _failed(vcpu, walker, access, PFERR_PRESENT | PFERR_RSVD)
        accumulated &= gpte_access(pte)
        if is_leaf(level, pte):
            break
        table_gfn = pte_frame(pte)
        level -= 1
    walker.level = level
    writable = accumulated & ACC_WRITE_MASK != 0
    user = accumulated & ACC_USER_MASK != 0
    if not permitted(config, writable, user, not accumulated & ACC_EXEC_MASK, access):
        return _failed(vcpu, walker, access, PFERR_PRESENT)
    if not access & ACCESS_WRITE and not walker.ptes[level] & PTE_D:
        # FNAME(protect_clean_gpte): the first write must fault, to set D.
        accumulated &= ~ACC_WRITE_MASK
    walker.pte_access = accumulated
    walker.gfn = leaf_frame(level, walker.ptes[level], gva)
    return walker


def _failed(vcpu: Vcpu, walker: GuestWalker, access: int, cause: int) -> GuestWalker:
    walker.failed = True
    walker.error_code = fault_code(vcpu.paging, access, cause)
    return walker


def _update_accessed_dirty_bits(vcpu: Vcpu, walker: GuestWalker, access: int) -> bool:
    """paging_tmpl.h:FNAME(update_accessed_dirty_bits): from the top level down; False if a gPTE changed meanwhile."""
    kvm = vcpu.kvm
    level = vcpu.paging.level
    while level >= walker.level:
        old = walker.ptes[level]
        new = old | PTE_A
        if level == walker.level and access & ACCESS_WRITE:
            new |= PTE_D
        # A table in a read-only slot keeps its bits clear; the walk succeeds all the same.
        if new != old and walker.table_writable[level]:
            kvm.mark("walk.set_accessed_dirty")
            found = kvm.host.current.cmpxchg(GPTE_ATOMIC, gpa_to_hpa(walker.pte_gpa[level]), old, new)
            if found != old:
                return False
            walker.ptes[level] = new
        level -= 1
    return True


def vcpu_match_mmio_gva(vcpu: Vcpu, gva: int) -> bool:
    """x86.h:vcpu_match_mmio_gva: the last MMIO access was to this page."""
    return vcpu.mmio_gva != 0 and vcpu.mmio_gva == gva & -PAGE_SIZE


def gva_to_gpa(vcpu: Vcpu, gva: int, access: int) -> tuple[int, int]:
    """mmu->gva_to_gpa: (gpa, 0), or (INVALID_GPA, error code of the guest's #PF)."""
    if vcpu.mmu.direct:
        return gva, 0
    walker = walk_addr(vcpu, gva, access)
    if walker.failed:
        return INVALID_GPA, walker.error_code
    return walker.gfn << PAGE_SHIFT | gva & PAGE_SIZE - 1, 0
