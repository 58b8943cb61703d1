"""Does a finding come from what a campaign changed about the kernel, or does the unchanged kernel show it too?"""

from __future__ import annotations

from dataclasses import replace

from mmufuzz.campaign.running import safe_run
from mmufuzz.case.model import Case
from mmufuzz.case.rng import Rng
from mmufuzz.outcome import Finding, Outcome
from mmufuzz.search.racing import Aims, Races
from mmufuzz.search.strategies import portfolio

SCHEDULES = 60
"""Schedules of the reproducer that the unchanged kernel is tried under."""


def shows(outcome: Outcome, finding: Finding) -> Finding | None:
    """The finding of ``outcome`` that has the kind and the fingerprint of ``finding``."""
    for other in outcome.findings:
        if other.kind == finding.kind and other.fingerprint == finding.fingerprint:
            return other
    return None


def unchanged(case: Case) -> Case:
    """``case`` on its kernel profile alone."""
    return replace(case, revert=(), apply=())


def changed(case: Case) -> bool:
    """Whether ``case`` reverts or applies fixes."""
    return bool(case.revert or case.apply)


def shown_unchanged(case: Case, finding: Finding) -> bool:
    """Whether the unchanged kernel shows ``finding`` under the schedule of ``case``."""
    return shows(safe_run(unchanged(case)), finding) is not None


def attributed(case: Case, finding: Finding, schedules: int = SCHEDULES) -> bool:
    """Whether the changes of ``case`` are to blame for ``finding``.

    They are not if there are none, or if the unchanged kernel shows the finding with the same guests under the
    schedule of ``case`` or one of ``schedules`` others.
    """
    if not changed(case) or shown_unchanged(case, finding):
        return False
    bare = replace(unchanged(case), schedule=())
    outcome = safe_run(bare)
    length = max(1, outcome.events)
    races = Races(outcome.trace)
    aims = Aims()
    for number in range(schedules):
        if shows(outcome, finding) is not None:
            return False
        rng = Rng(number)
        aimed = aims.schedule(races, rng)
        if aimed:
            outcome = safe_run(replace(bare, schedule=aimed))
        else:
            outcome = safe_run(bare, portfolio(rng.next64(), length))
    return shows(outcome, finding) is None
