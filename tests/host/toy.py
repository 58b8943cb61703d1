"""Tiny concurrent programs, run on ``Host`` and on an x86-TSO machine that shares no code with it."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st

from mmufuzz.host.deviation import Deviation
from mmufuzz.host.lock import Lock
from mmufuzz.host.memory import Memory
from mmufuzz.host.sched import DEADLOCK, ENDED, EVENT_LIMIT, Host
from mmufuzz.host.sites import LOCK_LOCK, LOCK_UNLOCK, MB, WORD_ATOMIC, WORD_LOAD, WORD_STORE
from mmufuzz.host.strategy import Strategy
from mmufuzz.host.thread import Body, Waitable
from mmufuzz.outcome import FINDING, SUSPECT, Finding, Outcome

BASE = 1 << 32
LOCKS = BASE + 0x1000


class Op(NamedTuple):
    """One operation. ``word`` is a word or lock number; ``value`` what is stored; ``size`` and ``offset`` are bytes."""

    kind: str
    word: int = 0
    value: int = 0
    size: int = 8
    offset: int = 0


Programs = tuple[tuple[Op, ...], ...]


def ld(word: int, size: int = 8, offset: int = 0) -> Op:
    return Op("ld", word, 0, size, offset)


def store(word: int, value: int, size: int = 8, offset: int = 0) -> Op:
    return Op("st", word, value, size, offset)


def xchg(word: int, value: int) -> Op:
    return Op("xchg", word, value)


def spin(word: int) -> Op:
    """Yield until ``word`` is not 0."""
    return Op("spin", word)


FENCE = Op("mf")
YIELD = Op("yield")
PAD = Op("pad")
"""A visible operation that does nothing."""


def lock(number: int) -> Op:
    return Op("lock", number)


def unlock(number: int) -> Op:
    return Op("unlock", number)


def append(value: int) -> Op:
    """Append ``value`` to a list that lock 0 protects, without a visible operation, and read it."""
    return Op("append", 0, value)


class NotZero(Waitable):
    def __init__(self, memory: Memory, address: int) -> None:
        self.memory = memory
        self.address = address

    def ready(self) -> bool:
        return self.memory.read(self.address, 8) != 0


class ToyBody(Body):
    def __init__(self, machine: ToyMachine, program: tuple[Op, ...]) -> None:
        self.machine = machine
        self.program = program
        self.reads: list[object] = []
        self.tlb: list[tuple[str, int]] = []

    def evict(self, gva: int) -> None:
        self.tlb.append(("evict", gva))

    def fill(self, gva: int) -> None:
        self.tlb.append(("fill", gva))

    def run(self) -> None:
        host = self.machine.host
        thread = host.current
        for step in range(len(self.program)):
            thread.step = step
            op = self.program[step]
            address = BASE + 8 * op.word + op.offset
            if op.kind == "ld":
                self.reads.append(thread.load(WORD_LOAD, address, op.size))
            elif op.kind == "st":
                thread.store(WORD_STORE, address, op.value, op.size)
            elif op.kind == "xchg":
                self.reads.append(thread.xchg(WORD_ATOMIC, address, op.value))
            elif op.kind == "mf":
                thread.fence(MB)
            elif op.kind == "lock":
                self.machine.locks[op.word].acquire()
            elif op.kind == "unlock":
                self.machine.locks[op.word].release()
            elif op.kind == "append":
                self.machine.data.append(op.value)
                self.reads.append(tuple(self.machine.data))
            elif op.kind == "pad":
                host.point(WORD_LOAD)
            elif op.kind == "yield":
                host.yield_()
            elif op.kind == "spin":
                while thread.load(WORD_LOAD, address) == 0:
                    host.yield_()
            elif op.kind == "wait":
                host.block(NotZero(host.memory, address))
            else:
                raise ValueError(op.kind)


class ToyMachine:
    """``programs`` on a Host, ready to run."""

    def __init__(self, programs: Programs, tso: bool = True, event_limit: int = 2000, track: bool = False) -> None:
        self.memory = Memory()
        self.memory.track = track
        self.host = Host(self.memory, tso, event_limit)
        self.host.track = track
        self.data: list[int] = []
        self.locks = [
            Lock(self.host, f"lock{number}", number, LOCKS + 8 * number, LOCK_LOCK, LOCK_UNLOCK) for number in range(2)
        ]
        self.bodies = [ToyBody(self, program) for program in programs]
        for index, body in enumerate(self.bodies):
            self.host.spawn(f"thread{index}", body)

    def final(self) -> str:
        reads = tuple(tuple(body.reads) for body in self.bodies)
        words = tuple(self.memory.words.get(BASE // 8 + word, 0) for word in range(4))
        if self.host.status == DEADLOCK:
            return repr(("deadlock", reads))
        return repr((reads, words, tuple(self.data)))


def run_toy(
    programs: Programs,
    schedule: tuple[Deviation, ...] = (),
    strategy: Strategy | None = None,
    tso: bool = True,
    track: bool = False,
    bad: str = "",
    event_limit: int = 2000,
) -> Outcome:
    """An ``Outcome`` as ``run`` would give it; a final state whose text contains ``bad`` is a finding."""
    machine = ToyMachine(programs, tso, event_limit, track)
    host = machine.host
    host.follow(list(schedule))
    if strategy is not None:
        host.decide_with(strategy)
    host.run()
    outcome = Outcome()
    outcome.schedule = tuple(host.deviations)
    outcome.trace = host.trace.entries()
    outcome.notes = host.trace.notes()
    outcome.events = host.events
    outcome.threads = tuple(thread.name for thread in host.threads)
    if host.status in (ENDED, DEADLOCK):
        outcome.guest = machine.final()
        if bad and bad in outcome.guest:
            outcome.verdict = FINDING
            outcome.findings.append(Finding("toy", bad, outcome.guest, host.last))
    elif host.status == EVENT_LIMIT:
        outcome.verdict = SUSPECT
    return outcome


# The independent machine (Owens, Sarkar, Sewell, "A better x86 memory model", TPHOLs 2009), over bytes.

Buffer = tuple[tuple[int, bytes], ...]


def _write(memory: bytes, offset: int, data: bytes) -> bytes:
    return memory[:offset] + data + memory[offset + len(data) :]


def _seen(memory: bytes, buffer: Buffer) -> bytes:
    for offset, data in buffer:
        memory = _write(memory, offset, data)
    return memory


class _State(NamedTuple):
    pcs: tuple[int, ...]
    reads: tuple[tuple[object, ...], ...]
    buffers: tuple[Buffer, ...]
    memory: bytes
    locks: tuple[int, ...]
    data: tuple[int, ...]


def _splits_buffered_store(buffer: Buffer, offset: int, size: int) -> bool:
    """Whether the youngest buffered store that overlaps the load covers only a part of it: the load must wait."""
    for start, data in reversed(buffer):
        if start < offset + size and offset < start + len(data):
            return not (start <= offset and offset + size <= start + len(data))
    return False


def _put(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


def _step(programs: Programs, state: _State, thread: int, tso: bool, mutant: str) -> _State | None:
    """What ``thread``'s next operation leads to; None if it cannot run."""
    op = programs[thread][state.pcs[thread]]
    buffer = state.buffers[thread]
    pcs = _put(state.pcs, thread, state.pcs[thread] + 1)
    offset = 8 * op.word + op.offset
    empty = not buffer or (mutant == "weak fence" and op.kind == "mf")
    changes: dict[str, Any] = {"pcs": pcs}
    reads: tuple[object, ...] = state.reads[thread]
    if op.kind == "ld":
        if _splits_buffered_store(buffer, offset, op.size):
            return None
        value = _seen(state.memory, () if mutant == "no forwarding" else buffer)[offset : offset + op.size]
        reads += (int.from_bytes(value, "little"),)
    elif op.kind == "st":
        data = (op.value & (1 << 8 * op.size) - 1).to_bytes(op.size, "little")
        if tso:
            changes["buffers"] = _put(state.buffers, thread, (*buffer, (offset, data)))
        else:
            changes["memory"] = _write(state.memory, offset, data)
    elif op.kind == "append":
        changes["data"] = (*state.data, op.value)
        reads += ((*state.data, op.value),)
    elif op.kind == "unlock":
        data = (0).to_bytes(8, "little")
        if tso:
            changes["buffers"] = _put(state.buffers, thread, (*buffer, (64 + 8 * op.word, data)))
        else:
            changes["memory"] = _write(state.memory, 64 + 8 * op.word, data)
    elif op.kind in ("xchg", "mf", "lock"):
        if not empty:
            return None
        if op.kind == "xchg":
            reads += (int.from_bytes(state.memory[offset : offset + 8], "little"),)
            changes["memory"] = _write(state.memory, offset, op.value.to_bytes(8, "little"))
        elif op.kind == "lock":
            where = 64 + 8 * op.word
            if state.memory[where : where + 8] != bytes(8):
                return None
            changes["memory"] = _write(state.memory, where, (thread + 1).to_bytes(8, "little"))
    elif op.kind not in ("yield", "pad"):
        raise ValueError(op.kind)
    changes["reads"] = _put(state.reads, thread, reads)
    return state._replace(**changes)


