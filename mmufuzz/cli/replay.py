"""``mmufuzz replay``: does each Case still show what it says it shows?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmufuzz.campaign.corpus import files, load_file
from mmufuzz.campaign.expect import unmet
from mmufuzz.campaign.running import safe_run
from mmufuzz.case.model import Case
from mmufuzz.cli.arguments import add_json, add_kernel, count, kernel_from
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.outcome import HARNESS_ERROR, Outcome


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("replay", help="run Cases and compare with what they expect")
    parser.add_argument("paths", metavar="PATH", nargs="+", help=".toml or .case files, or directories of them")
    parser.add_argument("--times", metavar="N", type=count, default=1, help="run each N times; digests must agree")
    add_kernel(parser, "")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Replay every file. JSON: a list of ``{"case", "ok", "verdict", "digest", …}``."""
    kernel = kernel_from(arguments)
    # All files are read before any is run: bad input is told at once.
    cases = [(path, kernel.override(load_file(path))) for name in arguments.paths for path in files(Path(name))]
    rows = []
    for done, (path, case) in enumerate(cases):
        output.progress(f"replay: {done} of {len(cases)}")
        row, outcome = replay(path, case, arguments.times)
        rows.append(row)
        output.line(f"{'ok  ' if row['ok'] else 'FAIL'} {path}: {_said(outcome)}")
        for complaint in row["unmet"]:
            output.line(f"     {complaint}")
    output.done()
    failed = sum(1 for row in rows if not row["ok"])
    output.line(f"{len(rows)} replayed, {failed} not as expected")
    output.json(rows)
    if any(row["verdict"] == HARNESS_ERROR for row in rows):
        return Status.INTERNAL
    return Status.FOUND if failed else Status.CLEAN


def replay(path: Path, case: Case, times: int) -> tuple[dict[str, Any], Outcome]:
    """Run ``case`` ``times`` times; its JSON row, and the first outcome."""
    outcome = safe_run(case)
    complaints = unmet(case, outcome)
    for repetition in range(1, times):
        digest = safe_run(case).digest
        if digest != outcome.digest:
            complaints.append(f"run {repetition + 1} of {times} has digest {digest}, the first {outcome.digest}")
            break
    row: dict[str, Any] = {
        "case": str(path),
        "ok": not complaints,
        "verdict": outcome.verdict,
        "digest": outcome.digest,
        "findings": [{"kind": found.kind, "fingerprint": found.fingerprint} for found in outcome.findings],
        "guest": outcome.guest,
        "unmet": complaints,
    }
    return row, outcome


def _said(outcome: Outcome) -> str:
    if outcome.findings:
        return f"{outcome.verdict}: {outcome.findings[0].fingerprint}"
    return f"{outcome.verdict}, {outcome.instructions} instructions, {outcome.events} events"
