"""Edits of Cases that need to know what a run of them did."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mmufuzz.case.model import Case, Word
from mmufuzz.host.deviation import RUN
from mmufuzz.host.memory import GUEST_FRAMES, PAGE_SHIFT
from mmufuzz.host.sites import (
    BOOT,
    EMUL_ATOMIC,
    EMUL_STORE,
    GPTE_LOAD,
    GUEST_ATOMIC,
    GUEST_STORE,
    label_site,
    label_step,
    label_thread,
)
from mmufuzz.kvm.memslots import pfn_to_gfn

Trace = list[tuple[int, int, int]]

_GUEST_WRITES: Final = (GUEST_STORE, GUEST_ATOMIC, EMUL_STORE, EMUL_ATOMIC)


def slid(case: Case, trace: Trace, thread: int, first: int, last: int) -> Case:
    """With preemptions and ends of holds in steps ``first``..``last`` - 1 of ``thread`` moved to before those steps."""
    schedule = []
    for deviation in case.schedule:
        if deviation.kind == RUN:
            deviation = replace(deviation, at=_before(trace, deviation.at, thread, first, last))
        schedule.append(replace(deviation, until=_before(trace, deviation.until, thread, first, last)))
    return replace(case, schedule=tuple(schedule))


def _before(trace: Trace, packed: int, thread: int, first: int, last: int) -> int:
    if packed == BOOT or label_thread(packed) != thread or not first <= label_step(packed) < last:
        return packed
    previous = BOOT
    for entry, _, _ in trace:
        if entry == packed:
            break
        if entry > 0 and label_thread(entry) == thread and not first <= label_step(entry) < last:
            previous = entry
    return previous


def stored(case: Case, trace: Trace, thread: int, first: int, last: int) -> Case:
    """With what steps ``first``..``last`` - 1 of ``thread`` stored to guest memory there from the start.

    A guess: the trace does not tell how many bytes a store had, nor what a locked operation stored. What KVM next reads
    there as a gPTE is taken, or else the value of the store on top of the word's other bits.
    """
    words = {word.gfn << 9 | word.index: word.value for word in case.memory}
    for position in range(len(trace)):
        entry, address, value = trace[position]
        if entry <= 0 or label_thread(entry) != thread or not first <= label_step(entry) < last:
            continue
        if label_site(entry) in _GUEST_WRITES and 0 < address < GUEST_FRAMES << PAGE_SHIFT:
            place = pfn_to_gfn(address >> PAGE_SHIFT) << 9 | address >> 3 & 511
            seen = _next_read(trace, position, address & ~7)
            if seen < 0:
                seen = words.get(place, 0) | value << ((address & 7) << 3) & (1 << 64) - 1
            words[place] = seen
    memory = tuple([Word(place >> 9, place & 511, words[place]) for place in words])
    return replace(case, memory=memory)


def _next_read(trace: Trace, position: int, address: int) -> int:
    for entry, read, value in trace[position:]:
        if read == address and entry > 0 and label_site(entry) == GPTE_LOAD:
            return value
    return -1


def earlier(trace: Trace, packed: int, most: int) -> list[int]:
    """Labels of the same thread before ``packed``: the first ones and the last ones, at most ``most``."""
    labels: list[int] = []
    if packed == BOOT:
        return labels
    seen: dict[int, bool] = {}
    for entry, _, _ in trace:
        if entry == packed:
            break
        if entry > 0 and label_thread(entry) == label_thread(packed) and entry not in seen:
            seen[entry] = True
            labels.append(entry)
    if len(labels) <= most:
        return labels
    return labels[: most // 2] + labels[-(most // 2) :]
