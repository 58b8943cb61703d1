"""Paging as the architecture defines it: entry formats, access rights and the reference walk.

SDM references are to volume 3, chapter 4. Modelled: no paging, 4-level and 5-level paging. The
mode is one number, ``PagingConfig.level``, and everything that depends on the entry format goes through
``reserved_bits``, ``is_leaf``, ``leaf_frame`` and ``table_index``, which is where PAE and 32-bit
paging would branch.

Linear addresses are taken as canonical: a non-canonical one is #GP or #SS before any walk begins
(SDM vol. 1, 3.3.7.1), which is the business of whoever executes the access.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.state import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NX,
    FLAG_AC,
    PFERR_FETCH,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_USER,
    PFERR_WRITE,
    Regs,
)

# Bits of a 64-bit paging-structure entry (SDM tables 4-15 to 4-20).
PTE_P: Final = 1 << 0
PTE_W: Final = 1 << 1
PTE_U: Final = 1 << 2
PTE_PWT: Final = 1 << 3
PTE_PCD: Final = 1 << 4
PTE_A: Final = 1 << 5
PTE_D: Final = 1 << 6
PTE_PS: Final = 1 << 7  # levels 2 and 3: maps a page; level 1: PAT
PTE_G: Final = 1 << 8
PTE_PAT_LARGE: Final = 1 << 12  # PAT of a 2M or 1G page
PTE_NX: Final = 1 << 63

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
ENTRIES_PER_TABLE: Final = 512
MAXPHYADDR: Final = 40

CR4_LA57: Final = 1 << 12

# Kinds of access: an or of these, at the positions they have in the #PF error code.
ACCESS_READ: Final = 0
ACCESS_WRITE: Final = PFERR_WRITE
ACCESS_USER: Final = PFERR_USER
ACCESS_FETCH: Final = PFERR_FETCH

NO_ADDRESS: Final = -1
NO_MEMORY: Final = -1

_FRAME_MASK: Final = (1 << 40) - 1
_OFFSET_MASK: Final = PAGE_SIZE - 1
_MAX_LEVEL: Final = 5

# No two of these share a position, so that one integer can key the cache of configurations.
_CR0_KEY: Final = CR0_WP | CR0_PG
_CR4_KEY: Final = CR4_PAE | CR4_PGE | CR4_LA57 | CR4_SMEP | CR4_SMAP
_EFER_KEY: Final = EFER_LMA | EFER_NX
_MAXPHYADDR_KEY_SHIFT: Final = 32


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


class PagingConfig:
    """What the registers say about paging. Immutable: configurations are shared and cached.

    ``level`` is the depth of the tables: 0 without paging, 4 or 5. ``maxphyaddr`` is 32..52 bits.
    ``rflags_ac`` is EFLAGS.AC; it matters only under SMAP. Raises ``ValueError`` for a value outside these.
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
    ) -> None:
        if level not in (0, 4, 5):
            raise ValueError(f"paging with {level} levels is not modelled")
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
        # The I/D flag is reported only where fetches are told apart at all (SDM 4.7).
        self.reports_fetch: Final = efer_nx or smep
        common = (1 << 52) - (1 << maxphyaddr)
        if not efer_nx:
            common |= PTE_NX
        self._reserved_table: Final[list[int]] = [common, common, common, common, common | PTE_PS, common | PTE_PS]
        self._reserved_large: Final[list[int]] = [
            common,
            common,
            common | ((1 << 21) - (1 << 13)),
            common | ((1 << 30) - (1 << 13)),
            common | PTE_PS,
            common | PTE_PS,
        ]

    def reserved_mask(self, level: int, entry: int) -> int:
        """Bits that must be zero in a present entry of ``level`` that has the PS bit of ``entry``."""
        if entry & PTE_PS:
            return self._reserved_large[level]
        return self._reserved_table[level]


_configs: Final[dict[int, PagingConfig]] = {}


def paging_config(regs: Regs, maxphyaddr: int = MAXPHYADDR) -> PagingConfig:
    """Paging configuration that CR0, CR4, EFER and EFLAGS.AC select (SDM 4.1.1).

    The answer is shared between calls with equal inputs. Raises ``ValueError`` for PAE and 32-bit
    paging, which are not modelled.
    """
    key = (
        (regs.cr0 & _CR0_KEY)
        | (regs.cr4 & _CR4_KEY)
        | (regs.efer & _EFER_KEY)
        | (regs.rflags & FLAG_AC)
        | (maxphyaddr << _MAXPHYADDR_KEY_SHIFT)
    )
    config = _configs.get(key)
    if config is None:
        config = _build_config(regs, maxphyaddr)
        _configs[key] = config
    return config


def _build_config(regs: Regs, maxphyaddr: int) -> PagingConfig:
    if not regs.cr0 & CR0_PG:
        level = 0
    elif regs.efer & EFER_LMA:
        level = 5 if regs.cr4 & CR4_LA57 else 4
    else:
        mode = "PAE" if regs.cr4 & CR4_PAE else "32-bit"
        raise ValueError(f"{mode} paging is not modelled")
    return PagingConfig(
        level,
        cr0_wp=regs.cr0 & CR0_WP != 0,
        smep=regs.cr4 & CR4_SMEP != 0,
        smap=regs.cr4 & CR4_SMAP != 0,
        efer_nx=regs.efer & EFER_NX != 0,
        rflags_ac=regs.rflags & FLAG_AC != 0,
        pge=regs.cr4 & CR4_PGE != 0,
        maxphyaddr=maxphyaddr,
    )


