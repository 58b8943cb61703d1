"""Semantic counters: what a run did, as a fixed table of small numbers.

Lines of code do not tell one interleaving from another, and marks do not tell on which role a thing happened. A
counter does. It belongs to a *block*, a small array with named axes; its index is arithmetic over small ints, so that
counting costs next to nothing in any build. Campaigns keep Cases by them, and libFuzzer reads them as coverage.

A run counts into ``Outcome.counters``; none of it changes what the run does, and it is not in the digest. Indices
change when a block grows: they compare runs of one version, and no file holds them.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import SITE_NAMES
from mmufuzz.kvm.marks import MARKS


class Block:
    """A part of the table: one counter for each choice of a value on each of at most four ``axes``.

    ``base``: index of its first counter. ``meaning`` is for people.
    """

    def __init__(self, name: str, base: int, axes: tuple[tuple[str, ...], ...], meaning: str) -> None:
        self.name = name
        self.base = base
        self.axes = axes
        self.meaning = meaning
        sizes = [len(axis) for axis in axes] + [1, 1, 1]
        self.second = sizes[1]
        self.third = sizes[2]
        self.fourth = sizes[3]
        self.size = sizes[0] * sizes[1] * sizes[2] * sizes[3]

    def at(self, first: int, second: int = 0, third: int = 0, fourth: int = 0) -> int:
        """Index of the counter at these positions on the axes."""
        return self.base + ((first * self.second + second) * self.third + third) * self.fourth + fourth

    def values(self, index: int) -> list[str]:
        """What the counter ``index`` of this block stands for, a word for each axis."""
        rest = index - self.base
        words: list[str] = []
        for axis in reversed(self.axes):
            words.append(axis[rest % len(axis)])
            rest //= len(axis)
        words.reverse()
        return words


ROLES: Final = ("direct", "indirect", "nested")
"""Kinds of MMU: of a guest without paging, of one with tables of its own, of a nested guest behind L1's table."""
DIRECT: Final = 0
INDIRECT: Final = 1
NESTED: Final = 2

LEVELS: Final = ("none", "1", "2", "3", "4", "5")

RET_PF: Final = ("CONTINUE", "RETRY", "EMULATE", "WRITE_PROTECTED", "INVALID", "FIXED", "SPURIOUS")

PAGE_EVENTS: Final = ("created", "found", "zapped", "zapped root")
CREATED: Final = 0
FOUND: Final = 1
ZAPPED: Final = 2
ZAPPED_ROOT: Final = 3

PAGE_KINDS: Final = ("direct", "shadows a table", "pass-through")

RETRIES: Final = (
    "unprotect: nothing there",
    "unprotect: zapped",
    "unprotect: count is zero",
    "retry guard",
    "retry before emulating",
    "retry a failed emulation",
    "no retry: write to a table in use",
    "emulate a table write",
    "gPTE changed",
    "root gPTE changed",
    "root is stale",
    "MMIO SPTE replaced",
    "cmpxchg failed",
    "entry cancelled",
    "guest walk again",
)
RETRY_NOTHING: Final = 0
RETRY_ZAPPED: Final = 1
RETRY_COUNT_ZERO: Final = 2
RETRY_GUARD: Final = 3
RETRY_BEFORE: Final = 4
RETRY_FAILED: Final = 5
RETRY_TO_TABLE: Final = 6
RETRY_TABLE_WRITE: Final = 7
RETRY_GPTE: Final = 8
RETRY_TOP: Final = 9
RETRY_STALE: Final = 10
RETRY_MMIO: Final = 11
RETRY_CMPXCHG: Final = 12
RETRY_ENTRY: Final = 13
RETRY_WALK: Final = 14

LOCK_STATES: Final = ("free", "held by another", "held here", "contended")

NEAR_MISSES: Final = (
    "coherence: an access by hardware stands on an old value",
    "coherence: an access by the emulator stands on an old value",
    "coherence: an access stands on a store still in its own buffer",
    "coherence: a #PF stands on an old value",
    "coherence: an emulated store is not tracked though its gfn has a gSP",
    "coherence: a gfn becomes a table while a store to it is in a buffer",
    "accounting: the count reads zero while there is a gSP",
    "accounting: the books are right only through the store buffer",
    "write-protection: a gfn becomes a table while a TLB can write it",
    "write-protection: a TLB can write a table until a pending flush",
    "lifetime: a lockless walk reads a zapped page",
    "lifetime: freeing waits for a lockless walk",
    "progress: a state came back",
    "progress: a state came back, then a vCPU got on",
    "deadlock: all threads but the one that yields wait",
    "suspect: half of the events are used up",
    "races: two threads each missed the other's store",
)
STALE_HARDWARE: Final = 0
STALE_EMULATED: Final = 1
OWN_STORE: Final = 2
STALE_FAULT: Final = 3
UNTRACKED_STORE: Final = 4
STORE_IN_FLIGHT: Final = 5
COUNT_ZERO: Final = 6
BUFFERED_BOOKS: Final = 7
WRITABLE_TLB: Final = 8
FLUSH_PENDING: Final = 9
ZAPPED_WALK: Final = 10
FREE_WAITS: Final = 11
STATE_AGAIN: Final = 12
STATE_LEFT: Final = 13
ALL_BUT_ONE_WAIT: Final = 14
HALF_SPENT: Final = 15
BOTH_MISSED: Final = 16

