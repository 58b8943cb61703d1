"""Threads as greenlets, and the scheduler they call into before every visible operation.

A run is the default schedule (the current thread goes on until it waits, yields or ends; stores drain at once)
plus deviations from it. Deviations come from a recorded schedule or from a ``Strategy``, and whatever a strategy
decides is recorded as deviations, so that every run can be repeated from its Case alone.

Scheduling is fair in the sense of Musuvathi and Qadeer (PLDI 2008): a thread that yields gives way to the threads
it has kept waiting since its last yield.
"""

from __future__ import annotations

from typing import Final

from greenlet import GreenletExit, greenlet
from mypy_extensions import mypyc_attr

from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.memory import Memory, Pending, StoreBuffer, mix
from mmufuzz.host.sites import (
    BOOT,
    MAX_OCCURRENCE,
    MAX_THREADS,
    THREAD_END,
    THREAD_START,
    THREAD_WAIT,
    THREAD_WAKE,
    THREAD_YIELD,
    label_site,
    label_thread,
)
from mmufuzz.host.strategy import Default, Strategy

PATIENCE: Final = 3000
"""Events without a deviation after which those whose labels never came up are given up; bounds every horizon."""

SLICE: Final = 1500
"""Events after which a thread that never yields is made to: weak fairness for guests that spin on their own."""

NOTE: Final = -1
"""In a trace, the place of a label: the entry is a note, its second field an index into ``Host.notes``."""

ENDED: Final = 0
DEADLOCK: Final = 1
EVENT_LIMIT: Final = 2
STOPPED: Final = 3


@mypyc_attr(native_class=False)
class RunStop(BaseException):
    """Ends a run at once, from any thread."""


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


@mypyc_attr(allow_interpreted_subclasses=True)
class BoundaryWatcher:
    """Asked when a thread yields in the liveness phase: the place where a repeated state can be seen."""

    def at_yield(self) -> None:
        """The current thread has yielded and every other one stands at a yield, a wait or its start."""

    def fingerprint(self) -> int:
        """With ``Host.track``: all that observers remember of the past and that can change what they report later."""
        return 0


class Thread:
    """A host thread pinned to a logical CPU of its own, with that CPU's store buffer."""

    def __init__(self, host: Host, index: int, name: str, body: Body) -> None:
        self.host = host
        self.index = index
        self.name = name
        self.body = body
        self.greenlet: greenlet = greenlet(self._main)
        self.waiting: Waitable | None = None
        self.done = False
        self.at_boundary = True
        self.step = 0
        self.counts: dict[int, int] = {}
        self.last = BOOT
        self.buffer = StoreBuffer(host.memory)
        self.held_locks: list[int] = []
        self.history = 0
        """Fingerprint of everything this thread has done and read: its local state, for the search."""

    def _main(self) -> None:
        self.host._started(self)
        self.body.run()
        self.host._ended(self)

    # Memory operations of this CPU. Each is one visible operation.

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
        self.host.observed(self, value)
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

    def store_now(self, address: int, value: int, size: int = 8) -> None:
        """The write half of a locked operation whose read half was this thread's last visible operation."""
        self.host.detail(self.last, address, value)
        self.host.memory.write(address, size, value)

    def atomic_load(self, site: int, address: int, size: int = 8) -> int:
        """The read half of a locked operation: drains the buffer, then reads."""
        self.host.point(site)
        self.drain()
        value = self.host.memory.read(address, size)
        self.host.observed(self, value)
        self.host.detail(self.last, address, value)
        return value

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

    def drain(self) -> None:
        """Empty the store buffer, as every locked or serialising operation does. Not a visible operation of its own."""
        if self.buffer.pending:
            self.buffer.drain(len(self.buffer.pending))

    def age_stores(self) -> None:
        """Fairness of the store buffer, when this thread yields or, once it has ended, another one does.

        What was pending the time before becomes visible.
        """
        pending = self.buffer.pending
        while pending and (pending[0].aged or not pending[0].held):
            self.buffer.drain(1)
        for entry in pending:
            entry.aged = True


