"""Reduction: exact targets on made-up findings and toy programs, bounded runs, edits that keep labels' meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Op, run_toy

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import ZAP_ALL_FAST, Case, HostThread, Options, Slot, Vcpu, Word
from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import EVICT, HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, THREAD_END, WORD_LOAD, WORD_STORE, label
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import FINDING, Finding, Outcome
from mmufuzz.search.edits import drop_steps, drop_thread, key, merge_frames, vcpu_first
from mmufuzz.search.explore import COMPLETE, explore
from mmufuzz.search.reduce import REPLAYS, ReduceError, Reducer, reduce, simpler_values
from mmufuzz.search.strategies import RandomWalk

RunFn = Callable[[Case, Strategy | None], Outcome]


def made_up(predicate: Callable[[Case], bool]) -> RunFn:
    """Runs that show the finding "bug" exactly when ``predicate`` holds, and repeat the Case's schedule."""

    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        outcome = Outcome()
        outcome.schedule = case.schedule
        if predicate(case):
            outcome.verdict = FINDING
            outcome.findings.append(Finding("coherence", "bug", "", 0))
        return outcome

    return run_fn


NOISY = Case(
    revert=("a", "b"),
    apply=("c",),
    options=Options(fep=True, n_max_mmu_pages=7, write_track=(3, 4), event_limit=999),
    slots=(Slot(0, 64), Slot(128, 16, True)),
    memory=tuple(Word(1, index, 0x1067 + (index << 12)) for index in range(20)),
    vcpus=(
        Vcpu("long4", 3, 5, regs=((0, 77), (3, 5)), program=(b"\x01\x02", b"\x90", b"\x0f\x31")),
        Vcpu("long4", 0, 5, regs=((1, 6),), program=(b"\xaa\xff", b"\x90\x07", b"\x90", b"\xab", b"\x90")),
        Vcpu("long4", program=(b"\x90",) * 4),
    ),
    host=(HostThread((ZAP_ALL_FAST,) * 3), HostThread((ZAP_ALL_FAST,))),
    schedule=(
        Deviation(RUN, label(0, 1, WORD_LOAD, 1), 1),
        Deviation(RUN, label(1, 3, WORD_STORE, 1), 2),
        Deviation(HOLD, label(1, 3, WORD_STORE, 1), 1, label(2, 0, WORD_LOAD, 1)),
        Deviation(HOLD, label(0, 2, WORD_STORE, 2), 0, label(4, 0, WORD_LOAD, 1)),
        Deviation(EVICT, label(3, 0, WORD_LOAD, 1), 1, BOOT, 0x5000),
    ),
)


def test_everything_that_does_not_matter_goes() -> None:
    result = reduce(NOISY, "bug", made_up(lambda case: True))
    assert key(result.case)[0] == (0,) * 12 + (0,)
    assert result.case.schedule == ()
    assert result.case.options == Options()


def test_a_step_and_a_word_are_all_that_stays_and_are_simplified() -> None:
    def predicate(case: Case) -> bool:
        steps = [step for vcpu in case.vcpus for step in vcpu.program]
        return any(step[:1] == b"\xaa" for step in steps) and any(word.value & 0x20 for word in case.memory)

    result = reduce(NOISY, "bug", made_up(predicate))
    assert [vcpu.program for vcpu in result.case.vcpus] == [(b"\xaa\x00",)]
    assert result.case.host == ()
    assert [word.value for word in result.case.memory] == [0x20]


def test_what_is_needed_together_stays_together() -> None:
    def predicate(case: Case) -> bool:
        threads = len(case.vcpus) == 2 and len(case.host) == 1
        return threads and len(case.memory) % 4 == 3 and 4 in case.options.write_track

    start = replace(NOISY, vcpus=NOISY.vcpus[:2], host=NOISY.host[:1], memory=NOISY.memory[:19], schedule=())
    result = reduce(start, "bug", made_up(predicate))
    assert len(result.case.memory) == 3
    assert result.case.options == Options(write_track=(4,))


def test_labels_and_actors_are_renumbered_with_their_threads_and_steps() -> None:
    def predicate(case: Case) -> bool:
        """Some deviation runs the vCPU with step ab.. after, and holds, the store of that very step."""
        for deviation in case.schedule:
            for index, vcpu in enumerate(case.vcpus):
                for step, code in enumerate(vcpu.program):
                    if code == b"\xab" and deviation.kind == HOLD and deviation.at == label(index, step, WORD_STORE, 1):
                        return True
        return False

    result = reduce(NOISY, "bug", made_up(predicate))
    assert [vcpu.program for vcpu in result.case.vcpus] == [(b"\xab",)]
    assert result.case.schedule == (Deviation(HOLD, label(0, 0, WORD_STORE, 1), 0),)


