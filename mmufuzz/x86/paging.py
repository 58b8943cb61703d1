"""Paging as the architecture defines it: modes, entry formats, access rights and page-fault error codes.

SDM references are to volume 3, chapter 4. The mode is one number, ``PagingConfig.level``: the depth of the tables.

=====  ==============  =======  ====================================================================
level  mode            entries  pages
=====  ==============  =======  ====================================================================
0      no paging       -        -
2      32-bit (4.3)    4 bytes  4K; 4M if CR4.PSE
3      PAE (4.4)       8 bytes  4K, 2M; level 3 is the four PDPTE registers, not a table
4      4-level (4.5)   8 bytes  4K, 2M, 1G
5      5-level (4.5)   8 bytes  4K, 2M, 1G
=====  ==============  =======  ====================================================================

Functions that take no configuration (``table_index``, ``entry_address``, ``is_leaf``, ``leaf_frame``) speak of
8-byte entries; the methods of ``PagingConfig`` by the same names, of entries of its mode. How a walk puts them
together is in ``page_walk``.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.state import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NX,
    FLAG_AC,
    PFERR_FETCH,
    PFERR_PRESENT,
    PFERR_USER,
    PFERR_WRITE,
    Regs,
)

# Bits of a paging-structure entry (SDM tables 4-5, 4-6, 4-9 to 4-11 and 4-15 to 4-20).
PTE_P: Final = 1 << 0
PTE_W: Final = 1 << 1
PTE_U: Final = 1 << 2
PTE_PWT: Final = 1 << 3
PTE_PCD: Final = 1 << 4
PTE_A: Final = 1 << 5
PTE_D: Final = 1 << 6
PTE_PS: Final = 1 << 7  # levels 2 and 3: maps a page; level 1: PAT
PTE_G: Final = 1 << 8
PTE_PAT_LARGE: Final = 1 << 12  # PAT of a 2M, 4M or 1G page
PTE_PKEY_SHIFT: Final = 59  # four bits, in a leaf of 4-level and 5-level paging
PTE_NX: Final = 1 << 63

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
ENTRIES_PER_TABLE: Final = 512
MAXPHYADDR: Final = 40

CR4_LA57: Final = 1 << 12
CR4_PCIDE: Final = 1 << 17
CR4_PKE: Final = 1 << 22

# INVPCID types.
INVPCID_ADDRESS: Final = 0
INVPCID_CONTEXT: Final = 1
INVPCID_ALL_GLOBAL: Final = 2
INVPCID_ALL: Final = 3

PFERR_PK: Final = 1 << 5

# Kinds of access: an or of these, the first four at the positions they have in the #PF error code.
ACCESS_READ: Final = 0
ACCESS_WRITE: Final = PFERR_WRITE
ACCESS_USER: Final = PFERR_USER
ACCESS_FETCH: Final = PFERR_FETCH
ACCESS_IMPLICIT: Final = 1 << 48
"""A supervisor access that no instruction asked for: descriptor tables, TSS (SDM 4.6). Excludes ACCESS_USER."""

NO_ADDRESS: Final = -1
NO_MEMORY: Final = -1

# Where an entry is split: what lies below is a small integer on every build, and bit 63 costs nothing.
LOW_BITS: Final = 52
LOW: Final = (1 << LOW_BITS) - 1

_FRAME_MASK: Final = (1 << 40) - 1
_PDPTE_RESERVED: Final = 0b1_1110_0110

# No two of these share a position, so that one integer can key the cache of configurations.
_CR0_KEY: Final = CR0_WP | CR0_PG
_CR4_KEY: Final = CR4_PSE | CR4_PAE | CR4_PGE | CR4_LA57 | CR4_SMEP | CR4_SMAP
_EFER_KEY: Final = EFER_LMA | EFER_NX
_EFER_KEY_SHIFT: Final = 32
_MAXPHYADDR_KEY_SHIFT: Final = 48


def pte_frame(entry: int) -> int:
    """Frame number in bits 12..51 of ``entry``; of a large page it holds the PAT bit too (see ``leaf_frame``)."""
    return (entry >> PAGE_SHIFT) & _FRAME_MASK


def table_index(gva: int, level: int) -> int:
    """Index (0..511) into the table of ``level`` for ``gva``: 1 is the page table, 4 the PML4, 5 the PML5."""
    return (gva >> (PAGE_SHIFT + 9 * (level - 1))) & 511


def entry_address(table_frame: int, gva: int, level: int) -> int:
    """Physical address of the entry for ``gva`` in the table of ``level`` at ``table_frame``."""
    return (table_frame << PAGE_SHIFT) | (table_index(gva, level) << 3)


def is_leaf(level: int, entry: int) -> bool:
    """True if a present entry of ``level`` maps a page. PS at level 4 and 5 is reserved, never a leaf."""
    return level == 1 or (level <= 3 and entry & PTE_PS != 0)


def leaf_frame(level: int, entry: int, gva: int) -> int:
    """Number of the 4K frame that holds ``gva``, given the leaf ``entry`` of ``level`` 1..3."""
    within = (1 << (9 * (level - 1))) - 1
    return (pte_frame(entry) & ~within) | ((gva >> PAGE_SHIFT) & within)


def is_canonical(gva: int, bits: int) -> bool:
    """True if bits 63..``bits``-1 of ``gva``, an unsigned 64-bit address, are equal (SDM vol. 1, 3.3.7.1)."""
    upper = gva >> (bits - 1)
    return upper == 0 or upper == (1 << (65 - bits)) - 1


class PagingConfig:
    """What the registers say about paging. Immutable: configurations are shared and cached.

    ``level``: 0, 2, 3, 4 or 5, see the head of the module. ``maxphyaddr`` is 32..52 bits. ``rflags_ac`` is
    EFLAGS.AC; it matters only under SMAP. ``pse`` matters only to 32-bit paging, ``pke`` only to 4-level and 5-level
    paging, where ``pkru`` is PKRU. ``pse36`` and ``page_1g`` are what CPUID says of the processor. Raises
    ``ValueError`` for a value outside these.
    """

    def __init__(
        self,
        level: int,
        *,
        cr0_wp: bool = True,
        smep: bool = False,
        smap: bool = False,
        efer_nx: bool = True,
        rflags_ac: bool = False,
        pge: bool = False,
        maxphyaddr: int = MAXPHYADDR,
        pse: bool = True,
        pke: bool = False,
        pkru: int = 0,
        pse36: bool = True,
        page_1g: bool = True,
    ) -> None:
        if level not in (0, 2, 3, 4, 5):
            raise ValueError(f"there is no paging with {level} levels")
        if not 32 <= maxphyaddr <= 52:
            raise ValueError(f"maxphyaddr {maxphyaddr} is outside 32..52")
        self.level: Final = level
        self.paging: Final = level != 0
        self.cr0_wp: Final = cr0_wp
        self.smep: Final = smep
        self.smap: Final = smap
        self.efer_nx: Final = efer_nx
        self.rflags_ac: Final = rflags_ac
        self.pge: Final = pge
        self.maxphyaddr: Final = maxphyaddr
        self.pke: Final = pke and level >= 4
        self.pkru: Final = pkru
        self.linear_bits: Final = 57 if level == 5 else 48 if level == 4 else 32
        self.wide: Final = level != 2
        """Entries are 8 bytes long; else 4."""
        self.index_bits: Final = 9 if level != 2 else 10
        # The I/D flag is reported only where fetches are told apart at all (SDM 4.7).
        self.reports_fetch: Final = smep or (efer_nx and level != 2)
        self.maps_page: Final[list[bool]] = [False, True, level != 2 or pse, page_1g, False, False]
        """Indexed by level: an entry with PS maps a page. At level 1 the bit is PAT, and every entry does."""
        table, ps = _reserved_masks(level, maxphyaddr, efer_nx, pse, pse36, page_1g)
        self._reserved_table: Final = table
        self._reserved_ps: Final = ps
        # The same, split at LOW_BITS. Without PS all levels reserve the same bits.
        self.reserved_low: Final = table & LOW
        self.reserved_low_ps: Final[list[int]] = [mask & LOW for mask in ps]
        self.reserved_high: Final = table >> LOW_BITS

    def reserved_mask(self, level: int, entry: int) -> int:
        """Bits that must be zero in a present entry of ``level`` that has the PS bit of ``entry``."""
        if entry & PTE_PS:
            return self._reserved_ps[level]
        return self._reserved_table

    def entry_address(self, table_frame: int, gva: int, level: int) -> int:
        """Physical address of the entry for ``gva`` in the table of ``level`` at ``table_frame``."""
        if self.wide:
            return (table_frame << PAGE_SHIFT) | (table_index(gva, level) << 3)
        return (table_frame << PAGE_SHIFT) | ((gva >> (2 + 10 * level)) & 1023) << 2

    def leaf_frame(self, level: int, entry: int, gva: int) -> int:
        """Number of the 4K frame that holds ``gva``, given the leaf ``entry`` of ``level``."""
        if self.wide or level == 1:
            return leaf_frame(level, entry, gva)
        # A 4M page: bits 13..20 are bits 32..39 of the address (SDM table 4-4).
        return (entry >> 22 & 0x3FF) << 10 | (entry >> 13 & 0xFF) << 20 | (gva >> PAGE_SHIFT & 0x3FF)



def _reserved_masks(
    level: int, maxphyaddr: int, efer_nx: bool, pse: bool, pse36: bool, page_1g: bool
) -> tuple[int, list[int]]:
    """Reserved bits of entries without PS, and by level of those with PS.

    SDM tables 4-4 to 4-6, 4-9 to 4-11 and 4-15 to 4-20.
    """
    if level == 2:
        # Bits of a 4M page's address above bit 31 sit from bit 13 up; those the processor lacks are reserved.
        address_bits = min(40, maxphyaddr) if pse36 else 32
        large = (1 << 22) - (1 << (address_bits - 19)) if pse else 0
        return 0, [0, 0, large, 0, 0, 0]
    # With PAE paging bits 52..62 are reserved too; with more levels they are ignored or a protection key.
    common = (1 << (63 if level == 3 else 52)) - (1 << maxphyaddr)
    if not efer_nx:
        common |= PTE_NX
    pml = common | PTE_PS
    large_2m = common | ((1 << 21) - (1 << 13))
    large_1g = common | ((1 << 30) - (1 << 13)) if page_1g else pml
    return common, [common, common, large_2m, large_1g, pml, pml]


_configs: Final[dict[int, PagingConfig]] = {}


def paging_config(regs: Regs, maxphyaddr: int = MAXPHYADDR) -> PagingConfig:
    """Paging configuration that CR0, CR4, EFER and EFLAGS.AC select (SDM 4.1.1), without protection keys.

    The answer is shared between calls with equal inputs.
    """
    key = (
        (regs.cr0 & _CR0_KEY)
        | (regs.cr4 & _CR4_KEY)
        | (regs.efer & _EFER_KEY) << _EFER_KEY_SHIFT
        | (regs.rflags & FLAG_AC)
        | (maxphyaddr << _MAXPHYADDR_KEY_SHIFT)
    )
    config = _configs.get(key)
    if config is None:
        config = build_config(regs.cr0, regs.cr4, regs.efer, regs.rflags, maxphyaddr=maxphyaddr)
        _configs[key] = config
    return config


def build_config(
    cr0: int,
    cr4: int,
    efer: int,
    rflags: int,
    *,
    pkru: int = 0,
    maxphyaddr: int = MAXPHYADDR,
    pse36: bool = True,
    page_1g: bool = True,
) -> PagingConfig:
    """The configuration that these registers select (SDM 4.1.1)."""
    if not cr0 & CR0_PG:
        level = 0
    elif efer & EFER_LMA:
        level = 5 if cr4 & CR4_LA57 else 4
    else:
        level = 3 if cr4 & CR4_PAE else 2
    return PagingConfig(
        level,
        cr0_wp=cr0 & CR0_WP != 0,
        smep=cr4 & CR4_SMEP != 0,
        smap=cr4 & CR4_SMAP != 0,
        efer_nx=efer & EFER_NX != 0,
        rflags_ac=rflags & FLAG_AC != 0,
        pge=cr4 & CR4_PGE != 0,
        maxphyaddr=maxphyaddr,
        pse=cr4 & CR4_PSE != 0,
        pke=cr4 & CR4_PKE != 0,
        pkru=pkru,
        pse36=pse36,
        page_1g=page_1g,
    )


def reserved_bits(config: PagingConfig, level: int, entry: int) -> bool:
    """True if the present ``entry`` of ``level`` has a reserved bit set (SDM 4.7, RSVD flag).

    Reserved are address bits from maxphyaddr up, NX without EFER.NX, PS where no such page exists, and the
    address bits below the size of a large page but for PAT (bit 12). Of level 3 of PAE paging see ``pdpte_reserved``.
    """
    return entry & config.reserved_mask(level, entry) != 0


def pdpte_reserved(config: PagingConfig, pdpte: int) -> bool:
    """True if ``pdpte`` of PAE paging is present with a reserved bit set: loading it raises #GP(0) (SDM 4.4.1)."""
    return pdpte & PTE_P != 0 and pdpte & (_PDPTE_RESERVED | ((1 << 64) - (1 << config.maxphyaddr))) != 0