def model_outcomes(programs: Programs, tso: bool = True, mutant: str = "") -> set[str]:
    """Every final state, in the text form of ``ToyMachine.final``; programs with ``spin`` are not supported.

    ``mutant`` names a machine that is not x86-TSO: "lifo", "no forwarding" or "weak fence".
    """
    count = len(programs)
    start = _State((0,) * count, ((),) * count, ((),) * count, bytes(80), (), ())
    seen = {start}
    stack = [start]
    outcomes = set()
    while stack:
        state = stack.pop()
        successors = []
        for thread in range(count):
            if state.pcs[thread] < len(programs[thread]):
                following = _step(programs, state, thread, tso, mutant)
                if following is not None:
                    successors.append(following)
            if state.buffers[thread]:
                buffer = state.buffers[thread]
                oldest, rest = (buffer[-1], buffer[:-1]) if mutant == "lifo" else (buffer[0], buffer[1:])
                memory = _write(state.memory, *oldest)
                successors.append(state._replace(buffers=_put(state.buffers, thread, rest), memory=memory))
        if not successors:
            if all(state.pcs[thread] == len(programs[thread]) for thread in range(count)):
                words = tuple(int.from_bytes(state.memory[8 * w : 8 * w + 8], "little") for w in range(4))
                outcomes.add(repr((state.reads, words, state.data)))
            else:
                outcomes.add(repr(("deadlock", state.reads)))
        for following in successors:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return outcomes


