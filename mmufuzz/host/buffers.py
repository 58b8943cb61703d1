"""The store buffers of all CPUs: which hold stores, and how held ones are released."""

from __future__ import annotations

from mmufuzz.host.memory import mix
from mmufuzz.host.replay import Record
from mmufuzz.host.sites import label_thread
from mmufuzz.host.thread import Thread


class Buffers:
    """``threads`` is the host's list; a CPU keeps its buffer when its thread has ended."""

    def __init__(self, threads: list[Thread], record: Record) -> None:
        self.threads = threads
        self.record = record

    def pending(self) -> int:
        """Bit mask of the threads whose buffers are not empty."""
        mask = 0
        for thread in self.threads:
            if thread.buffer.pending:
                mask |= 1 << thread.index
        return mask

    def release(self, index: int, count: int, last: int) -> None:
        """After event ``last`` a thread's oldest ``count`` stores drain, and those behind them that are not held."""
        buffer = self.threads[index].buffer
        while buffer.pending and (count > 0 or not buffer.pending[0].held):
            if buffer.pending[0].held:
                self.record.released(buffer.pending[0].label, last)
            buffer.drain(1)
            count -= 1

    def release_store(self, label: int, last: int) -> None:
        """After event ``last`` the store ``label`` drains, if it is pending, and all before it."""
        index = label_thread(label)
        if index < len(self.threads):
            pending = self.threads[index].buffer.pending
            for position in range(len(pending)):
                if pending[position].label == label:
                    self.release(index, position + 1, last)
                    break

    def release_all(self, last: int) -> None:
        """All stores drain, those that were held after event ``last``."""
        for thread in self.threads:
            self.release(thread.index, len(thread.buffer.pending), last)

    def drain_all(self) -> None:
        """All stores drain by themselves."""
        for thread in self.threads:
            thread.drain()

    def age(self, yielding: Thread) -> None:
        """``yielding`` yields: its stores age, and those of threads that have ended and will not yield again."""
        for thread in self.threads:
            if thread.buffer.pending and (thread is yielding or thread.done):
                thread.age_stores()

    def fingerprint(self) -> int:
        """Of what is pending."""
        state = 0
        for thread in self.threads:
            for entry in thread.buffer.pending:
                state = mix(mix(state, entry.label), entry.address)
                state = mix(mix(state, entry.value), entry.size << 1 | entry.held)
        return state
