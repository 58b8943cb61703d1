"""Profiles and fixes: which behaviours a kernel has, and what reverting and applying change."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmufuzz.case.error import CaseError
from mmufuzz.kvm.fixes import (
    BARRIER_ACCOUNT,
    BARRIER_EMULATOR,
    BENIGN,
    BREAKPOINT_BEFORE_DECODE,
    DUMMY_ROOT,
    EIP_CHECK,
    FIXES,
    KERNELS,
    LATEST,
    LOCKED_ATOMIC,
    MEMOPP_CHECK,
    MMIO_SCRATCH,
    MOVBE66,
    NO_SINGLESTEP_ON_FAULT,
    NULL_SS,
    POP_SS_SHADOW,
    REEXECUTE_FLAG_ONLY,
    REEXECUTE_LOCKLESS,
    REEXECUTE_ONE_PATH,
    REEXECUTE_OPT_IN,
    REP_ZERO_QUIRK,
    RETRY_CHECK,
    RETRY_RECORD_FAILURE,
    RETRY_RECORD_FAULT,
    RETRY_REWRITE,
    SEGMENT_PRIVILEGE,
    SELF_CHANGE_IN_FETCH,
    SKIP_FAILS_ON_EXCEPTION,
    STD_USER_ACCESS,
    SYSENTER_CS,
    TRACK_DIRECT_CALL,
    UNPROTECT_IFF_ZAPPED,
    USER_FAILURE_IS_UD,
    WRITE_PF_TO_SP,
    behaviours,
    find,
)
from mmufuzz.kvm.switches import Fixes

V6_1 = {
    WRITE_PF_TO_SP,
    REEXECUTE_OPT_IN,
    USER_FAILURE_IS_UD,
    BREAKPOINT_BEFORE_DECODE,
    NO_SINGLESTEP_ON_FAULT,
    MMIO_SCRATCH,
    SKIP_FAILS_ON_EXCEPTION,
    MEMOPP_CHECK,
    EIP_CHECK,
    NULL_SS,
    STD_USER_ACCESS,
    SYSENTER_CS,
    LOCKED_ATOMIC,
    REP_ZERO_QUIRK,
    POP_SS_SHADOW,
}
V6_8 = V6_1 | {SELF_CHANGE_IN_FETCH, TRACK_DIRECT_CALL, DUMMY_ROOT, SEGMENT_PRIVILEGE}
V6_9 = V6_8 | {REEXECUTE_LOCKLESS, REEXECUTE_ONE_PATH, REEXECUTE_FLAG_ONLY, MOVBE66}
GUARD = {RETRY_CHECK, RETRY_RECORD_FAULT, RETRY_RECORD_FAILURE}
V6_12 = V6_9 | GUARD | {BARRIER_EMULATOR, BARRIER_ACCOUNT, UNPROTECT_IFF_ZAPPED, RETRY_REWRITE}


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
    assert behaviours("v6.12", ("H1",), ()) == V6_12 - {BARRIER_EMULATOR, BARRIER_ACCOUNT}


def test_one_half_of_the_barrier_can_be_applied_to_an_old_kernel() -> None:
    assert behaviours("v6.9", (), ("track-write-barrier.account",)) == V6_9 | {BARRIER_ACCOUNT}


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
    on = Fixes(frozenset(V6_12))
    off = Fixes(frozenset())
    # Not vars(): in the compiled core the attributes are in a struct.
    names = [name for name in dir(on) if not name.startswith("_")]
    assert all(getattr(on, name) for name in names) and not any(getattr(off, name) for name in names)
    assert len(names) == len(V6_12)
