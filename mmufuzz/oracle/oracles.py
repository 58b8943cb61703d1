"""All oracles of one run, behind the watchers that the machine calls."""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from mmufuzz.host.lock import Lock, LockWatcher
from mmufuzz.host.memory import MemoryWatcher
from mmufuzz.host.sched import DEADLOCK, ENDED, BoundaryWatcher
from mmufuzz.kvm.interrupts import Halted
from mmufuzz.kvm.observer import Observer
from mmufuzz.kvm.structs import Kvm
from mmufuzz.oracle.accounting import Accounting
from mmufuzz.oracle.architecture import Architecture
from mmufuzz.oracle.coherence import Coherence
from mmufuzz.oracle.emulator import Emulator
from mmufuzz.oracle.history import History
from mmufuzz.oracle.interrupts import Interrupts
from mmufuzz.oracle.lifetime import Lifetime
from mmufuzz.oracle.progress import Progress
from mmufuzz.oracle.quiescence import stale_sptes
from mmufuzz.oracle.sink import Sink
from mmufuzz.outcome import Finding


@mypyc_attr(allow_interpreted_subclasses=True)
class GuestObserver(Observer):
    """``Kvm.observer``."""

    def __init__(self, kvm: Kvm, coherence: Coherence, lifetime: Lifetime, sink: Sink) -> None:
        self.coherence = coherence
        self.architecture = Architecture(kvm, sink)
        self.interrupts = Interrupts(kvm, sink)
        self.emulator = Emulator(kvm, sink)
        self.lifetime = lifetime
        self.sink = sink

    def guest_access(self, vcpu: int, gva: int, hpa: int, access: int, emulated: bool) -> None:
        """Coherence."""
        self.coherence.guest_access(vcpu, gva, hpa, access, emulated)

    def guest_fault(self, vcpu: int, gva: int, error_code: int) -> None:
        """Coherence."""
        self.coherence.guest_fault(vcpu, gva, error_code)

    def guest_exception(self, vcpu: int, vector: int) -> None:
        """Architecture, and what becomes of an interrupt."""
        self.architecture.guest_exception(vcpu, vector)
        self.interrupts.guest_exception(vcpu)

    def internal_error(self, vcpu: int) -> None:
        """Architecture."""
        self.architecture.internal_error(vcpu)

    def instruction_done(self, vcpu: int) -> None:
        """Architecture."""
        self.architecture.instruction_done(vcpu)

    def instruction_skipped(self, vcpu: int) -> None:
        """Architecture."""
        self.architecture.instruction_skipped(vcpu)

    def emulation_begins(self, vcpu: int) -> None:
        """Emulator, and what becomes of an interrupt."""
        self.emulator.begins(vcpu)
        self.interrupts.emulation_begins(vcpu)

    def emulation_ends(self, vcpu: int) -> None:
        """Emulator."""
        self.emulator.ends(vcpu)

    def interrupt_queued(self, vcpu: int, vector: int) -> None:
        """Interrupts."""
        self.interrupts.queued(vcpu, vector)

    def interrupt_begins(self, vcpu: int, vector: int) -> None:
        """Interrupts."""
        self.interrupts.begins(vcpu, vector)

    def interrupt_delivered(self, vcpu: int, vector: int) -> None:
        """Interrupts."""
        self.interrupts.delivered(vcpu)

    def vm_entered(self, vcpu: int) -> None:
        """Interrupts."""
        self.interrupts.vm_entered(vcpu)

    def vm_entry_failed(self, vcpu: int) -> None:
        """Interrupts."""
        self.interrupts.vm_entry_failed(vcpu)

    def events_ended(self, vcpu: int) -> None:
        """Interrupts."""
        self.interrupts.delivered(vcpu)

    def temporary_used(self, vcpu: int, site: str) -> None:
        """Lifetime."""
        self.lifetime.temporary_used(vcpu, site)

    def guest_invalidated(self, vcpu: int, gva: int) -> None:
        """Coherence."""
        self.coherence.guest_invalidated(vcpu, gva)

    def warn(self, site: str, text: str) -> None:
        """A WARN_ON of the modelled kernel is a finding."""
        self.sink.violated("warn", f"{site}: {text}", f"WARN in {site}: {text}")


