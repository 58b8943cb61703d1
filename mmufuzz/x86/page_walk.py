"""The reference page walk: what the architecture says of one linear address, and nothing cached.

SDM references are to volume 3. ``walk`` is the public form, over registers; ``walk_tables`` the same over a
``PagingConfig`` and a root, for addresses that are known to be canonical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from mypy_extensions import mypyc_attr

from mmufuzz.x86.paging import (
    ACCESS_FETCH,
    ACCESS_IMPLICIT,
    ACCESS_READ,
    ACCESS_USER,
    ACCESS_WRITE,
    CR4_PCIDE,
    LOW,
    LOW_BITS,
    MAXPHYADDR,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_G,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    PagingConfig,
    build_config,
    denial,
    fault_code,
    is_canonical,
    pdpte_reserved,
)
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    FLAG_FIXED,
    PFERR_PRESENT,
    PFERR_RSVD,
    VECTOR_GP,
    VECTOR_PF,
)
from mmufuzz.x86.walk_result import WalkResult

_OFFSET_MASK: Final = PAGE_SIZE - 1
_NX_HIGH: Final = 1 << 11  # bit 63 of an entry, in its upper part
_PKEY_HIGH_SHIFT: Final = 7
_CR3_FRAME: Final = (1 << 52) - PAGE_SIZE
_CR3_FRAME_LEGACY: Final = (1 << 32) - PAGE_SIZE
_CR3_PDPT: Final = (1 << 32) - 32


@mypyc_attr(allow_interpreted_subclasses=True)
class PageTableReader:
    """Where a walk finds paging-structure entries."""

    def read_entry(self, gpa: int) -> int:
        """The 64-bit word at ``gpa`` (a multiple of 8), unsigned; negative if there is no memory."""
        raise NotImplementedError

    def read_entry_32(self, gpa: int) -> int:
        """The 32-bit entry at ``gpa`` (a multiple of 4), unsigned; negative if there is no memory."""
        word = self.read_entry(gpa & -8)
        if word < 0:
            return word
        return word >> ((gpa & 4) << 3) & 0xFFFFFFFF


def walk_tables(config: PagingConfig, root_gfn: int, gva: int, access: int, memory: PageTableReader) -> WalkResult:
    """Translate the canonical ``gva`` for ``access`` by the tables at ``root_gfn``, as the architecture defines it.

    ``root_gfn`` is the frame of the topmost table in memory: with PAE paging the page directory that the PDPTE
    register of ``gva`` names. Reads entries from ``memory``, once each, and changes nothing:
    ``WalkResult.ad_updates`` says what hardware would write. Faults are found in hardware's order: level by level
    from the root, P before reserved bits, access rights only once the leaf is known (SDM 4.5, 4.6, 4.7).
    """
    result = WalkResult(access)
    level = config.level
    if level == 0:
        result.gpa = gva
        return result
    if level == 3:
        level = 2
    wide = config.wide
    index_bits = config.index_bits
    shift = PAGE_SHIFT + index_bits * (level - 1)
    index_mask = (1 << index_bits) - 1
    table = root_gfn << PAGE_SHIFT
    rights = PTE_W | PTE_U
    cause = 0
    while True:
        index = (gva >> shift) & index_mask
        if wide:
            address = table | index << 3
            entry = memory.read_entry(address)
        else:
            address = table | index << 2
            entry = memory.read_entry_32(address)
        high = entry >> LOW_BITS
        if high < 0:
            result.no_memory = True
            break
        result.record(address, entry)
        low = entry & LOW
        if not low & PTE_P:
            break
        leaf = level == 1
        reserved = config.reserved_low
        if low & PTE_PS:
            reserved = config.reserved_low_ps[level]
            leaf = leaf or config.maps_page[level]
        if low & reserved or high & config.reserved_high:
            cause = PFERR_PRESENT | PFERR_RSVD
            break
        rights &= low
        if high & _NX_HIGH:
            result.nx = True
        if leaf:
            result.page_shift = shift
            result.gpa = config.leaf_frame(level, low, gva) << PAGE_SHIFT | gva & _OFFSET_MASK
            result.is_global = config.pge and low & PTE_G != 0
            if config.pke:
                result.pkey = high >> _PKEY_HIGH_SHIFT & 15
            cause = denial(config, rights & PTE_W != 0, rights & PTE_U != 0, result.nx, result.pkey, access)
            break
        table = low & -PAGE_SIZE
        level -= 1
        shift -= index_bits
    result.level = level
    result.writable = rights & PTE_W != 0
    result.user = rights & PTE_U != 0
    if cause or result.page_shift == 0:
        return _page_fault(result, config, cause)
    return result


def _page_fault(result: WalkResult, config: PagingConfig, cause: int) -> WalkResult:
    result.vector = VECTOR_PF
    result.error_code = fault_code(config, result.access, cause)
    return result


class PagingRegisters:
    """The registers that a walk depends on. Immutable.

    ``cr0``, ``cr3``, ``cr4``, ``efer``, ``rflags``, ``pkru`` are as MOV, RDMSR, PUSHF and RDPKRU show them; bits that
    do not concern paging are ignored. ``cpl`` is 0..3. ``maxphyaddr`` (32..52), ``pse36`` and ``page_1g`` are what
    CPUID reports. ``pdptes``: the four PDPTE registers of PAE paging; None: as in memory at the time of the walk,
    which is what a MOV to CR3 just before it would load. Raises ``ValueError`` for values that no processor can hold.
    """

    def __init__(
        self,
        *,
        cr0: int,
        cr3: int,
        cr4: int = 0,
        efer: int = 0,
        rflags: int = FLAG_FIXED,
        cpl: int = 0,
        pkru: int = 0,
        maxphyaddr: int = MAXPHYADDR,
        pse36: bool = True,
        page_1g: bool = True,
        pdptes: tuple[int, int, int, int] | None = None,
    ) -> None:
        check_registers(cr0, cr4, efer)
        if not 0 <= cpl <= 3:
            raise ValueError(f"cpl {cpl} is outside 0..3")
        if not 0 <= pkru < 1 << 32:
            raise ValueError(f"pkru {pkru:#x} is outside 32 bits")
        self.config: Final = build_config(
            cr0, cr4, efer, rflags, pkru=pkru, maxphyaddr=maxphyaddr, pse36=pse36, page_1g=page_1g
        )
        for pdpte in pdptes or ():
            if pdpte_reserved(self.config, pdpte):
                raise ValueError(f"PDPTE {pdpte:#x} has a reserved bit set, so it cannot be loaded")
        self.cr0: Final = cr0
        self.cr3: Final = cr3
        self.cr4: Final = cr4
        self.efer: Final = efer
        self.rflags: Final = rflags
        self.cpl: Final = cpl
        self.pkru: Final = pkru
        self.pdptes: Final = pdptes
        self.root: Final = root_of(self.config, cr3)


def check_registers(cr0: int, cr4: int, efer: int) -> None:
    """Raise ``ValueError`` for a combination that no sequence of instructions reaches (SDM 4.1.1, 4.10.1)."""
    if cr0 & CR0_PG and not cr0 & CR0_PE:
        raise ValueError("CR0.PG without CR0.PE")
    if efer & EFER_LMA and not cr0 & CR0_PG:
        raise ValueError("EFER.LMA without CR0.PG")
    if efer & EFER_LMA and not cr4 & CR4_PAE:
        raise ValueError("EFER.LMA without CR4.PAE")
    if cr4 & CR4_PCIDE and not efer & EFER_LMA:
        raise ValueError("CR4.PCIDE without EFER.LMA")


def root_of(config: PagingConfig, cr3: int) -> int:
    """Frame of the topmost table that CR3 names (SDM tables 4-3 and 4-12); with PAE paging, of the PDPT's page."""
    if config.level >= 4:
        return (cr3 & _CR3_FRAME & ((1 << config.maxphyaddr) - 1)) >> PAGE_SHIFT
    return (cr3 & _CR3_FRAME_LEGACY) >> PAGE_SHIFT


