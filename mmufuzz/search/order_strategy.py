"""Follows the search of ``orders`` on a Host: who is where, what each could do next, and what the host is told.

A run has three parts. First the threads are brought to their first planned accesses on the default schedule
("gathering"); a thread that waits there for the others gives way to them. Then every choice is the search's. When all
planned accesses are done and all buffers are empty, the threads run to their ends on the default schedule.

In the middle part each store stays in its buffer until the search drains it. Entering the buffer is nothing that
another thread could see, and neither are a code fetch and a fence with an empty buffer: such operations follow the
thread's access before them at once. A thread that has done its accesses stands still until the others have done theirs.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import (
    GUEST_ATOMIC,
    GUEST_FENCE,
    GUEST_FETCH,
    GUEST_LOAD,
    GUEST_STORE,
    label_occurrence,
    label_site,
    label_step,
    label_thread,
)
from mmufuzz.host.strategy import STOP, Strategy
from mmufuzz.search.orders import ACCESS, ASLEEP, DRAIN, NOTHING, Foot, OrderError, Orders

# What a step does to memory besides the fetch of its code.
NONE: Final = 0
LOAD: Final = 1
STORE: Final = 2
ATOMIC: Final = 3
FENCE: Final = 4
END: Final = 5
"""Nothing, and it comes after all accesses."""

_SITES: Final = {LOAD: GUEST_LOAD, STORE: GUEST_STORE, ATOMIC: GUEST_ATOMIC, FENCE: GUEST_FENCE}

HORIZON: Final = 3000
"""Events a run may have; the host asks no strategy beyond ``sched.PATIENCE``, which is as many."""


class Access:
    """What one step does; ``location`` is a bit mask with one bit, 0 where the kind has none."""

    def __init__(self, kind: int, location: int = 0) -> None:
        self.kind = kind
        self.location = location


class Plan:
    """One thread: step ``first`` + i does ``accesses[i]``, the last of which is END.

    At step ``waits`` (before ``first``; -1 for none) it goes round in a loop until all threads are there.
    """

    def __init__(self, first: int, accesses: list[Access], waits: int = -1) -> None:
        self.first = first
        self.accesses = accesses
        self.waits = waits

    def at(self, step: int) -> Access | None:
        """What ``step`` does; None before the first and behind the last."""
        if self.first <= step < self.first + len(self.accesses):
            return self.accesses[step - self.first]
        return None


class OrderStrategy(Strategy):
    """One run of ``search``.

    Afterwards ``complete`` tells that it came to the end of all accesses, ``asleep`` that it was ended because all that
    was left had been run before. Neither is set if the run was longer than the horizon: then the search cannot go on.
    """

    def __init__(self, plans: list[Plan], search: Orders) -> None:
        self.horizon = HORIZON
        self.plans = plans
        self.search = search
        self.count = len(plans)
        self.ready = 0
        """Bit mask of the threads that stand at their first access."""
        self.waiting = 0
        """Bit mask of those that wait for the others."""
        self.standing: list[Access] = [Access(NONE)] * self.count
        """By thread: the access it would perform next."""
        self.pending = [0] * self.count
        """By thread: locations of the stores that may be in its buffer."""
        self.running = -1
        """The thread that the search let perform an access last; -1 before."""
        self.chosen = -1
        """The thread that the search lets perform its access; -1 while that is open."""
        self.drains_asked = -1
        """``events`` when it last let no buffer drain; who runs is asked next then, with the same stores pending."""
        self.complete = False
        self.asleep = False

    def pick(self, current: int, enabled: int, label: int) -> int:
        """See ``Strategy``."""
        if self.complete:
            return current
        everyone = (1 << self.count) - 1
        draining = enabled >> self.count != 0
        access = self._access(label)
        if draining:
            self.drains_asked = self.events
        if draining or self.drains_asked != self.events:
            # What is not offered has drained; where no drain was offered before the threads, nothing is pending.
            for thread in range(self.count):
                if not enabled >> (self.count + thread) & 1:
                    self.pending[thread] = 0
        if self.ready != everyone:
            self._arrive(label, access)
            if self.ready != everyone:
                return current if draining else self._gather(current, enabled)
        if self.chosen >= 0:
            # The second question at the same operation: the first was which buffer drains, and the answer none.
            return self._perform(enabled)
        if access is None or not self._visible(current, access):
            return current
        if self.running not in (-1, current):
            raise OrderError(f"thread {current} ran in the place of thread {self.running}")
        self.standing[current] = access
        return self._decide(current, enabled, draining)

    def _decide(self, current: int, enabled: int, draining: bool) -> int:
        """Ask the search."""
        transition = self.search.decide(self._feet())
        if transition == ASLEEP:
            self.asleep = True
            return STOP
        if transition == NOTHING:
            self.complete = True
            return current
        thread = transition >> 1
        if transition & 1 == DRAIN:
            self.drains_asked = -1
            return self.count + thread
        self.chosen = thread
        return current if draining else self._perform(enabled)

    def _perform(self, enabled: int) -> int:
        thread = self.chosen
        if not enabled >> thread & 1:
            raise OrderError(f"thread {thread} cannot run")
        self.chosen = -1
        self.running = thread
        return thread

    def hold(self, label: int) -> bool:
        """See ``Strategy``: every planned store stays in its buffer."""
        thread = label_thread(label)
        access = self.plans[thread].at(label_step(label))
        if self.complete or access is None or access.kind != STORE or label_site(label) != GUEST_STORE:
            return False
        self.pending[thread] |= access.location
        return True

    def _access(self, label: int) -> Access | None:
        """What the thread whose last event is ``label`` is about to do, if that is planned."""
        if label_site(label) != GUEST_FETCH:
            return None
        return self.plans[label_thread(label)].at(label_step(label))

    def _visible(self, thread: int, access: Access) -> bool:
        """Whether the search orders ``access`` against those of other threads; END is where it waits for them."""
        if access.kind == FENCE:
            return self.pending[thread] != 0
        return access.kind not in (NONE, STORE)

    def _arrive(self, label: int, access: Access | None) -> None:
        """Note where the thread whose last event is ``label`` stands."""
        thread = label_thread(label)
        if access is not None and self._visible(thread, access):
            self.ready |= 1 << thread
            self.standing[thread] = access
        elif label_site(label) == GUEST_FETCH and label_step(label) == self.plans[thread].waits:
            self.waiting |= 1 << thread

    def _gather(self, current: int, enabled: int) -> int:
        """Who runs while not all threads stand at their first access."""
        # First those that are still on their way to the others, then those that only have to leave their loop.
        for left in (enabled & ~self.waiting & ~self.ready, enabled & ~self.ready):
            if left:
                return current if left >> current & 1 else (left & -left).bit_length() - 1
        return current

    def _feet(self) -> dict[int, Foot]:
        """The transitions that are possible, and what they touch."""
        feet: dict[int, Foot] = {}
        for thread in range(self.count):
            access = self.standing[thread]
            pending = self.pending[thread]
            if access.kind == LOAD:
                feet[2 * thread + ACCESS] = Foot(access.location, 0)
            elif access.kind in (ATOMIC, FENCE):
                feet[2 * thread + ACCESS] = Foot(0, access.location | pending)
            if pending:
                feet[2 * thread + DRAIN] = Foot(0, pending)
        return feet


def strays(plans: list[Plan], trace: list[tuple[int, int, int]]) -> int:
    """The first event of a planned step that is neither its code fetch nor its one access; 0 if there is none.

    Such an event (a page fault, say) is an operation that the search did not order against the others.
    """
    for label, _, _ in trace:
        if label <= 0:
            continue
        access = plans[label_thread(label)].at(label_step(label)) if label_thread(label) < len(plans) else None
        if access is None or access.kind == END:
            continue
        if label_site(label) not in (GUEST_FETCH, _SITES.get(access.kind, GUEST_FETCH)) or label_occurrence(label) > 1:
            return label
    return 0
