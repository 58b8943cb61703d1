"""Reduction with an end: the best Case so far is kept when runs, time or patience run out."""

from __future__ import annotations

from collections.abc import Callable

from mmufuzz.campaign.attribution import changed, shown_unchanged, shows
from mmufuzz.campaign.running import safe_run
from mmufuzz.campaign.suspects import stuck
from mmufuzz.case.model import Case
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import SUSPECT, Finding, Outcome
from mmufuzz.search.edits import key
from mmufuzz.search.reduce import ReduceError, reduce

__all__ = ["shows", "shrink"]


class _EnoughError(Exception):
    """Leaves a reduction."""


def shrink(
    case: Case, finding: Finding, runs: int, should_stop: Callable[[], bool], tick: Callable[[int], None]
) -> tuple[Case, int]:
    """``case`` made as small as ``runs`` runs allow while it still shows ``finding``; and the runs it took.

    The kernel and its changes stay. What the unchanged kernel shows too is no reproducer of a finding that the
    changes are to blame for; nor is a run that just ends at the event limit one of a run that was stuck.
    ``should_stop`` is asked before each run; ``tick`` is told how many were made.
    """
    best = case
    made = 0
    blamed = changed(case) and not shown_unchanged(case, finding)
    suspected = finding.kind == SUSPECT and stuck(safe_run(case))

    def attempt(candidate: Case, strategy: Strategy | None) -> Outcome:
        nonlocal best, made
        if should_stop():
            raise _EnoughError
        made += 1
        tick(made)
        outcome = safe_run(candidate, strategy)
        if suspected and not stuck(outcome):
            return Outcome()
        if strategy is None and shows(outcome, finding) is not None:
            if blamed and shown_unchanged(candidate, finding):
                return Outcome()
            if key(candidate) < key(best):
                best = candidate
        return outcome

    try:
        return reduce(case, finding.fingerprint, attempt, runs, keep_kernel=True).case, made
    except (_EnoughError, ReduceError):
        # A reduction that ended early, or in something that does not replay, still leaves the best that did.
        return best, made
