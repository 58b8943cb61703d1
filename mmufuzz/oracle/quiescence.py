"""When all threads have ended: no SPTE may say more than the guest's tables do.

Which architectural property a stale SPTE violates: a guest that flushes its whole TLB must find its tables as
they are (SDM vol. 3, 4.10.4). But nothing in a flush makes KVM look at the gPTEs of a *sync* shadow page again: it is
write-protected, so KVM takes for granted that it has seen every store to it (invariant I25). An SPTE of a sync page
that disagrees with its gPTE when no emulated store is in flight any more stays wrong for good, whatever the
guest does, as long as the page can be reached from a root or be found in the hash for a new one.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.memslots import gfn_to_memslot, gfn_to_pfn, gpa_to_hpa
from mmufuzz.kvm.role import (
    ACC_ALL,
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    ROLE_CR0_WP,
    ROLE_DIRECT,
    ROLE_SMEP_ANDNOT_WP,
    role_access,
    role_level,
    role_text,
)
from mmufuzz.kvm.spte import (
    SPTE_NX,
    SPTE_U,
    SPTE_W,
    is_last_spte,
    is_mmio_spte,
    is_shadow_present,
    mmio_spte_gfn,
    spte_pfn,
)
from mmufuzz.kvm.structs import Kvm, ShadowPage
from mmufuzz.kvm.walker import gpte_access
from mmufuzz.kvm.write_track import is_obsolete_sp, sp_has_gptes
from mmufuzz.oracle.fate import NOBODY, fate_of_last_store
from mmufuzz.oracle.sink import Sink
from mmufuzz.x86.paging import PAGE_SHIFT, PTE_A, PTE_D, PTE_P, PagingConfig, is_leaf, pte_frame, reserved_bits

_CONFIG: Final = PagingConfig(4)
"""With NX allowed: EFER.NX of the guest is not in the role of a shadow page, which forces it on."""


def stale_sptes(kvm: Kvm, sink: Sink) -> None:
    """Record the first SPTE that disagrees with its gPTE. All store buffers are empty."""
    for sp in kvm.by_pfn.values():
        if is_obsolete_sp(kvm, sp) or sp.unsync:
            continue
        for index in sorted(sp.used):
            spte = kvm.memory.words.get(sp.spte_address(index) >> 3, 0)
            why = _wrong(kvm, sp, index, spte) if spte else ""
            if why:
                cause = why
                where = f"SPTE {index} of gfn {sp.gfn:#x} {role_text(sp.role)} is {spte:#x}"
                if sp_has_gptes(sp):
                    where += f", the gPTE {_gpte(kvm, sp, index):#x}: {why}"
                    fate = fate_of_last_store(kvm, gpa_to_hpa(sp.gfn << PAGE_SHIFT | index << 3))
                    cause = why if fate == NOBODY else fate
                sink.record("coherence", f"stale SPTE after quiescence: {cause}", where)
                return


def _gpte(kvm: Kvm, sp: ShadowPage, index: int) -> int:
    return kvm.memory.words.get(gpa_to_hpa(sp.gfn << PAGE_SHIFT | index << 3) >> 3, 0)


def _wrong(kvm: Kvm, sp: ShadowPage, index: int, spte: int) -> str:
    """What is wrong with a non-zero SPTE; empty if nothing."""
    if not sp_has_gptes(sp):
        return _wrong_direct(sp, spte)
    level = role_level(sp.role)
    gpte = _gpte(kvm, sp, index)
    slot = gfn_to_memslot(kvm, sp.gfn)
    if not gpte & PTE_P:
        return "the gPTE is not present"
    if reserved_bits(_CONFIG, level, gpte):
        return "the gPTE has a reserved bit set"
    # In a read-only slot A and D cannot be set (paging_tmpl.h:update_accessed_dirty_bits).
    fixed = slot is not None and slot.readonly
    if not gpte & PTE_A and not fixed:
        return "the gPTE has A clear"
    allowed = role_access(sp.role) & gpte_access(gpte)
    if is_leaf(level, gpte) and not gpte & PTE_D and not fixed:
        allowed &= ~ACC_WRITE_MASK
    if is_mmio_spte(spte):
        return "" if mmio_spte_gfn(spte) == pte_frame(gpte) else "an MMIO SPTE for another gfn"
    if not is_shadow_present(spte):
        return ""
    if is_last_spte(spte, level):
        if spte_pfn(spte) != gfn_to_pfn(pte_frame(gpte)):
            return "the gPTE names another gfn"
        return _surplus(sp, _spte_access(spte), allowed)
    return _wrong_link(sp, kvm.by_pfn[spte_pfn(spte)], gpte, allowed)


def _wrong_link(sp: ShadowPage, child: ShadowPage, gpte: int, allowed: int) -> str:
    level = role_level(sp.role)
    if is_leaf(level, gpte):
        within = (1 << 9 * (level - 1)) - 1
        if not child.role & ROLE_DIRECT or child.gfn != pte_frame(gpte) & ~within:
            return "the gPTE maps another large page"
    elif child.role & ROLE_DIRECT or child.gfn != pte_frame(gpte):
        return "the gPTE names another table"
    return _surplus(sp, role_access(child.role), allowed)


def _wrong_direct(sp: ShadowPage, spte: int) -> str:
    """A direct page has no gPTEs of its own: its leaves may not exceed the access it was made for."""
    if not is_shadow_present(spte) or not is_last_spte(spte, role_level(sp.role)):
        return ""
    return _surplus(sp, _spte_access(spte), role_access(sp.role))


def _spte_access(spte: int) -> int:
    access = ACC_ALL
    if not spte & SPTE_W:
        access &= ~ACC_WRITE_MASK
    if not spte & SPTE_U:
        access &= ~ACC_USER_MASK
    if spte & SPTE_NX:
        access &= ~ACC_EXEC_MASK
    return access


def _surplus(sp: ShadowPage, access: int, allowed: int) -> str:
    """Rights in ``access`` that are not allowed, as text."""
    if access & ~allowed & ACC_WRITE_MASK and not sp.role & ROLE_CR0_WP and not access & ACC_USER_MASK:
        # A supervisor's write with CR0.WP clear (I26): W without U, and not executable under SMEP.
        if not (sp.role & ROLE_SMEP_ANDNOT_WP and access & ACC_EXEC_MASK):
            access &= ~ACC_WRITE_MASK
    names = ""
    for bit, name in ((ACC_WRITE_MASK, "W"), (ACC_USER_MASK, "U"), (ACC_EXEC_MASK, "X")):
        if access & ~allowed & bit:
            names += name
    return f"the gPTE does not grant {names}" if names else ""
