"""What a run answers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from mmufuzz.host.deviation import Deviation

# Verdicts.
OK: Final = "ok"  # every guest CPU finished and nothing was found
FINDING: Final = "finding"
SUSPECT: Final = "suspect"  # the event limit was hit
HARNESS_ERROR: Final = "harness-error"  # mmufuzz itself failed


@dataclass(frozen=True)
class Finding:
    """A violated property.

    ``kind``: "coherence", "livelock", "deadlock", "accounting", "write-protection", "lifetime", "warn", "lock",
    "suspect" or "harness-error". ``fingerprint`` has no addresses and no numbers that vary between runs of the same
    bug. ``detail`` is for people. ``label`` is the last visible operation before it was seen.
    """

    kind: str
    fingerprint: str
    detail: str
    label: int


class Outcome:
    """The result of ``run(case)``; equal Cases give equal Outcomes.

    ``schedule`` is what was followed, as deviations: with it in place of the Case's, the run repeats. ``marks``: how
    often each named point of the model was passed. ``guest``: digest of what the guest can see at the end (registers,
    memory, faults, exits to userspace). ``instructions``: guest instructions retired. ``exits``: VM exits by reason.
    ``locks``: acquisitions by lock name. ``period``: for a livelock, indices into ``trace`` (start, end) of one
    period.
    """

    def __init__(self) -> None:
        self.verdict = OK
        self.findings: list[Finding] = []
        self.schedule: tuple[Deviation, ...] = ()
        self.marks: dict[str, int] = {}
        self.counters: dict[int, int] = {}
        """``kvm.counters``: index to count, of those that were hit."""
        self.guest = ""
        self.registers: tuple[tuple[int, ...], ...] = ()
        """General-purpose registers at the end, by vCPU and encoding number."""
        self.words: dict[int, int] = {}
        """Host physical memory at the end: address >> 3 to aligned 64-bit word, absent ones are zero."""
        self.events = 0
        self.instructions = 0
        self.exits: dict[str, int] = {}
        self.locks: dict[str, int] = {}
        self.threads: tuple[str, ...] = ()
        """Thread names by index: "vcpu0", "vcpu1", …, "host0", …"""
        self.trace: list[tuple[int, int, int]] = []
        """(label, address, value) by visible operation; (sched.NOTE, index into ``notes``, thread) for notes."""
        self.notes: list[str] = []
        self.period: tuple[int, int] = (0, 0)

    @property
    def digest(self) -> str:
        """sha256 over verdict, findings, guest-visible result, schedule and the whole trace."""
        text = [self.verdict, self.guest, repr(self.findings), repr(self.schedule)]
        text.append(repr(self.trace))
        text.append(repr(self.notes))
        return hashlib.sha256("\n".join(text).encode()).hexdigest()
