"""A host thread, pinned to a logical CPU of its own: that CPU's memory operations, in front of its store buffer."""

from __future__ import annotations

from greenlet import greenlet
from mypy_extensions import mypyc_attr

from mmufuzz.host.memory import Memory, Pending, StoreBuffer, mix
from mmufuzz.host.sites import BOOT, N_SITES, label


@mypyc_attr(allow_interpreted_subclasses=True)
class Body:
    """What a thread does."""

    def run(self) -> None:
        """Runs to the end of the thread."""
        raise NotImplementedError

    def evict(self, gva: int) -> None:
        """The TLB of the thread's CPU forgets the page that holds ``gva``."""

    def fill(self, gva: int) -> None:
        """The CPU translates ``gva`` speculatively."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Waitable:
    """A condition a thread can wait for."""

    def ready(self) -> bool:
        """True once the waiting thread may go on. Must not have effects."""
        raise NotImplementedError

    def fingerprint(self) -> int:
        """For an object in ``Host.locks``: what the data it protects is a function of."""
        return 0


class Scheduler:
    """What a thread needs of the host it runs on (``sched.Host``)."""

    def __init__(self, memory: Memory, tso: bool) -> None:
        self.memory = memory
        self.tso = tso
        self.track = False
        """Keep ``Thread.history`` up to date; only the exhaustive search needs it."""

    def point(self, site: int) -> None:
        """The current thread is about to perform the visible operation ``site``: others may run first."""
        raise NotImplementedError

    def detail(self, label: int, address: int, value: int) -> None:
        """What event ``label`` accessed, for the trace."""
        raise NotImplementedError

    def may_hold(self, label: int) -> bool:
        """Whether the store that was just issued as ``label`` stays in its buffer."""
        raise NotImplementedError

    def started(self, thread: Thread) -> None:
        """``thread`` runs for the first time."""
        raise NotImplementedError

    def ended(self, thread: Thread) -> None:
        """The body of ``thread`` has returned."""
        raise NotImplementedError


class Thread:
    """A thread and its CPU.

    ``step`` is the instruction or host operation it works on, set by its body; ``last`` the label of its last event.
    """

    def __init__(self, host: Scheduler, index: int, name: str, body: Body) -> None:
        self.host = host
        self.index = index
        self.name = name
        self.body = body
        self.greenlet: greenlet = greenlet(self._main)
        self.waiting: Waitable | None = None
        self.done = False
        self.at_boundary = True
        """True where all that the thread will do is determined by the machine's state alone."""
        self.step = 0
        self.counted_step = -1
        """The step that ``counts`` and ``label_prefix`` are about."""
        self.counts: list[int] = []
        """How often the thread passed each site in that step."""
        self.label_prefix = 0
        """Thread and step, where a label has them."""
        self._counts_by_step: dict[int, list[int]] = {}
        self.last = BOOT
        self.buffer = StoreBuffer(host.memory)
        self.held_locks: list[int] = []
        """Ranks, in the order in which the locks were taken."""
        self.marks: dict[str, int] = {}
        """How often it passed each named point of the model (``Outcome.marks``)."""
        self.history = 0
        """Fingerprint of everything this thread has read, for the search."""

    def _main(self) -> None:
        self.host.started(self)
        self.body.run()
        self.host.ended(self)

    def count_step(self) -> None:
        """``step`` has changed. Labels count occurrences within a step, and go on counting in one that comes back."""
        step = self.step
        counts = self._counts_by_step.get(step)
        if counts is None:
            counts = [0] * N_SITES
            self._counts_by_step[step] = counts
        self.counts = counts
        self.counted_step = step
        self.label_prefix = label(self.index, step, 0, 0)

    # Loads and stores. Each is one visible operation unless it says otherwise.

    def load(self, site: int, address: int, size: int = 8) -> int:
        """Read ``size`` bytes within one aligned word."""
        self.host.point(site)
        value = self.peek(address, size)
        self.host.detail(self.last, address, value)
        return value

    def peek(self, address: int, size: int = 8) -> int:
        """Read without a scheduling point: for reads glued to the thread's next visible operation."""
        value = -1
        if self.buffer.pending:
            value = self.buffer.forward(address, size)
        if value < 0:
            value = self.host.memory.read(address, size)
        self.observed(value)
        return value

    def peek_bytes(self, address: int, size: int) -> int:
        """``size`` bytes at any address, read word by word without a scheduling point: an instruction fetch."""
        first = address & ~7
        value = 0
        shift = 0
        for word in range(first, address + size, 8):
            value |= self.peek(word) << shift
            shift += 64
        return value >> ((address - first) << 3) & (1 << (size << 3)) - 1

    def store(self, site: int, address: int, value: int, size: int = 8) -> None:
        """Write ``size`` bytes within one aligned word; visible to others when the store buffer drains."""
        host = self.host
        host.point(site)
        host.detail(self.last, address, value)
        if host.tso:
            held = host.may_hold(self.last)
            if held or self.buffer.pending:
                self.buffer.pending.append(Pending(self.last, address, size, value, held))
                return
        host.memory.write(address, size, value)

    def observed(self, value: int) -> None:
        """The thread read ``value``: part of what determines everything it does from here."""
        if self.host.track:
            self.history = mix(self.history, value)

    def local_state(self) -> int:
        """Fingerprint of what the thread knows and where it stands: a program is a function of what it reads."""
        return mix(self.history, self.last)

    # Locked operations and barriers.

    def atomic_load(self, site: int, address: int, size: int = 8) -> int:
        """The read half of a locked operation: drains the buffer, then reads."""
        self.host.point(site)
        self.drain()
        value = self.host.memory.read(address, size)
        self.observed(value)
        self.host.detail(self.last, address, value)
        return value

    def store_now(self, address: int, value: int, size: int = 8) -> None:
        """The write half of a locked operation whose read half was this thread's last visible operation."""
        self.host.detail(self.last, address, value)
        self.host.memory.write(address, size, value)

    def cmpxchg(self, site: int, address: int, old: int, new: int, size: int = 8) -> int:
        """LOCK CMPXCHG; the value found."""
        found = self.atomic_load(site, address, size)
        if found == old:
            self.store_now(address, new, size)
        return found

    def xchg(self, site: int, address: int, value: int, size: int = 8) -> int:
        """XCHG; the value found."""
        found = self.atomic_load(site, address, size)
        self.store_now(address, value, size)
        return found

    def fetch_or(self, site: int, address: int, bits: int, size: int = 8) -> int:
        """LOCK OR; the value found."""
        found = self.atomic_load(site, address, size)
        self.store_now(address, found | bits, size)
        return found

    def fetch_and(self, site: int, address: int, bits: int, size: int = 8) -> int:
        """LOCK AND; the value found."""
        found = self.atomic_load(site, address, size)
        self.store_now(address, found & bits, size)
        return found

    def fence(self, site: int) -> None:
        """A full barrier."""
        self.host.point(site)
        self.drain()

    # The store buffer. None of these is a visible operation.

    def drain(self) -> None:
        """Empty the buffer, as every locked or serialising operation does."""
        if self.buffer.pending:
            self.buffer.drain(len(self.buffer.pending))

    def age_stores(self) -> None:
        """Fairness of the buffer: a store is pending for at most one yield of its thread.

        Called when the thread yields or, once it has ended, another one does.
        """
        pending = self.buffer.pending
        while pending and (pending[0].aged or not pending[0].held):
            self.buffer.drain(1)
        for entry in pending:
            entry.aged = True
