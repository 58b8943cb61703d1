"""``run`` as campaigns need it: an error inside mmufuzz is a finding too, never the end of the campaign."""

from __future__ import annotations

import traceback

from mmufuzz.case.model import Case
from mmufuzz.host.sites import BOOT
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import HARNESS_ERROR, Finding, Outcome
from mmufuzz.run import run


def safe_run(case: Case, strategy: Strategy | None = None) -> Outcome:
    """``run``, with an exception inside mmufuzz as a finding of kind "harness-error" instead."""
    try:
        return run(case, strategy)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        outcome = Outcome()
        outcome.verdict = HARNESS_ERROR
        text = "".join(traceback.format_exception(error))
        fingerprint = f"harness-error|{type(error).__name__}|{frame.name}"
        outcome.findings.append(Finding(HARNESS_ERROR, fingerprint, text, BOOT))
        return outcome
