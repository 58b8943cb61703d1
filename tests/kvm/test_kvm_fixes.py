"""Profiles and fixes: which behaviours a kernel has, and what reverting and applying change."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmufuzz.case.error import CaseError
from mmufuzz.kvm import switches as on
from mmufuzz.kvm.fixes import BENIGN, FIXES, KERNELS, LATEST, behaviours, find

V6_1 = {
    on.WRITE_PF_TO_SP,
    on.REEXECUTE_OPT_IN,
    on.USER_FAILURE_IS_UD,
    on.BREAKPOINT_BEFORE_DECODE,
    on.NO_SINGLESTEP_ON_FAULT,
    on.MMIO_SCRATCH,
    on.SKIP_FAILS_ON_EXCEPTION,
    on.MEMOPP_CHECK,
    on.EIP_CHECK,
    on.NULL_SS,
    on.STD_USER_ACCESS,
    on.SYSENTER_CS,
    on.LOCKED_ATOMIC,
    on.REP_ZERO_QUIRK,
    on.POP_SS_SHADOW,
}
V6_8 = V6_1 | {on.SELF_CHANGE_IN_FETCH, on.TRACK_DIRECT_CALL, on.DUMMY_ROOT, on.SEGMENT_PRIVILEGE}
V6_9 = V6_8 | {on.REEXECUTE_LOCKLESS, on.REEXECUTE_ONE_PATH, on.REEXECUTE_FLAG_ONLY, on.MOVBE66}
GUARD = {on.RETRY_CHECK, on.RETRY_RECORD_FAULT, on.RETRY_RECORD_FAILURE}
V6_12 = V6_9 | GUARD | {on.BARRIER_EMULATOR, on.BARRIER_ACCOUNT, on.UNPROTECT_IFF_ZAPPED, on.RETRY_REWRITE}


@pytest.mark.parametrize(
    "kernel, expected", [("v6.1", V6_1), ("v6.8", V6_8), ("v6.9", V6_9), ("v6.12", V6_12), ("latest", V6_12)]
)
def test_a_profile_is_the_set_of_behaviours_that_kernel_has(kernel: str, expected: set[str]) -> None:
    assert behaviours(kernel, (), ()) == expected


def test_every_later_kernel_has_what_the_earlier_one_had() -> None:
    for earlier, later in pairwise(KERNELS):
        assert behaviours(earlier, (), ()) < behaviours(later, (), ())
    assert KERNELS[-1] == LATEST


@pytest.mark.parametrize("fix", FIXES, ids=[fix.id for fix in FIXES])
def test_reverting_takes_exactly_the_behaviours_of_the_fix_and_applying_brings_them_back(fix: object) -> None:
    assert isinstance(fix, type(FIXES[0]))
    without = behaviours(LATEST, (fix.id,), ())
    assert behaviours(LATEST, (), ()) - without == set(fix.behaviours)
    assert behaviours(LATEST, (fix.id,), (fix.id,)) == behaviours(LATEST, (), ())


@pytest.mark.parametrize("fix", FIXES, ids=[fix.id for fix in FIXES])
def test_a_fix_says_what_it_is_and_where(fix: object) -> None:
    assert isinstance(fix, type(FIXES[0]))
    assert fix.title and fix.commit and fix.behaviours and ":" in fix.citation
    assert fix.kernel in KERNELS
    assert fix.shows in (BENIGN, "coherence", "livelock", "lifetime", "architecture", "emulator", "warn")


def test_a_fix_can_be_named_by_its_entry_in_the_zoo() -> None:
    assert find("H1") is find("track-write-barrier") is find("h1")
    assert behaviours("v6.12", ("H1",), ()) == V6_12 - {on.BARRIER_EMULATOR, on.BARRIER_ACCOUNT}


def test_one_half_of_the_barrier_can_be_applied_to_an_old_kernel() -> None:
    assert behaviours("v6.9", (), ("track-write-barrier.account",)) == V6_9 | {on.BARRIER_ACCOUNT}


def test_a_revert_gives_way_to_an_apply() -> None:
    assert behaviours("v6.12", ("retry-guard",), ("retry-guard",)) == V6_12


@pytest.mark.parametrize("kernel", ["v6.2", "", "6.12"])
def test_an_unknown_kernel_is_an_error(kernel: str) -> None:
    with pytest.raises(CaseError, match="expected one of v6"):
        behaviours(kernel, (), ())


@pytest.mark.parametrize("revert, apply", [(("nonsense",), ()), ((), ("nonsense",))])
def test_an_unknown_fix_is_an_error(revert: tuple[str, ...], apply: tuple[str, ...]) -> None:
    with pytest.raises(CaseError, match="nonsense"):
        behaviours("v6.12", revert, apply)


def test_the_switches_of_the_model_follow_the_behaviours() -> None:
    having = on.Fixes(frozenset(V6_12))
    lacking = on.Fixes(frozenset())
    # Not vars(): in the compiled core the attributes are in a struct.
    names = [name for name in dir(having) if not name.startswith("_")]
    assert all(getattr(having, name) for name in names) and not any(getattr(lacking, name) for name in names)
    assert len(names) == len(V6_12)
