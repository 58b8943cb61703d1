"""What every harness needs when it runs as a program of its own: arguments, a recorder, and the line at the end."""

from __future__ import annotations

import json
import os
import tempfile
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mmufuzz.campaign.budget import Budget, Stop, parse_duration
from mmufuzz.campaign.corpus import Corpus
from mmufuzz.campaign.engine_hypothesis import Batch, run_batches
from mmufuzz.campaign.files import checkout, write_atomic
from mmufuzz.campaign.findings import FindingStore
from mmufuzz.campaign.kernel import Kernel, canonical
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.campaign.tally import Tally
from mmufuzz.kvm.fixes import LATEST
from mmufuzz.outcome import HARNESS_ERROR

DEFAULT_SECONDS: Final = 10.0

REPORT_INTERVAL: Final = 0.5
"""Seconds between reports while the harness runs: whoever started it may have to kill it."""


@dataclass
class Session:
    """A harness at work."""

    name: str
    recorder: Recorder
    budget: Budget
    seed: int
    report: Path | None
    corpora: list[Path]
    _reported: float = 0.0

    def over(self) -> bool:
        """Whether to end."""
        return self.recorder.stop.requested or self.budget.spent(
            self.recorder.share.cases or self.recorder.share.executions
        )

    def tick(self) -> None:
        """Called between examples: writes the report now and then."""
        if self.report is not None and self.budget.elapsed - self._reported > REPORT_INTERVAL:
            self._reported = self.budget.elapsed
            self.write_report()

    def write_report(self) -> None:
        """Hand over sums and findings, in the form that ``engine_atheris`` reads."""
        if self.report is None:
            return
        self.recorder.share.seconds = self.budget.elapsed
        fields = {
            "tally": self.recorder.tally.as_json(),
            "reached": self.recorder.corpus.reached.as_json(),
            "kept": self.recorder.corpus.added,
            "findings": [record.as_json() for record in self.recorder.store.records.values()],
            "harness_errors": [record.as_json() for record in self.recorder.store.errors.values()],
            "crashes": self.recorder.store.crashes,
        }
        write_atomic(self.report, json.dumps(fields))

    def line(self) -> str:
        """What it did, in one line."""
        share = self.recorder.share
        work = f"{share.cases} cases, {share.schedules} schedules" if share.cases else f"{share.executions} executions"
        seconds = self.budget.elapsed
        new = sum(1 for record in self.recorder.store.records.values() if record.new)
        rate = (share.cases or share.executions) / seconds if seconds else 0.0
        return (
            f"{self.name}: {work} in {seconds:.1f} s ({rate:.0f}/s), seed {self.seed}, {self.recorder.kernel}; "
            f"{new} new findings, {len(self.recorder.store.records) - new} known"
        )

    def finish(self) -> int:
        """Write the report, print the line; the exit status."""
        self.write_report()
        print(self.line(), flush=True)
        store = self.recorder.store
        for record in [*store.records.values(), *store.errors.values()]:
            print(f"  {record.kind}: {record.fingerprint} ({record.case})", flush=True)
        for crash in store.crashes:
            print(f"  {HARNESS_ERROR}: {crash}", flush=True)
        if any(record.new for record in store.records.values()):
            return 1
        return 70 if store.errors or store.crashes else 0


def session(name: str, arguments: list[str]) -> Session:
    """Parse the arguments of harness ``name``. Raises ``CaseError`` or ``InputError`` for bad ones."""
    parser = ArgumentParser(prog=name)
    parser.add_argument("--time", type=parse_duration, help="default 10s")
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kernel", default=LATEST)
    parser.add_argument("--revert", action="append", default=[])
    parser.add_argument("--apply", action="append", default=[])
    parser.add_argument("--findings", default="findings")
    parser.add_argument("--corpus", type=Path, action="append", default=[])
    parser.add_argument("--keep", type=Path, help="directory for Cases that reach something new")
    parser.add_argument("--report", help="JSON for the process that started this one")
    given = parser.parse_args(arguments)
    seconds = given.time if given.time or given.cases else DEFAULT_SECONDS
    kernel = Kernel(given.kernel, tuple(map(canonical, given.revert)), tuple(map(canonical, given.apply)))
    kernel.check()
    root = checkout()
    store = FindingStore(Path(given.findings), root / "corpus" if root is not None else None)
    budget = Budget(seconds, given.cases)
    recorder = Recorder(kernel, store, Corpus(given.keep), Tally(), Stop(), budget)
    recorder.begin(name, given.seed)
    recorder.campaign_seed = given.seed
    report = Path(given.report) if given.report else None
    return Session(name, recorder, budget, given.seed, report, given.corpus)


def test_recorder(name: str) -> Recorder:
    """A recorder for a harness that pytest runs; the environment says on which kernel.

    ``MMUFUZZ_KERNEL``, ``MMUFUZZ_REVERT`` and ``MMUFUZZ_APPLY`` (ids with commas), ``MMUFUZZ_FINDINGS`` (a directory;
    default: one under the system's temporary directory).
    """
    kernel = Kernel(os.environ.get("MMUFUZZ_KERNEL", LATEST), _ids("MMUFUZZ_REVERT"), _ids("MMUFUZZ_APPLY"))
    kernel.check()
    directory = os.environ.get("MMUFUZZ_FINDINGS") or str(Path(tempfile.gettempdir()) / "mmufuzz-findings")
    root = checkout()
    store = FindingStore(Path(directory), root / "corpus" if root is not None else None)
    recorder = Recorder(kernel, store, Corpus(None), Tally(), Stop(), Budget())
    recorder.grow = False
    recorder.begin(name, 0)
    return recorder


def run_hypothesis_harness(name: str, batch: Batch, arguments: list[str]) -> int:
    """Run ``batch`` as a program until its time is up; the exit status."""
    work = session(name, arguments)
    with work.recorder.stop:
        run_batches(batch, work.recorder, work.seed, work.budget, work.tick)
    return 130 if work.recorder.stop.requested else work.finish()


def _ids(variable: str) -> tuple[str, ...]:
    return tuple(canonical(name) for name in os.environ.get(variable, "").split(",") if name)
