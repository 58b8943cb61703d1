"""Host physical memory: a sparse array of aligned 64-bit words, and the FIFO store buffer in front of it.

Everything that more than one host thread can reach without a lock lives here: guest frames, shadow page tables
(hardware walks them) and the kernel's shared variables. So there is one place where x86-TSO holds
(Sewell et al., CACM 2010): a store enters its CPU's buffer, the CPU's own loads see the youngest matching entry,
and the buffer drains to memory in order.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
ALL_ONES: Final = (1 << 64) - 1

GUEST_FRAMES: Final = 1 << 17
"""pfns below this back guest memory; shadow pages and kernel variables lie above."""


@mypyc_attr(allow_interpreted_subclasses=True)
class MemoryWatcher:
    """Told when a guest frame's contents become visible to all CPUs, and when freed memory is touched."""

    def guest_word_changed(self, address: int, old: int, new: int) -> None:
        """The aligned word at host physical ``address`` in a guest frame changed."""

    def freed_frame_accessed(self, address: int, write: bool) -> None:
        """A frame that KVM freed was read or written."""


def mix(state: int, value: int) -> int:
    """Fold ``value`` into a 64-bit fingerprint (the finaliser of splitmix64 over both)."""
    z = (state * 0x9E3779B97F4A7C15 + value + 0x632BE59BD9B4E019) & ALL_ONES
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & ALL_ONES
    return z ^ z >> 31


class Memory:
    """``words`` maps address >> 3 to a 64-bit value; absent words are zero."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.freed: dict[int, bool] = {}
        """pfns that KVM gave back; never handed out again, so every later access is a use after free."""
        self._freed_from = 0
        self._freed_to = 0
        """All freed frames lie between these addresses: most accesses are told apart without a look-up."""
        self.watcher = MemoryWatcher()
        self.track = False
        self.digest = 0
        """With ``track``: a fingerprint of all contents, the same for the same contents."""

    def read(self, address: int, size: int) -> int:
        """Read ``size`` (1, 2, 4, 8) bytes that lie within one aligned word."""
        if self._freed_from <= address < self._freed_to and address >> PAGE_SHIFT in self.freed:
            self.watcher.freed_frame_accessed(address, False)
        word = self.words.get(address >> 3, 0)
        if size == 8:
            return word
        return word >> ((address & 7) << 3) & ((1 << (size << 3)) - 1)

    def write(self, address: int, size: int, value: int) -> None:
        """Make ``value`` visible in ``size`` bytes within one aligned word."""
        if self._freed_from <= address < self._freed_to and address >> PAGE_SHIFT in self.freed:
            self.watcher.freed_frame_accessed(address, True)
        index = address >> 3
        old = self.words.get(index, 0)
        if size == 8:
            new = value
        else:
            shift = (address & 7) << 3
            mask = ((1 << (size << 3)) - 1) << shift
            new = old & ~mask | value << shift & mask
        if new != old:
            self.words[index] = new
            if self.track:
                self.digest ^= mix(index, old) ^ mix(index, new)
            if address < GUEST_FRAMES << PAGE_SHIFT:
                self.watcher.guest_word_changed(index << 3, old, new)

    def free_frame(self, pfn: int) -> None:
        """Poison a frame: its contents go, and every later access is reported."""
        first = pfn << PAGE_SHIFT
        if not self.freed or first < self._freed_from:
            self._freed_from = first
        self._freed_to = max(self._freed_to, first + PAGE_SIZE)
        self.freed[pfn] = True


class Pending:
    """A store that its CPU has executed and that is not visible yet."""

    def __init__(self, label: int, address: int, size: int, value: int, held: bool) -> None:
        self.label = label
        self.address = address
        self.size = size
        self.value = value
        self.held = held
        """False for a store that only waits behind a held one."""
        self.aged = False
        """True once the thread has yielded with the store pending."""


class StoreBuffer:
    """The FIFO of one logical CPU."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.pending: list[Pending] = []

    def forward(self, address: int, size: int) -> int:
        """The value of the youngest store that covers the load entirely, else -1.

        A store that covers the load in part cannot be forwarded: the buffer drains up to it first, as hardware stalls
        the load until it can read all bytes from the cache.
        """
        position = len(self.pending) - 1
        while position >= 0:
            entry = self.pending[position]
            if entry.address < address + size and address < entry.address + entry.size:
                if entry.address <= address and address + size <= entry.address + entry.size:
                    return entry.value >> ((address - entry.address) << 3) & ((1 << (size << 3)) - 1)
                self.drain(position + 1)
                while self.pending and not self.pending[0].held:
                    self.drain(1)
                return -1
            position -= 1
        return -1

    def drain(self, count: int) -> None:
        """Make the oldest ``count`` stores visible, in order."""
        for _ in range(count):
            entry = self.pending.pop(0)
            self.memory.write(entry.address, entry.size, entry.value)
