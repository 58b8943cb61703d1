"""``mmufuzz explore``: every schedule of one Case."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import load_file
from mmufuzz.campaign.findings import save
from mmufuzz.case.model import FINDING as EXPECT_FINDING
from mmufuzz.case.model import Expect
from mmufuzz.cli.arguments import add_json, add_kernel, count, duration, kernel_from, natural
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.outcome import HARNESS_ERROR
from mmufuzz.search.explore import COMPLETE, ExploreResult, explore_case


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("explore", help="run every schedule of one Case")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--bound", metavar="K", type=natural, help="at most K deviations from the default schedule; default: no bound"
    )
    parser.add_argument("--time", metavar="T", type=duration, help="give up after this time (verdict: incomplete)")
    parser.add_argument("--schedules", metavar="N", type=count, help="give up after N schedules (verdict: incomplete)")
    parser.add_argument("--memory-model", choices=("sc", "tso"), help="instead of the Case's")
    parser.add_argument("-o", "--output", metavar="OUT", help="write the Case with the finding's schedule")
    add_kernel(parser, "")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Explore. JSON: ``{"verdict", "schedules", "outcomes", "seconds", …}``."""
    case = kernel_from(arguments).override(load_file(Path(arguments.file)))
    if arguments.memory_model:
        case = replace(case, memory_model=arguments.memory_model)
    budget = Budget(arguments.time, arguments.schedules)
    runs = 0
    last = 0.0

    with Stop() as stop:

        def should_stop() -> bool:
            nonlocal runs, last
            runs += 1
            if time.monotonic() - last > 0.25:
                last = time.monotonic()
                output.progress(f"explore: {runs} schedules, {budget.elapsed:.0f} s")
            return stop.requested or budget.spent(runs)

        result = explore_case(case, arguments.bound, should_stop)
    output.done()
    found = result.finding.findings[0] if result.finding is not None and result.finding.findings else None
    fields: dict[str, Any] = {
        "verdict": result.verdict,
        "schedules": result.schedules,
        "outcomes": len(result.outcomes),
        "seconds": round(budget.elapsed, 3),
        "interrupted": stop.requested,
        "case": arguments.file,
        "bound": arguments.bound,
        "pruned": result.pruned,
        "states": result.states,
        "cost": result.cost,
        "guest_outcomes": {guest: reached.count for guest, reached in sorted(result.outcomes.items())},
        "reached": result.reached if case.expect.reach else None,
        "finding": {"kind": found.kind, "fingerprint": found.fingerprint} if found is not None else None,
    }
    _tell(arguments, result, fields, output)
    if result.finding is not None and found is not None and arguments.output:
        witness = Expect(verdict=EXPECT_FINDING, kind=found.kind, fingerprint=found.fingerprint)
        save(replace(case, schedule=result.finding.schedule, expect=witness), Path(arguments.output))
        output.line(f"written to {arguments.output}")
    output.json(fields)
    return _status(result, stop.requested)


def _tell(arguments: argparse.Namespace, result: ExploreResult, fields: dict[str, Any], output: Output) -> None:
    within = "" if arguments.bound is None else f" of at most {arguments.bound} deviations"
    numbers = (
        f"{result.schedules} schedules ({result.pruned} cut at a state met before), {result.states} states, "
        f"{len(result.outcomes)} guest-visible outcomes, {fields['seconds']:.1f} s"
    )
    if fields["finding"] is not None:
        output.line(f"finding: {fields['finding']['fingerprint']}, {result.cost} deviations")
    elif result.verdict == COMPLETE:
        output.line(f"complete: every schedule{within} was run, and none has a finding")
    else:
        output.line(f"incomplete: a limit was hit; every schedule of at most {result.cost} deviations was run"
                    if result.cost >= 0 else "incomplete: a limit was hit")  # fmt: skip
    output.line(numbers)
    if fields["reached"] is not None:
        output.line(f"all marks of expect.reach were passed in at least {fields['reached']} of them")


def _status(result: ExploreResult, interrupted: bool) -> Status:
    if result.finding is not None:
        return Status.INTERNAL if result.finding.verdict == HARNESS_ERROR else Status.FOUND
    if interrupted:
        return Status.INTERRUPTED
    return Status.CLEAN if result.verdict == COMPLETE else Status.CUT_SHORT
