"""Memslots: what backs a gfn (kvm_host.h:gfn_to_memslot, __gfn_to_hva_memslot)."""

from __future__ import annotations

from mmufuzz.host.memory import PAGE_SHIFT, PAGE_SIZE
from mmufuzz.kvm.structs import FIRST_GUEST_PFN, Kvm, MemSlot


def gfn_to_memslot(kvm: Kvm, gfn: int) -> MemSlot | None:
    """The slot that holds ``gfn``, None where the guest has no memory."""
    for slot in kvm.slots:
        if slot.base_gfn <= gfn < slot.base_gfn + slot.npages:
            return slot
    return None


def gfn_to_pfn(gfn: int) -> int:
    """The host frame behind a gfn that is in a slot."""
    return gfn + FIRST_GUEST_PFN


def pfn_to_gfn(pfn: int) -> int:
    """Inverse of ``gfn_to_pfn``."""
    return pfn - FIRST_GUEST_PFN


def gpa_to_hpa(gpa: int) -> int:
    """Host physical address of a gpa that is in a slot."""
    return gfn_to_pfn(gpa >> PAGE_SHIFT) << PAGE_SHIFT | gpa & PAGE_SIZE - 1
