"""``mmufuzz fixes``: the behaviours that differ between kernels."""

from __future__ import annotations

import argparse
from typing import Any

from mmufuzz.cli.arguments import add_json
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.kvm.fixes import FIXES, KERNELS, Fix, behaviours, find


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("fixes", help="list the fixes that can be reverted or applied, or show one")
    parser.add_argument("what", nargs="?", default="list", choices=("list", "show"), help="default: list")
    parser.add_argument("id", nargs="?", help="with show: id of a fix, or its entry in the zoo")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Print the fixes. JSON: a list of objects, one for ``show`` too."""
    if arguments.what == "show":
        chosen: list[Fix] = [find(arguments.id or "")]
    else:
        chosen = list(FIXES)
    rows = [_fields(fix) for fix in chosen]
    if arguments.what == "show":
        for key, value in rows[0].items():
            output.line(f"{key:<11} {', '.join(value) if isinstance(value, list) else value}")
    else:
        width = max(len(fix.id) for fix in chosen)
        output.line(f"{'id':<{width}}  {'since':<6} {'zoo':<4} {'reverting shows':<16} title")
        for fix in chosen:
            output.line(f"{fix.id:<{width}}  {fix.kernel:<6} {fix.zoo or '-':<4} {fix.shows:<16} {fix.title}")
    output.json(rows)
    return Status.CLEAN


def _fields(fix: Fix) -> dict[str, Any]:
    return {
        "id": fix.id,
        "title": fix.title,
        "commit": fix.commit,
        "kernel": fix.kernel,
        "kernels": [name for name in KERNELS if set(fix.behaviours) <= behaviours(name, (), ())],
        "shows": fix.shows,
        "zoo": fix.zoo,
        "citation": fix.citation,
        "behaviours": list(fix.behaviours),
    }
