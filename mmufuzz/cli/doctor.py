"""``mmufuzz doctor``: what is installed and used, and proof that a known bug would be found."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmufuzz.build.loader import in_use
from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import Corpus
from mmufuzz.campaign.engine_guided import GuidedEngine
from mmufuzz.campaign.files import checkout
from mmufuzz.campaign.findings import FindingStore, Record
from mmufuzz.campaign.kernel import Kernel
from mmufuzz.campaign.plan import ENGINES, missing
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.campaign.tally import Tally
from mmufuzz.cli.arguments import add_json, natural
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status
from mmufuzz.kvm.fixes import LATEST, find

PLANTED = "retry-guard"
SECONDS = 10.0
PACKAGES = ("greenlet", "iced-x86", "rich", "hypothesis", "atheris", "coverage", "mypy", "ziglang")


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("doctor", help="what is installed and used; plant a known bug and find it")
    parser.add_argument("--seed", metavar="N", type=natural, default=1)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """Look around. JSON: ``{"verdict", "python", "packages", "engines", "core", "checkout", "planted"}``."""
    root = checkout()
    packages = {name: _version(name) for name in PACKAGES}
    engines = {name: missing(name, root) or "ready" for name in ENGINES}
    output.line(f"Python      {platform.python_version()} ({sys.executable})")
    output.line(f"core        {in_use().line}")
    if in_use().directory is not None:
        output.line(f"            in {in_use().directory}")
    for name, version in packages.items():
        output.line(f"{name:<11} {version or 'not installed'}")
    for name, state in engines.items():
        output.line(f"engine      {name}: {state}")
    output.line(f"checkout    {root or 'none: harnesses and corpus are not available'}")
    planted = plant(arguments.seed, output)
    output.line(
        f"planted     {PLANTED} reverted: "
        + (f"found after {planted['seconds']:.1f} s" if planted["found"] else f"NOT FOUND within {SECONDS:.0f} s")
    )
    output.json(
        {
            "verdict": "ok" if planted["found"] else "blind",
            "python": platform.python_version(),
            **in_use().as_json(),
            "packages": packages,
            "engines": engines,
            "checkout": str(root) if root is not None else None,
            "planted": planted,
        }
    )
    return Status.CLEAN if planted["found"] else Status.FOUND


def plant(seed: int, output: Output) -> dict[str, Any]:
    """Revert ``PLANTED`` and search for the kind of finding that shows it, with nothing but generated Cases."""
    wanted = find(PLANTED).shows
    found: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="mmufuzz-doctor-") as directory, Stop() as stop:
        budget = Budget(SECONDS)
        tally = Tally()
        recorder = Recorder(
            Kernel(LATEST, (PLANTED,)), FindingStore(Path(directory), None), Corpus(None), tally, stop, budget
        )
        recorder.reduce_findings = False

        def on_finding(record: Record) -> None:
            if record.kind == wanted:
                found.append(record)
                stop.requested = True

        recorder.on_finding = on_finding
        recorder.begin("guided", seed)
        GuidedEngine(recorder, seed, budget, lambda: output.progress(f"doctor: looking for {PLANTED}")).run()
        interrupted = stop.requested and not found
    output.done()
    if interrupted:
        raise KeyboardInterrupt
    return {
        "fix": PLANTED,
        "found": bool(found),
        "kind": found[0].kind if found else "",
        "seconds": round(found[0].found_after_seconds, 3) if found else round(SECONDS, 3),
        "cases": tally.cases,
        "schedules": tally.schedules,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
