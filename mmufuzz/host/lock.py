"""Locks, built on memory: taking one is a locked operation, releasing one a plain store.

So a release can sit in the store buffer, as on x86, and taking a lock drains the taker's buffer.
"""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from mmufuzz.host.memory import Memory, mix
from mmufuzz.host.sched import Host
from mmufuzz.host.thread import Waitable

FREE = 0


@mypyc_attr(allow_interpreted_subclasses=True)
class LockWatcher:
    """Told about misuse of locks and about the moments when a lock becomes free."""

    def lock_misused(self, text: str) -> None:
        """A lock was taken out of order, taken twice, or released by a thread that does not hold it."""

    def releasing(self, name: str) -> None:
        """The current thread is about to release lock ``name``: what it protected must be consistent."""


class Lock(Waitable):
    """A spinlock, mutex or rwlock held for write; all exclude each other alike.

    ``rank`` orders nesting: a thread may take a lock only if its rank is higher than that of every lock it
    holds (Documentation/virt/kvm/locking.rst). The word at ``address`` is 0 when free, else owner + 1.
    """

    def __init__(self, host: Host, name: str, rank: int, address: int, lock_site: int, unlock_site: int) -> None:
        self.host = host
        self.memory: Memory = host.memory
        self.name = name
        self.rank = rank
        self.address = address
        self.lock_site = lock_site
        self.unlock_site = unlock_site
        self.owner = -1
        """Index of the holder in program order: -1 as soon as the release is executed, visible or not."""
        self.acquisitions = 0
        self.history = 0
        """What the critical sections so far did, for the search: data under the lock is a function of it."""
        self.watcher = LockWatcher()
        host.locks.append(self)

    def ready(self) -> bool:
        """True if the lock is visibly free."""
        return self.memory.read(self.address, 8) == FREE

    def fingerprint(self) -> int:
        """``history``."""
        return self.history

    def acquire(self) -> None:
        """Take the lock, waiting for it if need be."""
        thread = self.host.current
        self.host.point(self.lock_site)
        self.host.detail(thread.last, self.address, thread.index + 1)
        if self.owner == thread.index:
            self.watcher.lock_misused(f"{self.name} taken twice by {thread.name}")
        if thread.held_locks and thread.held_locks[-1] >= self.rank:
            self.watcher.lock_misused(f"{self.name} taken by {thread.name} out of order")
        thread.drain()
        if not self.ready():
            self.host.block(self)
        self.memory.write(self.address, 8, thread.index + 1)
        self.owner = thread.index
        thread.held_locks.append(self.rank)
        self.acquisitions += 1
        if self.host.track:
            thread.history = mix(thread.history, self.history)

    def release(self) -> None:
        """Release the lock with a plain store."""
        thread = self.host.current
        if self.owner != thread.index:
            self.watcher.lock_misused(f"{self.name} released by {thread.name}, which does not hold it")
            return
        self.watcher.releasing(self.name)
        self.owner = -1
        thread.held_locks.remove(self.rank)
        if self.host.track:
            self.history = mix(self.history, thread.local_state())
        thread.store(self.unlock_site, self.address, FREE)

    def held_by_current(self) -> bool:
        """lockdep_assert_held."""
        return self.owner == self.host.current.index
