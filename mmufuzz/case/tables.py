"""Builds guest page tables, with the aliasing that makes shadow paging hard."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.model import Word

P: Final = 1
W: Final = 1 << 1
U: Final = 1 << 2
A: Final = 1 << 5
D: Final = 1 << 6
PS: Final = 1 << 7
G: Final = 1 << 8
NX: Final = 1 << 63
RESERVED: Final = 1 << 51
"""Above MAXPHYADDR."""

TABLE: Final = P | W | U | A
PAGE: Final = P | W | U | A | D

_FRAME: Final = ((1 << 40) - 1) << 12


def entry(gfn: int, flags: int) -> int:
    """A page-table entry."""
    return gfn << 12 | flags


def frame(value: int) -> int:
    """The frame a page-table entry points at."""
    return (value & _FRAME) >> 12


def index(gva: int, level: int) -> int:
    """The index of ``gva`` in its table of ``level`` (1..4)."""
    return gva >> (12 + 9 * (level - 1)) & 511


def sign_extend(gva: int) -> int:
    """The canonical address with the low 48 bits of ``gva``."""
    gva &= (1 << 48) - 1
    return gva | (0xFFFF << 48 if gva >> 47 else 0)


class TableBuilder:
    """Page tables in frames of ``pool``, taken from its front. The keys of ``words`` are gfn << 9 | index."""

    def __init__(self, pool: list[int]) -> None:
        self.pool = pool
        self.words: dict[int, int] = {}
        self.levels: dict[int, int] = {}
        """Tables in use, and the level each was made for."""

    def table(self, level: int) -> int:
        """A fresh table; when the pool is empty a table in use, so that frames get a second role."""
        if self.pool:
            gfn = self.pool.pop(0)
            self.levels[gfn] = level
            return gfn
        return list(self.levels)[level % len(self.levels)]

    def get(self, gfn: int, position: int) -> int:
        """An entry."""
        return self.words.get(gfn << 9 | position, 0)

    def set(self, gfn: int, position: int, value: int) -> None:
        """Write an entry."""
        self.words[gfn << 9 | position] = value

    def map(self, root: int, gva: int, gfn: int, flags: int, table_flags: int = TABLE, level: int = 1) -> None:
        """Map ``gva`` at ``level`` to ``gfn``, with tables of ``table_flags`` where some are missing."""
        table = root
        for depth in (4, 3, 2, 1):
            position = index(gva, depth)
            if depth == level:
                self.set(table, position, entry(gfn, flags))
                return
            value = self.get(table, position)
            if not value & P or value & PS:
                value = entry(self.table(depth - 1), table_flags)
                self.set(table, position, value)
            table = frame(value)

    def path(self, root: int, gva: int) -> list[tuple[int, int, int]]:
        """(table, level, index) from the root down to the entry that ends the walk of ``gva``."""
        steps: list[tuple[int, int, int]] = []
        table = root
        for level in (4, 3, 2, 1):
            position = index(gva, level)
            steps.append((table, level, position))
            value = self.get(table, position)
            if not value & P or value & PS:
                break
            table = frame(value)
        return steps

    def used(self, gfn: int) -> list[int]:
        """Indices of the words of a frame that were written."""
        return [key & 511 for key in self.words if key >> 9 == gfn]

    def memory(self) -> tuple[Word, ...]:
        """All words, in the order they were first written."""
        return tuple([Word(key >> 9, key & 511, value) for key, value in self.words.items()])
