"""A toy 4-level page walk: the yardstick for what a real one costs. Knows P, R/W and U/S, and nothing else."""

from __future__ import annotations


def toy_walk(memory: dict[int, int], root: int, gva: int, write: bool, user: bool) -> int:
    """Physical address for ``gva`` by the tables at frame ``root``; negative if there is none."""
    table = root
    writable = True
    users = True
    level = 4
    while level > 0:
        entry = memory.get((table << 12) | ((gva >> (12 + 9 * (level - 1))) & 511) << 3, 0)
        if not entry & 1:
            return -1
        if not entry & 2:
            writable = False
        if not entry & 4:
            users = False
        table = entry >> 12 & 0xFFFFFFFFFF
        level -= 1
    if write and not writable:
        return -2
    if user and not users:
        return -2
    return table << 12 | gva & 0xFFF
