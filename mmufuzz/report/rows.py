"""A trace as rows: one per visible operation, with what it read or wrote and what the schedule did there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from mmufuzz.host.deviation import EVICT, HOLD, RUN, Deviation
from mmufuzz.host.memory import GUEST_FRAMES, PAGE_SHIFT, PAGE_SIZE
from mmufuzz.host.sites import BOOT, SITE_NAMES, label_occurrence, label_site, label_step, label_thread
from mmufuzz.host.trace import NOTE
from mmufuzz.kvm.memslots import pfn_to_gfn
from mmufuzz.kvm.structs import (
    FIRST_GUEST_PFN,
    FIRST_SHADOW_PFN,
    FLOODING_OFFSET,
    KERNEL_DATA,
    ROLE_INVALID_BASE,
    WRITE_TRACK_BASE,
)
from mmufuzz.outcome import Outcome

RUN_MARK: Final = "▶"
HOLD_MARK: Final = "⏸"
RELEASE_MARK: Final = "⏵"

_WRITES: Final = tuple(name.endswith((".store", ".unlock", ".atomic", ".lock")) for name in SITE_NAMES)
_LANDMARKS: Final = frozenset(
    site for site, name in enumerate(SITE_NAMES) if name.startswith(("guest.store", "guest.atomic", "vcpu.", "mb."))
)


@dataclass
class Row:
    """One visible operation of ``thread``, or, with ``label`` ``NOTE``, a state change.

    ``address`` (0: none) and ``value``: what it read, of an atomic too, or wrote. ``marks``: what the schedule did
    after it. ``count`` above 1: a folded stretch of that many operations.
    """

    label: int
    thread: int
    address: int = 0
    value: int = 0
    marks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    key: bool = False
    count: int = 1
    first: int = 0
    """Index of its first entry in the trace."""


def rows(outcome: Outcome) -> list[Row]:
    """All rows of ``outcome``; notes hang on the operation they follow."""
    found: list[Row] = []
    for index, (label, address, value) in enumerate(outcome.trace):
        if label == NOTE:
            if not found:
                found.append(Row(NOTE, value, first=index))
            found[-1].notes.append(outcome.notes[address])
        else:
            found.append(Row(label, label_thread(label), address, value, first=index))
    return found


def mark_deviations(found: list[Row], schedule: tuple[Deviation, ...], threads: tuple[str, ...]) -> list[Deviation]:
    """Note each deviation at the row it acts on; those whose label never came up are returned."""
    by_label = {row.label: row for row in found}
    missed: list[Deviation] = []
    for deviation in schedule:
        row = by_label.get(deviation.at)
        if row is None:
            if deviation.at != BOOT or not found:
                missed.append(deviation)
                continue
            row = found[0]
        row.key = True
        actor = threads[deviation.actor] if deviation.actor < len(threads) else f"thread{deviation.actor}"
        if deviation.kind == RUN:
            row.marks.append(f"{RUN_MARK} {'from the start' if deviation.at == BOOT else 'then'} {actor} runs")
        elif deviation.kind == HOLD:
            row.marks.append(f"{HOLD_MARK} held in the store buffer")
            until = by_label.get(deviation.until) if deviation.until != BOOT else None
            if until is not None:
                until.key = True
                text = f"{operation(row.label)} of {threads[row.thread]}"
                until.marks.append(f"{RELEASE_MARK} {text} drains to memory")
        else:
            verb = "forgets" if deviation.kind == EVICT else "speculatively fills"
            row.marks.append(f"{RUN_MARK} {actor}'s TLB {verb} {deviation.address:#x}")
    return missed


def mark_conflicts(found: list[Row]) -> None:
    """Make key the rows a reader needs: those where threads meet at a word that is written, and landmarks."""
    users: dict[int, int] = {}
    written: dict[int, bool] = {}
    for row in found:
        if row.address:
            word = row.address >> 3
            users[word] = users.get(word, 0) | 1 << row.thread
            if row.label >= 0 and _WRITES[label_site(row.label)]:
                written[word] = True
    for row in found:
        word = row.address >> 3
        landmark = row.label >= 0 and label_site(row.label) in _LANDMARKS
        contested = word in written and users[word] & (users[word] - 1) != 0
        if row.notes or row.marks or landmark or contested:
            row.key = True


def fold(found: list[Row]) -> list[Row]:
    """Stretches of three and more rows of one thread that are not key become one row with a count."""
    folded: list[Row] = []
    stretch: list[Row] = []
    for row in [*found, Row(NOTE, -1, key=True)]:
        if stretch and (row.key or row.thread != stretch[0].thread):
            if len(stretch) > 2:
                folded.append(Row(NOTE, stretch[0].thread, count=len(stretch), first=stretch[0].first))
            else:
                folded.extend(stretch)
            stretch = []
        if row.key:
            folded.append(row)
        else:
            stretch.append(row)
    return folded[:-1]


def operation(label: int) -> str:
    """A label without its thread, which is the column: "2.guest.store 1"."""
    return f"{label_step(label)}.{SITE_NAMES[label_site(label)]} {label_occurrence(label)}"


def place(address: int) -> str:
    """A host physical address as a reader thinks of it: a word of a guest frame, an SPTE; "" where the site says it.

    Shadow pages are numbered in the order of their allocation.
    """
    pfn = address >> PAGE_SHIFT
    word = (address & PAGE_SIZE - 1) >> 3
    if FIRST_GUEST_PFN <= pfn < GUEST_FRAMES + FIRST_GUEST_PFN:
        within = f"+{address & 7}" if address & 7 else ""
        return f"gfn {pfn_to_gfn(pfn):#x}[{word}]{within}"
    if address < KERNEL_DATA:
        return f"sp{pfn - FIRST_SHADOW_PFN}[{word}]"
    if WRITE_TRACK_BASE <= address < ROLE_INVALID_BASE:
        return f"gfn {address - WRITE_TRACK_BASE >> 3:#x}"
    if address >= ROLE_INVALID_BASE:
        return f"sp{(address - ROLE_INVALID_BASE & FLOODING_OFFSET - 1) >> 3}"
    return ""


def cell(row: Row) -> str:
    """The text of a row in its thread's column."""
    if row.label < 0:
        return f"… {row.count} operations" if row.count > 1 else "…"
    text = operation(row.label)
    if not row.address:
        return text
    arrow = "←" if SITE_NAMES[label_site(row.label)].endswith((".store", ".unlock")) else "="
    where = place(row.address)
    return f"{text}: {where} {arrow} {row.value:#x}" if where else f"{text} {arrow} {row.value:#x}"