def test_a_candidate_with_another_finding_is_not_taken() -> None:
    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        outcome = Outcome()
        name, kind = ("bug", "coherence") if len(case.memory) >= 5 else ("bug", "lifetime")
        outcome.findings.append(Finding(kind, name, "", 0))
        return outcome

    assert len(reduce(NOISY, "bug", run_fn).case.memory) == 5


def test_a_candidate_that_is_no_valid_case_is_not_taken() -> None:
    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        if not case.vcpus:
            raise CaseError("vcpus", "at least one")
        return made_up(lambda _: True)(case, strategy)

    assert len(reduce(NOISY, "bug", run_fn).case.vcpus) == 1


def test_the_budget_bounds_the_runs() -> None:
    calls = [0]

    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        calls[0] += 1
        return made_up(lambda each: len(each.memory) >= 3)(case, strategy)

    result = reduce(NOISY, "bug", run_fn, budget=10)
    assert result.exhausted
    assert result.runs == calls[0] <= 13
    assert key(result.case) < key(NOISY)


def test_a_case_that_does_not_show_the_finding_is_an_error() -> None:
    with pytest.raises(ReduceError):
        reduce(NOISY, "bug", made_up(lambda case: False))


def test_the_finding_may_be_one_of_several() -> None:
    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        outcome = made_up(lambda each: bool(each.vcpus and each.vcpus[0].program))(case, strategy)
        if len(case.vcpus) > 1:
            outcome.findings.insert(0, Finding("livelock", "another", "", 0))
        return outcome

    reducer = Reducer(NOISY, "bug", run_fn, 100)
    assert reducer.kind == "coherence"
    assert len(reduce(NOISY, "bug", run_fn).case.vcpus) == 1


def test_tables_of_one_level_are_merged() -> None:
    def both_mapped(case: Case) -> bool:
        """Two entries of a vCPU's root lead to tables that map something."""
        if not case.vcpus or case.vcpus[0].cr3 != 5:
            return False
        words = {(word.gfn, word.index): word.value for word in case.memory}
        tables = [words.get((5, index), 0) for index in (0, 1)]
        return all(table & 1 and table >> 12 not in (0, 5) and words.get((table >> 12, 3), 0) & 1 for table in tables)

    # No frame becomes another by losing bits.
    memory = tuple(Word(*word) for word in ((5, 0, 0x6007), (5, 1, 0x9007), (6, 3, 0x8007), (9, 3, 0x8007), (9, 4, 0)))
    case = Case(memory=memory, vcpus=(Vcpu("long4", 0, 5),))
    reduced = reduce(case, "bug", made_up(both_mapped)).case
    assert [(word.gfn, word.index) for word in reduced.memory] in ([(5, 0), (5, 1), (6, 3)], [(5, 0), (5, 1), (9, 3)])


def test_merging_frames_merges_what_their_entries_point_at() -> None:
    upper = ((5, 0, 0x6001), (5, 1, 0x7001), (6, 3, 0x8001), (6, 4, 0x700))
    lower = ((7, 3, 0x9001), (7, 4, 0x6000), (9, 0, 0x7002))
    case = Case(memory=tuple(Word(*word) for word in upper + lower), vcpus=(Vcpu("long4", 0, 7),))
    merged = merge_frames(case, 7, 6)
    # A word that is no entry keeps its value; of two the first stays.
    expected = ((5, 0, 0x6001), (5, 1, 0x6001), (6, 3, 0x8001), (6, 4, 0x700), (8, 0, 0x7002))
    assert merged.memory == tuple(Word(*word) for word in expected)
    assert merged.vcpus[0].cr3 == 6


def test_a_result_that_does_not_show_the_finding_again_is_an_error() -> None:
    runs = reduce(NOISY, "bug", made_up(lambda case: True)).runs
    calls = [0]

    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        calls[0] += 1
        return made_up(lambda each: calls[0] <= runs - REPLAYS)(case, strategy)

    with pytest.raises(ReduceError, match="does not replay"):
        reduce(NOISY, "bug", run_fn)


def test_a_result_that_does_not_repeat_is_an_error() -> None:
    calls = [0]

    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        calls[0] += 1
        outcome = made_up(lambda each: True)(case, strategy)
        outcome.guest = str(calls[0])
        return outcome

    with pytest.raises(ReduceError):
        reduce(NOISY, "bug", run_fn)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=4))
def test_any_few_needed_steps_are_found_in_a_long_program(length: int, wanted: set[int]) -> None:
    program = tuple(bytes([step]) for step in range(length))
    needed = {bytes([step]) for step in wanted if step < length}
    case = Case(vcpus=(Vcpu("long4", flags=(), program=program),))
    result = reduce(case, "bug", made_up(lambda each: bool(each.vcpus) and needed <= set(each.vcpus[0].program)))
    assert result.case.vcpus[0].program == tuple(sorted(needed))
    assert result.runs < 40 + 40 * len(needed)


