"""What every word of guest memory has been, and which of it each vCPU may still have cached."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import Memory, StoreBuffer, mix
from mmufuzz.x86.paging import PTE_A, PTE_D

_WITHOUT_AD: Final = ~(PTE_A | PTE_D)
ALWAYS: Final = -1
"""As a time: before the run."""


class Invalidations:
    """When one vCPU last invalidated: everything (``full``), and single pages later than that.

    INVLPG drops the page's TLB entry and all paging-structure entries, so the next walk of that page reads every
    level afresh (SDM vol. 3, 4.10.4.1). Other pages may keep TLB entries made from old upper levels: a time per page.
    For the other 4K pieces of a guest's large page it counts as no invalidation, which only allows more.
    """

    def __init__(self) -> None:
        self.full = 0
        self.pages: dict[int, int] = {}

    def since(self, gva: int) -> int:
        """Time of the last invalidation that covers ``gva``."""
        return max(self.full, self.pages.get(gva >> 12, 0))


class History:
    """Values of guest words over time. Time counts changes; contents at the start have time 0."""

    def __init__(self, memory: Memory, vcpus: int) -> None:
        self.memory = memory
        self.clock = 0
        self._times: dict[int, list[int]] = {}
        self._values: dict[int, list[int]] = {}
        self.invalidations = [Invalidations() for _ in range(vcpus)]
        self._fingerprint = 0
        self._fresh = False

    def changed(self, address: int, old: int, new: int) -> None:
        """The aligned word at host physical ``address`` changed."""
        self.clock += 1
        self._fresh = False
        times = self._times.get(address)
        if times is None:
            self._times[address] = [0, self.clock]
            self._values[address] = [old, new]
        else:
            times.append(self.clock)
            self._values[address].append(new)

    def invalidated(self, vcpu: int, gva: int) -> None:
        """``vcpu`` invalidated the page of ``gva``, or with -1 everything."""
        self._fresh = False
        mine = self.invalidations[vcpu]
        if gva < 0:
            mine.full = self.clock
            mine.pages = {}
        else:
            mine.pages[gva >> 12] = self.clock

    def addresses(self) -> list[int]:
        """Host physical addresses of the words that ever changed, in the order of their first change."""
        return list(self._values)

    def values(self, address: int, since: int, buffer: StoreBuffer | None) -> list[int]:
        """All values the word held from time ``since`` on, newest first, one for each that differ in more than A and D.

        With ``buffer``, its pending stores to the word count too: a processor's walk may see its own stores early.
        """
        current = self.memory.words.get(address >> 3, 0)
        found: list[int] = []
        if buffer is not None and buffer.pending:
            ahead = current
            for entry in buffer.pending:
                if entry.address & ~7 == address:
                    shift = (entry.address & 7) << 3
                    mask = (1 << (entry.size << 3)) - 1 << shift
                    ahead = ahead & ~mask | entry.value << shift & mask
                    found.append(ahead)
            found.reverse()
        found.append(current)
        times = self._times.get(address)
        if times is None and len(found) == 1:
            return found
        if times is not None:
            held = self._values[address]
            position = len(times) - 1
            while position > 0 and times[position] > since:
                position -= 1
                found.append(held[position])
        return _distinct(found)

    def fingerprint(self) -> int:
        """What the past still allows each vCPU: equal for histories that will answer every later question alike."""
        if not self._fresh:
            self._fingerprint = self._fold()
            self._fresh = True
        return self._fingerprint

    def _fold(self) -> int:
        # Sums, since two runs may have reached the same sets in different orders.
        total = 0
        for address in self._values:
            for vcpu in range(len(self.invalidations)):
                mine = self.invalidations[vcpu]
                base = mix(address, vcpu)
                total += self._fold_word(base, address, mine.full)
                for vpn, time in mine.pages.items():
                    if time > mine.full:
                        total += self._fold_word(mix(base, vpn + 1), address, time)
        return total & (1 << 64) - 1

    def _fold_word(self, base: int, address: int, since: int) -> int:
        total = 0
        for value in self.values(address, since, None):
            total += mix(base, value & _WITHOUT_AD)
        return total


def _distinct(values: list[int]) -> list[int]:
    seen: dict[int, bool] = {}
    result: list[int] = []
    for value in values:
        if value & _WITHOUT_AD not in seen:
            seen[value & _WITHOUT_AD] = True
            result.append(value)
    return result
