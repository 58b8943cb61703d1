"""Descriptors and the loading of segment registers (SDM vol. 3, chapters 3 and 5)."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.bus import Bus
from mmufuzz.x86.insn import CS, DS, ES, FS, LDTR, SS
from mmufuzz.x86.state import (
    CR0_PE,
    EFER_LMA,
    RIGHTS_DB,
    RIGHTS_L,
    RIGHTS_UNUSABLE,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_SS,
    Fault,
    Regs,
    Segment,
)

RIGHTS_PRESENT: Final = 1 << 7
RIGHTS_S: Final = 1 << 4  # clear: a system descriptor
TYPE_CODE: Final = 8
TYPE_CONFORMING: Final = 4
TYPE_EXPAND_DOWN: Final = 4
TYPE_RW: Final = 2  # data: writable; code: readable
TYPE_ACCESSED: Final = 1

_FLAT_LIMIT: Final = 0xFFFFFFFF


class Descriptor:
    """A descriptor as it lies in its table; ``rights`` as in ``Segment``."""

    def __init__(self, address: int, word: int) -> None:
        self.address = address
        self.word = word
        self.rights = word >> 40 & 0xF0FF
        self.base = word >> 16 & 0xFFFFFF | word >> 32 & 0xFF000000
        limit = word & 0xFFFF | word >> 32 & 0xF0000
        self.limit = limit << 12 | 0xFFF if word >> 55 & 1 else limit
        self.dpl = word >> 45 & 3
        self.present = word >> 47 & 1 != 0
        self.is_system = word >> 44 & 1 == 0
        self.type = word >> 40 & 15

    @property
    def is_code(self) -> bool:
        """True for a code segment."""
        return not self.is_system and self.type & TYPE_CODE != 0

    @property
    def is_conforming(self) -> bool:
        """True for a conforming code segment."""
        return self.is_code and self.type & TYPE_CONFORMING != 0

    @property
    def is_writable(self) -> bool:
        """True for a writable data segment."""
        return not self.is_system and self.type & (TYPE_CODE | TYPE_RW) == TYPE_RW


def table_address(regs: Regs, address: int) -> int:
    """Linear address of an entry of a descriptor table, or of a field of a TSS: outside long mode it has 32 bits."""
    return address & (0xFFFFFFFFFFFFFFFF if regs.efer & EFER_LMA else 0xFFFFFFFF)


def table_limit(regs: Regs, selector: int) -> int:
    """Offset of the last byte of the table that ``selector`` is for; -1 without an LDT."""
    if not selector & 4:
        return regs.gdt_limit
    ldt = regs.segments[LDTR]
    return -1 if ldt.rights & RIGHTS_UNUSABLE else ldt.limit


def read_descriptor(regs: Regs, bus: Bus, selector: int, vector: int = VECTOR_GP, external: int = 0) -> Descriptor:
    """The descriptor that ``selector`` names. Raises ``vector``, with the selector, beyond the table's limit."""
    if (selector | 7) > table_limit(regs, selector):
        raise Fault(vector, selector & 0xFFFC | external)
    base = regs.segments[LDTR].base if selector & 4 else regs.gdt_base
    address = table_address(regs, base + (selector & 0xFFF8))
    return Descriptor(address, bus.load_system(regs, address, 8))


def mark_accessed(regs: Regs, bus: Bus, descriptor: Descriptor) -> None:
    """Set the accessed bit of a code or data descriptor that lacks it."""
    if not descriptor.type & TYPE_ACCESSED:
        address = table_address(regs, descriptor.address + 5)
        bus.store_system(regs, address, 1, descriptor.word >> 40 & 0xFF | TYPE_ACCESSED)
        descriptor.rights |= TYPE_ACCESSED


def install(regs: Regs, index: int, selector: int, base: int, limit: int, rights: int) -> None:
    """Set a segment register, hidden part and all, and what depends on it."""
    regs.segments[index] = Segment(selector, base, limit, rights)
    if index == CS:
        regs.compatibility = regs.efer & EFER_LMA != 0 and rights & RIGHTS_L == 0
        regs.code16 = rights & (RIGHTS_L | RIGHTS_DB) == 0
    refresh(regs)


def refresh(regs: Regs) -> None:
    """Bring ``stack16`` and ``flat`` up to date with the segment registers."""
    regs.stack16 = regs.segments[SS].rights & RIGHTS_DB == 0
    regs.flat = True
    for index in (ES, CS, SS, DS):
        segment = regs.segments[index]
        # Data, writable, up; or readable code.
        kind = segment.rights & (RIGHTS_UNUSABLE | TYPE_CODE | TYPE_EXPAND_DOWN | TYPE_RW)
        usable = kind & ~TYPE_EXPAND_DOWN == TYPE_CODE | TYPE_RW if index == CS else kind == TYPE_RW
        if segment.base != 0 or segment.limit != _FLAT_LIMIT or not usable:
            regs.flat = False


