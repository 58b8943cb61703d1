"""SPTE bits and predicates (arch/x86/kvm/mmu/spte.h, spte.c).

A non-present SPTE is 0 in every profile; 6.12's SHADOW_NONPRESENT_VALUE sets bit 63 as well, which hardware ignores
in a non-present entry.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.role import ACC_EXEC_MASK, ACC_USER_MASK

SPTE_P: Final = 1 << 0
SPTE_W: Final = 1 << 1
SPTE_U: Final = 1 << 2
SPTE_A: Final = 1 << 5
SPTE_D: Final = 1 << 6
SPTE_PS: Final = 1 << 7
SPTE_HOST_WRITABLE: Final = 1 << 9
SPTE_MMU_WRITABLE: Final = 1 << 10
SPTE_MMU_PRESENT: Final = 1 << 11
SPTE_NX: Final = 1 << 63
SPTE_MMIO: Final = 1 << 51
"""Reserved for the modelled MAXPHYADDR, so that hardware raises a RSVD #PF."""
SPTE_MMIO_ACCESS: Final = SPTE_W | SPTE_U
"""Where an MMIO SPTE keeps ACC_* bits (shadow_mmio_access_mask): those have the positions of W and U."""

_FRAME: Final = ((1 << 51) - 1) & ~0xFFF


def is_shadow_present(spte: int) -> bool:
    """spte.h:is_shadow_present_pte."""
    return spte & SPTE_MMU_PRESENT != 0


def is_mmio_spte(spte: int) -> bool:
    """spte.h:is_mmio_spte."""
    return spte & SPTE_MMIO != 0


def is_last_spte(spte: int, level: int) -> bool:
    """spte.h:is_last_spte: a leaf. Huge leaves have PS set."""
    return level == 1 or spte & SPTE_PS != 0


def spte_pfn(spte: int) -> int:
    """The frame a present SPTE points at."""
    return (spte & _FRAME) >> 12


def make_nonleaf_spte(child_pfn: int) -> int:
    """spte.c:make_nonleaf_spte: all restriction is left to the leaves."""
    return child_pfn << 12 | SPTE_MMU_PRESENT | SPTE_P | SPTE_W | SPTE_U | SPTE_A


def make_mmio_spte(gfn: int, access: int) -> int:
    """spte.c:make_mmio_spte, without a generation: the set of memslots is fixed during a run."""
    return SPTE_MMIO | SPTE_P | gfn << 12 | access & SPTE_MMIO_ACCESS


def mmio_spte_gfn(spte: int) -> int:
    """The gfn an MMIO SPTE stands for."""
    return (spte & _FRAME) >> 12


def make_leaf_spte(pfn: int, access: int, host_writable: bool, writable: bool, prefetch: bool) -> int:
    """The bits of spte.c:make_spte for a 4K leaf; the caller has decided ``writable``."""
    spte = pfn << 12 | SPTE_MMU_PRESENT | SPTE_P
    if not prefetch:
        spte |= SPTE_A
    if not access & ACC_EXEC_MASK:
        spte |= SPTE_NX
    if access & ACC_USER_MASK:
        spte |= SPTE_U
    if host_writable:
        spte |= SPTE_HOST_WRITABLE
    if writable:
        spte |= SPTE_W | SPTE_MMU_WRITABLE | SPTE_D
    return spte


def spte_has_volatile_bits(spte: int) -> bool:
    """spte.c:spte_has_volatile_bits: a present SPTE that may change behind the back of mmu_lock's holder."""
    if not spte & SPTE_W and spte & SPTE_MMU_WRITABLE:
        return True
    return not spte & SPTE_A or bool(spte & SPTE_W and not spte & SPTE_D)
