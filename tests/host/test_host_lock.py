"""Locks: exclusion, the order rule, and a release that is a plain store."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from toy import FENCE, LOCKS, Op, Programs, ToyMachine, append, ld, lock, run_toy, store, unlock, xchg

from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.lock import LockWatcher
from mmufuzz.host.sched import ENDED
from mmufuzz.host.sites import (
    LOCK_LOCK,
    LOCK_UNLOCK,
    THREAD_WAIT,
    WORD_LOAD,
    WORD_STORE,
    label,
    label_site,
    label_thread,
)
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import Outcome
from mmufuzz.search.explore import COMPLETE, explore
from mmufuzz.search.strategies import portfolio


class Recorder(LockWatcher):
    def __init__(self) -> None:
        self.misuse: list[str] = []
        self.releases: list[str] = []

    def lock_misused(self, text: str) -> None:
        self.misuse.append(text)

    def releasing(self, name: str) -> None:
        self.releases.append(name)


def watched(programs: Programs) -> tuple[ToyMachine, Recorder]:
    machine = ToyMachine(programs)
    recorder = Recorder()
    for each in machine.locks:
        each.watcher = recorder
    machine.host.run()
    return machine, recorder


INCREMENT = (lock(0), ld(0), ld(1), store(0, 1), unlock(0))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, (1 << 64) - 1))
def test_critical_sections_exclude_each_other(seed: int) -> None:
    machine = ToyMachine((INCREMENT, INCREMENT, INCREMENT))
    machine.host.decide_with(portfolio(seed, 60))
    machine.host.run()
    holder = -1
    for packed, address, _ in machine.host.trace.entries():
        if address == LOCKS:
            holder = -1
        elif address:
            assert holder in (-1, label_thread(packed))
            holder = label_thread(packed)
    assert sorted(body.reads for body in machine.bodies) == [[0, 0], [1, 0], [1, 0]]


def test_data_under_a_lock_is_seen_in_every_order_the_lock_allows() -> None:
    def run_with(strategy: Strategy) -> Outcome:
        return run_toy(tuple((lock(0), append(n), unlock(0)) for n in range(3)), strategy=strategy, track=True)

    result = explore(run_with, None, lambda: False)
    assert result.verdict == COMPLETE
    assert len(result.outcomes) == 6


def test_a_release_can_sit_in_the_store_buffer_and_keeps_others_out() -> None:
    program: Programs = ((lock(0), unlock(0), ld(1), FENCE, ld(1)), (lock(0), store(1, 1), unlock(0)))
    hold = Deviation(HOLD, label(0, 1, LOCK_UNLOCK, 1), 0)
    switch = Deviation(RUN, label(0, 2, WORD_LOAD, 1), 1)
    held = run_toy(program, (hold, switch))
    assert any(label_site(entry[0]) == THREAD_WAIT for entry in held.trace)
    assert not any(label_site(entry[0]) == THREAD_WAIT for entry in run_toy(program, (switch,)).trace)


def test_taking_a_lock_drains_the_taker() -> None:
    program: Programs = ((store(0, 1), lock(0), ld(1), unlock(0)), (store(1, 1), xchg(2, 1), ld(0)))
    hold = Deviation(HOLD, label(0, 0, WORD_STORE, 1), 0)
    switch = Deviation(RUN, label(0, 2, WORD_LOAD, 1), 1)
    assert run_toy(program, (hold, switch)).guest.startswith("(((0,), (0, 1))")


def test_taking_locks_against_their_ranks_is_reported() -> None:
    machine, recorder = watched(((lock(1), lock(0), unlock(0), unlock(1)),))
    assert machine.host.status == ENDED
    assert recorder.misuse == ["lock0 taken by thread0 out of order"]
    assert recorder.releases == ["lock0", "lock1"]


def test_taking_a_lock_twice_is_reported() -> None:
    _, recorder = watched(((lock(0), lock(0)),))
    assert recorder.misuse[0] == "lock0 taken twice by thread0"


def test_releasing_a_lock_that_another_thread_holds_is_reported_and_does_nothing() -> None:
    machine, recorder = watched(((Op("unlock", 0),),))
    assert recorder.misuse == ["lock0 released by thread0, which does not hold it"]
    assert recorder.releases == []
    assert machine.host.events == 2


def test_acquisitions_are_counted_and_an_uncontended_lock_never_waits() -> None:
    machine, _ = watched((INCREMENT, INCREMENT))
    assert machine.locks[0].acquisitions == 2
    assert [label_site(entry[0]) for entry in machine.host.trace.entries()].count(LOCK_LOCK) == 2
    assert all(label_site(entry[0]) != THREAD_WAIT for entry in machine.host.trace.entries())
