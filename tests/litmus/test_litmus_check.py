"""A test on the whole stack: its final states, against an independent enumeration of x86-TSO, and the verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import FENCE, Op, Programs, ld, model_outcomes, store, xchg

import mmufuzz.litmus.check
from mmufuzz.case.model import Case
from mmufuzz.host.sites import GUEST_ATOMIC, GUEST_FETCH, SPTE_WALK, label, label_site, label_step
from mmufuzz.litmus.build import FIRST, build
from mmufuzz.litmus.check import CUT_SHORT, FOUND, REFUTED, VALIDATED, Result, check, observation, summary
from mmufuzz.litmus.model import LitmusTest
from mmufuzz.litmus.reader import read
from mmufuzz.outcome import OK, Outcome
from mmufuzz.run import run
from mmufuzz.search.order_strategy import OrderStrategy, Plan, strays
from mmufuzz.search.orders import Orders

SB = r"""X86 SB
{ x=0; y=0; }
 P0          | P1          ;
 MOV [x],$1  | MOV [y],$1  ;
 MOV EAX,[y] | MOV EAX,[x] ;
exists (0:EAX=0 /\ 1:EAX=0)
"""


def as_is(case: Case) -> Case:
    return case


def checked(text: str, stop_after: int = 0) -> Result:
    return check(read("t", text), as_is, lambda runs: runs == stop_after)


# Final states.

REGISTERS = {"X86": ["EAX", "EBX", "ECX", "EDX"], "X86_64": ["rax", "r9", "rdi", "r15"]}
"""By the number of the read that each takes."""

_op = st.one_of(
    st.builds(ld, st.integers(0, 1)),
    st.builds(store, st.integers(0, 1), st.integers(1, 3)),
    st.builds(xchg, st.integers(0, 1), st.integers(1, 3)),
    st.just(FENCE),
)


def litmus(programs: Programs, arch: str) -> LitmusTest:
    """``programs`` of the toy machine as a litmus test that observes all registers and both locations."""
    columns = []
    state = ["uint64_t w0", "uint64_t w1"] if arch == "X86_64" else []
    observed = ["w0", "w1"]
    for thread, program in enumerate(programs):
        column = []
        free = iter(REGISTERS[arch])
        for op in program:
            name = next(free) if op.kind in ("ld", "xchg") else ""
            if name:
                observed.append(f"{thread}:{name}")
            if op.kind == "xchg":
                state.append(f"{thread}:{name}={op.value}")
            column.append(instruction(op, name, arch))
        columns.append(column)
    rows = [" | ".join(f"P{thread}" for thread in range(len(programs)))]
    for number in range(max(len(column) for column in columns)):
        rows.append(" | ".join(column[number] if number < len(column) else "" for column in columns))
    text = f"{arch} t\n{{ {'; '.join(state)} }}\n" + "".join(f"{row} ;\n" for row in rows)
    return read("t", f"{text}locations [{'; '.join(observed)}]\nforall (true)\n")


def instruction(op: Op, name: str, arch: str) -> str:
    if op.kind == "mf":
        return "MFENCE"
    if arch == "X86_64":
        operands = {"ld": f"(w{op.word}),%{name}", "st": f"${op.value},(w{op.word})", "xchg": f"%{name},(w{op.word})"}
        return f"{'xchgq' if op.kind == 'xchg' else 'movq'} {operands[op.kind]}"
    operands = {"ld": f"{name},[w{op.word}]", "st": f"[w{op.word}],${op.value}", "xchg": f"[w{op.word}],{name}"}
    return f"{'XCHG' if op.kind == 'xchg' else 'MOV'} {operands[op.kind]}"


def stack_outcomes(programs: Programs, arch: str) -> set[str]:
    """Final states in the text form of ``toy.model_outcomes``."""
    test = litmus(programs, arch)
    result = check(test, as_is, lambda runs: False)
    assert result.verdict == VALIDATED
    found = set()
    for state in result.states:
        values = {str(item): value for item, value in zip(test.observed, state, strict=True)}
        reads = []
        for thread, program in enumerate(programs):
            count = sum(1 for op in program if op.kind in ("ld", "xchg"))
            reads.append(tuple(values[f"{thread}:{name}"] for name in REGISTERS[arch][:count]))
        found.add(repr((tuple(reads), (values.get("[w0]", 0), values.get("[w1]", 0), 0, 0), ())))
    return found


def straight(threads: int, most: int) -> st.SearchStrategy[Programs]:
    return st.tuples(*[st.lists(_op, min_size=1, max_size=most).map(tuple)] * threads)


# Every program has to touch both words: ``locations`` speaks of what the test mentions.
_touch = ((store(0, 1),), (store(1, 1),))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(straight(2, 2), st.sampled_from(["X86", "X86_64"]))
def test_random_programs_of_two_threads_end_in_exactly_the_states_of_x86_tso(programs: Programs, arch: str) -> None:
    longer = tuple((*first, *program) for first, program in zip(_touch, programs, strict=True))
    assert stack_outcomes(longer, arch) == model_outcomes(longer)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(straight(2, 1), straight(1, 2), st.sampled_from(["X86", "X86_64"]))
def test_random_programs_of_three_threads_end_in_exactly_the_states_of_x86_tso(
    writers: Programs, reader: Programs, arch: str
) -> None:
    programs = (*(first + program for first, program in zip(_touch, writers, strict=True)), *reader)
    assert stack_outcomes(programs, arch) == model_outcomes(programs)


@pytest.mark.oracle
@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.one_of(straight(2, 3), straight(3, 1)), st.sampled_from(["X86", "X86_64"]))
def test_many_larger_programs_end_in_exactly_the_states_of_x86_tso(programs: Programs, arch: str) -> None:
    longer = tuple((*_touch[index % 2], *program) for index, program in enumerate(programs))
    assert stack_outcomes(longer, arch) == model_outcomes(longer)


def test_a_load_may_and_may_not_be_forwarded_from_a_store_that_is_about_to_drain() -> None:
    own: Programs = ((store(0, 1), ld(0)), (store(0, 2), store(1, 1)))
    assert stack_outcomes(own, "X86") == model_outcomes(own)


def test_initial_values_and_sizes_reach_the_guest() -> None:
    text = "X86_64 t\n{ int8_t x=-2; uint64_t y=-2; z=x; 0:rbx=7; int16_t 0:rcx=-1; }\n P0 ;\n movb (x),%al ;\n"
    result = checked(text + "locations [x; y; z; 0:rbx; 0:rcx; 0:al]\nforall (true)\n")
    state = "0:al=-2; 0:rbx=7; 0:rcx=-1; [x]=-2; [y]=18446744073709551614; [z]=x;"
    assert summary(result)[2] == f"1     *>{state}"


def test_each_thread_arrives_before_any_begins() -> None:
    case, plans = build(read("t", SB))
    strategy = OrderStrategy(plans, Orders())
    trace = run(case, strategy).trace
    arrivals = [at for at, entry in enumerate(trace) if entry[0] > 0 and label_site(entry[0]) == GUEST_ATOMIC]
    begun = [at for at, entry in enumerate(trace) if entry[0] > 0 and label_step(entry[0]) >= FIRST]
    assert strategy.complete
    assert len(arrivals) == 2
    assert max(arrivals) < min(begun)


# What is said.


def test_the_summary_has_herds_shape() -> None:
    assert summary(checked(SB)) == [
        "Test SB Allowed",
        "States 4",
        "3     *>0:EAX=0; 1:EAX=0;",
        "4     :>0:EAX=0; 1:EAX=1;",
        "4     :>0:EAX=1; 1:EAX=0;",
        "3     :>0:EAX=1; 1:EAX=1;",
        "Ok",
        "Witnesses",
        "Positive: 3 Negative: 11",
        r"Condition exists (0:EAX=0 /\ 1:EAX=0)",
        "Observation SB Sometimes 3 11",
    ]


VERDICTS = [
    ("exists (0:EAX=0)", VALIDATED, "Allowed", "Ok", "Sometimes"),
    ("exists (0:EAX=2)", REFUTED, "Allowed", "No", "Never"),
    ("~exists (0:EAX=2)", VALIDATED, "Forbidden", "Ok", "Never"),
    ("~exists (0:EAX=0)", REFUTED, "Forbidden", "No", "Sometimes"),
    ("forall (0:EAX=0 \\/ 0:EAX=1)", VALIDATED, "Required", "Ok", "Always"),
    ("forall (0:EAX=0)", REFUTED, "Required", "No", "Sometimes"),
]


@pytest.mark.parametrize("condition, verdict, kind, word, observed", VERDICTS, ids=[row[0] for row in VERDICTS])
def test_the_verdict_follows_the_quantifier(condition: str, verdict: str, kind: str, word: str, observed: str) -> None:
    result = checked(SB.split("exists", maxsplit=1)[0] + condition)
    lines = summary(result)
    assert (result.verdict, lines[0], observation(result)) == (verdict, f"Test SB {kind}", observed)
    assert word in lines
    witnesses = (result.positive, result.negative)
    if kind == "Forbidden":
        witnesses = (result.negative, result.positive)
    assert f"Positive: {witnesses[0]} Negative: {witnesses[1]}" in lines
    assert f"Observation SB {observed} {result.positive} {result.negative}" in lines


@pytest.mark.parametrize("condition", ["exists (0:EAX=0)", "~exists (0:EAX=7)", "forall (0:EAX!=7)"])
def test_a_search_that_was_cut_short_validates_nothing(condition: str) -> None:
    result = checked(SB.split("exists", maxsplit=1)[0] + condition, stop_after=2)
    assert (result.runs, result.verdict) == (2, CUT_SHORT)
    assert "Incomplete" in summary(result)


def test_a_search_that_was_cut_short_may_refute() -> None:
    assert checked(SB.split("exists", maxsplit=1)[0] + "forall (0:EAX=7)", stop_after=1).verdict == REFUTED


def test_a_run_past_the_horizon_cuts_the_search_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def short_sighted(plans: list[Plan], search: Orders) -> OrderStrategy:
        strategy = OrderStrategy(plans, search)
        strategy.horizon = 103
        return strategy

    monkeypatch.setattr(mmufuzz.litmus.check, "OrderStrategy", short_sighted)
    result = checked(SB)
    assert (result.runs, result.complete, result.verdict) == (1, False, CUT_SHORT)


def test_a_finding_of_an_oracle_ends_the_search() -> None:
    def limited(case: Case) -> Case:
        return replace(case, options=replace(case.options, event_limit=60))

    result = check(read("t", SB), limited, lambda runs: False)
    assert (result.runs, result.verdict) == (1, FOUND)
    assert result.finding is not None and result.finding.kind == "suspect"
    assert "Finding" in summary(result)


# The runs.


@pytest.mark.parametrize("name", ["exists (0:EAX=0 /\\ 1:EAX=0)", "~exists (0:EAX=1 /\\ 1:EAX=1)", "forall (0:EAX=1)"])
def test_the_witness_is_a_case_that_shows_it_again(name: str) -> None:
    result = checked(SB.split("exists", maxsplit=1)[0] + name)
    assert result.witness is not None
    outcome = run(result.witness)
    assert outcome.verdict == OK
    state = tuple(outcome.registers[item.thread][0] for item in result.test.observed)
    assert result.satisfies(state) == (result.test.quantifier != "forall")


def test_nothing_but_the_planned_accesses_happens_between_the_first_and_the_last() -> None:
    case, plans = build(read("t", SB))
    trace = run(case, OrderStrategy(plans, Orders())).trace
    assert strays(plans, trace) == 0
    second_fetch = label(1, FIRST, GUEST_FETCH, 2)
    assert strays(plans, [*trace, (second_fetch, 0, 0)]) == second_fetch
    walk = label(1, FIRST, SPTE_WALK, 1)
    assert strays(plans, [*trace, (walk, 0, 0)]) == walk
    assert strays(plans, [*trace, (label(1, FIRST - 1, SPTE_WALK, 1), 0, 0)]) == 0


def test_a_run_that_leaves_the_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def straying(case: Case, strategy: OrderStrategy) -> Outcome:
        outcome = run(case, strategy)
        outcome.trace.append((label(0, FIRST, SPTE_WALK, 1), 0, 0))
        return outcome

    monkeypatch.setattr(mmufuzz.litmus.check, "run", straying)
    with pytest.raises(RuntimeError, match=r"vcpu0@3\.spte\.walk 1 was not planned"):
        checked(SB)


def test_equal_tests_give_equal_results() -> None:
    first, second = checked(SB), checked(SB)
    assert first.states == second.states
    assert list(first.states) == list(second.states)
    assert first.witness == second.witness
