"""Every order of a few memory accesses: against an independent enumeration of x86-TSO (``toy``), right or broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from broken_buffers import broken, interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from order_programs import order_outcomes, order_states
from toy import FENCE, Op, Programs, ld, model_outcomes, store, xchg

from mmufuzz.search.orders import ACCESS, DRAIN, Foot, OrderError, Orders

MP: Programs = ((store(0, 1), store(1, 1)), (ld(1), ld(0)))
IRIW: Programs = ((store(0, 1),), (store(1, 1),), (ld(0), ld(1)), (ld(1), ld(0)))

_op = st.one_of(
    st.builds(ld, st.integers(0, 1)),
    st.builds(store, st.integers(0, 1), st.integers(1, 3)),
    st.builds(xchg, st.integers(0, 1), st.integers(1, 3)),
    st.just(FENCE),
)


def straight(threads: int, most: int) -> st.SearchStrategy[Programs]:
    return st.tuples(*[st.lists(_op, min_size=1, max_size=most).map(tuple)] * threads)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(straight(2, 4))
def test_two_threads_end_in_exactly_the_states_of_x86_tso(programs: Programs) -> None:
    assert order_outcomes(programs) == model_outcomes(programs)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(straight(3, 2))
def test_three_threads_end_in_exactly_the_states_of_x86_tso(programs: Programs) -> None:
    assert order_outcomes(programs) == model_outcomes(programs)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(straight(4, 1), _op, _op)
def test_four_threads_end_in_exactly_the_states_of_x86_tso(programs: Programs, one: Op, other: Op) -> None:
    longer = (programs[0], programs[1], (*programs[2], one), (*programs[3], other))
    assert order_outcomes(longer) == model_outcomes(longer)


@pytest.mark.oracle
@settings(derandomize=True, deadline=None, max_examples=800)
@given(st.one_of(straight(2, 5), straight(3, 3), straight(4, 2)))
def test_many_larger_programs_end_in_exactly_the_states_of_x86_tso(programs: Programs) -> None:
    if sum(len(program) for program in programs) <= 8:
        assert order_outcomes(programs) == model_outcomes(programs)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(straight(3, 2), st.permutations([0, 1, 2]))
def test_the_search_does_not_depend_on_the_numbers_of_the_threads(programs: Programs, order: list[int]) -> None:
    renumbered = tuple(programs[index] for index in order)
    states = {(tuple(reads[index] for index in order), words) for reads, words in order_states(programs)[0]}
    assert order_states(renumbered)[0] == states


def test_independent_accesses_are_run_in_one_order_only() -> None:
    apart: Programs = ((ld(0), ld(0)), (ld(1), ld(1)), (ld(0), ld(1)))
    assert order_states(apart)[1] == 1


def test_iriw_takes_one_run_for_each_of_its_states() -> None:
    states, runs = order_states(IRIW)
    assert (len(states), runs) == (15, 15)


def test_a_load_is_tried_before_and_after_the_drain_of_its_own_cpus_store() -> None:
    # Forwarded, the load runs ahead of the other CPU's store in coherence order; after the drain it may see it.
    own: Programs = ((store(0, 1), ld(0)), (store(0, 2),))
    states = order_states(own)[0]
    assert {words[0] for reads, words in states if reads[0] == (1,)} == {1, 2}
    assert (((2,), ()), (2, 0, 0, 0)) in states


# Broken store buffers: the search must follow them, not what it expects of a right one.


@interpreted
@settings(derandomize=True, deadline=None, max_examples=60)
@given(straight(2, 3), st.sampled_from(["no forwarding", "weak fence"]))
def test_a_broken_buffer_ends_in_exactly_the_states_of_a_machine_broken_alike(programs: Programs, name: str) -> None:
    with broken(name):
        assert order_outcomes(programs) == model_outcomes(programs, mutant=name)


@interpreted
@settings(derandomize=True, deadline=None, max_examples=60)
@given(straight(2, 3))
def test_a_lifo_buffer_ends_in_states_of_a_lifo_machine(programs: Programs) -> None:
    with broken("lifo"):
        assert order_outcomes(programs) <= model_outcomes(programs, mutant="lifo")


@interpreted
def test_a_lifo_buffer_is_seen_wherever_two_stores_pend_together() -> None:
    with broken("lifo"):
        assert order_outcomes(MP) == model_outcomes(MP, mutant="lifo")


# A search that is wrong about which accesses depend on each other must fail these comparisons.


def _writes_only(self: Foot, other: Foot) -> bool:
    return self.writes & other.writes != 0


def _reads_only(self: Foot, other: Foot) -> bool:
    return (self.writes & other.reads | self.reads & other.writes) != 0


@interpreted
@pytest.mark.parametrize("conflicts", [_writes_only, _reads_only], ids=["writes only", "reads only"])
def test_without_one_kind_of_conflict_final_states_are_missed(
    conflicts: Callable[[Foot, Foot], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Foot, "conflicts", conflicts)
    shapes = (MP, ((store(0, 1),), (store(0, 2),)))
    assert any(order_outcomes(shape) < model_outcomes(shape) for shape in shapes)


# The search by itself.


def test_a_run_that_offers_other_accesses_than_before_is_an_error() -> None:
    orders = Orders()
    feet = {ACCESS: Foot(1, 0), 2 + DRAIN: Foot(0, 1)}
    orders.decide(feet)
    orders.decide({2 + DRAIN: Foot(0, 1)})
    assert orders.advance()
    with pytest.raises(OrderError, match="other memory accesses"):
        orders.decide({ACCESS: Foot(1, 0)})


def test_a_run_that_ends_too_early_is_an_error() -> None:
    orders = Orders()
    orders.decide({ACCESS: Foot(1, 0), 2 + DRAIN: Foot(0, 1)})
    orders.decide({2 + DRAIN: Foot(0, 1)})
    assert orders.advance()
    with pytest.raises(OrderError, match="ended before"):
        orders.advance()
