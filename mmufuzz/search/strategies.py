"""Schedule strategies: random walk, PCT, sparse deviations, bytes, and a portfolio of them.

All take ``length``, the number of visible operations a run is expected to have, and use it as horizon.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.rng import Rng
from mmufuzz.host.sites import BOOT, THREAD_END, THREAD_WAIT, THREAD_YIELD, label_site, label_thread
from mmufuzz.host.strategy import Strategy

NEVER: Final = 1 << 30
"""An event number no run reaches."""

BYTES_PER_DEVIATION: Final = 2


def count_bits(mask: int) -> int:
    """Number of bits set in ``mask``."""
    count = 0
    while mask:
        mask &= mask - 1
        count += 1
    return count


def nth_bit(mask: int, index: int) -> int:
    """Number of the ``index``-th bit, from 0, that is set in ``mask``."""
    while index > 0:
        mask &= mask - 1
        index -= 1
    return (mask & -mask).bit_length() - 1


def free_choice(label: int) -> bool:
    """True if the thread whose last event is ``label`` cannot simply go on: it waits, has yielded, or has ended."""
    return label == BOOT or label_site(label) in (THREAD_WAIT, THREAD_YIELD, THREAD_END)


class RandomWalk(Strategy):
    """A uniform choice wherever there is one, after a coin that keeps the current thread going.

    The coin (``switch`` of 256) departs from the plain random walk of Thomson, Donaldson and Betts (TOPC 2016): with
    one switch a step, rare orders of far-apart operations are out of reach. ``hold`` and ``drain`` (of 256) are the
    chances that a store is held, and that a buffer with held stores drains one before an operation.
    """

    def __init__(self, rng: Rng, length: int, switch: int = 64, hold: int = 32, drain: int = 32) -> None:
        self.horizon = length
        self.rng = rng
        self.switch = switch
        self.hold_chance = hold
        self.drain = drain
        self.count = 0

    def begin(self, threads: int) -> None:
        """See ``Strategy``."""
        self.count = threads

    def pick(self, current: int, enabled: int, label: int) -> int:
        """See ``Strategy``."""
        rng = self.rng
        if enabled >> self.count:
            if not rng.chance(self.drain, 256):
                return current
            enabled &= ~(1 << current)
        elif not free_choice(label) and not rng.chance(self.switch, 256):
            return current
        return nth_bit(enabled, rng.below(count_bits(enabled)))

    def hold(self, label: int) -> bool:
        """See ``Strategy``."""
        return self.rng.chance(self.hold_chance, 256)


class Pct(Strategy):
    """Probabilistic concurrency testing (Burckhardt et al., ASPLOS 2010): random priorities, ``depth`` - 1 changes.

    Departures: the ``depth`` - 1 change points fall on choices, not on steps; a thread that yields drops below the
    others, for fairness; a store buffer is an actor whose priority starts below all threads ("lazy drain"), as in
    our measurements that finds store-buffer shapes two to three times as often; only ``hold`` of 256 stores wait for
    their buffer's turn, the rest drain at once.
    """

    def __init__(self, rng: Rng, length: int, depth: int = 3, hold: int = 64) -> None:
        self.horizon = length
        self.rng = rng
        self.hold_chance = hold
        self.count = 0
        self.lowest = 0
        self.priority: list[int] = []
        """By actor; higher runs first."""
        self.changes: list[int] = []
        for _ in range(depth - 1):
            self.changes.append(1 + rng.below(length))
        self.changes.sort()
        self.change = 0

    def begin(self, threads: int) -> None:
        """See ``Strategy``."""
        self.count = threads
        self.priority = [0] * (2 * threads)
        for first in (0, threads):
            order = [first + index for index in range(threads)]
            for index in range(threads - 1, -1, -1):
                other = self.rng.below(index + 1)
                order[index], order[other] = order[other], order[index]
                self.lowest -= 1
                self.priority[order[index]] = self.lowest

    def pick(self, current: int, enabled: int, label: int) -> int:
        """See ``Strategy``."""
        if label != BOOT and label_site(label) == THREAD_YIELD:
            self._sink(label_thread(label))
        chosen = self._first(enabled)
        if self.change < len(self.changes) and self.events >= self.changes[self.change]:
            self.change += 1
            self._sink(chosen)
            chosen = self._first(enabled)
        return chosen

    def hold(self, label: int) -> bool:
        """See ``Strategy``."""
        return self.rng.chance(self.hold_chance, 256)

    def _sink(self, actor: int) -> None:
        self.lowest -= 1
        self.priority[actor] = self.lowest

    def _first(self, enabled: int) -> int:
        best = -1
        for actor in range(2 * self.count):
            if enabled >> actor & 1 and (best < 0 or self.priority[actor] > self.priority[best]):
                best = actor
        return best


class Planned(Strategy):
    """A strategy that plans its deviations ahead by event, and drains all held stores at one event, ``release``."""

    def __init__(self, length: int) -> None:
        self.horizon = length
        self.count = 0
        self.release = NEVER
        """Event after which all held stores drain."""

    def begin(self, threads: int) -> None:
        """See ``Strategy``."""
        self.count = threads

    def drain(self, current: int, enabled: int) -> int:
        """``pick`` where stores are pending: nothing drains before ``release``, then one buffer after another."""
        drains = enabled >> self.count
        if self.events < self.release:
            return current
        if drains & (drains - 1) == 0:
            self.release = NEVER
            self._plan()
        return nth_bit(drains, 0) + self.count

    def _plan(self) -> None:
        """Set ``next_event`` to the next event at which anything is planned."""
        raise NotImplementedError


class Sparse(Planned):
    """``preemptions`` switches and ``holds`` held stores, at random events; the default schedule elsewhere.

    Half of the runs also start with a random thread.

    Delay-bounded random testing (Emmi, Qadeer, Rakamaric, POPL 2011) with preemptions instead of delays, and with held
    stores as a second kind of deviation. Half of the held stores drain by themselves, half after a random number of
    events whose scale is random too, so that short and long delays are alike in number.
    """

    def __init__(self, rng: Rng, length: int, preemptions: int = 2, holds: int = 1) -> None:
        super().__init__(length)
        self.rng = rng
        self.switches: list[int] = []
        for _ in range(preemptions):
            self.switches.append(1 + rng.below(length))
        self.switches.sort()
        self.holds: list[int] = []
        for _ in range(holds):
            self.holds.append(rng.below(length))
        self.holds.sort()
        self.switched = 0
        self.held = 0
        self._plan()

    def pick(self, current: int, enabled: int, label: int) -> int:
        """See ``Strategy``."""
        if enabled >> self.count:
            return self.drain(current, enabled)
        if free_choice(label):
            if label == BOOT and self.rng.chance(1, 2):
                return nth_bit(enabled, self.rng.below(count_bits(enabled)))
            return current
        if self.switched < len(self.switches) and self.events >= self.switches[self.switched]:
            self.switched += 1
            self._plan()
            others = enabled & ~(1 << current)
            return nth_bit(others, self.rng.below(count_bits(others)))
        return current

    def hold(self, label: int) -> bool:
        """See ``Strategy``."""
        if self.held >= len(self.holds) or self.events < self.holds[self.held]:
            return False
        self.held += 1
        if self.rng.chance(1, 2):
            self.release = self.events + 1 + self.rng.below(2 << self.rng.below(8))
            self._plan()
        return True

    def _plan(self) -> None:
        following = self.switches[self.switched] if self.switched < len(self.switches) else NEVER
        self.next_event = following if following < self.release else self.release


class BytesStrategy(Planned):
    """A fuzzer's bytes decide: two bytes a deviation, a gap in events and an action.

    Action below 128: run the (action mod n)-th other thread. Below 192: hold the next store until it drains by
    itself. Else: hold the next store and drain all buffers 1 << (action & 15) events later, at most 256. What a gap
    has above 127 counts four times. Sparse, as a byte for each choice shrinks badly (our measurements).
    """

    def __init__(self, data: bytes, length: int) -> None:
        super().__init__(length)
        self.data = data
        self.position = 0
        self.holding = False
        self.action = 0
        self.due = 0
        self._advance()

    def pick(self, current: int, enabled: int, label: int) -> int:
        """See ``Strategy``."""
        if enabled >> self.count:
            return self.drain(current, enabled)
        if self.holding or self.events < self.due:
            return current
        others = enabled & ~(1 << current)
        chosen = nth_bit(others, self.action % count_bits(others))
        self._advance()
        return chosen

    def hold(self, label: int) -> bool:
        """See ``Strategy``."""
        if not self.holding or self.events < self.due:
            return False
        if self.action >= 192:
            self.release = self.events + (1 << min(self.action & 15, 8))
        self._advance()
        return True

    def _advance(self) -> None:
        """Read the next deviation."""
        if self.position + BYTES_PER_DEVIATION > len(self.data):
            self.due = NEVER
            self.holding = False
        else:
            gap = self.data[self.position]
            self.action = self.data[self.position + 1]
            self.position += BYTES_PER_DEVIATION
            self.due = self.events + (gap if gap < 128 else 128 + (gap - 128) * 4)
            self.holding = self.action >= 128
        self._plan()

    def _plan(self) -> None:
        following = NEVER if self.holding else self.due
        self.next_event = following if following < self.release else self.release


def portfolio(seed: int, length: int) -> Strategy:
    """One of the strategies with random parameters, all drawn from ``seed``.

    Weights follow bench/strategies.py: no strategy wins everywhere. Sparse deviations are better at store-buffer
    shapes, random walks at orders.
    """
    rng = Rng(seed)
    kind = rng.below(16)
    if kind < 6:
        return Sparse(rng, length, rng.below(4), rng.below(3))
    if kind < 10:
        return Pct(rng, length, 1 + rng.below(4), (0, 16, 64, 256)[rng.below(4)])
    return RandomWalk(rng, length, (8, 32, 96, 256)[rng.below(4)], (0, 8, 48)[rng.below(3)], (8, 48)[rng.below(2)])
