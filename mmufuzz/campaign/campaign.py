"""One campaign: engines in turn, then the sums."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import CASE_HARNESS, OWN, Corpus, load_directory, load_harness_cases
from mmufuzz.campaign.engine_atheris import run_atheris
from mmufuzz.campaign.engine_guided import GuidedEngine
from mmufuzz.campaign.engine_process import harness_command, run_harness
from mmufuzz.campaign.engine_random import RandomEngine
from mmufuzz.campaign.files import sweep
from mmufuzz.campaign.findings import FindingStore, Record
from mmufuzz.campaign.plan import Plan, Share, shares
from mmufuzz.campaign.reached import Reached
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.campaign.tally import Tally
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.marks import MARKS
from mmufuzz.outcome import HARNESS_ERROR


@dataclass
class Result:
    """What a campaign did. ``left_out``: engines that could not run, and why."""

    plan: Plan
    tally: Tally
    records: list[Record]
    seconds: float
    interrupted: bool
    left_out: list[str]
    reached: Reached
    new_cases: int
    errors: list[Record]
    """Errors of mmufuzz itself."""
    crashes: list[str]
    """Harnesses that crashed, a line each."""
    dropped: int = 0
    """Findings of fingerprints beyond those that a campaign keeps."""

    @property
    def verdict(self) -> str:
        """ "finding", "harness-error", "interrupted" or "ok" (known findings alone count as ok)."""
        if any(record.new for record in self.records):
            return "finding"
        if self.errors or self.crashes:
            return HARNESS_ERROR
        return "interrupted" if self.interrupted else "ok"

    def as_json(self) -> dict[str, Any]:
        """The document of ``fuzz --json``."""
        return {
            "verdict": self.verdict,
            "interrupted": self.interrupted,
            "cases": self.tally.cases,
            "schedules": self.tally.schedules,
            "seconds": round(self.seconds, 3),
            "seed": self.plan.seed,
            "kernel": {
                "name": self.plan.kernel.name,
                "revert": list(self.plan.kernel.revert),
                "apply": list(self.plan.kernel.apply),
            },
            **self.tally.as_json(),
            "left_out": self.left_out,
            "features": self.reached.total,
            "counters": self.reached.by_block(),
            "marks_missed": [name for name in MARKS if name not in self.tally.marks],
            "findings": [record.as_json() for record in self.records],
            "harness_errors": [record.as_json() for record in self.errors],
            "crashes": self.crashes,
            "corpus_dir": str(self.plan.corpus),
            "findings_dir": str(self.plan.findings),
            "new_cases": self.new_cases,
        }


class Campaign:
    """Carries out ``plan``; ``say`` gets a line per event worth one, ``progress`` a text that replaces the last."""

    def __init__(self, plan: Plan, say: Callable[[str], None], progress: Callable[[str], None]) -> None:
        self.plan = plan
        self.say = say
        self.progress = progress
        self.stop = Stop()
        self.tally = Tally()
        corpus_root = plan.checkout / "corpus" if plan.checkout is not None else None
        for directory in (plan.corpus, plan.findings):
            sweep(directory)
        self.store = FindingStore(plan.findings, corpus_root)
        self.corpus = Corpus(plan.corpus / OWN)
        starts = load_directory(corpus_root / "seeds") if corpus_root is not None else []
        starts += load_directory(plan.corpus / OWN)
        starts += load_harness_cases(plan.corpus / CASE_HARNESS)
        for case in starts:
            self.corpus.add(case)
        self.budget = Budget(plan.seconds, plan.cases)
        self.recorder = Recorder(plan.kernel, self.store, self.corpus, self.tally, self.stop, self.budget)
        self.recorder.campaign_seed = plan.seed
        self.recorder.on_finding = self._found
        self._last_tick = 0.0

    def run(self) -> Result:
        """Run all engines. SIGINT and SIGTERM end it early, with everything saved."""
        chosen, left_out = shares(self.plan)
        for line in left_out:
            self.say(f"left out: {line}")
        with self.stop, tempfile.TemporaryDirectory(prefix="mmufuzz-") as workdir:
            weights = total = sum(share.weight for share in chosen)
            for position, share in enumerate(chosen):
                if self.stop.requested:
                    break
                self._share(share, position, weights, total, Path(workdir))
                weights -= share.weight
        records = sorted(self.store.records.values(), key=lambda record: record.found_after_seconds)
        return Result(
            self.plan,
            self.tally,
            records,
            self.budget.elapsed,
            self.stop.requested,
            left_out,
            self.corpus.reached,
            self.corpus.added,
            list(self.store.errors.values()),
            self.store.crashes,
            self.store.dropped,
        )

    def _share(self, share: Share, position: int, weights: int, total: int, workdir: Path) -> None:
        """Give ``share`` its part: of the time that is left, or of all the cases."""
        seconds: float | None = None
        cases: int | None = None
        if self.plan.cases is not None:
            cases = max(1, self.plan.cases * share.weight // total)
        else:
            seconds = max(0.5, self.budget.left * share.weight / weights)
        budget = Budget(seconds, cases)
        recorder = self.recorder
        seed = Rng(self.plan.seed * 64 + position).next64()
        recorder.begin(share.name, seed)
        if share.engine == "random":
            RandomEngine(recorder, seed, budget, self._tick).run()
        elif share.engine == "guided":
            GuidedEngine(recorder, seed, budget, self._tick).run()
        elif self.plan.checkout is not None:
            harness = self.plan.checkout / "harnesses" / f"{share.harness}.py"
            if share.engine == "hypothesis":
                # In a process of its own: what Hypothesis takes of memory goes with it.
                command = harness_command(harness, recorder, seed, budget)
                command += ["--keep", str(self.plan.corpus / OWN)]
                run_harness(harness, command, recorder, budget, self._tick, workdir, lambda: None)
            else:
                run_atheris(harness, recorder, seed, budget, self._tick, workdir, self.plan.corpus)
        self.tally.engine(share.name).seconds += budget.elapsed

    def _found(self, record: Record) -> None:
        word = "new" if record.new else "known"
        kernel = self.plan.kernel
        if record.attributed is False and (kernel.revert or kernel.apply):
            word += f", on {kernel.name} unchanged too:"
        self.say(
            f"{word} {record.kind} after {record.found_after_cases} cases, {record.found_after_seconds:.1f} s: "
            f"{record.fingerprint} ({record.case})"
        )

    def _tick(self) -> None:
        """Called between runs: show progress a few times a second."""
        moment = time.monotonic()
        if moment - self._last_tick >= 0.25:
            self._last_tick = moment
            limit = f"{self.plan.cases} cases" if self.plan.cases is not None else f"{self.plan.seconds:.0f} s"
            self.progress(
                f"{self.budget.elapsed:.0f} s of {limit}, {self.recorder.engine}: {self.tally.cases} cases, "
                f"{self.tally.schedules} schedules, {len(self.tally.marks)} marks, {len(self.store.records)} findings"
            )