def read_pdptes(reader: PageTableReader, cr3: int) -> tuple[int, int, int, int]:
    """The four PDPTEs in memory that CR3 names (SDM table 4-7, 4.4.1); 0 where there is no memory."""
    table = cr3 & _CR3_PDPT
    return (
        max(reader.read_entry(table), 0),
        max(reader.read_entry(table + 8), 0),
        max(reader.read_entry(table + 16), 0),
        max(reader.read_entry(table + 24), 0),
    )


Memory: TypeAlias = PageTableReader | Mapping[int, int] | Callable[[int], int]
"""Physical memory: the 64-bit word at an address that is a multiple of 8, unsigned.

A mapping reads as 0 where it has no key. A callable, or a ``PageTableReader``, answers a negative number where there is
no memory.
"""


class _DictReader(PageTableReader):
    def __init__(self, words: dict[int, int]) -> None:
        self.words: Final = words

    def read_entry(self, gpa: int) -> int:
        return self.words.get(gpa, 0)


class _MappingReader(PageTableReader):
    def __init__(self, words: Mapping[int, int]) -> None:
        self.words: Final = words

    def read_entry(self, gpa: int) -> int:
        return self.words.get(gpa, 0)


class _CallReader(PageTableReader):
    def __init__(self, call: Callable[[int], int]) -> None:
        self.call: Final = call

    def read_entry(self, gpa: int) -> int:
        return self.call(gpa)


