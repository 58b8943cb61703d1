"""Runs Cases for every engine: counts them, keeps the novel ones, and turns a finding into a minimal reproducer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from mmufuzz.campaign.attribution import SCHEDULES, attributed, shows
from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import Corpus
from mmufuzz.campaign.findings import FindingStore, Record
from mmufuzz.campaign.kernel import Kernel
from mmufuzz.campaign.reached import NOTHING
from mmufuzz.campaign.reducing import shrink
from mmufuzz.campaign.running import safe_run
from mmufuzz.campaign.suspects import stuck
from mmufuzz.campaign.tally import EngineTally, Tally
from mmufuzz.case.model import Case
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import HARNESS_ERROR, SUSPECT, Finding, Outcome

REDUCE_RUNS = 1500
"""Runs spent on one reduction."""

REDUCE_SECONDS = 20.0
"""Seconds spent on one reduction: livelocks run long."""

MAX_REDUCED = 24
"""Fingerprints of one campaign that are reduced; a flood beyond that is saved as found."""


@dataclass
class Recorder:
    """What the engines of one process share. ``kernel`` is what every Case runs on."""

    kernel: Kernel
    store: FindingStore
    corpus: Corpus
    tally: Tally
    stop: Stop
    budget: Budget
    engine: str = ""
    seed: int = 0
    campaign_seed: int = 0
    grow: bool = True
    """Whether Cases that reach something novel are kept."""
    reduce_findings: bool = True
    on_finding: Callable[[Record], None] | None = None
    on_run: Callable[[], None] | None = None

    @property
    def share(self) -> EngineTally:
        """The sums of the engine at work."""
        return self.tally.engine(self.engine)

    def begin(self, engine: str, seed: int) -> None:
        """``engine`` starts work with ``seed``."""
        self.engine = engine
        self.seed = seed

    def case(self) -> None:
        """Another Case begins."""
        self.share.cases += 1

    def check(self, case: Case, strategy: Strategy | None = None) -> Outcome:
        """Run ``case`` under one schedule and record all it shows. The Case is already on ``kernel``."""
        outcome = safe_run(case, strategy)
        self.share.schedules += 1
        self.tally.count(outcome)
        if self.on_run is not None:
            self.on_run()
        followed = replace(case, schedule=outcome.schedule) if strategy is not None else case
        if self.grow and self.corpus.reached.add(outcome.counters) != NOTHING and outcome.verdict != HARNESS_ERROR:
            self.corpus.keep(followed)
        if outcome.verdict != SUSPECT or stuck(outcome):
            for finding in outcome.findings:
                self._record(followed, finding)
        return outcome

    def _record(self, case: Case, finding: Finding) -> None:
        if self.store.again(finding.fingerprint):
            return
        original = case
        confirmed = shows(safe_run(case), finding) is not None
        first_seen: dict[str, object] = {
            "engine": self.engine,
            "seed": self.campaign_seed,
            "engine_seed": self.seed,
            "cases": self.tally.cases,
            "schedules": self.tally.schedules,
            "seconds": round(self.budget.elapsed, 3),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "kernel": str(self.kernel),
            "confirmed": confirmed,
        }
        # The reproducer is on disk before it is minimal: a reduction may be interrupted.
        record = self.store.add(case, case, finding, first_seen)
        if confirmed and record.new and self._may_reduce():
            patience = Budget(REDUCE_SECONDS)
            small, _ = shrink(
                case, finding, REDUCE_RUNS, lambda: self.stop.requested or patience.spent(0), lambda runs: None
            )
            detail = shows(safe_run(small), finding)
            if detail is not None:
                case, finding = small, detail
        if confirmed:
            # What is known was searched for by hand: one look is enough.
            first_seen["attributed"] = attributed(case, finding, SCHEDULES if record.new else 0)
            record = self.store.add(original, case, finding, first_seen)
        if self.on_finding is not None:
            self.on_finding(record)

    def _may_reduce(self) -> bool:
        return self.reduce_findings and len(self.store.records) <= MAX_REDUCED and not self.stop.requested
