"""Host memory and one store buffer."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.host.memory import PAGE_SHIFT, Memory, MemoryWatcher, Pending, StoreBuffer

SIZES = st.sampled_from([1, 2, 4, 8])


@st.composite
def accesses(draw: st.DrawFn) -> tuple[int, int, int]:
    """(address, size, value) within one aligned word, naturally aligned."""
    size = draw(SIZES)
    address = draw(st.integers(0, 2)) * 8 + draw(st.integers(0, 8 // size - 1)) * size
    return address, size, draw(st.integers(0, (1 << 8 * size) - 1))


class Recorder(MemoryWatcher):
    def __init__(self) -> None:
        self.changes: list[tuple[int, int, int]] = []
        self.freed: list[tuple[int, bool]] = []

    def guest_word_changed(self, address: int, old: int, new: int) -> None:
        self.changes.append((address, old, new))

    def freed_frame_accessed(self, address: int, write: bool) -> None:
        self.freed.append((address, write))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(accesses(), max_size=12), accesses())
def test_memory_reads_what_an_array_of_bytes_reads(
    writes: list[tuple[int, int, int]], read: tuple[int, int, int]
) -> None:
    memory = Memory()
    reference = bytearray(64)
    for address, size, value in writes:
        memory.write(address, size, value)
        reference[address : address + size] = value.to_bytes(size, "little")
    address, size, _ = read
    assert memory.read(address, size) == int.from_bytes(reference[address : address + size], "little")


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(accesses(), max_size=10), st.lists(accesses(), max_size=10))
def test_the_digest_is_equal_exactly_when_the_contents_are(
    left: list[tuple[int, int, int]], right: list[tuple[int, int, int]]
) -> None:
    memories = []
    for writes in (left, right):
        memory = Memory()
        memory.track = True
        for address, size, value in writes:
            memory.write(address, size, value)
        memories.append(memory)
    same = all(memories[0].read(8 * word, 8) == memories[1].read(8 * word, 8) for word in range(3))
    assert (memories[0].digest == memories[1].digest) == same


def test_a_watcher_sees_changes_of_guest_words_only_and_not_stores_of_the_same_value() -> None:
    memory = Memory()
    watcher = Recorder()
    memory.watcher = watcher
    memory.write(0x1004, 4, 5)
    memory.write(0x1004, 4, 5)
    memory.write(1 << 40, 8, 5)
    assert watcher.changes == [(0x1000, 0, 5 << 32)]


def test_access_to_a_freed_frame_is_reported() -> None:
    memory = Memory()
    watcher = Recorder()
    memory.watcher = watcher
    memory.free_frame(7)
    memory.read((7 << PAGE_SHIFT) + 8, 4)
    memory.write(7 << PAGE_SHIFT, 8, 1)
    memory.read(8 << PAGE_SHIFT, 8)
    assert watcher.freed == [((7 << PAGE_SHIFT) + 8, False), (7 << PAGE_SHIFT, True)]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(accesses(), min_size=1, max_size=8), accesses())
def test_a_cpu_reads_as_if_its_buffered_stores_had_reached_memory(
    stores: list[tuple[int, int, int]], read: tuple[int, int, int]
) -> None:
    memory = Memory()
    buffer = StoreBuffer(memory)
    drained = Memory()
    for number, (address, size, value) in enumerate(stores):
        buffer.pending.append(Pending(number + 1, address, size, value, True))
        drained.write(address, size, value)
    address, size, _ = read
    value = buffer.forward(address, size)
    if value < 0:
        value = memory.read(address, size)
    assert value == drained.read(address, size)


def test_a_load_that_a_buffered_store_covers_in_part_drains_the_buffer_up_to_it() -> None:
    memory = Memory()
    buffer = StoreBuffer(memory)
    buffer.pending.append(Pending(1, 8, 8, 1, True))
    buffer.pending.append(Pending(2, 0, 1, 2, True))
    buffer.pending.append(Pending(3, 16, 8, 3, False))
    buffer.pending.append(Pending(4, 16, 8, 4, True))
    assert buffer.forward(0, 8) == -1
    assert [entry.label for entry in buffer.pending] == [4]
    assert memory.read(0, 8) == 2
