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
    N_SITES,
    SITE_NAMES,
    VCPU_ENTRY,
    VCPU_EXIT,
    label_site,
    label_thread,
)

WINDOW: Final = 24
"""Shared accesses after a store among which a load that may overtake it is looked for."""

SAMPLES: Final = 8
"""Accesses kept of those by one thread, during one of its steps, to one word at one site: the first ones.

A guest that spins makes thousands of them; what is looked for must not grow with their square.
"""

ACCESSES: Final = 400
"""Accesses kept of each thread, the first ones."""

SHARERS: Final = 12
"""Accesses of a thread to one word that are paired with one of another thread, the first ones."""

RELAX: Final = 40
FLIP: Final = 30
RARE: Final = 80
"""Parts of a hundred, see ``Aims.schedule``. The figures are from bench/strategies.py."""

RARE_TRIES: Final = 300
"""Turns after which a kind of critical cycle is no longer rare."""

MOST_KINDS: Final = 10_000
"""Kinds of races whose turns are remembered; beyond that the count begins anew."""

ROUNDS: Final = 3

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
        elif name.endswith(".fence") or site in (VCPU_ENTRY, VCPU_EXIT):
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
        self.position = 0
        """Among those of its thread."""


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
        self.by_word: list[dict[int, list[Access]]] = []
        """By thread and word."""
        self._collect(trace)
        self.cycles: list[list[Cycle]] = []
        """Grouped by their sites: every kind of race gets its turn, however often it comes."""
        self.cycle_keys: list[int] = []
        self.pair_keys: list[int] = []
        """What kind of race each group is: equal in all runs and Cases."""
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
        seen: dict[int, int] = {}
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
                self.by_word.append({})
            name = SITE_NAMES[label_site(label)]
            if _KINDS[label_site(label)] & FENCE:
                epochs[thread] += 1
            word = address >> 3
            if address and touched[word] & (touched[word] - 1) and word in written:
                key = word << 40 | label >> 16
                seen[key] = seen.get(key, 0) + 1
                if seen[key] <= SAMPLES and len(self.by_thread[thread]) < ACCESSES:
                    access = Access(label, last[thread], unlocked[thread], word, epochs[thread])
                    self._add(access)
            if name.endswith(".lock"):
                locks[thread] += 1
            elif name.endswith(".unlock"):
                locks[thread] -= 1
            if locks[thread] <= 0:
                unlocked[thread] = label
            last[thread] = label

    def _add(self, access: Access) -> None:
        accesses = self.by_thread[access.thread]
        access.position = len(accesses)
        accesses.append(access)
        self.by_word[access.thread].setdefault(access.word, []).append(access)

    def _find_pairs(self) -> None:
        groups: dict[int, int] = {}
        for accesses in self.by_thread:
            for first in accesses:
                for other in self.by_word:
                    if other is self.by_word[first.thread]:
                        continue
                    for second in other.get(first.word, [])[:SHARERS]:
                        if (first.kind | second.kind) & WRITE:
                            key = label_site(first.label) * N_SITES + label_site(second.label)
                            if key not in groups:
                                groups[key] = len(self.pairs)
                                self.pairs.append([])
                                self.pair_keys.append(key)
                            self.pairs[groups[key]].append((first, second))

    def _find_cycles(self) -> None:
        groups: dict[int, int] = {}
        for accesses in self.by_thread:
            for store in accesses:
                if not store.kind & BUFFERED:
                    continue
                for load in accesses[store.position + 1 : store.position + 1 + WINDOW]:
                    if load.epoch != store.epoch:
                        break
                    if load.kind & READ and load.word != store.word:
                        for other in self.by_word:
                            if other is not self.by_word[store.thread]:
                                self._close(store, load, other, groups)

    def _close(self, store: Access, load: Access, other: dict[int, list[Access]], groups: dict[int, int]) -> None:
        """Add the cycles of ``store`` and ``load`` with the accesses of another thread, by word."""
        if load.word not in other or store.word not in other:
            return
        for answer in other[load.word]:
            if not answer.kind & WRITE:
                continue
            loads: list[Access] = []
            for access in other[store.word]:
                if access.kind & READ and access.position > answer.position:
                    loads.append(access)
            if loads:
                key = 1
                for label in (store.label, load.label, answer.label, loads[0].label):
                    key = key * N_SITES + label_site(label)
                if key not in groups:
                    groups[key] = len(self.cycles)
                    self.cycles.append([])
                    self.cycle_keys.append(key)
                self.cycles[groups[key]].append(Cycle(store, load, answer, loads))


