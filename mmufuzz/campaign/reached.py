"""Which semantic counters a campaign has reached, and how often in one run: the novelty that decides what is kept."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.counters import BLOCKS, N_COUNTERS

NOTHING: Final = 0
MORE: Final = 1
"""A known counter was hit a number of times that is new."""
NEW: Final = 2
"""A counter was hit for the first time."""

_BUCKETS: Final = (0, 1, 2, 4, 8, 8, 8, 8)


def bucket(count: int) -> int:
    """The bit of a number of hits, in libFuzzer's classes: 1, 2, 3, 4-7, 8-15, 16-31, 32-127, 128 and up."""
    if count < 8:
        return _BUCKETS[count]
    return 16 if count < 16 else 32 if count < 32 else 64 if count < 128 else 128


class Reached:
    """A bit for each counter and class of hits: as large as the table of counters, whatever a campaign does."""

    def __init__(self) -> None:
        self.buckets = bytearray(N_COUNTERS)
        self.total = 0
        """Counters reached."""

    def add(self, counters: dict[int, int]) -> int:
        """Take in the counters of a run; ``NOTHING``, ``MORE`` or ``NEW``."""
        buckets = self.buckets
        answer = NOTHING
        for index, count in counters.items():
            bit = bucket(count)
            known = buckets[index]
            if not known & bit:
                buckets[index] = known | bit
                if not known:
                    self.total += 1
                    answer = NEW
                elif answer == NOTHING:
                    answer = MORE
        return answer

    def by_block(self) -> dict[str, dict[str, int]]:
        """For each block how many of its counters were reached, and how many it has."""
        sums: dict[str, dict[str, int]] = {}
        for block in BLOCKS:
            part = self.buckets[block.base : block.base + block.size]
            sums[block.name] = {"reached": block.size - part.count(0), "of": block.size}
        return sums

    def as_json(self) -> str:
        """The form in which processes hand it on."""
        return self.buckets.hex()

    def absorb(self, text: str) -> None:
        """Add what another process of the same version reached. Raises ``ValueError`` for anything else."""
        other = bytes.fromhex(text)
        if len(other) != N_COUNTERS:
            raise ValueError(f"expected {N_COUNTERS} counters, got {len(other)}")
        for index, bits in enumerate(other):
            self.buckets[index] |= bits
        self.total = N_COUNTERS - self.buckets.count(0)


def summary(reached: Reached) -> str:
    """In one line: "marks 50 of 57, …"."""
    return ", ".join(f"{name} {sums['reached']} of {sums['of']}" for name, sums in reached.by_block().items())
