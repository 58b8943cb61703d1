"""What races a run shows, and that schedules aimed at them show what other orders and store buffers do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import FENCE, PAD, Op, Programs, ld, lock, programs, run_toy, spin, store, unlock, xchg

from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import HOLD, RUN
from mmufuzz.host.sites import label_site, label_step, label_thread
from mmufuzz.search.racing import ACCESSES, MOST_KINDS, RARE_TRIES, Aims, Races

PADS: tuple[Op, ...] = (PAD,) * 8
SB: Programs = ((*PADS, store(0, 1), ld(1), *PADS), (*PADS, store(1, 1), ld(0), *PADS))
TORN: Programs = ((*PADS, store(0, 1), store(1, 1), *PADS), (*PADS, ld(0), ld(1), *PADS))
SEEDS = st.integers(0, (1 << 64) - 1)


def races(program: Programs) -> Races:
    return Races(run_toy(program).trace)


def cycles(program: Programs) -> list[tuple[int, int, int, int]]:
    """(thread, step of its store, step of its load, step of the other's store) of every critical cycle."""
    found = []
    for group in races(program).cycles:
        for cycle in group:
            store_label = cycle.store.label
            steps = label_step(store_label), label_step(cycle.load.label), label_step(cycle.other_store.label)
            found.append((label_thread(store_label), *steps))
    return found


def test_a_store_that_a_load_may_overtake_is_in_a_cycle_with_the_other_thread_s() -> None:
    program: Programs = ((store(0, 1), ld(1)), (store(1, 1), ld(0)))
    assert sorted(cycles(program)) == [(0, 0, 1, 0), (1, 0, 1, 0)]


def test_only_the_thread_without_a_barrier_has_a_store_to_hold() -> None:
    program: Programs = ((store(0, 1), FENCE, ld(1)), (store(1, 1), ld(0)))
    assert cycles(program) == [(1, 0, 1, 0)]


@pytest.mark.parametrize(
    "program",
    [
        ((store(0, 1), FENCE, ld(1)), (store(1, 1), FENCE, ld(0))),
        ((xchg(0, 1), ld(1)), (xchg(1, 1), ld(0))),
        ((store(0, 1), ld(1)), (ld(0), store(1, 1))),
        ((store(0, 1), ld(0)), (store(0, 2), ld(0))),
        ((ld(0), store(1, 1)), (ld(1), store(0, 1))),
        ((lock(0), unlock(0), ld(1)), (store(1, 1), lock(0), unlock(0))),
    ],
    ids=["fences", "locked stores", "no cycle", "one word", "loads first", "an unlock"],
)
def test_where_tso_allows_nothing_more_there_is_no_cycle(program: Programs) -> None:
    assert cycles(program) == []


def test_two_reads_do_not_race_and_one_thread_does_not_race_with_itself() -> None:
    assert races(((ld(0), ld(1)), (ld(0), store(2, 1), ld(2)))).pairs == []
    pairs = races(((ld(0),), (store(0, 1),))).pairs
    assert [[(first.thread, second.thread) for first, second in group] for group in pairs] == [[(0, 1)], [(1, 0)]]


def test_a_thread_that_spins_does_not_make_a_race_of_every_turn() -> None:
    program: Programs = ((spin(0), *((ld(1),) * 900)), (*PADS, store(1, 1), *((store(2, 1),) * 40), spin(3)))
    found = Races(run_toy(program, event_limit=4000).trace)
    assert all(len(accesses) <= ACCESSES for accesses in found.by_thread)
    assert sum(len(group) for group in found.pairs) < 20_000


def hits(program: Programs, aim: str, wanted: str, seeds: int) -> int:
    """Of so many aimed schedules those whose run ends with ``wanted``."""
    aims = Aims()
    known = races(program)
    count = 0
    for seed in range(seeds):
        rng = Rng(seed)
        schedule = aims.relax(known, rng) if aim == "relax" else aims.flip(known, rng)
        count += wanted in run_toy(program, schedule).guest
    return count


def test_store_buffering_between_other_operations_is_aimed_at() -> None:
    assert hits(SB, "relax", "((0,), (0,))", 100) >= 30


def test_two_switches_at_the_right_places_are_aimed_at() -> None:
    assert hits(TORN, "flip", "((), (0, 1))", 100) >= 5


@settings(derandomize=True, deadline=None, max_examples=60)
@given(programs(3, 4, yields=True), SEEDS)
def test_an_aimed_schedule_is_sparse_and_a_function_of_its_seed(program: Programs, seed: int) -> None:
    known = races(program)
    schedule = Aims().schedule(known, Rng(seed))
    assert schedule == Aims().schedule(known, Rng(seed))
    assert sum(deviation.kind == HOLD for deviation in schedule) <= 1
    assert sum(deviation.kind == RUN for deviation in schedule) <= 3
    assert not schedule or known.cycles or known.pairs


def test_a_kind_of_race_that_was_seldom_tried_goes_first() -> None:
    rare_and_common: Programs = ((store(0, 1), ld(1), xchg(2, 1), ld(3)), (store(1, 1), ld(0), store(3, 1), ld(2)))
    known = races(rare_and_common)
    assert len(known.pair_keys) > 2
    aims = Aims()
    for key in known.pair_keys[1:]:
        aims.tried[key] = 1000
    for seed in range(60):
        aims.flip(known, Rng(seed))
    assert aims.tried[known.pair_keys[0]] > 60 // len(known.pair_keys)


def test_a_new_kind_of_cycle_gets_most_schedules_at_first() -> None:
    known = races(SB)
    shares = []
    for tried in (0, RARE_TRIES):
        aims = Aims()
        aims.tried = dict.fromkeys(known.cycle_keys, tried)
        schedules = [aims.schedule(known, Rng(seed)) for seed in range(200)]
        shares.append(sum(any(item.kind == HOLD for item in schedule) for schedule in schedules))
    assert shares[0] > shares[1] + 40


def test_kinds_of_races_are_the_same_in_every_run() -> None:
    one = races(SB)
    other = races(((*PADS, *SB[0]), SB[1]))
    assert one.cycle_keys == other.cycle_keys and one.pair_keys == other.pair_keys
    first = one.cycles[0][0]
    assert label_site(first.store.label) != label_site(first.load.label)


def test_the_count_of_turns_is_bounded() -> None:
    aims = Aims()
    rng = Rng(1)
    for key in range(MOST_KINDS + 1):
        aims._least_tried([key], rng)
    assert len(aims.tried) == 1
