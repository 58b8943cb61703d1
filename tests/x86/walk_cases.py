"""Random page tables, register settings and accesses, and what the reference walk says of them.

A case is whatever a walk can depend on. Content is drawn for the entries that the walk can meet, whatever they then
lead to: tables may be shared between levels or map themselves. The draws are biased, so that walks go deep and every
reason to stop comes up often; ``outcome`` names the reason, for the runs to count.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mmufuzz.case.rng import Rng
from mmufuzz.x86 import ACCESS_FETCH, ACCESS_READ, ACCESS_WRITE, PageTableReader, PagingRegisters, WalkResult, walk
from mmufuzz.x86.paging import (
    CR4_LA57,
    CR4_PKE,
    NO_MEMORY,
    PFERR_PK,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_NX,
    PTE_P,
    PTE_PCD,
    PTE_PS,
    PTE_PWT,
    PTE_U,
    PTE_W,
)
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    FLAG_AC,
    FLAG_FIXED,
    PFERR_PRESENT,
    PFERR_RSVD,
    VECTOR_GP,
)

CR0_ET = 1 << 4
MODES = {"32-bit": 2, "pae": 3, "4-level": 4, "5-level": 5}
MAXPHYADDR = 40  # what both Unicorn and bochscpu have

RAM = 0x10_0000
TABLES = range(0x10, 0x1C)
"""Frames that random tables are in."""
CODE_TABLES = (0, 0x41, 0x42, 0x43, 0x44)
"""By level."""
CODE_FRAME = 0x50
CODE_OFFSET = 0x40
PDPT = 0xE0
"""The page of the PDPTs of PAE paging."""

READ, WRITE, FETCH, IMPLICIT = "read", "write", "fetch", "implicit"
KINDS = {READ: ACCESS_READ, WRITE: ACCESS_WRITE, FETCH: ACCESS_FETCH, IMPLICIT: ACCESS_READ}


@dataclass
class WalkCase:
    """One access, and all that it depends on. ``words``: memory that is not zero, by address."""

    mode: str
    kind: str
    gva: int
    code: int
    """Linear address of the page that the accessing instruction is in."""
    cr0: int
    cr3: int
    cr4: int
    efer: int
    rflags: int
    cpl: int
    pkru: int
    words: dict[int, int] = field(default_factory=dict)

    def registers(self) -> PagingRegisters:
        return PagingRegisters(
            cr0=self.cr0, cr3=self.cr3, cr4=self.cr4, efer=self.efer, rflags=self.rflags, cpl=self.cpl, pkru=self.pkru
        )


class Ram(PageTableReader):
    """Memory of a case: zero where it says nothing, absent beyond RAM."""

    def __init__(self, words: dict[int, int]) -> None:
        self.words = words

    def read_entry(self, gpa: int) -> int:
        return self.words.get(gpa, 0) if gpa < RAM else NO_MEMORY


def reference(case: WalkCase) -> WalkResult:
    """What the reference walk says of ``case``."""
    return walk(Ram(case.words), case.registers(), case.gva, KINDS[case.kind], implicit=case.kind == IMPLICIT)


def outcome(case: WalkCase, result: WalkResult) -> str:
    """Why and where the walk ended, coarsely: what coverage is counted in."""
    if result.vector == VECTOR_GP:
        return "#GP, PDPTE" if case.mode == "pae" else "#GP, not canonical"
    if result.no_memory:
        return "no memory"
    at = f"level {result.level}"
    if not result.fault:
        return f"{case.kind}, page of 2^{result.page_shift}"
    if not result.error_code & PFERR_PRESENT:
        return f"not present, {at}"
    if result.error_code & PFERR_RSVD:
        return f"reserved, {at}"
    if result.error_code & PFERR_PK:
        return f"{case.kind} denied by PKRU"
    return f"{case.kind} denied, {'user' if case.cpl == 3 and case.kind != IMPLICIT else 'supervisor'}"


def reachable(mode: str, pke: bool) -> set[str]:
    """Every outcome that cases of ``mode`` can have."""
    level = MODES[mode]
    found = {f"not present, level {at}" for at in range(1, level + 1)}
    shifts = {2: (12, 22), 3: (12, 21), 4: (12, 21, 30), 5: (12, 21, 30)}[level]
    for kind in KINDS:
        found.update(f"{kind}, page of 2^{shift}" for shift in shifts)
        found.add(f"{kind} denied, supervisor")
        if kind != IMPLICIT:
            found.add(f"{kind} denied, user")
        if pke and level >= 4 and kind != FETCH:
            found.add(f"{kind} denied by PKRU")
    if level == 2:
        found.add("reserved, level 2")
    else:
        found.update(f"reserved, level {at}" for at in range(1, 3 if level == 3 else level + 1))
        found.add("#GP, PDPTE" if level == 3 else "#GP, not canonical")
    return found


class Generator:
    """Draws cases of one mode. ``pke``, ``linear_bits``: what the implementation to compare with can do."""

    def __init__(self, mode: str, seed: int, *, pke: bool, linear_bits: int) -> None:
        self.mode = mode
        self.rng = Rng(seed)
        self.pke = pke
        self.linear_bits = linear_bits
        self.level = MODES[mode]
        self.index_bits = 10 if self.level == 2 else 9

    def chance(self, percent: int) -> bool:
        return self.rng.below(100) < percent

    def one_of(self, bits: int, percent: int) -> int:
        """One of the ``bits``, with a chance of ``percent``; else 0."""
        if not bits or not self.chance(percent):
            return 0
        places = [place for place in range(64) if bits >> place & 1]
        return 1 << places[self.rng.below(len(places))]

    def case(self) -> WalkCase:
        """The next case."""
        while True:
            case = self.attempt()
            if self.code(case):
                return case

    def attempt(self) -> WalkCase:
        """A case in which the code has no page."""
        cpl = 3 if self.chance(50) else 1 + self.rng.below(2) if self.chance(20) else 0
        kind = (READ, WRITE, FETCH, IMPLICIT)[min(self.rng.below(7) // 2, 3)]
        case = WalkCase(
            mode=self.mode,
            kind=kind,
            gva=self.address(kind),
            code=0,
            cr0=CR0_PE | CR0_PG | CR0_ET | (CR0_WP if self.chance(50) else 0),
            cr3=0,
            cr4=self.cr4(),
            efer=(EFER_NX if self.chance(75) else 0) | (EFER_LME | EFER_LMA if self.level >= 4 else 0),
            rflags=FLAG_FIXED | (FLAG_AC if self.chance(50) else 0),
            cpl=cpl,
            pkru=0,
        )
        if case.cr4 & CR4_PKE:
            case.pkru = self.rng.next64() & self.rng.next64() & 0xFFFFFFFF
        self.tables(case)
        return case

    def cr4(self) -> int:
        value = CR4_PAE if self.level >= 3 else 0
        if self.level == 5:
            value |= CR4_LA57
        for bit in (CR4_PSE, CR4_PGE, CR4_SMEP, CR4_SMAP):
            if self.chance(50):
                value |= bit
        if self.pke and self.level >= 4 and self.chance(60):
            value |= CR4_PKE
        return value

    def address(self, kind: str) -> int:
        """A linear address; 32 bytes at it lie in one page, and code of the case need not be there."""
        gva = self.rng.next64() & ~0x1F
        if self.level < 4:
            return gva & 0xFFFFFFFF
        bits = self.linear_bits
        # One that is not canonical. A fetch from there cannot be brought about, since the jump faults, and where a
        # descriptor is there its selector is to blame.
        if kind in (READ, WRITE) and self.chance(3):
            return gva & ~(1 << 63) | 1 << (56 if self.level == 5 else 47)
        gva &= (1 << bits) - 1
        return gva | ((1 << 64) - (1 << bits) if gva >> (bits - 1) else 0)

    def slot(self, frame: int, gva: int, level: int) -> int:
        """Address of an entry."""
        index = gva >> (12 + self.index_bits * (level - 1)) & (1 << self.index_bits) - 1
        return frame << 12 | index << (2 if self.level == 2 else 3)

    def tables(self, case: WalkCase) -> None:
        """Entries for the address of ``case``, and CR3."""
        level = self.level
        frame = TABLES[self.rng.below(len(TABLES))]
        case.cr3 = frame << 12 | (PTE_PWT if self.chance(10) else 0) | (PTE_PCD if self.chance(10) else 0)
        if level == 3:
            frame = self.pdptes(case)
            level = 2
        while level > 0:
            target = frame if self.chance(6) else TABLES[self.rng.below(len(TABLES))]
            self.put(case, self.slot(frame, case.gva, level), self.entry(level, target))
            frame = target
            level -= 1

    def pdptes(self, case: WalkCase) -> int:
        """PAE paging: the PDPT. Returns the frame of the directory for the address of ``case``."""
        case.cr3 = PDPT << 12 | self.rng.below(128) << 5 | (PTE_PWT if self.chance(10) else 0)
        frames = [TABLES[self.rng.below(len(TABLES))] for _ in range(4)]
        for index, frame in enumerate(frames):
            entry = frame << 12 | (0 if self.chance(8) else PTE_P)
            entry |= (PTE_PWT if self.chance(10) else 0) | 0xE00 & self.rng.next64()
            entry |= self.one_of(0b1_1110_0110 | (1 << 64) - (1 << MAXPHYADDR), 3)
            case.words[(case.cr3 & ~0x1F) + 8 * index] = entry
        return frames[case.gva >> 30]

    def put(self, case: WalkCase, address: int, entry: int) -> None:
        """Store ``entry``, unless an upper level has put one there."""
        word = address & ~7
        if self.level != 2:
            case.words.setdefault(word, entry)
            return
        shift = (address & 4) * 8
        old = case.words.get(word)
        if old is None:
            # The neighbour must not matter.
            old = (self.rng.next64() & ~PTE_P & ~(PTE_P << 32)) & ~(0xFFFFFFFF << shift)
        if not old >> shift & 0xFFFFFFFF:
            case.words[word] = old | entry << shift

    def entry(self, level: int, table: int) -> int:
        """An entry for ``level`` that leads to ``table``, or maps a page, or is malformed."""
        leaf = level == 1
        entry = PTE_P if self.chance(95) else 0
        for bit, percent in ((PTE_W, 75), (PTE_U, 70), (PTE_A, 50), (PTE_D, 50), (PTE_G, 30), (PTE_PWT, 20)):
            if self.chance(percent):
                entry |= bit
        if self.chance(35 if level <= 3 else 3):
            entry |= PTE_PS
            leaf = leaf or level <= 3
        if self.level == 2:
            return entry | self.address_32(level, entry, table)
        frame = table
        if leaf:
            # Half of the pages lie where the tables do.
            size = 9 * (level - 1)
            frame = self.rng.below(RAM >> 12) if self.chance(50) else self.rng.next64() & (1 << MAXPHYADDR - 12) - 1
            frame = frame >> size << size
            if size:
                frame |= self.rng.below(2) | self.one_of((1 << size) - 2, 10) & ((1 << size) - 2)
        if self.level >= 4:
            entry |= self.rng.next64() & 0x7FF << 52
        else:
            entry |= self.one_of(0x7FF << 52, 2)
        entry |= self.one_of((1 << 52) - (1 << MAXPHYADDR), 2)
        return entry | frame << 12 | (PTE_NX if self.chance(12) else 0)

    def address_32(self, level: int, entry: int, table: int) -> int:
        """The address field of a 4-byte entry."""
        if level == 2 and entry & PTE_PS and self.chance(80):
            # A 4M page, if CR4.PSE: bit 21 is reserved, bits 13 to 20 are an address above 4G.
            high = self.rng.next64() & 0xFF << 13 if self.chance(50) else 0
            return self.rng.below(1024) << 22 & (0xFFC00000 if self.chance(50) else 0) | high | self.one_of(1 << 21, 8)
        if level == 1:
            return (self.rng.below(RAM >> 12) if self.chance(50) else self.rng.below(1 << 20)) << 12
        return table << 12

    def code(self, case: WalkCase) -> bool:
        """Map the page of the accessing instruction, with all rights but U for CPL < 3; False if there is no room."""
        flags = PTE_P | PTE_W | PTE_A | PTE_D | (PTE_U if case.cpl == 3 else 0)
        top = 12 + self.index_bits * (self.level - 1)
        for index in self.code_indices():
            gva = index << top | CODE_OFFSET << 12
            if self.level >= 4 and index >> 8:
                bits = top + 9
                gva |= 1 << top - 1 | (1 << 64) - (1 << bits)
            root = case.cr3 & ~0x1F | index << 3 if self.level == 3 else self.slot(case.cr3 >> 12, gva, self.level)
            if index != case.gva >> top if self.level == 3 else not self.occupied(case, root):
                break
        else:
            return False
        case.code = gva
        if self.level == 3:
            case.words[root] = CODE_TABLES[2] << 12 | PTE_P
        else:
            self.put(case, root, CODE_TABLES[self.level - 1] << 12 | flags)
        for level in range(self.level - 1, 0, -1):
            target = CODE_TABLES[level - 1] if level > 1 else CODE_FRAME
            self.put(case, self.slot(CODE_TABLES[level], gva, level), target << 12 | flags)
        return True

    def code_indices(self) -> list[int]:
        """Indices into the topmost table under which the code can be, in order of preference."""
        if self.level == 3:
            return [3, 2]
        last = (1 << self.index_bits) - 1
        if self.level == 5 and self.linear_bits == 48:
            return [0, last]
        return [last, last - 1, last - 2, last - 3, last - 4, last - 5]

    def occupied(self, case: WalkCase, address: int) -> bool:
        word = case.words.get(address & ~7)
        if word is None:
            return False
        return self.level != 2 or word >> ((address & 4) * 8) & 0xFFFFFFFF != 0
