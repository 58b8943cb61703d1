"""How often one schedule of each strategy shows a finding, as JSON: ``python bench/strategies.py [SECONDS]``.

On Cases of each shape with two threads at least, as the campaign generates them, for kernels without the fixes that
only schedules can tell, and for the unchanged one. Cases whose default schedule shows a finding already are left out.
The weights in ``mmufuzz.search.racing`` and ``mmufuzz.search.strategies.portfolio`` follow these figures.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import replace
from typing import Any

from mmufuzz.case.generate import SHAPES, generate_shape
from mmufuzz.case.model import Case
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.fixes import LATEST
from mmufuzz.outcome import FINDING, OK, Outcome
from mmufuzz.run import run
from mmufuzz.search.racing import Aims, Races
from mmufuzz.search.strategies import Pct, RandomWalk, Sparse, portfolio

SECONDS = 240.0
ROUNDS = 4
"""Schedules of each strategy for one Case."""

REVERTS = ((), ("track-write-barrier.emulator",), ("track-write-barrier.account",))
STRATEGIES = ("walk", "pct", "sparse", "portfolio", "relax", "flip")


class Bench:
    """One kernel and one shape."""

    def __init__(self, shape: str, revert: tuple[str, ...]) -> None:
        self.shape = shape
        self.revert = revert
        self.rng = Rng(1)
        self.aims = Aims()
        self.cases = 0
        self.schedules = dict.fromkeys(STRATEGIES, 0)
        self.hits: dict[str, dict[str, int]] = {name: {} for name in STRATEGIES}

    def run(self, seconds: float) -> None:
        """Case after Case."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            case = replace(generate_shape(self.rng.fork(), self.shape), kernel=LATEST, revert=self.revert)
            if len(case.vcpus) + len(case.host) == 1:
                continue
            first = run(case)
            if first.verdict != OK:
                continue
            self.cases += 1
            races = Races(first.trace)
            for _ in range(ROUNDS):
                for name in STRATEGIES:
                    self._one(name, case, first.events, races)

    def _one(self, name: str, case: Case, length: int, races: Races) -> None:
        rng = Rng(self.rng.next64())
        outcome: Outcome
        if name in ("relax", "flip"):
            aimed = self.aims.relax(races, rng) if name == "relax" else self.aims.flip(races, rng)
            if not aimed:
                return
            outcome = run(replace(case, schedule=aimed))
        elif name == "walk":
            outcome = run(case, RandomWalk(rng, length))
        elif name == "pct":
            outcome = run(case, Pct(rng, length))
        elif name == "sparse":
            outcome = run(case, Sparse(rng, length, rng.below(4), rng.below(3)))
        else:
            outcome = run(case, portfolio(rng.next64(), length))
        self.schedules[name] += 1
        if outcome.verdict == FINDING:
            fingerprint = outcome.findings[0].fingerprint
            self.hits[name][fingerprint] = self.hits[name].get(fingerprint, 0) + 1

    def as_json(self) -> dict[str, Any]:
        """Hits per thousand schedules, by strategy and fingerprint."""
        rates: dict[str, Any] = {}
        for name in STRATEGIES:
            count = self.schedules[name]
            per_thousand = {key: round(1000 * hits / count, 2) for key, hits in sorted(self.hits[name].items())}
            rates[name] = {"schedules": count, "hits_per_thousand": per_thousand}
        return {"shape": self.shape, "revert": list(self.revert), "cases": self.cases, "strategies": rates}


def main(seconds: float) -> None:
    """Measure every kernel on every shape for the same time, and print."""
    shapes = [shape for shape, _ in SHAPES]
    share = seconds / (len(REVERTS) * len(shapes))
    rows = []
    for revert in REVERTS:
        for shape in shapes:
            bench = Bench(shape, revert)
            bench.run(share)
            rows.append(bench.as_json())
    print(json.dumps({"python": platform.python_version(), "kernel": LATEST, "rows": rows}, indent=2))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
