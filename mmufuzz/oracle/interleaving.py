"""Which thread met which other one at a word, from the trace of a run: the counters of the block "interleaving".

A pair is two accesses by different threads to one word with no other thread's between them, at least one of them a
write. Where the second reads another value than the first stored, the store was still in a buffer: the second *missed*
it. Both orders of a pair are counters of their own, so a run in which two events are reversed reaches something new.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import N_SITES, SITE_NAMES
from mmufuzz.host.trace import WIDTH, Trace
from mmufuzz.kvm.counters import BOTH_MISSED, PAIR_BLOCK, Counters

_WRITES: Final = [name.endswith((".store", ".atomic", ".lock", ".unlock")) for name in SITE_NAMES]
_STORES: Final = [name.endswith((".store", ".unlock")) for name in SITE_NAMES]
_READS: Final = [name.endswith((".load", ".walk")) for name in SITE_NAMES]


class Word:
    """What is known of a word: ``label`` of the last access; ``address`` and ``value`` of the last plain store."""

    def __init__(self) -> None:
        self.label = 0
        self.address = 0
        """0 where nothing is known: what a locked operation wrote is not in the trace."""
        self.value = 0


def count_interleavings(trace: Trace, threads: int, counters: Counters) -> None:
    """Count the pairs of ``trace``; a run of one thread has none."""
    if threads < 2:
        return
    hits = counters.hits
    base = PAIR_BLOCK.base
    words: dict[int, Word] = {}
    missed = 0
    """Bit ``first * threads + second``: the second thread missed a store of the first."""
    flat = trace.flat()
    for at in range(0, len(flat), WIDTH):
        label = flat[at]
        address = flat[at + 1]
        if address == 0 or label < 0:
            continue
        # One look-up a visible operation: this loop is all that the counters cost.
        word = words.get(address >> 3)
        if word is None:
            word = Word()
            words[address >> 3] = word
        before = word.label
        word.label = label
        site = label >> 16 & 0xFF
        site_before = before >> 16 & 0xFF
        thread = label >> 36
        other = before >> 36
        if before != 0 and thread != other and (_WRITES[site] or _WRITES[site_before]):
            index = base + (site_before * N_SITES + site) * 4
            if _READS[site] and _STORES[site_before] and word.address == address and word.value != flat[at + 2]:
                index += 2
                missed |= 1 << other * threads + thread
                if missed >> thread * threads + other & 1:
                    counters.near(BOTH_MISSED)
            if thread < other:
                index += 1
            hits[index] = hits.get(index, 0) + 1
        if _STORES[site]:
            word.address = address
            word.value = flat[at + 2]
        elif _WRITES[site]:
            word.address = 0
