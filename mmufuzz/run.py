"""``run(case) -> Outcome``: the only way in."""

from __future__ import annotations

from mmufuzz.case.model import Case
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import Outcome


def run(case: Case, strategy: Strategy | None = None, track: bool = False) -> Outcome:
    """Execute ``case``.

    With ``strategy`` (whose horizon is above 0) the strategy decides instead of the schedule of the Case (TLB
    deviations of the Case still apply); ``Outcome.schedule`` then repeats its decisions. ``track`` keeps state
    fingerprints for the exhaustive search. Raises ``CaseError`` if the Case is not valid.
    """
    raise NotImplementedError