class Host:
    """The machine's threads and their schedule.

    ``status`` after ``run``: ENDED (all threads ended), DEADLOCK, EVENT_LIMIT or STOPPED (somebody raised RunStop).
    ``deviations`` then holds the schedule that was followed.
    """

    _current: Thread

    def __init__(self, memory: Memory, tso: bool, event_limit: int) -> None:
        self.memory = memory
        self._next = -1
        self.tso = tso
        self.event_limit = event_limit
        self.strategy: Strategy = Default()
        self.strategic = False
        self.threads: list[Thread] = []
        self.locks: list[Waitable] = []
        self.events = 0
        self.last = BOOT
        self.trace: list[tuple[int, int, int]] = []
        self.notes: list[str] = []
        self.watcher = BoundaryWatcher()
        self.status = ENDED
        self.track = False
        """Keep ``Thread.history`` up to date; only the exhaustive search needs it."""
        # The replayed schedule, by label.
        self._runs: dict[int, int] = {}
        self._holds: dict[int, int] = {}
        self._until: dict[int, list[int]] = {}
        self._tlb: dict[int, list[Deviation]] = {}
        self._last_trigger = 0
        self._slice_start = 0
        # The followed schedule.
        self._recorded_runs: list[Deviation] = []
        self._recorded_holds: dict[int, int] = {}
        # Fairness windows of Musuvathi and Qadeer: bit masks by thread.
        self._below: list[int] = []
        self._enabled_since: list[int] = []
        self._disabled_by: list[int] = []
        self._slice_enabled = 0
        self._scheduled_since: list[int] = []

    def spawn(self, name: str, body: Body) -> Thread:
        """Add a thread. All threads exist before ``run``."""
        index = len(self.threads)
        if index >= MAX_THREADS:
            raise ValueError(f"more than {MAX_THREADS} threads")
        thread = Thread(self, index, name, body)
        self.threads.append(thread)
        return thread

    def follow(self, schedule: list[Deviation]) -> None:
        """Replay ``schedule``. Deviations whose labels never come up have no effect."""
        for deviation in schedule:
            if deviation.kind == RUN:
                self._runs.setdefault(deviation.at, deviation.actor)
            elif deviation.kind == HOLD:
                if deviation.at not in self._holds:
                    self._holds[deviation.at] = deviation.until
                    if deviation.until != BOOT:
                        self._until.setdefault(deviation.until, []).append(deviation.at)
            else:
                self._tlb.setdefault(deviation.at, []).append(deviation)

    def decide_with(self, strategy: Strategy) -> None:
        """Let ``strategy`` decide instead of a recorded schedule; TLB deviations of ``follow`` still apply."""
        self.strategy = strategy
        self.strategic = strategy.horizon > 0
        self._runs = {}
        self._holds = {}
        self._until = {}

    @property
    def deviations(self) -> list[Deviation]:
        """The preemptions and holds that were followed; TLB deviations are always those given to ``follow``.

        Holds that end at the same event are listed in the order in which the stores became visible.
        """
        holds = [Deviation(HOLD, at, label_thread(at), until) for at, until in self._recorded_holds.items()]
        return self._recorded_runs + holds

    def fingerprint(self) -> int:
        """With ``track``: a fingerprint of the whole state, equal for runs that can only go on alike."""
        state = self.memory.digest
        alive = 0
        for thread in self.threads:
            if not thread.done:
                alive |= 1 << thread.index
            state = mix(state, thread.history)
            for entry in thread.buffer.pending:
                state = mix(mix(state, entry.label), entry.address)
                state = mix(mix(state, entry.value), entry.size << 1 | entry.held)
        for index in range(len(self.threads)):
            if alive >> index & 1:
                state = mix(mix(state, self._below[index] & alive), self._enabled_since[index] & alive)
                state = mix(mix(state, self._disabled_by[index] & alive), self._scheduled_since[index] & alive)
        for lock in self.locks:
            state = mix(state, lock.fingerprint())
        return mix(mix(state, self._slice_enabled & alive), self.watcher.fingerprint())

    @property
    def current(self) -> Thread:
        """The running thread."""
        return self._current

    def run(self) -> None:
        """Run all threads to their ends, or until something stops the run."""
        count = len(self.threads)
        self._below = [0] * count
        self._enabled_since = [(1 << count) - 1] * count
        self._disabled_by = [0] * count
        self._scheduled_since = [(1 << count) - 1] * count
        self._slice_enabled = (1 << count) - 1
        self.strategy.begin(count)
        self._current = self.threads[0]
        try:
            self._settle()
            self._next = self._decide(BOOT, 0, (1 << count) - 1)
            while self._next >= 0:
                thread = self.threads[self._next]
                self._enter(thread)
                thread.greenlet.switch()
        except RunStop:
            if self.status == ENDED:
                self.status = STOPPED
        finally:
            for thread in self.threads:
                if not thread.greenlet.dead:
                    thread.greenlet.throw(GreenletExit)

    def stop(self, status: int) -> None:
        """End the run from inside a thread."""
        self.status = status
        raise RunStop

    def note(self, text: str) -> None:
        """Put a line into the trace: a state change that explains what follows."""
        self.trace.append((NOTE, len(self.notes), self._current.index))
        self.notes.append(text)

    # Scheduling points.

    def point(self, site: int) -> None:
        """The current thread is about to perform the visible operation ``site``."""
        thread = self._current
        if self.strategic:
            self._ask(thread)
        elif self._runs or self._until or self._tlb:
            self._replay(thread)
        if self.events - self._slice_start > SLICE:
            self.yield_(False)
        self._event(thread, site)

    def _event(self, thread: Thread, site: int) -> None:
        self.events += 1
        if self.events > self.event_limit:
            self.stop(EVENT_LIMIT)
        key = thread.step << 8 | site
        occurrence = thread.counts.get(key, 0) + 1
        if occurrence > MAX_OCCURRENCE:
            self.stop(EVENT_LIMIT)
        thread.counts[key] = occurrence
        last = (thread.index << 20 | key) << 16 | occurrence
        thread.last = last
        self.last = last
        self.trace.append((last, 0, 0))
        if self.track:
            thread.history = mix(thread.history, last)

    def observed(self, thread: Thread, value: int) -> None:
        """``thread`` read ``value``: part of what determines everything it does from here."""
        if self.track:
            thread.history = mix(thread.history, value)

    def detail(self, label: int, address: int, value: int) -> None:
        """Complete the trace entry of event ``label``; a second access glued to the same event is left out."""
        if self.trace[-1] == (label, 0, 0):
            self.trace[-1] = (label, address, value)

    def may_hold(self, label: int) -> bool:
        """Whether the store that was just issued as ``label`` is held."""
        if self.strategic:
            if self._alone() or not self._ask_hold(label):
                return False
        elif self._holds and label in self._holds:
            del self._holds[label]
            self._last_trigger = self.events
        else:
            return False
        self._recorded_holds[label] = BOOT
        return True

    def block(self, condition: Waitable) -> None:
        """Wait until ``condition`` is ready; other threads run meanwhile."""
        thread = self._current
        if condition.ready():
            return
        self._settle_unasked()
        while not condition.ready():
            thread.waiting = condition
            self._event(thread, THREAD_WAIT)
            thread.at_boundary = True
            self._reschedule(thread, False)
        thread.waiting = None
        self._event(thread, THREAD_WAKE)

    def yield_(self, boundary: bool = True) -> None:
        """The current thread has made no progress by itself: let the others run first.

        ``boundary`` tells that everything this thread will do is determined by the machine's state alone.
        """
        thread = self._current
        self._settle_unasked()
        self._event(thread, THREAD_YIELD)
        for other in self.threads:
            if other.buffer.pending and (other is thread or other.done):
                other.age_stores()
        thread.at_boundary = boundary
        self._reschedule(thread, True)

    @property
    def quiet(self) -> bool:
        """True in the liveness phase: nothing but the default schedule is left."""
        if self.strategic:
            return False
        if not (self._runs or self._until or self._tlb or self._holds or self._pending_buffers()):
            return True
        if self.events - self._last_trigger <= PATIENCE:
            return False
        self._runs = {}
        self._until = {}
        self._tlb = {}
        self._holds = {}
        self._drain_all()
        return True

    # Inside the scheduler.

    def _started(self, thread: Thread) -> None:
        thread.at_boundary = False
        self._event(thread, THREAD_START)

    def _ended(self, thread: Thread) -> None:
        self._settle_unasked()
        self._event(thread, THREAD_END)
        # The CPU lives on: what its buffer holds becomes visible later, not here.
        thread.done = True
        thread.at_boundary = True
        self._settle()
        self._next = self._successor(thread, False)

    def _enter(self, thread: Thread) -> None:
        bit = 1 << thread.index
        for index in range(len(self.threads)):
            self._below[index] &= ~bit
            self._scheduled_since[index] |= bit
        self._current = thread
        self._slice_start = self.events

    def _switch(self, thread: Thread) -> None:
        self._enter(thread)
        thread.greenlet.switch()

    def _reschedule(self, thread: Thread, yielded: bool) -> None:
        """``thread`` waits or has yielded; run the next one."""
        self._settle()
        if yielded:
            self._lower(thread)
        successor = self._successor(thread, yielded)
        if successor != thread.index:
            self._switch(self.threads[successor])
        else:
            self._enter(thread)
        thread.at_boundary = False

    def _successor(self, thread: Thread, yielded: bool) -> int:
        """The thread to run after ``thread`` waited, yielded or ended; -1 when all have ended."""
        enabled = self._enabled()
        if not enabled:
            self._drain_all()
            enabled = self._enabled()
        if not enabled:
            for other in self.threads:
                if not other.done:
                    self.stop(DEADLOCK)
            return -1
        self._disabled_by[thread.index] |= self._slice_enabled & ~enabled
        self._slice_enabled = enabled
        for index in range(len(self.threads)):
            self._enabled_since[index] &= enabled
        allowed = self._allowed(enabled)
        if yielded:
            self.watcher.at_yield()
        default = thread.index
        for _ in range(len(self.threads)):
            default = (default + 1) % len(self.threads)
            if allowed >> default & 1:
                break
        return self._decide(thread.last, default, allowed)

    def _decide(self, label: int, default: int, allowed: int) -> int:
        """Who runs after event ``label``, where the default schedule would run ``default``."""
        if self.strategic:
            return self._pick(label, default, allowed)
        if label in self._runs:
            chosen = self._runs.pop(label)
            self._last_trigger = self.events
            if chosen < len(self.threads) and allowed >> chosen & 1 and chosen != default:
                self._recorded_runs.append(Deviation(RUN, label, chosen))
                return chosen
        return default

    def _pick(self, label: int, default: int, allowed: int) -> int:
        """Let the strategy choose a thread."""
        if allowed & (allowed - 1) == 0:
            return default
        chosen = self._question(default, allowed, label)
        if chosen != default:
            self._recorded_runs.append(Deviation(RUN, label, chosen))
        return chosen

    def _question(self, default: int, actors: int, label: int) -> int:
        strategy = self.strategy
        strategy.events = self.events
        if self.track:
            strategy.state = self.fingerprint()
        chosen = strategy.pick(default, actors, label)
        if chosen < 0:
            self.stop(STOPPED)
        return chosen if actors >> chosen & 1 else default

    def _ask_hold(self, label: int) -> bool:
        self.strategy.events = self.events
        return self.strategy.hold(label)

    def _alone(self) -> bool:
        """True if no other thread is left that could tell a held store from a drained one."""
        for thread in self.threads:
            if not thread.done and thread is not self._current:
                return False
        return True

    def _pending_buffers(self) -> int:
        """Bit mask of the threads whose store buffers are not empty."""
        mask = 0
        for thread in self.threads:
            if thread.buffer.pending:
                mask |= 1 << thread.index
        return mask

    def _ask_drains(self) -> None:
        """Let the strategy drain buffers, one store at a time; at the horizon, hand over to the default schedule."""
        if self.events >= self.strategy.horizon or self.events >= PATIENCE:
            self.strategic = False
            for thread in self.threads:
                self._release(thread, len(thread.buffer.pending))
            return
        current = self._current
        while True:
            mask = self._pending_buffers()
            if not mask:
                return
            chosen = self._question(current.index, mask << len(self.threads) | 1 << current.index, current.last)
            if chosen == current.index:
                return
            self._release(self.threads[chosen - len(self.threads)], 1)

    def _release(self, thread: Thread, count: int) -> None:
        """The oldest ``count`` stores of ``thread`` drain, and those behind them that nobody holds."""
        pending = thread.buffer.pending
        while pending and (count > 0 or not pending[0].held):
            if pending[0].held:
                del self._recorded_holds[pending[0].label]
                self._recorded_holds[pending[0].label] = self.last
            thread.buffer.drain(1)
            count -= 1

    def _ask(self, thread: Thread) -> None:
        if self.events < self.strategy.next_event and self.events < self.strategy.horizon:
            self._settle_unasked()
            return
        if label_site(thread.last) in (THREAD_YIELD, THREAD_START):
            # Chosen a moment ago and nothing done since: to choose again would add nothing.
            self._settle_unasked()
            return
        self._settle()
        if self.strategic:
            allowed = self._allowed(self._enabled()) | 1 << thread.index
            chosen = self._pick(thread.last, thread.index, allowed)
            if chosen != thread.index:
                self._switch(self.threads[chosen])

    def _replay(self, thread: Thread) -> None:
        self._settle()
        if thread.last in self._runs:
            chosen = self._decide(thread.last, thread.index, self._enabled())
            if chosen != thread.index:
                self._switch(self.threads[chosen])

    def _settle(self) -> None:
        """Carry out what the schedule attaches to the last event: first releases of held stores, then TLB events."""
        if self.strategic:
            self._ask_drains()
        elif self._until and self.last in self._until:
            self._last_trigger = self.events
            for store in self._until.pop(self.last):
                self._release_store(store)
        if self._tlb:
            self._settle_tlb()

    def _settle_unasked(self) -> None:
        """As ``_settle`` for an event after which a strategy has no choice that matters."""
        if self._until:
            self._settle()
        elif self._tlb:
            self._settle_tlb()

    def _release_store(self, store: int) -> None:
        """The store labelled ``store`` drains, if it is pending, and all before it."""
        thread_index = label_thread(store)
        if thread_index < len(self.threads):
            thread = self.threads[thread_index]
            for position in range(len(thread.buffer.pending)):
                if thread.buffer.pending[position].label == store:
                    self._release(thread, position + 1)
                    break

    def _settle_tlb(self) -> None:
        if self.last not in self._tlb:
            return
        self._last_trigger = self.events
        for deviation in self._tlb.pop(self.last):
            if deviation.actor >= len(self.threads):
                continue
            thread = self.threads[deviation.actor]
            if self.track:
                thread.history = mix(mix(thread.history, deviation.kind), mix(deviation.address, self.memory.digest))
            if deviation.kind == EVICT:
                thread.body.evict(deviation.address)
            elif deviation.kind == FILL:
                thread.body.fill(deviation.address)

    def _drain_all(self) -> None:
        for thread in self.threads:
            thread.drain()

    def _enabled(self) -> int:
        """Bit mask of the threads that can run."""
        mask = 0
        for thread in self.threads:
            if not thread.done and (thread.waiting is None or thread.waiting.ready()):
                mask |= 1 << thread.index
        return mask

    def _allowed(self, enabled: int) -> int:
        allowed = 0
        for index in range(len(self.threads)):
            if enabled >> index & 1 and not self._below[index] & enabled:
                allowed |= 1 << index
        return allowed if allowed else enabled

    def _lower(self, thread: Thread) -> None:
        """Fairness: ``thread`` yielded to those it kept from running since its last yield."""
        index = thread.index
        starved = (self._enabled_since[index] | self._disabled_by[index]) & ~self._scheduled_since[index]
        self._below[index] |= starved
        self._enabled_since[index] = self._enabled()
        self._disabled_by[index] = 0
        self._scheduled_since[index] = 0
