"""``mmufuzz explain``: a Case and its run as a person reads them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmufuzz.campaign.corpus import load_file
from mmufuzz.campaign.running import safe_run
from mmufuzz.cli.arguments import add_json, add_kernel, kernel_from
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.outcome import HARNESS_ERROR
from mmufuzz.report.explain import explain


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("explain", help="print a Case's run as a table: a column per thread, rows in time")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--full", action="store_true", help="every visible operation; default folds dull stretches")
    add_kernel(parser, "")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Explain. JSON: ``{"case", "verdict", "digest", "findings", "threads", "text"}``."""
    case = kernel_from(arguments).override(load_file(Path(arguments.file)))
    outcome = safe_run(case)
    lines = explain(case, outcome, Path(arguments.file).name, arguments.full)
    for line in lines:
        output.line(line)
    output.json(
        {
            "case": arguments.file,
            "verdict": outcome.verdict,
            "digest": outcome.digest,
            "findings": [
                {"kind": found.kind, "fingerprint": found.fingerprint, "detail": found.detail}
                for found in outcome.findings
            ],
            "threads": list(outcome.threads),
            "text": lines,
        }
    )
    return Status.INTERNAL if outcome.verdict == HARNESS_ERROR else Status.CLEAN
