"""Schedules: labels, deviations and their replay, fairness, and the ways a run ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import BASE, FENCE, YIELD, Op, Programs, ToyMachine, ld, lock, programs, run_toy, spin, store, unlock, xchg

from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.sched import DEADLOCK, ENDED, EVENT_LIMIT, STOPPED, BoundaryWatcher, Host, RunStop
from mmufuzz.host.sites import (
    BOOT,
    LOCK_UNLOCK,
    MAX_OCCURRENCE,
    MAX_STEPS,
    MAX_THREADS,
    N_SITES,
    SITE_NAMES,
    STORE_SITES,
    THREAD_START,
    THREAD_YIELD,
    WORD_LOAD,
    WORD_STORE,
    label,
    label_occurrence,
    label_site,
    label_step,
    label_thread,
)
from mmufuzz.host.strategy import STOP, Strategy
from mmufuzz.host.thread import Body
from mmufuzz.host.trace import NOTE
from mmufuzz.search.strategies import BytesStrategy, RandomWalk, portfolio

SEEDS = st.integers(0, (1 << 64) - 1)
LENGTHS = st.integers(1, 80)
STRATEGIES = st.one_of(
    st.builds(portfolio, SEEDS, LENGTHS),
    st.builds(BytesStrategy, st.binary(max_size=10), LENGTHS),
    st.builds(lambda seed, length: RandomWalk(Rng(seed), length, 128, 128, 64), SEEDS, LENGTHS),
)


HANDSHAKE: Programs = ((store(0, 1), spin(1)), (store(1, 1), spin(0)))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.integers(0, MAX_THREADS - 1),
    st.integers(0, MAX_STEPS - 1),
    st.integers(0, N_SITES - 1),
    st.integers(1, MAX_OCCURRENCE),
)
def test_a_label_unpacks_to_what_it_was_packed_from(thread: int, step: int, site: int, occurrence: int) -> None:
    packed = label(thread, step, site, occurrence)
    assert packed != BOOT
    unpacked = label_thread(packed), label_step(packed), label_site(packed), label_occurrence(packed)
    assert unpacked == (thread, step, site, occurrence)


def test_every_site_has_a_name_and_stores_are_known_by_it() -> None:
    assert len(SITE_NAMES) == N_SITES == len(set(SITE_NAMES))
    assert WORD_STORE in STORE_SITES
    assert LOCK_UNLOCK in STORE_SITES
    assert WORD_LOAD not in STORE_SITES


def test_the_default_schedule_runs_each_thread_to_its_end() -> None:
    trace = run_toy(((store(0, 1), ld(1)), (store(1, 1), ld(0)))).trace
    threads = [label_thread(entry[0]) for entry in trace]
    assert threads == sorted(threads)


def test_labels_count_occurrences_within_a_step() -> None:
    trace = run_toy(((spin(0),), (store(0, 1),))).trace
    loads = [packed for packed, address, _ in trace if address and label_site(packed) == WORD_LOAD]
    assert [label_occurrence(entry) for entry in loads] == [1, 2]


@settings(derandomize=True, deadline=None, max_examples=250)
@given(
    st.one_of(programs(2, 4, yields=True), programs(3, 3, yields=True), st.just(HANDSHAKE)),
    STRATEGIES,
    st.booleans(),
)
def test_what_a_strategy_decided_replays_to_the_same_trace(program: Programs, strategy: Strategy, tso: bool) -> None:
    decided = run_toy(program, strategy=strategy, tso=tso)
    replayed = run_toy(program, decided.schedule, tso=tso)
    assert replayed.trace == decided.trace
    assert replayed.guest == decided.guest
    assert replayed.schedule == decided.schedule


@settings(derandomize=True, deadline=None, max_examples=100)
@given(programs(3, 3, yields=True), SEEDS, st.data())
def test_a_schedule_for_another_program_still_replays_what_it_did(
    program: Programs, seed: int, data: st.DataObject
) -> None:
    other = data.draw(programs(3, 3, yields=True))
    schedule = run_toy(other, strategy=RandomWalk(Rng(seed), 60, 128, 128, 64)).schedule
    first = run_toy(program, schedule)
    again = run_toy(program, first.schedule)
    assert (first.trace, first.schedule) == (again.trace, again.schedule)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(programs(3, 4, yields=True), SEEDS)
def test_a_run_is_a_function_of_program_and_seed(program: Programs, seed: int) -> None:
    first = run_toy(program, strategy=portfolio(seed, 60))
    second = run_toy(program, strategy=portfolio(seed, 60))
    assert first.digest == second.digest


def test_releases_at_the_same_event_replay_in_the_order_of_the_schedule() -> None:
    program = ((store(0, 1), ld(1), YIELD), (store(0, 2), ld(1), YIELD))
    stores = [label(thread, 0, WORD_STORE, 1) for thread in (0, 1)]
    loaded = label(1, 1, WORD_LOAD, 1)
    switch = Deviation(RUN, stores[0], 1)
    for order in ((0, 1), (1, 0)):
        holds = [Deviation(HOLD, stores[thread], thread, loaded) for thread in order]
        outcome = run_toy(program, (switch, *holds))
        assert outcome.schedule == (switch, *holds)
        assert f"({order[1] + 1}, 0, 0, 0)" in outcome.guest


def test_store_buffering_needs_one_hold_and_nothing_else() -> None:
    program = ((store(0, 1), ld(1)), (store(1, 1), ld(0)))
    hold = Deviation(HOLD, label(0, 0, WORD_STORE, 1), 0)
    assert run_toy(program).guest.startswith("(((0,), (1,))")
    assert run_toy(program, (hold,)).guest.startswith("(((0,), (0,))")


def test_a_hold_has_no_effect_under_sequential_consistency() -> None:
    program = ((store(0, 1), ld(1)), (store(1, 1), ld(0)))
    outcome = run_toy(program, (Deviation(HOLD, label(0, 0, WORD_STORE, 1), 0),), tso=False)
    assert outcome.schedule == ()
    assert outcome.guest == run_toy(program, tso=False).guest


def test_deviations_without_effect_are_not_recorded() -> None:
    program = ((store(0, 1), ld(1)), (store(1, 1),))
    nowhere = label(0, 77, WORD_STORE, 1)
    schedule = (
        Deviation(RUN, nowhere, 1),
        Deviation(RUN, label(0, 0, WORD_STORE, 1), 0),
        Deviation(RUN, label(0, 0, WORD_STORE, 1), 9),
        Deviation(HOLD, nowhere, 0),
    )
    assert run_toy(program, schedule).schedule == ()


def test_a_tlb_deviation_of_a_thread_that_is_not_there_has_no_effect() -> None:
    """Reduction drops threads; nobody looks at a schedule that a Host follows."""
    program = ((store(0, 1), ld(1)), (store(1, 1),))
    stored = label(0, 0, WORD_STORE, 1)
    plain = run_toy(program)
    assert run_toy(program, (Deviation(EVICT, stored, 2, BOOT, BASE),)).digest == plain.digest


def test_labels_count_on_in_a_step_that_comes_back() -> None:
    class Looping(Body):
        def __init__(self, host: Host) -> None:
            self.host = host

        def run(self) -> None:
            thread = self.host.current
            for step in (0, 0, 1, 0, 1):
                thread.step = step
                thread.store(WORD_STORE, BASE, step)

    machine = ToyMachine(((),))
    machine.host.threads.clear()
    machine.host.spawn("looping", Looping(machine.host))
    machine.host.run()
    stores = [packed for packed, _, _ in machine.host.trace.entries() if label_site(packed) == WORD_STORE]
    assert stores == [label(0, step, WORD_STORE, number) for step, number in ((0, 1), (0, 2), (1, 1), (0, 3), (1, 2))]


def test_a_site_passed_more_often_than_labels_can_count_ends_the_run() -> None:
    class Storing(Body):
        def __init__(self, host: Host) -> None:
            self.host = host

        def run(self) -> None:
            for value in range(2 * MAX_OCCURRENCE):
                self.host.current.store(WORD_STORE, BASE, value)

    machine = ToyMachine(((),), event_limit=4 * MAX_OCCURRENCE)
    machine.host.threads.clear()
    machine.host.spawn("storing", Storing(machine.host))
    machine.host.run()
    assert machine.host.status == EVENT_LIMIT
    assert label_occurrence(machine.host.last) == MAX_OCCURRENCE


def test_there_are_no_more_threads_than_labels_can_name() -> None:
    machine = ToyMachine(((),) * (MAX_THREADS - 1))
    machine.host.spawn("last", machine.bodies[0])
    with pytest.raises(ValueError, match=f"more than {MAX_THREADS} threads"):
        machine.host.spawn("one too many", machine.bodies[0])


class Adversary(Strategy):
    """Runs the lowest-numbered thread it may, always."""

    def __init__(self) -> None:
        self.horizon = 1 << 20

    def pick(self, current: int, enabled: int, label: int) -> int:
        return (enabled & -enabled).bit_length() - 1


def test_a_spinning_thread_cannot_starve_the_others_even_under_an_adversary() -> None:
    machine = ToyMachine(((spin(0),), (spin(1), store(0, 1)), (FENCE, FENCE, store(1, 1))))
    machine.host.decide_with(Adversary())
    machine.host.run()
    assert machine.host.status == ENDED
    assert machine.host.events < 60


def test_a_thread_that_never_yields_is_made_to() -> None:
    class Busy(Body):
        def __init__(self, host: Host) -> None:
            self.host = host

        def run(self) -> None:
            thread = self.host.current
            while thread.load(WORD_LOAD, BASE) == 0:
                pass

    machine = ToyMachine(((store(0, 1),),), event_limit=5000)
    machine.host.threads.clear()
    machine.host.spawn("busy", Busy(machine.host))
    machine.host.spawn("setter", machine.bodies[0])
    machine.host.run()
    assert machine.host.status == ENDED


class NeverDrains(Strategy):
    """Holds every store and never lets one go."""

    def __init__(self) -> None:
        self.horizon = 1 << 20

    def hold(self, label: int) -> bool:
        return True


def test_a_held_store_becomes_visible_when_its_thread_keeps_yielding() -> None:
    outcome = run_toy(HANDSHAKE, strategy=NeverDrains())
    assert outcome.events < 60
    assert outcome.guest


def test_a_held_store_of_an_ended_thread_becomes_visible_too() -> None:
    outcome = run_toy(((store(0, 1),), (spin(0),)), strategy=NeverDrains())
    assert outcome.events < 60
    assert outcome.guest


def test_threads_that_wait_for_each_other_are_a_deadlock() -> None:
    program = ((lock(0), lock(1), unlock(1), unlock(0)), (lock(1), lock(0), unlock(0), unlock(1)))
    machine = ToyMachine(program)
    machine.host.follow([Deviation(RUN, label(0, 0, SITE_NAMES.index("lock.lock"), 1), 1)])
    machine.host.run()
    assert machine.host.status == DEADLOCK


def test_a_condition_that_only_a_held_store_would_make_true_is_no_deadlock() -> None:
    program = ((Op("wait", 0),), (store(0, 1),))
    assert run_toy(program, strategy=NeverDrains()).guest.startswith("(((), ())")


def test_the_event_limit_ends_a_livelock() -> None:
    machine = ToyMachine(((spin(0),), (spin(0),)), event_limit=100)
    machine.host.run()
    assert machine.host.status == EVENT_LIMIT
    assert machine.host.events == 101


def test_a_strategy_can_stop_a_run() -> None:
    class Stopper(Strategy):
        def __init__(self) -> None:
            self.horizon = 100

        def pick(self, current: int, enabled: int, label: int) -> int:
            return STOP

    machine = ToyMachine(((ld(0),), (ld(0),)))
    machine.host.decide_with(Stopper())
    machine.host.run()
    assert machine.host.status == STOPPED
    assert machine.host.trace.entries() == []


def test_tlb_deviations_reach_the_named_cpu_in_replay_and_under_a_strategy() -> None:
    program = ((ld(0), ld(1)), (ld(0), YIELD, ld(1)))
    schedule = (
        Deviation(FILL, BOOT, 1, BOOT, 0x2000),
        Deviation(EVICT, label(0, 0, WORD_LOAD, 1), 1, BOOT, 0x3000),
        Deviation(FILL, label(1, 1, THREAD_YIELD, 1), 0, BOOT, 0x4000),
        Deviation(EVICT, label(1, 0, WORD_LOAD, 1), 0, BOOT, 0x5000),
    )
    for strategy in (None, RandomWalk(Rng(1), 100), portfolio(0, 100)):
        machine = ToyMachine(program)
        machine.host.follow(list(schedule))
        if strategy is not None:
            machine.host.decide_with(strategy)
        machine.host.run()
        assert machine.bodies[1].tlb == [("fill", 0x2000), ("evict", 0x3000)]
        assert machine.bodies[0].tlb == [("evict", 0x5000), ("fill", 0x4000)]


class QuietWatcher(BoundaryWatcher):
    def __init__(self, host: Host) -> None:
        self.host = host
        self.quiet: list[bool] = []

    def at_yield(self) -> None:
        self.quiet.append(self.host.quiet)
        if self.quiet[-1]:
            raise RunStop


def test_the_liveness_phase_starts_when_the_schedule_is_used_up() -> None:
    machine = ToyMachine(((spin(0),), (YIELD, YIELD, spin(0))))
    watcher = QuietWatcher(machine.host)
    machine.host.watcher = watcher
    machine.host.follow([Deviation(EVICT, label(1, 1, THREAD_YIELD, 1), 0, BOOT, 0x1000)])
    machine.host.run()
    assert watcher.quiet == [False, False, False, True]
    assert machine.host.status == STOPPED


def test_deviations_that_never_come_up_delay_the_liveness_phase_but_do_not_prevent_it() -> None:
    machine = ToyMachine(((spin(0),), (spin(0),)), event_limit=5000)
    watcher = QuietWatcher(machine.host)
    machine.host.watcher = watcher
    machine.host.follow([Deviation(RUN, label(0, 9, WORD_LOAD, 1), 1), Deviation(HOLD, label(0, 9, WORD_STORE, 1))])
    machine.host.run()
    assert machine.host.status == STOPPED
    assert watcher.quiet[-1]


def test_at_the_horizon_the_strategy_hands_over() -> None:
    strategy = RandomWalk(Rng(3), 40, 128, 128, 0)
    machine = ToyMachine(((store(1, 1), spin(0)), (store(2, 1), spin(0))))
    watcher = QuietWatcher(machine.host)
    machine.host.watcher = watcher
    machine.host.decide_with(strategy)
    machine.host.run()
    assert 40 <= machine.host.events < 50
    assert machine.memory.read(BASE + 8, 8) == machine.memory.read(BASE + 16, 8) == 1


class BoundaryRecorder(BoundaryWatcher):
    def __init__(self, host: Host) -> None:
        self.host = host
        self.seen: list[tuple[bool, ...]] = []

    def at_yield(self) -> None:
        self.seen.append(tuple(thread.at_boundary for thread in self.host.threads))


def test_a_preempted_thread_is_not_at_a_boundary() -> None:
    machine = ToyMachine(((ld(0), ld(1)), (YIELD,), (ld(0),)))
    watcher = BoundaryRecorder(machine.host)
    machine.host.watcher = watcher
    machine.host.follow([Deviation(RUN, label(0, 0, WORD_LOAD, 1), 1)])
    machine.host.run()
    assert watcher.seen == [(False, True, True)]


def test_notes_stand_in_the_trace_where_they_were_made() -> None:
    class Noter(Body):
        def __init__(self, host: Host) -> None:
            self.host = host

        def run(self) -> None:
            self.host.note("hello")

    machine = ToyMachine(())
    machine.host.spawn("noter", Noter(machine.host))
    machine.host.run()
    assert machine.host.trace.notes() == ["hello"]
    assert machine.host.trace.entries()[1] == (NOTE, 0, 0)
    assert label_site(machine.host.trace.entries()[0][0]) == THREAD_START


def test_locked_operations_read_and_write_in_one_event() -> None:
    program = ((xchg(0, 1), xchg(0, 2)), (xchg(0, 3),))
    seen = {run_toy(program, strategy=RandomWalk(Rng(seed), 50, 128)).guest for seed in range(60)}
    assert len(seen) == 3
