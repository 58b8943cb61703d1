"""How soon ``mmufuzz fuzz --revert ID`` finds what the reverted fix fixed, as JSON on standard output.

``python bench/detection.py --revert ID --seeds 20 --time 30``: one campaign a seed, by default that of ``mmufuzz fuzz``
without further arguments, with nothing but corpus/seeds to start from. It ends with the first new finding that the
unchanged kernel does not show, reduced, or after so many seconds. The reproducer is then replayed.
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
from mmufuzz.campaign.campaign import Campaign
from mmufuzz.campaign.expect import unmet
from mmufuzz.campaign.files import checkout
from mmufuzz.campaign.findings import Record
from mmufuzz.campaign.kernel import Kernel, canonical
from mmufuzz.campaign.plan import DEFAULT_SECONDS, Plan
from mmufuzz.case import toml
from mmufuzz.host.deviation import HOLD
from mmufuzz.kvm.fixes import LATEST
from mmufuzz.run import run


class Search:
    """One campaign that ends when it has found what it is for, or after ``limit`` seconds."""

    def __init__(self, plan: Plan, limit: float, seeds: bool) -> None:
        self.limit = limit
        self.found: Record | None = None
        self.others: list[str] = []
        self.campaign = Campaign(plan, lambda line: None, self.look)
        self.campaign.recorder.on_finding = self.saw
        if not seeds:
            self.campaign.corpus.clear()

    def saw(self, record: Record) -> None:
        """A finding was saved."""
        if record.new and record.attributed:
            self.found = self.found or record
            self.campaign.stop.requested = True
        else:
            self.others.append(f"{'new' if record.new else 'known'} {record.kind}: {record.fingerprint}")

    def look(self, progress: str) -> None:
        """Called a few times a second."""
        if self.campaign.budget.elapsed > self.limit:
            self.campaign.stop.requested = True


def measure(plan: Plan, limit: float, replays: int, seeds: bool) -> dict[str, Any]:
    """One seed of the generator; ``seeds``: with the Cases in corpus/seeds to start from."""
    search = Search(plan, limit, seeds)
    result = search.campaign.run()
    fields: dict[str, Any] = {
        "seed": plan.seed,
        "found": search.found is not None,
        "cases": result.tally.cases,
        "schedules": result.tally.schedules,
        "others": search.others,
    }
    record = search.found
    if record is not None:
        case = toml.load(record.case)
        digests = set()
        holding = 0
        for _ in range(replays):
            outcome = run(case)
            holding += not unmet(case, outcome)
            digests.add(outcome.digest)
        fields |= {
            "seconds": round(record.found_after_seconds, 2),
            "seconds_with_reduction": round(result.seconds, 2),
            "found_after_cases": record.found_after_cases,
            "engine": record.engine,
            "fingerprint": record.fingerprint,
            "instructions": record.instructions,
            "words": record.edits,
            "deviations": record.deviations,
            "holds": sum(item.kind == HOLD for item in case.schedule),
            "replays_ok": holding,
            "digests": len(digests),
            "case": toml.dumps(case),
        }
    return fields


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that matter, over all seeds."""
    found = [fields for fields in seeds if fields["found"]]
    sums: dict[str, Any] = {"seeds": len(seeds), "found": len(found)}
    if found:
        seconds = [fields["seconds"] for fields in found]
        sums |= {
            "median_seconds": median(seconds),
            "most_seconds": max(seconds),
            "most_seconds_with_reduction": max(fields["seconds_with_reduction"] for fields in found),
            "median_cases": median(fields["found_after_cases"] for fields in found),
            "most_instructions": max(fields["instructions"] for fields in found),
            "most_deviations": max(fields["deviations"] for fields in found),
            "fewest_holds": min(fields["holds"] for fields in found),
            "fewest_replays_ok": min(fields["replays_ok"] for fields in found),
        }
    return sums


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", default=LATEST)
    parser.add_argument("--revert", action="append", default=[])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--time", type=float, default=30.0, help="seconds in which it is to be found")
    parser.add_argument("--campaign", type=float, default=DEFAULT_SECONDS, help="seconds that the engines share")
    parser.add_argument("--without-seeds", action="store_true", help="start from nothing, not from corpus/seeds")
    parser.add_argument("--replays", type=int, default=100)
    given = parser.parse_args()
    kernel = Kernel(given.kernel, tuple(map(canonical, given.revert)))
    seeds = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            plan = Plan(
                kernel,
                seed,
                root / "corpus",
                root / "findings",
                seconds=given.campaign,
                engine=given.engine,
                checkout=checkout(),
            )
            seeds.append(measure(plan, given.time, given.replays, not given.without_seeds))
            shown = {name: value for name, value in seeds[-1].items() if name != "case"}
            print(json.dumps(shown), file=sys.stderr, flush=True)
    figures = {
        "kernel": str(kernel),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "core_build": "interpreted" if str(mmufuzz.host.sched.__file__).endswith(".py") else "compiled",
        "limit_seconds": given.time,
        "starts_from": "nothing" if given.without_seeds else "corpus/seeds",
        "summary": summary(seeds),
        "seeds": seeds,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
