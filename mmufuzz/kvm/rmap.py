"""Changing SPTEs, and the reverse map from gfn to the leaf SPTEs that map it (mmu.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.sites import SPTE_ATOMIC, SPTE_STORE
from mmufuzz.kvm.memslots import gfn_to_memslot
from mmufuzz.kvm.role import ROLE_DIRECT, role_level
from mmufuzz.kvm.spte import (
    SPTE_A,
    SPTE_D,
    SPTE_MMU_WRITABLE,
    SPTE_W,
    is_last_spte,
    is_shadow_present,
    spte_has_volatile_bits,
)
from mmufuzz.kvm.structs import Kvm, MemSlot, ShadowPage

_NOTHING: Final[list[int]] = []


def sptep_to_sp(kvm: Kvm, address: int) -> ShadowPage:
    """spte.h:sptep_to_sp: the page an SPTE lies in."""
    return kvm.by_pfn[address >> PAGE_SHIFT]


def spte_index(address: int) -> int:
    """mmu_internal.h:spte_index."""
    return address >> 3 & 511


def read_spte(kvm: Kvm, address: int) -> int:
    """An SPTE as the holder of mmu_lock sees it."""
    return kvm.host.current.peek(address)


def kvm_mmu_page_get_gfn(sp: ShadowPage, index: int) -> int:
    """mmu.c:kvm_mmu_page_get_gfn: what SPTE ``index`` maps."""
    if sp.role & ROLE_DIRECT:
        return sp.gfn + (index << 9 * (role_level(sp.role) - 1))
    return sp.shadowed_gfn[index]


def mmu_spte_set(kvm: Kvm, address: int, spte: int) -> None:
    """mmu.c:mmu_spte_set: a plain store over a non-present SPTE."""
    kvm.warn_on(is_shadow_present(read_spte(kvm, address)), "mmu_spte_set", "overwrote a present SPTE")
    sptep_to_sp(kvm, address).used[spte_index(address)] = True
    kvm.host.current.store(SPTE_STORE, address, spte)


def mmu_spte_clear_no_track(kvm: Kvm, address: int) -> None:
    """mmu.c:mmu_spte_clear_no_track: a plain store of zero."""
    kvm.host.current.store(SPTE_STORE, address, 0)


def mmu_spte_update(kvm: Kvm, address: int, spte: int) -> bool:
    """mmu.c:mmu_spte_update: replace a present SPTE; True if TLBs must be flushed.

    The flush is due whenever the old SPTE was MMU-writable and the new one is not writable, even if W was clear
    already: a stale writable TLB entry may be left from before. It is also due when A or D goes.
    """
    old = read_spte(kvm, address)
    if not is_shadow_present(old):
        mmu_spte_set(kvm, address, spte)
        return False
    if spte_has_volatile_bits(old):
        old = kvm.host.current.xchg(SPTE_ATOMIC, address, spte)
    else:
        kvm.host.current.store(SPTE_STORE, address, spte)
    if old & SPTE_MMU_WRITABLE and not spte & SPTE_W:
        return True
    return old & ~spte & (SPTE_A | SPTE_D) != 0


def mmu_spte_clear_track_bits(kvm: Kvm, address: int) -> None:
    """mmu.c:mmu_spte_clear_track_bits: clear a present SPTE, atomically where hardware may write it."""
    if spte_has_volatile_bits(read_spte(kvm, address)):
        kvm.host.current.xchg(SPTE_ATOMIC, address, 0)
    else:
        mmu_spte_clear_no_track(kvm, address)


def gfn_to_rmap(slot: MemSlot, gfn: int, level: int) -> list[int]:
    """mmu.c:gfn_to_rmap: the SPTEs that map ``gfn`` at ``level``."""
    heads = slot.rmap[level - 1]
    head = heads.get(gfn)
    if head is None:
        head = []
        heads[gfn] = head
    return head


def rmap_add(kvm: Kvm, address: int, gfn: int) -> None:
    """mmu.c:rmap_add: record a fresh leaf SPTE."""
    sp = sptep_to_sp(kvm, address)
    if not sp.role & ROLE_DIRECT:
        sp.shadowed_gfn[spte_index(address)] = gfn
    slot = gfn_to_memslot(kvm, gfn)
    assert slot is not None, "a leaf SPTE maps memory"
    gfn_to_rmap(slot, gfn, role_level(sp.role)).append(address)


def rmap_remove(kvm: Kvm, address: int) -> None:
    """mmu.c:rmap_remove."""
    sp = sptep_to_sp(kvm, address)
    gfn = kvm_mmu_page_get_gfn(sp, spte_index(address))
    slot = gfn_to_memslot(kvm, gfn)
    assert slot is not None, "a leaf SPTE maps memory"
    head = gfn_to_rmap(slot, gfn, role_level(sp.role))
    if kvm.warn_on(address not in head, "pte_list_remove", "SPTE missing from its rmap"):
        return
    head.remove(address)


def drop_spte(kvm: Kvm, address: int) -> None:
    """mmu.c:drop_spte: clear a present leaf and forget it."""
    mmu_spte_clear_track_bits(kvm, address)
    rmap_remove(kvm, address)


def drop_parent_pte(kvm: Kvm, child: ShadowPage, address: int) -> None:
    """mmu.c:drop_parent_pte: unlink ``child`` from the parent SPTE at ``address``."""
    if not kvm.warn_on(address not in child.parent_ptes, "drop_parent_pte", "parent SPTE missing from parent_ptes"):
        child.parent_ptes.remove(address)
    mmu_spte_clear_no_track(kvm, address)


def rmap_write_protect(kvm: Kvm, slot: MemSlot, gfn: int) -> bool:
    """mmu.c:kvm_mmu_slot_gfn_write_protect with pt_protect: take W and MMU_W from all SPTEs of gfn; True: flush.

    All leaves are 4K, so the rmaps of larger pages are empty.
    """
    flush = False
    for address in slot.rmap[0].get(gfn, _NOTHING):
        spte = read_spte(kvm, address)
        if spte & (SPTE_W | SPTE_MMU_WRITABLE):
            flush |= mmu_spte_update(kvm, address, spte & ~(SPTE_W | SPTE_MMU_WRITABLE))
    return flush


def is_leaf(kvm: Kvm, address: int, spte: int) -> bool:
    """True if the present ``spte`` stored at ``address`` maps memory."""
    return is_last_spte(spte, role_level(sptep_to_sp(kvm, address).role))
