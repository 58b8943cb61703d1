"""Schedules aimed at races that an earlier run of the same Case has shown.

Two operations race if two threads touch the same word and one of them writes it. A run shows which do, and in which
order; a directed schedule asks for another order ("flip one observed racing pair": SegFuzz, S&P 2023; RFF, ASPLOS
2024), or for what only store buffers allow. The latter needs a *critical cycle* (Shasha and Snir, TOPLAS 1988): one
thread stores x and then loads y, another stores y and then loads x. On TSO it shows only if one of the two threads has
no barrier between its store and its load; those are the cycles looked for, and that thread's store is the one held.

A directed schedule is a list of deviations, to be put into the Case: labels that another order does not reach have no
effect.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import (
    BOOT,
    IPI_ACK,
    N_SITES,
    SITE_NAMES,
    VCPU_ENTRY,
    VCPU_EXIT,
    label_site,
    label_thread,
)

WINDOW: Final = 24
"""Shared accesses after a store among which a load that may overtake it is looked for."""

RELAX: Final = 40
FLIP: Final = 20

# What an operation does, as far as races go.
WRITE: Final = 1
READ: Final = 2
FENCE: Final = 4
BUFFERED: Final = 8


def _site_kinds() -> list[int]:
    kinds: list[int] = []
    for site in range(N_SITES):
        name = SITE_NAMES[site]
        kind = 0
        if name.endswith((".atomic", ".lock")):
            kind = WRITE | READ | FENCE
        elif name.endswith(".unlock"):
            # Held or not, nobody gets past the lock before it drains: no cycle goes through it.
            kind = WRITE
        elif name.endswith(".store"):
            kind = WRITE | BUFFERED
        elif name.endswith(".fence") or site in (VCPU_ENTRY, VCPU_EXIT, IPI_ACK):
            kind = FENCE
        elif name.endswith((".load", ".walk", ".fetch")):
            kind = READ
        kinds.append(kind)
    return kinds


_KINDS: Final = _site_kinds()


class Access:
    """One access to a word that several threads touch."""

    def __init__(self, label: int, before: int, unlocked: int, word: int, epoch: int) -> None:
        self.label = label
        self.before = before
        """The same thread's event before this one, or BOOT."""
        self.unlocked = unlocked
        """The same thread's last event with no lock held, at or before ``before``."""
        self.word = word
        self.epoch = epoch
        """Barriers that the thread had passed."""
        self.thread = label_thread(label)
        self.kind = _KINDS[label_site(label)]


class Cycle:
    """``store`` and ``load`` of one thread with no barrier between; ``answers``: the other's accesses that close it."""

    def __init__(self, store: Access, load: Access, other_store: Access, other_loads: list[Access]) -> None:
        self.store = store
        self.load = load
        self.other_store = other_store
        self.other_loads = other_loads


