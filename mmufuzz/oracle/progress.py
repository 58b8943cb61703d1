"""Every vCPU gets on: in the liveness phase a state that comes back is a lasso.

The schedule is fair and nothing else is left to happen, so a machine that returns to a state in which some
vCPU has retired nothing since will do so for ever. One return is only a candidate: some state is not captured (what a
waiting thread has on its stack), so the same sequence of states has to be seen several times round.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.counters import ALL_BUT_ONE_WAIT, STATE_AGAIN, STATE_LEFT
from mmufuzz.kvm.structs import Kvm
from mmufuzz.oracle.history import History
from mmufuzz.oracle.sink import Sink
from mmufuzz.oracle.state import MachineState

CONFIRMATIONS: Final = 4
"""Periods that must repeat the first one exactly."""

MOST_NUMBERS: Final = 100_000
"""Of which recorded states are made: beyond that they are forgotten, and the search for a period begins anew.

Bounds the memory of a long run; a loop whose periods and their confirmations do not fit is not found.
"""

_TELLING: Final = (
    "emulate.",
    "event.",
    "unprotect.",
    "retry_guard.",
    "faultin.",
    "fetch.direct_relinked",
    "fetch.gpte_changed",
    "fetch.top_changed",
    "page_fault.EMULATE",
    "page_fault.RETRY",
    "page_fault.WRITE_PROTECTED",
    "page_fault.stale",
    "page_fault.write_pf_to_sp",
    "reclaim",
    "walk.retry",
)
"""Prefixes of marks that tell loops apart; the others follow from these, or vary within one and the same loop."""

_TELLING_ALONE: Final = "page_fault.cr0_wp"
"""A mark that tells a loop in which no other one does; in others it comes and goes."""

_TELLING_OF_DROPPED: Final = ("emulate.", "event.")
"""The same where each round drops the event it is to deliver: there are many ways to come to emulate, all as futile."""


class Progress:
    """Looks at the machine whenever a thread yields."""

    def __init__(self, kvm: Kvm, sink: Sink, history: History) -> None:
        self.kvm = kvm
        self.sink = sink
        self.history = history
        self._base: list[int] = []
        """Progress of each vCPU where the recorded states begin."""
        self._states: list[tuple[object, ...]] = []
        self.recorded = 0
        """Numbers of which the recorded states are made."""
        self._last_seen: dict[int, int] = {}
        """Where a state with that hash was last: hashing one costs as much as making it."""
        self._machine = MachineState(kvm)
        self._trace_at: list[int] = []
        self._marks_at: list[list[dict[str, int]]] = []
        """``Thread.marks`` of each vCPU."""
        self._exits_at: list[dict[str, int]] = []
        self._progress_at: list[list[int]] = []
        self._period = 0
        self._since = 0
        """Index of the first state that equals the one a period earlier."""

    def at_yield(self) -> None:
        """``BoundaryWatcher.at_yield``."""
        kvm = self.kvm
        self._count_waiting()
        if not kvm.host.quiet:
            return
        for thread in kvm.host.threads:
            if not (thread.at_boundary or thread.done or thread.waiting is not None):
                return
        if not self._somebody_is_stuck():
            self._start_over()
            return
        state = self._machine.state(self.history.addresses())
        self.recorded += len(state)
        if self.recorded > MOST_NUMBERS:
            self._forget()
            self.recorded = len(state)
        position = len(self._states)
        key = hash(state)
        self._states.append(state)
        self._trace_at.append(len(kvm.host.trace))
        self._marks_at.append([vcpu.thread.marks.copy() for vcpu in kvm.vcpus])
        self._exits_at.append(kvm.exits.copy())
        self._progress_at.append([vcpu.progress for vcpu in kvm.vcpus])
        if self._period == 0 or self._states[position - self._period] != state:
            seen = self._last_seen.get(key, -1)
            self._period = position - seen if seen >= 0 and self._states[seen] == state else 0
            self._since = position
            if self._period:
                kvm.counters.near(STATE_AGAIN)
        elif position - self._since >= CONFIRMATIONS * self._period:
            self._report(position)
        self._last_seen[key] = position

    def _count_waiting(self) -> None:
        """A near miss if the thread that yields is the only one of several that does not wait."""
        waiting = 0
        running = 0
        for thread in self.kvm.host.threads:
            if not thread.done:
                if thread.waiting is not None and not thread.waiting.ready():
                    waiting += 1
                else:
                    running += 1
        if waiting and running == 1:
            self.kvm.counters.near(ALL_BUT_ONE_WAIT)

    def _somebody_is_stuck(self) -> bool:
        """True if an unfinished vCPU has made no progress since the recorded states began."""
        if not self._base:
            return False
        for vcpu in self.kvm.vcpus:
            if not vcpu.finished and vcpu.progress == self._base[vcpu.index]:
                return True
        return False

    def _start_over(self) -> None:
        if self._period:
            self.kvm.counters.near(STATE_LEFT)
        self._base = [vcpu.progress for vcpu in self.kvm.vcpus]
        self._forget()

    def _forget(self) -> None:
        self._states = []
        self.recorded = 0
        self._last_seen = {}
        self._trace_at = []
        self._marks_at = []
        self._exits_at = []
        self._progress_at = []
        self._period = 0

    def _report(self, position: int) -> None:
        """A finding for each kind of loop that a stuck vCPU is in: two may be stuck for different reasons."""
        start = position - self._period
        stuck: dict[str, list[str]] = {}
        alone = False
        for vcpu in self.kvm.vcpus:
            if not vcpu.finished and vcpu.progress == self._progress_at[start][vcpu.index]:
                passed = _counted(vcpu.thread.marks, self._marks_at[start][vcpu.index])
                alone = alone or _TELLING_ALONE in passed
                stuck.setdefault(_loop(passed), []).append(f"{vcpu.thread.name} at rip {vcpu.regs.rip:#x}")
        # A vCPU that only waits for another, or is undone by it, passes no marks that tell.
        waiting = stuck.pop("", [])
        if not stuck:
            stuck[_TELLING_ALONE if alone else self._exits_since(start)] = []
        # The first time round reads best: what led into the loop stands right before it.
        self.sink.period = (self._trace_at[self._since - self._period], self._trace_at[self._since])
        for loop, vcpus in stuck.items():
            where = ", ".join(vcpus + waiting)
            what = f"{where}: the machine returns to the same state every {self._period} yields without progress"
            self.sink.record("livelock", loop, what)
        self.sink.end()

    def _exits_since(self, start: int) -> str:
        """The reasons of the VM exits in one period, as a fingerprint."""
        return ",".join(["exit " + name for name in _counted(self.kvm.exits, self._exits_at[start])])


def _counted(counts: dict[str, int], before: dict[str, int]) -> list[str]:
    """Names, in order, of what was counted since ``before``."""
    return [name for name in sorted(counts) if counts[name] != before.get(name, 0)]


def _loop(passed: list[str]) -> str:
    """The fingerprint of a loop: the telling marks among those that were ``passed`` in it."""
    telling = _TELLING_OF_DROPPED if "event.dropped" in passed else _TELLING
    return ",".join([name for name in passed if name.startswith(telling)])
