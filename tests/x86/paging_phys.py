"""Page tables for one address, and physical memory that remembers, for the tests of paging."""

from __future__ import annotations

from mmufuzz.x86.mmu import HostPhys
from mmufuzz.x86.paging import (
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    table_index,
)
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
)

ALL = PTE_P | PTE_W | PTE_U
ON = CR0_PE | CR0_PG | CR0_WP
ROOT, OTHER_ROOT = 1, 9
GVA = 0x1234_5000
PAGE, OTHER_PAGE = 0x77, 0x88


class Phys(HostPhys):
    """Memory in a dictionary, with every value that a word ever had: (time, value)."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.history: dict[int, list[tuple[int, int]]] = {}
        self.time = 0
        self.loads = 0

    def load_entry(self, hpa: int) -> int:
        self.loads += 1
        return self.words.get(hpa, 0)

    def set_entry_bits(self, hpa: int, expected: int, bits: int) -> bool:
        assert self.words[hpa] == expected
        self.store(hpa, expected | bits)
        return True

    def store(self, hpa: int, value: int) -> None:
        self.time += 1
        self.history.setdefault(hpa, [(0, 0)]).append((self.time, value))
        self.words[hpa] = value

    def values(self, hpa: int, since: int) -> set[int]:
        """What ``hpa`` held at some moment from ``since`` on."""
        held = self.history.get(hpa, [(0, 0)])
        first = [value for time, value in held if time <= since][-1]
        return {first} | {value for time, value in held if time > since}


def slot(table: int, gva: int, level: int) -> int:
    """Address of the entry for ``gva`` in the table of 8-byte entries at frame ``table``."""
    return table << 12 | table_index(gva, level) << 3


def chain(gva: int, flags: dict[int, int] | None = None, leaf: int = 1, levels: int = 4) -> dict[int, int]:
    """Tables at frames ``ROOT``, ``ROOT`` + 1, … that map ``gva``: to ``PAGE``, or to a large page at level ``leaf``.

    ``flags`` are by level; the others have ALL, and PS where it is due.
    """
    entries = {}
    for level in range(levels, leaf - 1, -1):
        table = ROOT + levels - level
        target = table + 1
        if level == leaf:
            span = 9 * (leaf - 1)
            target = PAGE if leaf == 1 else PAGE >> span << span | 1 << span
        bits = (flags or {}).get(level, ALL | (PTE_PS if level == leaf > 1 else 0))
        entries[slot(table, gva, level)] = target << 12 | bits
    return entries
