"""Random strategies find what they are for, within measured numbers of runs, and are functions of their seeds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import PAD, YIELD, Op, Programs, ld, programs, run_toy, store

from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import HOLD, RUN
from mmufuzz.host.sites import BOOT
from mmufuzz.host.strategy import Strategy
from mmufuzz.search.strategies import BytesStrategy, Pct, RandomWalk, Sparse, count_bits, nth_bit, portfolio

PADS: tuple[Op, ...] = (PAD,) * 8
SB: Programs = ((*PADS, store(0, 1), ld(1), *PADS), (*PADS, store(1, 1), ld(0), *PADS))
TORN: Programs = ((*PADS, store(0, 1), store(1, 1), *PADS), (*PADS, ld(0), ld(1), *PADS))
LENGTH = 44
SEEDS = st.integers(0, (1 << 64) - 1)


def make(name: str, seed: int) -> Strategy:
    rng = Rng(seed)
    if name == "random walk":
        return RandomWalk(rng, LENGTH)
    if name == "pct":
        return Pct(rng, LENGTH)
    if name == "sparse":
        return Sparse(rng, LENGTH)
    if name == "bytes":
        return BytesStrategy(bytes(rng.below(256) >> (not i & 1) * 3 for i in range(8)), LENGTH)
    return portfolio(seed, LENGTH)


NAMES = ["random walk", "pct", "sparse", "bytes", "portfolio"]


@pytest.mark.parametrize(
    ("name", "least"), [("random walk", 3), ("pct", 4), ("sparse", 25), ("bytes", 20), ("portfolio", 15)]
)
def test_store_buffering_between_other_operations_is_found(name: str, least: int) -> None:
    hits = sum("((0,), (0,))" in run_toy(SB, strategy=make(name, seed)).guest for seed in range(200))
    assert hits >= least


@pytest.mark.parametrize(("name", "least"), [("random walk", 10), ("pct", 4), ("sparse", 2), ("portfolio", 2)])
def test_two_switches_at_the_right_places_are_found(name: str, least: int) -> None:
    hits = sum("((), (0, 1))" in run_toy(TORN, strategy=make(name, seed)).guest for seed in range(500))
    assert hits >= least


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_is_a_function_of_its_seed(name: str) -> None:
    schedules = [run_toy(SB, strategy=make(name, seed)).schedule for seed in range(20)]
    assert schedules == [run_toy(SB, strategy=make(name, seed)).schedule for seed in range(20)]
    assert len(set(schedules)) > 5


@settings(derandomize=True, deadline=None, max_examples=60)
@given(programs(3, 4, yields=True), SEEDS, st.integers(0, 3), st.integers(0, 2))
def test_sparse_makes_no_more_deviations_than_asked_for(program: Programs, seed: int, runs: int, holds: int) -> None:
    schedule = run_toy(program, strategy=Sparse(Rng(seed), 30, runs, holds)).schedule
    assert sum(deviation.kind == RUN and deviation.at != BOOT for deviation in schedule) <= runs
    assert sum(deviation.kind == HOLD for deviation in schedule) <= holds


@settings(derandomize=True, deadline=None, max_examples=40)
@given(programs(2, 4, yields=True))
def test_no_bytes_are_the_default_schedule(program: Programs) -> None:
    assert run_toy(program, strategy=BytesStrategy(b"", 50)).schedule == ()
    assert run_toy(program, strategy=BytesStrategy(b"\x05", 50)).schedule == ()


def test_two_bytes_are_one_deviation() -> None:
    program: Programs = ((ld(0),) * 8, (ld(1),) * 8)
    for action, kinds in ((0, [RUN]), (127, [RUN])):
        schedule = run_toy(program, strategy=BytesStrategy(bytes([3, action]), 50)).schedule
        assert [deviation.kind for deviation in schedule] == kinds
    for action in (128, 191, 192, 255):
        schedule = run_toy(SB, strategy=BytesStrategy(bytes([3, action]), 50)).schedule
        assert [deviation.kind for deviation in schedule] == [HOLD]


def test_pct_of_depth_one_without_holds_switches_only_by_priority() -> None:
    program: Programs = ((ld(0),) * 5, (ld(1),) * 5, (ld(1), YIELD))
    for seed in range(20):
        schedule = run_toy(program, strategy=Pct(Rng(seed), 30, 1, 0)).schedule
        assert len(schedule) <= 3


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(1, (1 << 40) - 1), st.data())
def test_bits_are_counted_and_numbered(mask: int, data: st.DataObject) -> None:
    assert count_bits(mask) == mask.bit_count()
    index = data.draw(st.integers(0, mask.bit_count() - 1))
    assert nth_bit(mask, index) == [bit for bit in range(40) if mask >> bit & 1][index]