# Toy programs as Cases: three bytes a step.

KINDS = ("ld", "st", "xchg", "mf", "pad")
ST, LD, PADS = 1, 0, 4


def run_toy_case(bad: Callable[[str], bool]) -> RunFn:
    """A run function for vCPU programs of toy operations; a final state for which ``bad`` holds is the finding."""

    def run_fn(case: Case, strategy: Strategy | None) -> Outcome:
        programs = []
        for vcpu in case.vcpus:
            for code in vcpu.program:
                if len(code) != 3 or code[0] >= len(KINDS) or code[1] > 3:
                    raise CaseError("program", "a toy operation")
            programs.append(tuple(Op(KINDS[code[0]], code[1], code[2]) for code in vcpu.program))
        if not programs:
            raise CaseError("vcpus", "at least one")
        outcome = run_toy(tuple(programs), case.schedule, strategy)
        if bad(outcome.guest):
            outcome.verdict = FINDING
            outcome.findings.append(Finding("toy", "bug", "", 0))
        return outcome

    return run_fn


def toy_case(*programs: tuple[bytes, ...]) -> Case:
    return Case(vcpus=tuple(Vcpu("long4", flags=(), program=program) for program in programs))


def op(kind: int, word: int = 0, value: int = 0) -> bytes:
    return bytes([kind, word, value])


def failing(case: Case, run_fn: RunFn, seed: int) -> Case:
    """``case`` with a random schedule that shows the finding."""
    rng = Rng(seed)
    while True:
        outcome = run_fn(case, RandomWalk(rng.fork(), 100, 100, 100, 20))
        if outcome.findings:
            return replace(case, schedule=outcome.schedule)


def both_read_zero(guest: str) -> bool:
    return guest.count("(0,)") == 2 and "(1, 1, 0, 0)" in guest


NOISE = (op(PADS),) * 3
SB = toy_case(
    (*NOISE, op(ST, 0, 1), *NOISE, op(LD, 1), *NOISE),
    (*NOISE, op(PADS)),
    (*NOISE, op(ST, 1, 1), op(PADS), op(LD, 0), *NOISE),
)


@pytest.mark.parametrize("seed", range(4))
def test_store_buffering_among_noise_shrinks_to_four_operations_and_one_hold(seed: int) -> None:
    run_fn = run_toy_case(both_read_zero)
    start = failing(SB, run_fn, seed)
    result = reduce(start, "bug", run_fn, 4000)
    assert sorted(vcpu.program for vcpu in result.case.vcpus) == [
        (op(ST, 0, 1), op(LD, 1)),
        (op(ST, 1, 1), op(LD, 0)),
    ]
    assert result.case.schedule == (Deviation(HOLD, label(0, 0, WORD_STORE, 1)),)
    assert not result.exhausted


@pytest.mark.parametrize("seed", range(4))
def test_a_torn_read_among_noise_shrinks_to_four_operations_and_its_switches(seed: int) -> None:
    run_fn = run_toy_case(lambda guest: "(0, 2))" in guest)
    case = toy_case((*NOISE, op(ST, 0, 1), op(PADS), op(ST, 1, 2), *NOISE), (*NOISE, op(LD, 0), op(LD, 1), *NOISE))
    result = reduce(failing(case, run_fn, seed), "bug", run_fn, 4000)
    assert [vcpu.program for vcpu in result.case.vcpus] in (
        [(op(ST, 1, 2),), (op(LD, 0), op(LD, 1))],
        [(op(ST, 0, 1), op(ST, 1, 2)), (op(LD, 0), op(LD, 1))],
    )
    assert len(result.case.schedule) <= 2


@pytest.mark.parametrize("seed", range(3))
def test_a_reduced_case_cannot_be_reduced_further(seed: int) -> None:
    run_fn = run_toy_case(both_read_zero)
    result = reduce(failing(SB, run_fn, seed), "bug", run_fn, 4000)
    assert reduce(result.case, "bug", run_fn, 4000).case == result.case


def test_no_schedule_with_fewer_deviations_shows_the_reduced_finding() -> None:
    run_fn = run_toy_case(lambda guest: "((), (1, 0))" in guest)
    case = toy_case((op(ST, 0, 1), op(PADS), op(ST, 0, 0), op(PADS)), (op(LD, 0), op(LD, 0)))
    result = reduce(failing(case, run_fn, 5), "bug", run_fn)
    cost = sum(each.kind == HOLD or each.at != BOOT for each in result.case.schedule)
    assert cost > 0
    cheaper = explore(lambda strategy: run_fn(result.case, strategy), cost - 1, lambda: False, prune=False)
    assert cheaper.verdict == COMPLETE