def reserved_bits(config: PagingConfig, level: int, entry: int) -> bool:
    """True if the present ``entry`` of ``level`` (1..5) has a reserved bit set (SDM 4.7, RSVD flag).

    Reserved are bits maxphyaddr..51, NX without EFER.NX, PS above level 3, and the address bits
    below the size of a 2M or 1G page but for PAT (bit 12).
    """
    return entry & config.reserved_mask(level, entry) != 0


def permitted(
    config: PagingConfig, accumulated_w: bool, accumulated_u: bool, accumulated_nx: bool, access: int
) -> bool:
    """True if the access rights let ``access`` through (SDM 4.6.1).

    ``accumulated_w`` and ``accumulated_u`` are the conjunction of R/W and U/S over all levels,
    ``accumulated_nx`` the disjunction of NX. Data accesses are explicit ones: under SMAP, EFLAGS.AC
    lets a supervisor reach user pages. For an implicit access pass a configuration without AC.
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
        elif config.smap and not config.rflags_ac:
            return False
    if access & ACCESS_FETCH and accumulated_nx:
        return False
    if access & ACCESS_WRITE and not accumulated_w:
        return not config.cr0_wp and not access & ACCESS_USER
    return True


def fault_code(config: PagingConfig, access: int, cause: int) -> int:
    """#PF error code (SDM 4.7) of ``access``; ``cause`` is 0 (not present), P, or P and RSVD."""
    code = cause | (access & (PFERR_WRITE | PFERR_USER))
    if access & ACCESS_FETCH and config.reports_fetch:
        code |= PFERR_FETCH
    return code


@mypyc_attr(allow_interpreted_subclasses=True)
class PageTableReader:
    """Where ``walk`` finds paging-structure entries."""

    def read_entry(self, gpa: int) -> int:
        """The 64-bit entry at ``gpa`` (a multiple of 8), unsigned; negative if there is no memory."""
        raise NotImplementedError


class WalkResult:
    """What a walk found.

    ``fault``: the access raises #PF with ``error_code`` (0 if there is no fault).
    ``level``: of the last entry read: of the leaf, or of the entry that stopped the walk; 0 without paging.
    ``gpa``, ``gfn``: of the byte accessed, if a leaf was reached, even one that forbids the access;
    otherwise ``NO_ADDRESS``.
    ``entries``: (gpa of the entry, its value) from the root down, the entry that stopped the walk included.
    ``writable``, ``user``, ``nx``: accumulated over the present, well-formed entries of ``entries``.
    ``no_memory``: a table lies outside memory. The error code then says "not present", as KVM's walker does
    (paging_tmpl.h:walk_addr_generic); hardware would read whatever the bus answers.
    """

    def __init__(self, access: int) -> None:
        self.access: Final = access
        self.fault = False
        self.error_code = 0
        self.gpa = NO_ADDRESS
        self.gfn = NO_ADDRESS
        self.level = 0
        self.entries: list[tuple[int, int]] = []
        self.writable = True
        self.user = True
        self.nx = False
        self.no_memory = False

    @property
    def ad_updates(self) -> list[tuple[int, int]]:
        """Accessed and dirty flags that the access sets: (gpa of the entry, bits that are clear), root first.

        SDM 4.8. Empty for an access that faults: hardware may then have set A in the upper entries, or not.
        An entry that a self-mapping table uses at two levels may be listed twice.
        """
        updates: list[tuple[int, int]] = []
        if self.fault:
            return updates
        remaining = len(self.entries)
        for gpa, entry in self.entries:
            remaining -= 1
            wanted = PTE_A
            if remaining == 0 and self.access & ACCESS_WRITE:
                wanted |= PTE_D
            missing = wanted & ~entry
            if missing:
                updates.append((gpa, missing))
        return updates


def walk(config: PagingConfig, root_gfn: int, gva: int, access: int, memory: PageTableReader) -> WalkResult:
    """Translate ``gva`` for ``access`` by the tables at ``root_gfn``, as the architecture defines it.

    Reads entries from ``memory``, once each, and changes nothing: ``WalkResult.ad_updates`` says
    what hardware would write. Faults are found in hardware's order: level by level from the root,
    P before reserved bits, access rights only once the leaf is known (SDM 4.5, 4.6, 4.7).
    """
    result = WalkResult(access)
    if not config.paging:
        result.gpa = gva
        result.gfn = gva >> PAGE_SHIFT
        return result
    table = root_gfn
    level = config.level
    while True:
        result.level = level
        address = entry_address(table, gva, level)
        entry = memory.read_entry(address)
        if entry < 0:
            result.no_memory = True
            return _fail(result, config, 0)
        result.entries.append((address, entry))
        if not entry & PTE_P:
            return _fail(result, config, 0)
        if reserved_bits(config, level, entry):
            return _fail(result, config, PFERR_PRESENT | PFERR_RSVD)
        if not entry & PTE_W:
            result.writable = False
        if not entry & PTE_U:
            result.user = False
        if entry & PTE_NX:
            result.nx = True
        if is_leaf(level, entry):
            break
        table = pte_frame(entry)
        level -= 1
    result.gfn = leaf_frame(level, entry, gva)
    result.gpa = (result.gfn << PAGE_SHIFT) | (gva & _OFFSET_MASK)
    if not permitted(config, result.writable, result.user, result.nx, access):
        return _fail(result, config, PFERR_PRESENT)
    return result


def _fail(result: WalkResult, config: PagingConfig, cause: int) -> WalkResult:
    result.fault = True
    result.error_code = fault_code(config, result.access, cause)
    return result