# Random programs.


def _critical(number: int, inside: list[Op]) -> list[Op]:
    return [lock(number), *inside, unlock(number)]


_plain = st.one_of(
    st.builds(ld, st.integers(0, 1)),
    st.builds(store, st.integers(0, 1), st.integers(1, 3)),
    st.builds(xchg, st.integers(0, 1), st.integers(1, 3)),
    st.just(FENCE),
    st.builds(ld, st.just(0), st.sampled_from([1, 4]), st.sampled_from([0, 4])),
    st.builds(store, st.just(0), st.integers(1, 3), st.sampled_from([1, 4]), st.sampled_from([0, 4])),
)
_section = st.one_of(
    st.builds(_critical, st.just(0), st.lists(_plain | st.builds(append, st.integers(1, 2)), max_size=2)),
    st.builds(_critical, st.just(1), st.lists(_plain, max_size=2)),
    st.just([lock(0), lock(1), unlock(1), unlock(0)]),
    st.just([lock(1), lock(0), append(3), unlock(0), unlock(1)]),
)


def programs(threads: int, most: int, locks: bool = True, yields: bool = False) -> st.SearchStrategy[Programs]:
    """Programs for ``threads`` threads of at most ``most`` blocks each; a critical section is one block."""
    block = _plain.map(lambda op: [op])
    if locks:
        block = block | _section
    if yields:
        block = block | st.just([YIELD])
    body = st.lists(block, min_size=1, max_size=most).map(lambda blocks: tuple(op for ops in blocks for op in ops))
    return st.tuples(*[body] * threads)
