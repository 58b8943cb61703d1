"""The host's threads see memory as x86-TSO allows, no more and no less (independent machine in ``toy``)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from toy import FENCE, Programs, ld, lock, model_outcomes, programs, run_toy, store, unlock, xchg

from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import Outcome
from mmufuzz.search.explore import COMPLETE, explore

SHAPES: dict[str, Programs] = {
    "SB": ((store(0, 1), ld(1)), (store(1, 1), ld(0))),
    "SB with fences": ((store(0, 1), FENCE, ld(1)), (store(1, 1), FENCE, ld(0))),
    "SB with one fence": ((store(0, 1), FENCE, ld(1)), (store(1, 1), ld(0))),
    "SB with xchg": ((xchg(0, 1), ld(1)), (xchg(1, 1), ld(0))),
    "MP": ((store(0, 1), store(1, 1)), (ld(1), ld(0))),
    "LB": ((ld(0), store(1, 1)), (ld(1), store(0, 1))),
    "2+2W": ((store(0, 1), store(1, 2)), (store(1, 1), store(0, 2))),
    "S": ((store(0, 2), store(1, 1)), (ld(1), store(0, 1))),
    "R": ((store(0, 1), store(1, 1)), (store(1, 2), ld(0))),
    "n5": ((store(0, 1), ld(0)), (store(0, 2), ld(0))),
    "n6": ((store(0, 1), ld(0), ld(1)), (store(1, 2), store(0, 2))),
    "IRIW": ((store(0, 1),), (store(1, 1),), (ld(0), ld(1)), (ld(1), ld(0))),
    "WRC": ((store(0, 1),), (ld(0), store(1, 1)), (ld(1), ld(0))),
    "SB of three": ((store(0, 1), ld(1)), (store(1, 1), ld(2)), (store(2, 1), ld(0))),
    "partial store": ((store(0, 1, 4, 4), ld(0), ld(1)), (store(1, 1), store(0, 2, 1))),
    "unlock is a plain store": ((lock(0), store(0, 1), unlock(0), ld(1)), (store(1, 1), ld(0))),
}
NON_SC = {"SB", "SB with one fence", "n6", "R", "SB of three", "unlock is a plain store"}


def outcomes(shape: Programs, tso: bool = True) -> set[str]:
    def run_with(strategy: Strategy) -> Outcome:
        return run_toy(shape, strategy=strategy, tso=tso, track=True)

    result = explore(run_with, None, lambda: False)
    assert result.verdict == COMPLETE
    return set(result.outcomes)


@pytest.mark.parametrize("name", SHAPES)
def test_a_litmus_shape_has_exactly_the_outcomes_of_x86_tso(name: str) -> None:
    assert outcomes(SHAPES[name]) == model_outcomes(SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_without_store_buffers_it_has_those_of_sequential_consistency(name: str) -> None:
    sequential = outcomes(SHAPES[name], tso=False)
    assert sequential == model_outcomes(SHAPES[name], tso=False)
    assert (sequential != outcomes(SHAPES[name])) == (name in NON_SC)


@pytest.mark.parametrize("mutant", ["lifo", "no forwarding", "weak fence"])
def test_the_shapes_tell_a_wrong_store_buffer_from_a_right_one(mutant: str) -> None:
    assert any(outcomes(shape) != model_outcomes(shape, mutant=mutant) for shape in SHAPES.values())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(programs(2, 3))
def test_random_programs_have_exactly_the_outcomes_of_x86_tso(program: Programs) -> None:
    assert outcomes(program) == model_outcomes(program)