class FrameWatcher(MemoryWatcher):
    """``Memory.watcher``."""

    def __init__(self, history: History, lifetime: Lifetime) -> None:
        self.history = history
        self.lifetime = lifetime

    def guest_word_changed(self, address: int, old: int, new: int) -> None:
        """Coherence."""
        self.history.changed(address, old, new)

    def freed_frame_accessed(self, address: int, write: bool) -> None:
        """Lifetime."""
        self.lifetime.freed_frame_accessed(address, write)


class UnlockWatcher(LockWatcher):
    """``Lock.watcher`` of every lock."""

    def __init__(self, accounting: Accounting, sink: Sink) -> None:
        self.accounting = accounting
        self.sink = sink

    def lock_misused(self, text: str) -> None:
        """A lock rule was broken."""
        words = [word for word in text.split() if not word.rstrip(",").startswith(("vcpu", "host"))]
        self.sink.violated("lock", " ".join(words), text)

    def releasing(self, name: str) -> None:
        """Accounting."""
        if name == "mmu_lock":
            self.accounting.check()


class YieldWatcher(BoundaryWatcher):
    """``Host.watcher``."""

    def __init__(self, progress: Progress, history: History) -> None:
        self.progress = progress
        self.history = history

    def at_yield(self) -> None:
        """Progress."""
        self.progress.at_yield()

    def fingerprint(self) -> int:
        """Only coherence remembers: accounting looks at the machine alone, progress begins with the liveness phase."""
        return self.history.fingerprint()


class Oracles:
    """Built when all slots, vCPUs and threads of ``kvm`` exist; the machine reports to it from then on."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.sink = Sink(kvm.host)
        self.history = History(kvm.memory, len(kvm.vcpus))
        self.accounting = Accounting(kvm, self.sink)
        lifetime = Lifetime(kvm, self.sink)
        coherence = Coherence(kvm, self.sink, self.history)
        self.observer = GuestObserver(kvm, coherence, lifetime, self.sink)
        self.memory_watcher = FrameWatcher(self.history, lifetime)
        self.lock_watcher = UnlockWatcher(self.accounting, self.sink)
        self.boundary_watcher = YieldWatcher(Progress(kvm, self.sink, self.history), self.history)
        kvm.observer = self.observer
        kvm.memory.watcher = self.memory_watcher
        kvm.mmu_lock.watcher = self.lock_watcher
        kvm.slots_lock.watcher = self.lock_watcher
        kvm.host.watcher = self.boundary_watcher

    @property
    def findings(self) -> list[Finding]:
        """What was found; the first one ended the run."""
        return self.sink.findings

    @property
    def period(self) -> tuple[int, int]:
        """``Outcome.period``."""
        return self.sink.period

    def detach(self) -> None:
        """The machine reports to nobody any more."""
        kvm = self.kvm
        kvm.observer = Observer()
        kvm.memory.watcher = MemoryWatcher()
        kvm.mmu_lock.watcher = LockWatcher()
        kvm.slots_lock.watcher = LockWatcher()
        kvm.host.watcher = BoundaryWatcher()

    def at_end(self, status: int) -> None:
        """The run is over with ``status`` (ENDED, DEADLOCK, EVENT_LIMIT or STOPPED): what is judged only at the end.

        After ENDED the machine is quiescent. EVENT_LIMIT is the caller's to report, STOPPED has been reported.
        """
        if self.sink.findings:
            return
        if status == DEADLOCK:
            self._deadlock()
        elif status == ENDED:
            for thread in self.kvm.host.threads:
                thread.drain()
            for lock in (self.kvm.mmu_lock, self.kvm.slots_lock):
                if lock.owner >= 0:
                    self.sink.record("lock", f"{lock.name} held at the end", f"by thread {lock.owner}")
                    return
            self.observer.interrupts.at_end()
            stale_sptes(self.kvm, self.sink)

    def _deadlock(self) -> None:
        waiting: list[str] = []
        causes: dict[str, bool] = {}
        for thread in self.kvm.host.threads:
            if thread.waiting is None:
                continue
            cause = thread.waiting.name if isinstance(thread.waiting, Lock) else "acknowledgement of an interrupt"
            if isinstance(thread.waiting, Halted):
                cause = "an interrupt"
            causes[cause] = True
            waiting.append(f"{thread.name} waits for {cause}")
        self.sink.record("deadlock", "waiting for " + ", ".join(sorted(causes)), "; ".join(waiting))
