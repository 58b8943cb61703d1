"""Exhaustive search: pruned search against plain full search, costs, limits, and what "complete" means."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy import (
    FENCE,
    YIELD,
    Programs,
    ToyMachine,
    append,
    ld,
    lock,
    model_outcomes,
    programs,
    run_toy,
    spin,
    store,
    unlock,
    xchg,
)

from mmufuzz.case.model import Case, Expect, Slot, Vcpu
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.memory import mix
from mmufuzz.host.sites import BOOT
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import FINDING, Outcome
from mmufuzz.search.explore import COMPLETE, INCOMPLETE, ExploreResult, NondeterminismError, explore, explore_case
from mmufuzz.search.strategies import portfolio

SB: Programs = ((store(0, 1), ld(1)), (store(1, 1), ld(0)))


def never() -> bool:
    return False


def search(
    program: Programs, bound: int | None = None, prune: bool = True, bad: str = "", limit: int = 1 << 30
) -> ExploreResult:
    runs = [0]

    def run_with(strategy: Strategy) -> Outcome:
        runs[0] += 1
        return run_toy(program, strategy=strategy, track=prune, bad=bad)

    return explore(run_with, bound, lambda: runs[0] >= limit, prune)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.one_of(programs(2, 2, yields=True), programs(3, 1, yields=True)))
def test_pruned_search_finds_what_plain_full_search_finds(program: Programs) -> None:
    plain = search(program, prune=False, limit=800)
    assume(plain.verdict == COMPLETE)
    pruned = search(program)
    assert pruned.verdict == COMPLETE
    assert set(pruned.outcomes) == set(plain.outcomes)
    assert pruned.schedules <= plain.schedules
    assert plain.pruned == 0


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.one_of(programs(2, 3, yields=True), programs(3, 2, yields=True)), st.integers(0, 2))
def test_pruned_search_finds_the_same_within_a_bound(program: Programs, bound: int) -> None:
    pruned = search(program, bound)
    plain = search(program, bound, prune=False)
    assert pruned.verdict == plain.verdict == COMPLETE
    assert set(pruned.outcomes) == set(plain.outcomes)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(programs(2, 3), st.integers(0, 3))
def test_a_bound_only_takes_outcomes_away_and_a_large_one_takes_none(program: Programs, bound: int) -> None:
    some = set(search(program, bound).outcomes)
    assert some <= set(search(program, bound + 1).outcomes)
    assert set(search(program, 100).outcomes) == model_outcomes(program)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(programs(3, 2, locks=False))
def test_the_numbering_of_threads_does_not_matter(program: Programs) -> None:
    def renumbered(text: str) -> object:
        reads, words, data = eval(text)
        return (reads[2], reads[0], reads[1]), words, data

    turned = (program[1], program[2], program[0])
    assert {renumbered(text) for text in search(turned).outcomes} == {eval(text) for text in search(program).outcomes}


class Forgetful(Strategy):
    """Passes questions on with a fingerprint of its own, one that leaves a component of the state out."""

    def __init__(self, inner: Strategy, machine: ToyMachine, forgets: str) -> None:
        self.inner = inner
        self.machine = machine
        self.forgets = forgets
        self.horizon = inner.horizon

    def begin(self, threads: int) -> None:
        self.inner.begin(threads)

    def pick(self, current: int, enabled: int, label: int) -> int:
        state = 0 if self.forgets == "memory" else self.machine.memory.digest
        for thread in self.machine.host.threads:
            if self.forgets != "history":
                state = mix(state, thread.local_state())
            if self.forgets != "buffers":
                for entry in thread.buffer.pending:
                    state = mix(state, entry.label)
                    if self.forgets != "holds":
                        state = mix(state, entry.held)
        self.inner.state = state
        self.inner.events = self.events
        return self.inner.pick(current, enabled, label)

    def hold(self, label: int) -> bool:
        self.inner.events = self.events
        return self.inner.hold(label)


# Programs with an outcome that is reached only through states that the component tells apart from others; SC or TSO.
SENSITIVE: dict[str, tuple[bool, Programs]] = {
    "memory": (False, ((store(0, 1), store(1, 1), ld(2)), (store(0, 2), store(2, 1), ld(1)))),
    "history": (False, ((ld(0),), (ld(0), store(0, 1)))),
    "buffers": (True, ((xchg(0, 1), store(0, 1), ld(1)), (xchg(1, 1), store(0, 2)))),
    "holds": (True, ((store(0, 1), store(1, 1), ld(2)), (xchg(2, 1), ld(0), ld(0), ld(1)))),
}


def outcomes_forgetting(program: Programs, tso: bool, forgets: str) -> set[str]:
    def run_with(strategy: Strategy) -> Outcome:
        machine = ToyMachine(program, tso, track=True)
        machine.host.decide_with(Forgetful(strategy, machine, forgets))
        machine.host.run()
        outcome = Outcome()
        outcome.guest = machine.final()
        return outcome

    return set(explore(run_with, None, never).outcomes)


@pytest.mark.parametrize("component", SENSITIVE)
def test_a_fingerprint_that_forgets_a_component_loses_outcomes(component: str) -> None:
    tso, program = SENSITIVE[component]
    expected = model_outcomes(program, tso)
    assert outcomes_forgetting(program, tso, "") == expected
    assert outcomes_forgetting(program, tso, component) < expected


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.one_of(programs(2, 3), programs(3, 2)), st.lists(st.integers(0, (1 << 64) - 1), min_size=8, max_size=8))
def test_runs_that_end_with_equal_fingerprints_end_alike(program: Programs, seeds: list[int]) -> None:
    results: dict[int, str] = {}
    for seed in seeds:
        machine = ToyMachine(program, track=True)
        machine.host.decide_with(portfolio(seed, 40))
        machine.host.run()
        assert results.setdefault(machine.host.fingerprint(), machine.final()) == machine.final()


def test_the_order_of_critical_sections_is_part_of_the_fingerprint_and_that_of_other_events_is_not() -> None:
    def fingerprint(program: Programs, first: int) -> int:
        machine = ToyMachine(program, track=True)
        machine.host.follow([Deviation(RUN, BOOT, first)])
        machine.host.run()
        return machine.host.fingerprint()

    sections: Programs = tuple((lock(0), append(n), unlock(0)) for n in (1, 2))
    assert fingerprint(sections, 0) != fingerprint(sections, 1)
    apart: Programs = ((lock(0), append(1), unlock(0), store(0, 1)), (lock(1), unlock(1), store(1, 1), ld(2)))
    assert fingerprint(apart, 0) == fingerprint(apart, 1)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(programs(2, 3), st.data())
def test_the_first_finding_has_the_least_cost_and_replays(program: Programs, data: st.DataObject) -> None:
    bad = data.draw(st.sampled_from(sorted(model_outcomes(program))))
    result = search(program, 8, bad=bad)
    assert result.verdict == FINDING
    assert result.finding is not None
    assert len(result.finding.schedule) == result.cost
    assert run_toy(program, result.finding.schedule, bad=bad).digest == result.finding.digest
    if result.cost:
        cheaper = search(program, result.cost - 1, bad=bad)
        assert cheaper.verdict == COMPLETE
        assert bad not in cheaper.outcomes


def test_store_buffering_is_found_at_the_cost_of_one_hold() -> None:
    result = search(SB, 3, bad="((0,), (0,))")
    assert result.finding is not None
    assert result.cost == 1
    assert [deviation.kind for deviation in result.finding.schedule] == [HOLD]


def test_an_outcome_keeps_an_example_schedule_that_leads_to_it() -> None:
    result = search(SB)
    assert len(result.outcomes) == 4
    for guest, reached in result.outcomes.items():
        assert reached.count > 0
        assert run_toy(SB, reached.schedule).guest == guest


def test_a_limit_gives_incomplete_and_the_cost_up_to_which_all_was_run() -> None:
    runs = [0]

    def run_with(strategy: Strategy) -> Outcome:
        runs[0] += 1
        return run_toy(SB, strategy=strategy)

    result = explore(run_with, 4, lambda: runs[0] >= 20, prune=False)
    assert result.verdict == INCOMPLETE
    assert result.schedules == 20
    everything = explore(lambda strategy: run_toy(SB, strategy=strategy), result.cost, never, prune=False)
    assert everything.verdict == COMPLETE
    assert set(everything.outcomes) <= set(result.outcomes)


def test_a_run_cut_short_by_the_event_limit_makes_the_search_incomplete() -> None:
    def run_with(strategy: Strategy) -> Outcome:
        return run_toy(((spin(0),), (spin(0),)), strategy=strategy, track=True, event_limit=50)

    assert explore(run_with, 0, never).verdict == INCOMPLETE


def test_a_run_that_goes_past_the_horizon_makes_the_search_incomplete() -> None:
    long = tuple([FENCE] * 1600)

    def run_with(strategy: Strategy) -> Outcome:
        return run_toy((long, (FENCE,)), strategy=strategy, track=True, event_limit=4000)

    assert explore(run_with, 0, never).verdict == INCOMPLETE


def test_threads_that_spin_fairly_are_searched_within_a_bound() -> None:
    result = search(((store(0, 1), spin(1)), (spin(0), store(1, 1)), (YIELD,)), 2)
    assert result.verdict == COMPLETE
    assert len(result.outcomes) >= 1


@pytest.mark.parametrize(("mark", "all_runs"), [("mmu_load", True), ("emulate.forced", False)])
def test_runs_that_reach_every_mark_are_counted(mark: str, all_runs: bool) -> None:
    guests = tuple(Vcpu("flat32", code_gva=gfn << 12, code_gfn=gfn, program=(b"\x90",)) for gfn in (1, 2))
    case = Case(slots=(Slot(0, 16),), vcpus=guests, expect=Expect(reach=(mark,)))
    result = explore_case(case, 1, never)
    assert result.schedules > 1
    assert result.reached == (result.schedules if all_runs else 0)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (SB, SB[:1], "did not come to|fewer options"),
        ((*SB, SB[0]), SB, "offered fewer options than before"),
        (SB, ((store(0, 1),), ()), "did not come to the choice"),
    ],
    ids=["no choice", "fewer options", "a shorter run"],
)
def test_a_program_that_does_not_repeat_is_noticed(first: Programs, then: Programs, message: str) -> None:
    calls = [0]

    def run_with(strategy: Strategy) -> Outcome:
        calls[0] += 1
        return run_toy(first if calls[0] == 1 else then, strategy=strategy)

    with pytest.raises(NondeterminismError, match=message):
        explore(run_with, None, never, prune=False)