def _reader(memory: Memory) -> PageTableReader:
    if isinstance(memory, dict):
        return _DictReader(memory)
    if isinstance(memory, PageTableReader):
        return memory
    if isinstance(memory, Mapping):
        return _MappingReader(memory)
    return _CallReader(memory)


def walk(
    memory: Memory, registers: PagingRegisters, gva: int, access: int = ACCESS_READ, *, implicit: bool = False
) -> WalkResult:
    """Translate the linear address ``gva`` as a processor with empty caches would, and change nothing.

    ``access``: ACCESS_READ, ACCESS_WRITE (a read-modify-write is a write) or ACCESS_FETCH. It is a user access if
    CPL is 3, unless it is ``implicit``: one that the processor makes by itself to a descriptor table or a TSS is a
    supervisor access at any CPL (SDM 4.6). Raises ``ValueError`` for any other access, and for ``gva`` outside 64
    bits, or outside 32 bits where linear addresses are that short (outside long mode).

    Order of checks: canonical address (vol. 1, 3.3.7.1), then the tables from the root down (4.3 to 4.5), reserved
    bits (4.7), access rights (4.6.1), protection keys (4.6.2). A reserved bit in a PDPTE that is read from memory
    gives #GP(0), which the MOV to CR3 would have raised (4.4.1).
    """
    if access != ACCESS_READ and access != ACCESS_WRITE and access != ACCESS_FETCH:  # noqa: PLR1714 - no tuple
        raise ValueError(f"access {access:#x} is not one of ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH")
    config = registers.config
    if implicit:
        access |= ACCESS_IMPLICIT
    elif registers.cpl == 3:
        access |= ACCESS_USER
    upper = gva >> (config.linear_bits - 1)
    if upper != 0:
        if config.level < 4:
            if upper != 1:
                raise ValueError(f"gva {gva:#x} is outside 32 bits")
        elif not 0 <= gva < 1 << 64:
            raise ValueError(f"gva {gva:#x} is outside 64 bits")
        elif not is_canonical(gva, config.linear_bits):
            return _general_protection(access)
    reader = _reader(memory)
    if config.level == 3:
        return _walk_pae(registers, gva, access, reader)
    return walk_tables(config, registers.root, gva, access, reader)


def _walk_pae(registers: PagingRegisters, gva: int, access: int, reader: PageTableReader) -> WalkResult:
    config = registers.config
    pdptes = registers.pdptes
    if pdptes is None:
        pdptes = read_pdptes(reader, registers.cr3)
        for pdpte in pdptes:
            if pdpte_reserved(config, pdpte):
                return _general_protection(access)
    pdpte = pdptes[gva >> 30]
    if not pdpte & PTE_P:
        result = WalkResult(access)
        result.level = 3
        return _page_fault(result, config, 0)
    return walk_tables(config, (pdpte & LOW) >> PAGE_SHIFT, gva, access, reader)


def _general_protection(access: int) -> WalkResult:
    result = WalkResult(access)
    result.vector = VECTOR_GP
    return result