class Aims:
    """Chooses races and makes schedules for them, and counts how often each kind had its turn in a campaign.

    A kind that every Case has is tried ten thousand times in a minute; the one that matters may be in one Case of a
    hundred. So of a few kinds at hand the one that was tried least is taken.
    """

    def __init__(self) -> None:
        self.tried: dict[int, int] = {}

    def rare(self, races: Races) -> bool:
        """Whether ``races`` has a critical cycle of a kind that is still rare."""
        for key in races.cycle_keys:
            if self.tried.get(key, 0) < RARE_TRIES:
                return True
        return False

    def schedule(self, races: Races, rng: Rng) -> tuple[Deviation, ...]:
        """A schedule aimed at one race, or nothing: then a strategy that knows no races is due.

        ``RELAX`` and ``FLIP`` of a hundred are the shares of the two aims where the run showed such races, ``RARE``
        that of a critical cycle of a kind seldom tried.
        """
        choice = rng.below(100)
        if choice < RELAX or (choice < RARE and self.rare(races)):
            return self.relax(races, rng)
        return self.flip(races, rng) if choice < RELAX + FLIP else ()

    def relax(self, races: Races, rng: Rng) -> tuple[Deviation, ...]:
        """Aim at a critical cycle: both loads before both stores are visible. Empty if there is none."""
        if not races.cycles:
            return ()
        group = races.cycles[self._least_tried(races.cycle_keys, rng)]
        cycle = group[rng.below(len(group))]
        until = BOOT
        choice = rng.below(4)
        if choice == 0:
            until = cycle.other_loads[rng.below(len(cycle.other_loads))].label
        elif choice == 1:
            until = cycle.other_loads[len(cycle.other_loads) - 1].label
        holder = cycle.store.thread
        other = cycle.other_store.thread
        schedule = start(rng, holder, other)
        choice = rng.below(3)
        if choice:
            stop = cycle.other_store.before if choice == 1 else cycle.other_store.unlocked
            schedule.append(Deviation(RUN, stop, holder))
        schedule.append(Deviation(HOLD, cycle.store.label, holder, until))
        schedule.append(Deviation(RUN, cycle.load.label, other))
        return tuple(schedule)

    def flip(self, races: Races, rng: Rng) -> tuple[Deviation, ...]:
        """Aim at a racing pair: the second thread's access comes just before, or just after, the first's."""
        if not races.pairs:
            return ()
        group = races.pairs[self._least_tried(races.pair_keys, rng)]
        first, second = group[rng.below(len(group))]
        schedule = start(rng, first.thread, second.thread)
        choice = rng.below(4)
        stop = first.label if choice == 0 else first.unlocked if choice == 1 else first.before
        schedule.append(Deviation(RUN, stop, second.thread))
        if rng.chance(3, 4):
            schedule.append(Deviation(RUN, second.label, first.thread))
        if first.kind & BUFFERED and rng.chance(1, 3):
            schedule.append(Deviation(HOLD, first.label, first.thread, second.label))
        return tuple(schedule)

    def _least_tried(self, keys: list[int], rng: Rng) -> int:
        """Index of the key with the fewest turns, of ``ROUNDS`` random ones; this is one more turn."""
        best = rng.below(len(keys))
        for _ in range(ROUNDS - 1):
            index = rng.below(len(keys))
            if self.tried.get(keys[index], 0) < self.tried.get(keys[best], 0):
                best = index
        turns = self.tried.get(keys[best], 0) + 1
        if turns == 1 and len(self.tried) >= MOST_KINDS:
            self.tried = {}
        self.tried[keys[best]] = turns
        return best


def start(rng: Rng, one: int, other: int) -> list[Deviation]:
    """Half of the schedules say which of two threads starts."""
    if rng.chance(1, 2):
        return []
    return [Deviation(RUN, BOOT, one if rng.chance(1, 2) else other)]
