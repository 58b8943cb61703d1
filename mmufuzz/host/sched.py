"""The scheduler: what threads call before every visible operation.

A run is the default schedule (the current thread goes on until it waits, yields or ends; stores drain at once)
plus deviations from it. They come from a recorded schedule (``replay``) or from a ``Strategy``, and whatever a
strategy decides is recorded as deviations, so that every run can be repeated from its Case alone.
"""

from __future__ import annotations

from typing import Final

from greenlet import GreenletExit
from mypy_extensions import mypyc_attr

from mmufuzz.host.buffers import Buffers
from mmufuzz.host.deviation import EVICT, Deviation
from mmufuzz.host.fair import Fairness
from mmufuzz.host.memory import Memory, mix
from mmufuzz.host.replay import Record, Replay
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
)
from mmufuzz.host.strategy import Strategy
from mmufuzz.host.thread import Body, Scheduler, Thread, Waitable
from mmufuzz.host.trace import Trace

PATIENCE: Final = 3000
"""Events without a deviation after which those whose labels never came up are given up; bounds every horizon."""

SLICE: Final = 1500
"""Events after which a thread that never yields is made to: weak fairness for guests that spin on their own."""

# Host.status
ENDED: Final = 0
DEADLOCK: Final = 1
EVENT_LIMIT: Final = 2
STOPPED: Final = 3


@mypyc_attr(native_class=False)
class RunStop(BaseException):
    """Ends a run at once, from any thread."""


@mypyc_attr(allow_interpreted_subclasses=True)
class BoundaryWatcher:
    """Asked when a thread yields: the place where a repeated state can be seen."""

    def at_yield(self) -> None:
        """The current thread has yielded, and the next one is about to be chosen."""

    def fingerprint(self) -> int:
        """With ``Host.track``: all that observers remember of the past and that can change what they report later."""
        return 0