STALLS: Final = ("1", "2", "3", "4", "5 to 8", "9 to 16", "more")

EXITS: Final = (
    "external-interrupt",
    "page-fault",
    "invalid-opcode",
    "debug",
    "alignment-check",
    "cr-access",
    "invlpg",
    "invpcid",
    "hlt",
    "cpuid",
    "hypercall",
    "rdmsr",
    "wrmsr",
    "io",
    "task-switch",
    "triple-fault",
    "program-end",
    "interrupt-window",
    "preemption-timer",
    "invalid-state",
)

SEEN: Final = ("seen", "missed")
ORDERS: Final = ("lower thread first", "higher thread first")


def _lay_out() -> list[Block]:
    """All blocks, one behind the other."""
    blocks: list[Block] = []
    base = 0
    for name, axes, meaning in (
        ("marks", (MARKS,), "the run passed the mark"),
        ("exits", (EXITS,), "a VM exit by reason"),
        (
            "ret_pf",
            (RET_PF, ROLES, LEVELS),
            "a #PF exit ended in this code, on this kind of MMU; level of the guest's leaf entry, if a walk found one",
        ),
        ("shadow_page", (PAGE_EVENTS, PAGE_KINDS, LEVELS), "what became of a shadow page of this kind and level"),
        ("retry", (RETRIES, LOCK_STATES), "a retry or unprotect decision, and the state of mmu_lock as it was made"),
        ("near_miss", (NEAR_MISSES,), "an oracle was satisfied, but only just"),
        ("stall", (ROLES, STALLS), "entries into the guest in a row that got it nowhere, by kind of MMU"),
        (
            "interleaving",
            (SITE_NAMES, SITE_NAMES, SEEN, ORDERS),
            "a thread touched a word at the first site, and the next to touch it was another thread at the second, one"
            " of them writing; whether the second saw what the first stored; which of the threads came first",
        ),
    ):
        blocks.append(Block(name, base, axes, meaning))
        base += blocks[-1].size
    return blocks


BLOCKS: Final = _lay_out()
MARK_BLOCK: Final = BLOCKS[0]
EXIT_BLOCK: Final = BLOCKS[1]
RET_PF_BLOCK: Final = BLOCKS[2]
PAGE_BLOCK: Final = BLOCKS[3]
RETRY_BLOCK: Final = BLOCKS[4]
NEAR_BLOCK: Final = BLOCKS[5]
STALL_BLOCK: Final = BLOCKS[6]
PAIR_BLOCK: Final = BLOCKS[7]

N_COUNTERS: Final = PAIR_BLOCK.base + PAIR_BLOCK.size

_MARK_INDEX: Final = {name: MARK_BLOCK.base + position for position, name in enumerate(MARKS)}
_EXIT_INDEX: Final = {name: EXIT_BLOCK.base + position for position, name in enumerate(EXITS)}


class Counters:
    """The counters of one run: index to count, in the order of their first hits."""

    def __init__(self) -> None:
        self.hits: dict[int, int] = {}

    def hit(self, index: int) -> None:
        """Count once."""
        self.hits[index] = self.hits.get(index, 0) + 1

    def near(self, which: int) -> None:
        """Count a near miss."""
        self.hit(NEAR_BLOCK.base + which)

    def add_names(self, marks: dict[str, int], exits: dict[str, int]) -> None:
        """Take over what the run counts by name."""
        for name, count in marks.items():
            self.hits[_MARK_INDEX[name]] = count
        for name, count in exits.items():
            self.hits[_EXIT_INDEX[name]] = count


def stall_class(entries: int) -> int:
    """Position of ``entries`` (from 1) on the axis of the block "stall"."""
    if entries <= 4:
        return entries - 1
    return 4 if entries <= 8 else 5 if entries <= 16 else 6


def describe(index: int) -> str:
    """The counter ``index`` in words: "ret_pf: FIXED, indirect, 1"."""
    for block in BLOCKS:
        if index < block.base + block.size:
            return f"{block.name}: {', '.join(block.values(index))}"
    raise IndexError(index)
