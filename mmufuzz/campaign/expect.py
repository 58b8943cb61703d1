"""Does an outcome meet the Case's expectation?"""

from __future__ import annotations

from mmufuzz.case.model import Case
from mmufuzz.outcome import Outcome


def unmet(case: Case, outcome: Outcome) -> list[str]:
    """What ``case`` expects and ``outcome`` does not show, one line each; empty if all holds."""
    expect = case.expect
    complaints: list[str] = []
    if outcome.verdict != expect.verdict:
        shown = f" ({outcome.findings[0].fingerprint})" if outcome.findings else ""
        complaints.append(f"expected the verdict {expect.verdict}, got {outcome.verdict}{shown}")
    elif expect.kind and all(finding.kind != expect.kind for finding in outcome.findings):
        complaints.append(f"expected a finding of kind {expect.kind}, got {_kinds(outcome)}")
    elif expect.fingerprint and all(finding.fingerprint != expect.fingerprint for finding in outcome.findings):
        shown = ", ".join(finding.fingerprint for finding in outcome.findings)
        complaints.append(f"expected the finding {expect.fingerprint}, got {shown}")
    for name in expect.reach:
        if not outcome.marks.get(name):
            complaints.append(f"expected to reach {name}, did not")
    return complaints


def _kinds(outcome: Outcome) -> str:
    return ", ".join(finding.kind for finding in outcome.findings) or "none"