def install_descriptor(regs: Regs, bus: Bus, index: int, selector: int, descriptor: Descriptor) -> None:
    """Load a checked code or data descriptor into a segment register."""
    mark_accessed(regs, bus, descriptor)
    install(regs, index, selector, descriptor.base, descriptor.limit, descriptor.rights)


def load_segment(regs: Regs, bus: Bus, index: int, selector: int) -> None:
    """MOV, POP, LDS and the like to a segment register but CS (SDM vol. 2, MOV). Raises #GP, #SS, #NP or #PF."""
    if not regs.cr0 & CR0_PE:
        segment = regs.segments[index]
        install(regs, index, selector, selector << 4, segment.limit, segment.rights & ~RIGHTS_UNUSABLE)
        return
    if index == SS:
        load_stack_segment(regs, bus, selector)
        return
    if selector & 0xFFFC == 0:
        # Intel CPUs clear the base too; AMD's keep it.
        install(regs, index, selector, 0, 0, RIGHTS_UNUSABLE)
        return
    error = selector & 0xFFFC
    descriptor = read_descriptor(regs, bus, selector)
    readable = not descriptor.is_system and (not descriptor.is_code or descriptor.type & TYPE_RW != 0)
    if not readable:
        raise Fault(VECTOR_GP, error)
    if not descriptor.is_conforming and (selector & 3 > descriptor.dpl or regs.cpl > descriptor.dpl):
        raise Fault(VECTOR_GP, error)
    if not descriptor.present:
        raise Fault(VECTOR_NP, error)
    install_descriptor(regs, bus, index, selector, descriptor)


def load_stack_segment(regs: Regs, bus: Bus, selector: int) -> None:
    """A load of SS at the current privilege. A null selector is allowed in 64-bit code below CPL 3."""
    if selector & 0xFFFC == 0:
        if not regs.long_mode or regs.cpl == 3 or selector != regs.cpl:
            raise Fault(VECTOR_GP, 0)
        install(regs, SS, selector, 0, 0, RIGHTS_UNUSABLE | RIGHTS_DB)
        return
    descriptor = check_stack_segment(regs, bus, selector, regs.cpl, VECTOR_GP, VECTOR_SS, 0)
    install_descriptor(regs, bus, SS, selector, descriptor)


def check_stack_segment(
    regs: Regs, bus: Bus, selector: int, cpl: int, vector: int, absent: int, external: int
) -> Descriptor:
    """The descriptor of a stack for privilege ``cpl``. Raises ``vector``, or ``absent`` if it is not present."""
    error = selector & 0xFFFC | external
    descriptor = read_descriptor(regs, bus, selector, vector, external)
    if selector & 3 != cpl or descriptor.dpl != cpl or not descriptor.is_writable:
        raise Fault(vector, error)
    if not descriptor.present:
        raise Fault(absent, error)
    return descriptor


def code_rights(regs: Regs, selector: int, descriptor: Descriptor, external: int = 0) -> None:
    """Presence, and in long mode the combination of L and D, of a code segment about to be entered."""
    error = selector & 0xFFFC | external
    if regs.efer & EFER_LMA and descriptor.rights & (RIGHTS_L | RIGHTS_DB) == RIGHTS_L | RIGHTS_DB:
        raise Fault(VECTOR_GP, error)
    if not descriptor.present:
        raise Fault(VECTOR_NP, error)


def install_flat(regs: Regs, index: int, selector: int, long_code: bool) -> None:
    """The fixed segments of SYSCALL, SYSENTER and their returns: flat, their DPL is CPL."""
    rights = 0x9B if index == CS else 0x93
    size = RIGHTS_L if index == CS and long_code else RIGHTS_DB
    install(regs, index, selector, 0, _FLAT_LIMIT, rights | regs.cpl << 5 | size | 1 << 15)


def drop_inaccessible(regs: Regs) -> None:
    """After a return to an outer privilege: data segments above it become null (SDM vol. 3, 5.8.6)."""
    for index in (ES, DS, FS, FS + 1):
        segment = regs.segments[index]
        if segment.rights & RIGHTS_UNUSABLE:
            continue
        conforming = segment.rights & (TYPE_CODE | TYPE_CONFORMING) == TYPE_CODE | TYPE_CONFORMING
        if not conforming and segment.rights >> 5 & 3 < regs.cpl:
            install(regs, index, 0, 0, 0, RIGHTS_UNUSABLE)