class Host(Scheduler):
    """The machine's threads and their schedule.

    ``status`` after ``run``: ENDED (all threads ended), DEADLOCK, EVENT_LIMIT or STOPPED (somebody raised RunStop).
    ``deviations`` then holds the schedule that was followed. ``events`` counts visible operations; ``last`` is the
    label of the last one.
    """

    _current: Thread
    _fairness: Fairness

    def __init__(self, memory: Memory, tso: bool, event_limit: int) -> None:
        super().__init__(memory, tso)
        self.event_limit = event_limit
        self.strategy = Strategy()
        self.strategic = False
        """True while the strategy decides."""
        self.threads: list[Thread] = []
        self.locks: list[Waitable] = []
        self.events = 0
        self.last = BOOT
        self.trace = Trace()
        self.watcher = BoundaryWatcher()
        self.status = ENDED
        self._replay = Replay()
        self._record = Record()
        self._buffers = Buffers(self.threads, self._record)
        self._last_trigger = 0
        """``events`` when the recorded schedule last had an effect."""
        self._slice_start = 0
        """``events`` when the current thread was entered."""
        self._next = -1
        """Who runs after a thread has ended; -1 for nobody."""

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
        self._replay.follow(schedule)

    def decide_with(self, strategy: Strategy) -> None:
        """Let ``strategy`` decide instead of a recorded schedule; TLB deviations of ``follow`` still apply."""
        self.strategy = strategy
        self.strategic = strategy.horizon > 0
        self._replay.forget_choices()

    @property
    def deviations(self) -> list[Deviation]:
        """The preemptions and holds that were followed; TLB deviations are always those given to ``follow``."""
        return self._record.deviations()

    @property
    def current(self) -> Thread:
        """The running thread."""
        return self._current

    @property
    def quiet(self) -> bool:
        """True in the liveness phase: nothing but the default schedule is left."""
        if self.strategic:
            return False
        if self._replay.used_up() and not self._buffers.pending():
            return True
        if self.events - self._last_trigger <= PATIENCE:
            return False
        self._replay.forget()
        self._buffers.drain_all()
        return True

    def fingerprint(self) -> int:
        """With ``track``: a fingerprint of the whole state, equal for runs that can only go on alike."""
        state = self.memory.digest
        alive = 0
        for thread in self.threads:
            if not thread.done:
                alive |= 1 << thread.index
            state = mix(state, thread.local_state())
        state = mix(mix(state, self._buffers.fingerprint()), self._fairness.fingerprint(alive))
        for lock in self.locks:
            state = mix(state, lock.fingerprint())
        return mix(state, self.watcher.fingerprint())

    def run(self) -> None:
        """Run all threads to their ends, or until something stops the run."""
        count = len(self.threads)
        self._fairness = Fairness(count)
        self.strategy.begin(count)
        self._current = self.threads[0]
        try:
            self._settle()
            self._next = self._decide(BOOT, 0, (1 << count) - 1)
            while self._next >= 0:
                self._switch(self.threads[self._next])
        except RunStop:
            if self.status == ENDED:
                self.status = STOPPED
        finally:
            for thread in self.threads:
                if not thread.greenlet.dead:
                    thread.greenlet.throw(GreenletExit)

    def dismantle(self) -> None:
        """Let go of what refers back to this host; nothing may be asked of it afterwards."""
        self._current = _NOBODY
        self.threads.clear()
        self.locks.clear()

    def stop(self, status: int) -> None:
        """End the run from inside a thread."""
        self.status = status
        raise RunStop

    # Events and the trace.

    def _event(self, thread: Thread, site: int) -> None:
        self.events += 1
        if self.events > self.event_limit:
            self.stop(EVENT_LIMIT)
        if thread.step != thread.counted_step:
            thread.count_step()
        occurrence = thread.counts[site] + 1
        if occurrence > MAX_OCCURRENCE:
            self.stop(EVENT_LIMIT)
        thread.counts[site] = occurrence
        last = thread.label_prefix | site << 16 | occurrence
        thread.last = last
        self.last = last
        self.trace.event(last)

    def detail(self, label: int, address: int, value: int) -> None:
        """Complete the trace entry of event ``label``; a second access glued to the same event is left out."""
        self.trace.detail(label, address, value)

    def note(self, text: str, first: int = 0, second: int = 0) -> None:
        """Put a line into the trace: a state change that explains what follows. See ``Trace.note``."""
        self.trace.note(self._current.index, text, first, second)

    # What threads call. Each stands at a choice: what the schedule has for the last event happens, and others may run.

    def started(self, thread: Thread) -> None:
        """See ``Scheduler``."""
        thread.at_boundary = False
        self._event(thread, THREAD_START)

    def point(self, site: int) -> None:
        """See ``Scheduler``."""
        thread = self._current
        if self.strategic:
            self._ask(thread)
        elif self._replay.events:
            self._settle()
            if thread.last in self._replay.runs:
                chosen = self._decide(thread.last, thread.index, self._enabled())
                if chosen != thread.index:
                    self._switch(self.threads[chosen])
        if self.events - self._slice_start > SLICE:
            self.yield_(False)
        self._event(thread, site)

    def may_hold(self, label: int) -> bool:
        """See ``Scheduler``."""
        if self.strategic:
            if self._alone() or not self._ask_hold(label):
                return False
        elif self._replay.take_hold(label):
            self._last_trigger = self.events
        else:
            return False
        self._record.held(label)
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
        self._buffers.age(thread)
        thread.at_boundary = boundary
        self._reschedule(thread, True)

    def ended(self, thread: Thread) -> None:
        """See ``Scheduler``."""
        self._settle_unasked()
        self._event(thread, THREAD_END)
        # The CPU lives on: what its buffer holds becomes visible later, not here.
        thread.done = True
        thread.at_boundary = True
        self._settle()
        self._next = self._successor(thread, False)

    # Who runs.

    def _enter(self, thread: Thread) -> None:
        self._fairness.entered(thread.index)
        self._current = thread
        self._slice_start = self.events

    def _switch(self, thread: Thread) -> None:
        self._enter(thread)
        thread.greenlet.switch()

    def _reschedule(self, thread: Thread, yielded: bool) -> None:
        """``thread`` waits or has yielded; run the next one."""
        self._settle()
        if yielded:
            self._fairness.yielded(thread.index, self._enabled())
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
            self._buffers.drain_all()
            enabled = self._enabled()
        if not enabled:
            for other in self.threads:
                if not other.done:
                    self.stop(DEADLOCK)
            return -1
        self._fairness.left(thread.index, enabled)
        allowed = self._fairness.allowed(enabled)
        if yielded:
            self.watcher.at_yield()
        default = thread.index
        for _ in range(len(self.threads)):
            default = (default + 1) % len(self.threads)
            if allowed >> default & 1:
                break
        return self._decide(thread.last, default, allowed)

    def _enabled(self) -> int:
        """Bit mask of the threads that can run."""
        mask = 0
        for thread in self.threads:
            if not thread.done and (thread.waiting is None or thread.waiting.ready()):
                mask |= 1 << thread.index
        return mask

    def _decide(self, label: int, default: int, allowed: int) -> int:
        """Who runs after event ``label``, where the default schedule would run ``default``."""
        if self.strategic:
            return self._pick(label, default, allowed)
        if label in self._replay.runs:
            self._last_trigger = self.events
            chosen = self._replay.take_run(label)
            if chosen < len(self.threads) and allowed >> chosen & 1 and chosen != default:
                self._record.switched(label, chosen)
                return chosen
        return default

    # What the schedule attaches to the last event: first releases of held stores, then TLB events.

    def _settle(self) -> None:
        if self.strategic:
            self._ask_drains()
        elif self._replay.events:
            for store in self._replay.take_releases(self.last):
                self._last_trigger = self.events
                self._buffers.release_store(store, self.last)
        if self._replay.events:
            self._settle_tlb()

    def _settle_unasked(self) -> None:
        """As ``_settle`` for an event after which a strategy has no choice that matters."""
        if self.strategic:
            if self._replay.events:
                self._settle_tlb()
        else:
            self._settle()

    def _settle_tlb(self) -> None:
        for deviation in self._replay.take_tlb(self.last):
            self._last_trigger = self.events
            if deviation.actor >= len(self.threads):
                continue
            thread = self.threads[deviation.actor]
            if self.track:
                thread.history = mix(mix(thread.history, deviation.kind), mix(deviation.address, self.memory.digest))
            if deviation.kind == EVICT:
                thread.body.evict(deviation.address)
            else:
                thread.body.fill(deviation.address)

    # Asking the strategy.

    def _ask(self, thread: Thread) -> None:
        """``thread`` stands at a plain operation."""
        if self.events < self.strategy.next_event and self.events < self.strategy.horizon:
            self._settle_unasked()
            return
        if label_site(thread.last) in (THREAD_YIELD, THREAD_START):
            # Chosen a moment ago and nothing done since: to choose again would add nothing.
            self._settle_unasked()
            return
        self._settle()
        if self.strategic:
            allowed = self._fairness.allowed(self._enabled()) | 1 << thread.index
            chosen = self._pick(thread.last, thread.index, allowed)
            if chosen != thread.index:
                self._switch(self.threads[chosen])

    def _pick(self, label: int, default: int, allowed: int) -> int:
        """Let the strategy choose a thread."""
        if allowed & (allowed - 1) == 0:
            return default
        chosen = self._question(default, allowed, label)
        if chosen != default:
            self._record.switched(label, chosen)
        return chosen

    def _ask_drains(self) -> None:
        """Let the strategy drain buffers, one store at a time; at the horizon, hand over to the default schedule."""
        if self.events >= self.strategy.horizon or self.events >= PATIENCE:
            self.strategic = False
            self._buffers.release_all(self.last)
            return
        current = self._current
        while True:
            mask = self._buffers.pending()
            if not mask:
                return
            chosen = self._question(current.index, mask << len(self.threads) | 1 << current.index, current.last)
            if chosen == current.index:
                return
            self._buffers.release(chosen - len(self.threads), 1, self.last)

    def _question(self, default: int, actors: int, label: int) -> int:
        strategy = self.strategy
        strategy.events = self.events
        if strategy.wants_state:
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


_NOBODY: Final = Thread(Scheduler(Memory(), False), 0, "", Body())
"""Stands where a host has no current thread any more."""