class Races:
    """The races of one run, from its ``Outcome.trace``."""

    def __init__(self, trace: list[tuple[int, int, int]]) -> None:
        self.by_thread: list[list[Access]] = []
        self._collect(trace)
        self.cycles: list[list[Cycle]] = []
        """Grouped by their sites: every kind of race gets its turn, however often it comes."""
        self.pairs: list[list[tuple[Access, Access]]] = []
        """Two accesses of different threads, one of them a write, both orders; grouped by their sites."""
        self._find_pairs()
        self._find_cycles()

    def _collect(self, trace: list[tuple[int, int, int]]) -> None:
        touched: dict[int, int] = {}
        written: dict[int, bool] = {}
        for label, address, _ in trace:
            if label > BOOT and address:
                word = address >> 3
                touched[word] = touched.get(word, 0) | 1 << label_thread(label)
                if _KINDS[label_site(label)] & WRITE:
                    written[word] = True
        last: list[int] = []
        unlocked: list[int] = []
        locks: list[int] = []
        epochs: list[int] = []
        for label, address, _ in trace:
            if label <= BOOT:
                continue
            thread = label_thread(label)
            while len(last) <= thread:
                last.append(BOOT)
                unlocked.append(BOOT)
                locks.append(0)
                epochs.append(0)
                self.by_thread.append([])
            name = SITE_NAMES[label_site(label)]
            if _KINDS[label_site(label)] & FENCE:
                epochs[thread] += 1
            word = address >> 3
            if address and touched[word] & (touched[word] - 1) and word in written:
                access = Access(label, last[thread], unlocked[thread], word, epochs[thread])
                self.by_thread[thread].append(access)
            if name.endswith(".lock"):
                locks[thread] += 1
            elif name.endswith(".unlock"):
                locks[thread] -= 1
            if locks[thread] <= 0:
                unlocked[thread] = label
            last[thread] = label

    def _find_pairs(self) -> None:
        by_word: dict[int, list[Access]] = {}
        for accesses in self.by_thread:
            for access in accesses:
                by_word.setdefault(access.word, []).append(access)
        groups: dict[int, int] = {}
        for accesses in by_word.values():
            for first in accesses:
                for second in accesses:
                    if first.thread != second.thread and (first.kind | second.kind) & WRITE:
                        key = label_site(first.label) * N_SITES + label_site(second.label)
                        if key not in groups:
                            groups[key] = len(self.pairs)
                            self.pairs.append([])
                        self.pairs[groups[key]].append((first, second))

    def _find_cycles(self) -> None:
        groups: dict[int, int] = {}
        for accesses in self.by_thread:
            for position in range(len(accesses)):
                store = accesses[position]
                if not store.kind & BUFFERED:
                    continue
                for load in accesses[position + 1 : position + 1 + WINDOW]:
                    if load.epoch != store.epoch:
                        break
                    if load.kind & READ and load.word != store.word:
                        for other in self.by_thread:
                            self._close(store, load, other, groups)

    def _close(self, store: Access, load: Access, other: list[Access], groups: dict[int, int]) -> None:
        """Add the cycles of ``store`` and ``load`` with the accesses of another thread."""
        if not other or other[0].thread == store.thread:
            return
        for position in range(len(other)):
            if other[position].word != load.word or not other[position].kind & WRITE:
                continue
            loads: list[Access] = []
            for access in other[position + 1 :]:
                if access.word == store.word and access.kind & READ:
                    loads.append(access)
            if loads:
                sites = (store.label, load.label, other[position].label, loads[0].label)
                key = 0
                for label in sites:
                    key = key * N_SITES + label_site(label)
                if key not in groups:
                    groups[key] = len(self.cycles)
                    self.cycles.append([])
                self.cycles[groups[key]].append(Cycle(store, load, other[position], loads))

    # Schedules.

    def schedule(self, rng: Rng) -> tuple[Deviation, ...]:
        """A schedule aimed at one race, or nothing: then a strategy that knows no races is due.

        ``RELAX`` and ``FLIP`` of a hundred are the shares of the two aims where the run showed such races.
        """
        choice = rng.below(100)
        if choice < RELAX:
            return self.relax(rng)
        return self.flip(rng) if choice < RELAX + FLIP else ()

    def relax(self, rng: Rng) -> tuple[Deviation, ...]:
        """Aim at a critical cycle: both loads before both stores are visible. Empty if there is none."""
        if not self.cycles:
            return ()
        group = self.cycles[rng.below(len(self.cycles))]
        cycle = group[rng.below(len(group))]
        until = BOOT
        if rng.chance(1, 2):
            until = cycle.other_loads[rng.below(len(cycle.other_loads))].label
        holder = cycle.store.thread
        other = cycle.other_store.thread
        schedule = self._start(rng, holder, other)
        choice = rng.below(4)
        if choice < 2:
            stop = cycle.other_store.before if choice == 0 else cycle.other_store.unlocked
            schedule.append(Deviation(RUN, stop, holder))
        schedule.append(Deviation(HOLD, cycle.store.label, holder, until))
        schedule.append(Deviation(RUN, cycle.load.label, other))
        return tuple(schedule)

    def flip(self, rng: Rng) -> tuple[Deviation, ...]:
        """Aim at a racing pair: the second thread's access comes just before, or just after, the first's."""
        if not self.pairs:
            return ()
        group = self.pairs[rng.below(len(self.pairs))]
        first, second = group[rng.below(len(group))]
        schedule = self._start(rng, first.thread, second.thread)
        choice = rng.below(4)
        stop = first.label if choice == 0 else first.unlocked if choice == 1 else first.before
        schedule.append(Deviation(RUN, stop, second.thread))
        if rng.chance(3, 4):
            schedule.append(Deviation(RUN, second.label, first.thread))
        if first.kind & BUFFERED and rng.chance(1, 3):
            schedule.append(Deviation(HOLD, first.label, first.thread, second.label))
        return tuple(schedule)

    def _start(self, rng: Rng, one: int, other: int) -> list[Deviation]:
        """Half of the schedules say which of two threads starts."""
        if rng.chance(1, 2):
            return []
        return [Deviation(RUN, BOOT, one if rng.chance(1, 2) else other)]