def permitted(
    config: PagingConfig, accumulated_w: bool, accumulated_u: bool, accumulated_nx: bool, access: int
) -> bool:
    """True if the access rights let ``access`` through, protection keys aside (SDM 4.6.1).

    ``accumulated_w`` and ``accumulated_u`` are the conjunction of R/W and U/S over all levels,
    ``accumulated_nx`` the disjunction of NX. Under SMAP, EFLAGS.AC lets a supervisor reach user pages, unless the
    access is an implicit one.
    """
    if not config.paging:
        return True
    if access & ACCESS_USER:
        if not accumulated_u:
            return False
    elif accumulated_u:
        if access & ACCESS_FETCH:
            if config.smep:
                return False
        elif config.smap and (not config.rflags_ac or access & ACCESS_IMPLICIT):
            return False
    if access & ACCESS_FETCH and accumulated_nx:
        return False
    if access & ACCESS_WRITE and not accumulated_w:
        return not config.cr0_wp and not access & ACCESS_USER
    return True


def key_denies(config: PagingConfig, accumulated_u: bool, pkey: int, access: int) -> bool:
    """True if PKRU forbids ``access`` to a page with protection key ``pkey`` (SDM 4.6.2).

    Only data accesses to user-mode addresses are subject to PKRU, whoever makes them. WD binds a supervisor only
    under CR0.WP.
    """
    if not config.pke or not accumulated_u or access & ACCESS_FETCH:
        return False
    rights = config.pkru >> (2 * pkey)
    if rights & 1:
        return True
    return rights & 2 != 0 and access & ACCESS_WRITE != 0 and (config.cr0_wp or access & ACCESS_USER != 0)


def fault_code(config: PagingConfig, access: int, cause: int) -> int:
    """#PF error code (SDM 4.7) of ``access``; ``cause`` is 0 (not present), P, P and RSVD, or P and PK."""
    code = cause | (access & (PFERR_WRITE | PFERR_USER))
    if access & ACCESS_FETCH and config.reports_fetch:
        code |= PFERR_FETCH
    return code


def denial(config: PagingConfig, w: bool, u: bool, nx: bool, pkey: int, access: int) -> int:
    """Cause (see ``fault_code``) for which ``access`` to a mapped page faults, or 0 if it is allowed.

    PK is reported whenever PKRU forbids the access, be it forbidden for another reason too (SDM 4.7).
    """
    if config.pke and key_denies(config, u, pkey, access):
        return PFERR_PRESENT | PFERR_PK
    return 0 if permitted(config, w, u, nx, access) else PFERR_PRESENT
