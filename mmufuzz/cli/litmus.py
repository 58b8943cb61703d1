"""``mmufuzz litmus``: herd's litmus tests as guest code, under every order of their memory accesses."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Final

from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.files import InputError, reason, writable_directory
from mmufuzz.campaign.findings import save
from mmufuzz.cli.arguments import add_json, add_kernel, count, duration, kernel_from
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.litmus.check import CUT_SHORT, FOUND, REFUTED, Result, check, observation, state_text, summary
from mmufuzz.litmus.model import KINDS, LitmusTest
from mmufuzz.litmus.reader import read

MAX_BYTES: Final = 1 << 20
"""Of one file."""


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("litmus", help="run herd's litmus tests as guest code")
    parser.add_argument("paths", metavar="FILE", nargs="+", help=".litmus files, or directories of them")
    parser.add_argument("--time", metavar="T", type=duration, help="give a test up after this time")
    parser.add_argument("--schedules", metavar="N", type=count, help="give a test up after N schedules")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="write a Case with the schedule of each witness, to explain it"
    )
    add_kernel(parser, "")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Check every test. JSON: a list of ``{"file", "name", "verdict", "states", "observation", …}``."""
    kernel = kernel_from(arguments)
    # All files are read before any test is run: bad input is told at once.
    tests = [(path, load(path)) for name in arguments.paths for path in files(Path(name))]
    target = writable_directory(Path(arguments.output)) if arguments.output else None
    results: list[Result] = []
    rows: list[dict[str, Any]] = []
    with Stop() as stop:
        for path, test in tests:
            budget = Budget(arguments.time, arguments.schedules)
            last = time.monotonic()

            def should_stop(runs: int, name: str = test.name, budget: Budget = budget) -> bool:
                nonlocal last
                if time.monotonic() - last > 0.25:
                    last = time.monotonic()
                    output.progress(f"litmus: {name}, {runs} schedules, {budget.elapsed:.0f} s")
                return stop.requested or budget.spent(runs)

            result = check(test, kernel.override, should_stop)
            output.done()
            results.append(result)
            rows.append(row(path, result, budget.elapsed))
            for line in summary(result):
                output.line(line)
            if result.finding is not None:
                output.line(f"finding: {result.finding.fingerprint}")
            output.line(f"Time {test.name} {budget.elapsed:.2f}")
            if target is not None and result.witness is not None:
                save(result.witness, target / f"{path.stem}.toml")
                output.line(f"written to {target / path.stem}.toml")
            output.line()
            if stop.requested:
                break
    output.json(rows)
    return _status(results, stop.requested)


def files(path: Path) -> list[Path]:
    """``path`` itself, or the ``.litmus`` files below a directory, sorted. Raises InputError."""
    if not path.is_dir():
        return [path]
    found = sorted(path.rglob("*.litmus"))
    if not found:
        raise InputError(str(path), "expected a .litmus file or a directory that holds some")
    return found


def load(path: Path) -> LitmusTest:
    """The test in the file. Raises InputError or CaseError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(str(path), f"expected a readable file ({reason(error)})") from error
    if len(raw) > MAX_BYTES:
        raise InputError(str(path), f"expected at most {MAX_BYTES} bytes")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}", "expected UTF-8 text") from error
    return read(str(path), text)


def row(path: Path, result: Result, seconds: float) -> dict[str, Any]:
    """A test's entry in the JSON."""
    test = result.test
    return {
        "file": str(path),
        "name": test.name,
        "kind": KINDS[test.quantifier],
        "condition": f"{test.quantifier} ({test.condition})",
        "verdict": result.verdict,
        "states": [
            {"state": state_text(test, state), "schedules": result.states[state], "holds": result.satisfies(state)}
            for state in sorted(result.states)
        ],
        "observation": observation(result),
        "positive": result.positive,
        "negative": result.negative,
        "complete": result.complete,
        "schedules": result.runs,
        "seconds": round(seconds, 3),
        "finding": (
            {"kind": result.finding.kind, "fingerprint": result.finding.fingerprint}
            if result.finding is not None
            else None
        ),
    }


def _status(results: list[Result], interrupted: bool) -> Status:
    if any(result.internal for result in results):
        return Status.INTERNAL
    if any(result.verdict in (REFUTED, FOUND) for result in results):
        return Status.FOUND
    if interrupted:
        return Status.INTERRUPTED
    return Status.CUT_SHORT if any(result.verdict == CUT_SHORT for result in results) else Status.CLEAN