# Edits.


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2), st.integers(0, 2), st.integers(0, 5), st.integers(0, 5), st.integers(1, 3))
def test_deleting_steps_moves_later_labels_of_that_thread_only(
    thread: int, labelled: int, step: int, first: int, size: int
) -> None:
    vcpus = (Vcpu("long4", program=(b"\x90",) * 9),) * 3
    deviation = Deviation(RUN, label(labelled, step, WORD_LOAD, 2), 0)
    after = drop_steps(Case(vcpus=vcpus, schedule=(deviation,)), thread, first, first + size)
    assert len(after.vcpus[thread].program) == 9 - size
    if labelled != thread or step < first:
        assert after.schedule == (deviation,)
    elif step < first + size:
        assert after.schedule == ()
    else:
        assert after.schedule == (Deviation(RUN, label(labelled, step - size, WORD_LOAD, 2), 0),)


def test_deleting_a_thread_deletes_what_it_did_and_renumbers_the_rest() -> None:
    after = drop_thread(NOISY, 1)
    assert after.vcpus == (NOISY.vcpus[0], NOISY.vcpus[2])
    assert after.schedule == (Deviation(HOLD, label(0, 2, WORD_STORE, 2), 0, label(3, 0, WORD_LOAD, 1)),)
    assert drop_thread(NOISY, 3).host == NOISY.host[1:]
    ends = Case(vcpus=NOISY.vcpus, schedule=(Deviation(RUN, label(1, 4, THREAD_END, 1), 2),))
    assert drop_thread(ends, 0).schedule == (Deviation(RUN, label(0, 4, THREAD_END, 1), 1),)
    assert drop_thread(ends, 2).schedule == ()


def test_a_vcpu_moves_to_the_front_with_its_labels_and_no_preemption_is_needed_to_start_it() -> None:
    after = vcpu_first(replace(NOISY, schedule=(*NOISY.schedule, Deviation(RUN, BOOT, 1))), 1)
    assert after.vcpus == (NOISY.vcpus[1], NOISY.vcpus[0], NOISY.vcpus[2])
    assert after.schedule == (
        Deviation(RUN, label(1, 1, WORD_LOAD, 1), 0),
        Deviation(RUN, label(0, 3, WORD_STORE, 1), 2),
        Deviation(HOLD, label(0, 3, WORD_STORE, 1), 0, label(2, 0, WORD_LOAD, 1)),
        Deviation(HOLD, label(1, 2, WORD_STORE, 2), 1, label(4, 0, WORD_LOAD, 1)),
        Deviation(EVICT, label(3, 0, WORD_LOAD, 1), 0, BOOT, 0x5000),
    )


def test_a_run_that_must_start_with_the_second_vcpu_is_renumbered() -> None:
    run_fn = run_toy_case(lambda guest: guest.count("(1,)") == 1)
    case = toy_case((op(LD, 0),), (op(ST, 0, 1),))
    result = reduce(replace(case, schedule=(Deviation(RUN, BOOT, 1),)), "bug", run_fn)
    assert [vcpu.program for vcpu in result.case.vcpus] == [(op(ST, 0, 1),), (op(LD, 0),)]
    assert result.case.schedule == ()


def test_a_hold_that_ended_in_a_deleted_step_drains_by_itself() -> None:
    case = replace(NOISY, schedule=NOISY.schedule[2:3])
    after = drop_steps(case, 2, 0, 1)
    assert after.schedule == (Deviation(HOLD, label(1, 3, WORD_STORE, 1), 1, BOOT),)


def test_a_preemption_in_a_deleted_step_slides_to_the_step_before() -> None:
    run_fn = run_toy_case(lambda guest: "((7,)" in guest)
    case = toy_case((op(PADS), op(PADS), op(LD, 0)), (op(ST, 0, 7),))
    start = replace(case, schedule=(Deviation(RUN, label(0, 1, WORD_LOAD, 1), 1),))
    reducer = Reducer(start, "bug", run_fn, 100)
    reducer.drop_steps()
    assert reducer.case.vcpus[0].program == (op(LD, 0),)
    assert reducer.case.schedule == (Deviation(RUN, BOOT, 1),)


def test_fewer_instructions_are_worth_more_than_anything_else() -> None:
    smaller = replace(NOISY, vcpus=NOISY.vcpus[:2], memory=NOISY.memory * 2, schedule=NOISY.schedule * 2)
    assert key(smaller) < key(NOISY)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.integers(0, (1 << 64) - 1))
def test_simpler_values_have_fewer_bits(value: int) -> None:
    assert all(each & value == each != value for each in simpler_values(value))
    assert len(simpler_values(value)) <= 15
