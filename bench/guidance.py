"""Executions until a reverted fix is found, guided against blind, as JSON: ``python bench/guidance.py [--revert ID]…``.

For each fix that ``mmufuzz fixes list`` says shows a finding, and each seed: a campaign of the guided engine and one of
the random engine, both from nothing, on the latest kernel without the fix. It ends with the first finding of that kind
which the unchanged kernel does not show, or after ``--limit`` executions (which then count). Executions are runs of the
model; both engines get the same fresh Cases in the same order. ``ratio``: the blind median by the guided one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import mmufuzz.host.sched
from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import Corpus
from mmufuzz.campaign.engine_guided import GuidedEngine
from mmufuzz.campaign.engine_random import RandomEngine
from mmufuzz.campaign.findings import FindingStore, Record
from mmufuzz.campaign.kernel import Kernel
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.campaign.tally import Tally
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.fixes import BENIGN, FIXES, LATEST

ENGINES = {"guided": GuidedEngine, "random": RandomEngine}


class Search:
    """One campaign of one engine, until it has found a finding of kind ``shows`` or made ``limit`` executions."""

    def __init__(self, revert: str, shows: str, limit: int, directory: Path) -> None:
        self.shows = shows
        self.limit = limit
        self.found = False
        self.tally = Tally()
        self.stop = Stop()
        store = FindingStore(directory, None)
        self.recorder = Recorder(Kernel(LATEST, (revert,)), store, Corpus(None), self.tally, self.stop, Budget())
        self.recorder.reduce_findings = False
        self.recorder.on_finding = self.saw
        self.recorder.on_run = self.ran

    def saw(self, record: Record) -> None:
        """A finding was recorded."""
        if record.kind == self.shows and record.attributed:
            self.found = True
            self.stop.requested = True

    def ran(self) -> None:
        """Called after each execution."""
        if self.tally.schedules >= self.limit:
            self.stop.requested = True

    def executions(self, engine: str, seed: int) -> int:
        """Run ``engine``."""
        self.recorder.begin(engine, seed)
        ENGINES[engine](self.recorder, seed, Budget(), lambda: None).run()
        return self.tally.schedules


def measure(revert: str, shows: str, seeds: int, limit: int) -> dict[str, Any]:
    """One fix: executions of each engine for each seed."""
    row: dict[str, Any] = {"revert": revert, "shows": shows, "limit": limit}
    for engine in ENGINES:
        counts: list[int] = []
        found = 0
        for seed in range(1, seeds + 1):
            with tempfile.TemporaryDirectory() as directory:
                search = Search(revert, shows, limit, Path(directory))
                counts.append(search.executions(engine, Rng(seed).next64()))
                found += search.found
        row[engine] = {"median": median(counts), "found": found, "executions": counts}
    row["ratio"] = round(row["random"]["median"] / row["guided"]["median"], 2)
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--revert", action="append", default=[], help="default: every fix that shows a finding")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--limit", type=int, default=20_000, help="executions of one campaign")
    given = parser.parse_args()
    rows = []
    for fix in FIXES:
        if fix.shows != BENIGN and (not given.revert or fix.id in given.revert):
            rows.append(measure(fix.id, fix.shows, given.seeds, given.limit))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    figures = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "core_build": "interpreted" if str(mmufuzz.host.sched.__file__).endswith(".py") else "compiled",
        "kernel": LATEST,
        "seeds": given.seeds,
        "worst_ratio": min(row["ratio"] for row in rows),
        "fixes": rows,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
