"""``mmufuzz reduce``: the smallest Case with the same finding."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import load_file
from mmufuzz.campaign.files import InputError, writable_directory
from mmufuzz.campaign.findings import save, size
from mmufuzz.campaign.reducing import shows, shrink
from mmufuzz.campaign.running import safe_run
from mmufuzz.case.model import FINDING, Expect
from mmufuzz.cli.arguments import add_json, add_kernel, count, kernel_from
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.outcome import SUSPECT

VERIFICATIONS = 3
"""Replays that must all show the finding before a reduced Case is written."""


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("reduce", help="make a Case with a finding as small as possible")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("-o", "--output", metavar="OUT", help="where to write it; default: FILE with .min.toml")
    parser.add_argument("--runs", metavar="N", type=count, default=20000, help="runs to spend at most")
    add_kernel(parser, "")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Reduce. JSON: ``{"case", "out", "fingerprint", "runs", "seconds", "before", "after", …}``."""
    source = Path(arguments.file)
    target = Path(arguments.output) if arguments.output else source.with_suffix(".min.toml")
    case = kernel_from(arguments).override(load_file(source))
    writable_directory(target.parent)
    outcome = safe_run(case)
    finding = next((item for item in outcome.findings if item.fingerprint == case.expect.fingerprint), None)
    if finding is None and outcome.findings:
        finding = outcome.findings[0]
    if finding is None or outcome.verdict == SUSPECT:
        raise InputError(str(source), f"expected a Case that has a finding, but its verdict is {outcome.verdict}")
    budget = Budget()
    last = 0.0

    def tick(runs: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.25:
            last = time.monotonic()
            output.progress(f"reduce: {runs} runs, {budget.elapsed:.0f} s")

    with Stop() as stop:
        small, runs = shrink(case, finding, arguments.runs, lambda: stop.requested, tick)
    output.done()
    found = None
    for _ in range(VERIFICATIONS):
        found = shows(safe_run(small), finding)
        if found is None:
            raise RuntimeError(f"the reduced Case does not show {finding.fingerprint} when replayed")
    expect = Expect(FINDING, finding.kind, finding.fingerprint, case.expect.reach)
    save(replace(small, expect=expect), target)
    before, after = size(case), size(small)
    output.line(f"{finding.fingerprint}")
    for name, old, new in zip(("instructions", "words of memory", "deviations"), before, after, strict=True):
        output.line(f"  {name:<16} {old} → {new}")
    output.line(f"{runs} runs, {budget.elapsed:.1f} s; written to {target}")
    if stop.requested:
        output.line("interrupted; the smallest Case so far is saved")
    output.json(
        {
            "case": str(source),
            "out": str(target),
            "kind": finding.kind,
            "fingerprint": finding.fingerprint,
            "runs": runs,
            "seconds": round(budget.elapsed, 3),
            "interrupted": stop.requested,
            "before": dict(zip(("instructions", "edits", "deviations"), before, strict=True)),
            "after": dict(zip(("instructions", "edits", "deviations"), after, strict=True)),
        }
    )
    return Status.INTERRUPTED if stop.requested else Status.CLEAN
