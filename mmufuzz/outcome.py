"""What a run answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.host.deviation import Deviation
from mmufuzz.host.memory import GUEST_FRAMES, PAGE_SHIFT
from mmufuzz.host.trace import Trace

# Verdicts.
OK: Final = "ok"  # every guest CPU finished and nothing was found
FINDING: Final = "finding"
SUSPECT: Final = "suspect"  # the event limit was hit
HARNESS_ERROR: Final = "harness-error"  # mmufuzz itself failed


@dataclass(frozen=True)
class Finding:
    """A violated property.

    ``kind``: "coherence", "livelock", "deadlock", "accounting", "write-protection", "lifetime", "architecture",
    "emulator", "warn", "lock", "suspect" or "harness-error". ``fingerprint`` has no addresses and no numbers that vary
    between runs of the same bug. ``detail`` is for people. ``label`` is the last visible operation before it was seen.
    """

    kind: str
    fingerprint: str
    detail: str
    label: int


class GuestView:
    """What guests and their userspace can see when a run has ended.

    ``vcpus`` has the registers, faults and exits of each vCPU; ``deadlock``: no thread could run.
    """

    def __init__(self, vcpus: list[object], deadlock: bool) -> None:
        self.vcpus = vcpus
        self.deadlock = deadlock

    def digest(self, words: dict[int, int]) -> str:
        """sha256 of it and of the guest frames in ``words`` (``Outcome.words``)."""
        end = GUEST_FRAMES << PAGE_SHIFT >> 3
        seen = self.vcpus[:]
        seen.append([(index, words[index]) for index in sorted(words) if index < end and words[index]])
        seen.append(self.deadlock)
        return hashlib.sha256(repr(seen).encode()).hexdigest()


@mypyc_attr(allow_interpreted_subclasses=True)
class Reached:
    """What a run reached, for those who ask."""

    def counters(self) -> dict[int, int]:
        """``kvm.counters``: index to count, of those that were hit."""
        return {}


class Outcome:
    """The result of ``run(case)``; equal Cases give equal Outcomes.

    ``schedule`` is what was followed, as deviations: with it in place of the Case's, the run repeats. ``marks``: how
    often each named point of the model was passed. ``guest``: digest of what the guest can see at the end (registers,
    memory, faults, exits to userspace). ``instructions``: guest instructions retired. ``exceptions``: taken by guests.
    ``exits``: VM exits by reason. ``locks``: acquisitions by lock name. ``period``: for a livelock, indices into
    ``trace`` (start, end) of one period. What most callers never look at (``counters``, ``guest``, ``trace``,
    ``notes``) is made for those who ask.
    """

    def __init__(self) -> None:
        self.verdict = OK
        self.findings: list[Finding] = []
        self.schedule: tuple[Deviation, ...] = ()
        self.marks: dict[str, int] = {}
        self.registers: tuple[tuple[int, ...], ...] = ()
        """General-purpose registers at the end, by vCPU and encoding number."""
        self.userspace: tuple[tuple[str, ...], ...] = ()
        """Exits to userspace by vCPU, in order: "mmio write 0x100000 4 0x5" is gpa, bytes and value."""
        self.words: dict[int, int] = {}
        """Host physical memory at the end: address >> 3 to aligned 64-bit word, absent ones are zero."""
        self.events = 0
        self.instructions = 0
        self.exceptions = 0
        self.exits: dict[str, int] = {}
        self.locks: dict[str, int] = {}
        self.threads: tuple[str, ...] = ()
        """Thread names by index: "vcpu0", "vcpu1", …, "host0", …"""
        self.period: tuple[int, int] = (0, 0)
        self.record = Trace()
        self.view: GuestView | None = None
        self.reached = Reached()
        self._counters: dict[int, int] | None = None
        self._guest = ""
        self._trace: list[tuple[int, int, int]] | None = None
        self._notes: list[str] | None = None

    @property
    def counters(self) -> dict[int, int]:
        """``Reached.counters``."""
        if self._counters is None:
            self._counters = self.reached.counters()
        return self._counters

    @property
    def guest(self) -> str:
        """``GuestView.digest``; "" if there is no ``view``."""
        if not self._guest and self.view is not None:
            self._guest = self.view.digest(self.words)
        return self._guest

    @guest.setter
    def guest(self, digest: str) -> None:
        self._guest = digest

    @property
    def trace(self) -> list[tuple[int, int, int]]:
        """``Trace.entries`` of ``record``."""
        if self._trace is None:
            self._trace = self.record.entries()
        return self._trace

    @trace.setter
    def trace(self, entries: list[tuple[int, int, int]]) -> None:
        self._trace = entries

    @property
    def notes(self) -> list[str]:
        """``Trace.notes`` of ``record``."""
        if self._notes is None:
            self._notes = self.record.notes()
        return self._notes

    @notes.setter
    def notes(self, lines: list[str]) -> None:
        self._notes = lines

    @property
    def digest(self) -> str:
        """sha256 over verdict, findings, guest-visible result, schedule and the whole trace."""
        text = [self.verdict, self.guest, repr(self.findings), repr(self.schedule)]
        text.append(repr(self.trace))
        text.append(repr(self.notes))
        return hashlib.sha256("\n".join(text).encode()).hexdigest()
