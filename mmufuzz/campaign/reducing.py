"""Reduction with an end: the best Case so far is kept when runs, time or patience run out."""

from __future__ import annotations

from collections.abc import Callable

from mmufuzz.campaign.running import safe_run
from mmufuzz.case.model import Case
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import Finding, Outcome
from mmufuzz.search.edits import key
from mmufuzz.search.reduce import ReduceError, reduce


class _EnoughError(Exception):
    """Leaves a reduction."""


def shows(outcome: Outcome, finding: Finding) -> Finding | None:
    """The finding of ``outcome`` that has the fingerprint of ``finding``."""
    for other in outcome.findings:
        if other.fingerprint == finding.fingerprint:
            return other
    return None


def shrink(
    case: Case, finding: Finding, runs: int, should_stop: Callable[[], bool], tick: Callable[[int], None]
) -> tuple[Case, int]:
    """``case`` made as small as ``runs`` runs allow while it still shows ``finding``; and the runs it took.

    ``should_stop`` is asked before each run; ``tick`` is told how many were made.
    """
    best = case
    made = 0

    def attempt(candidate: Case, strategy: Strategy | None) -> Outcome:
        nonlocal best, made
        if should_stop():
            raise _EnoughError
        made += 1
        tick(made)
        outcome = safe_run(candidate, strategy)
        if strategy is None and key(candidate) < key(best) and shows(outcome, finding) is not None:
            best = candidate
        return outcome

    try:
        return reduce(case, finding.fingerprint, attempt, runs).case, made
    except (_EnoughError, ReduceError):
        # A reduction that ended early, or in something that does not replay, still leaves the best that did.
        return best, made
