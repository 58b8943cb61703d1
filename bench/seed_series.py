"""The figures of docs/explanation/seed-series.md: what patch 1/4 saves, and that the guest cannot tell.

    python bench/seed_series.py [--bound 2] [--memory-model tso]

Prints JSON. For each of the seed's Cases and each kernel: acquisitions of mmu_lock in the recorded schedule, how often
the store was re-executed, and every guest-visible outcome of all schedules within the bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from mmufuzz.case import toml
from mmufuzz.case.model import SC, TSO
from mmufuzz.run import run
from mmufuzz.search.explore import explore_case

REGRESSIONS = Path(__file__).parent.parent / "corpus" / "regressions"
CASES = ("seed-false-negative", "seed-false-positive")
KERNELS = ("v6.8", "v6.9")


def measure(name: str, kernel: str, bound: int, memory_model: str) -> dict[str, object]:
    """One row: the recorded schedule of ``kernel``'s own file, and all schedules of the v6.9 file under ``kernel``."""
    own = run(toml.load(REGRESSIONS / f"{name}-{kernel}.toml"))
    shared = toml.load(REGRESSIONS / f"{name}-v6.9.toml")
    start = time.monotonic()
    case = replace(shared, kernel=kernel, schedule=(), memory_model=memory_model)
    found = explore_case(case, bound, lambda: False)
    return {
        "case": name,
        "kernel": kernel,
        "mmu_lock": own.locks["mmu_lock"],
        "count_read": own.marks.get("reexecute.count_zero", 0) + own.marks.get("reexecute.count_nonzero", 0),
        "explore": {
            "verdict": found.verdict,
            "bound": bound,
            "memory_model": memory_model,
            "schedules": found.schedules,
            "seconds": round(time.monotonic() - start, 1),
            "outcomes": sorted(found.outcomes),
        },
    }


def plain_store(kernel: str) -> dict[str, object]:
    """mmu_lock per store that KVM cannot emulate, with nothing else going on."""
    case = replace(toml.load(REGRESSIONS / "seed-false-positive-v6.9.toml"), kernel=kernel, schedule=(), host=())
    outcome = run(case)
    reads = outcome.marks.get("reexecute.count_zero", 0) + outcome.marks.get("reexecute.count_nonzero", 0)
    return {"kernel": kernel, "verdict": outcome.verdict, "mmu_lock": outcome.locks["mmu_lock"], "count_read": reads}


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bound", type=int, default=2)
    parser.add_argument("--memory-model", choices=(TSO, SC), default=TSO)
    arguments = parser.parse_args()
    rows = [
        measure(name, kernel, arguments.bound, arguments.memory_model) for name in CASES for kernel in KERNELS
    ]
    json.dump({"default_schedule": [plain_store(kernel) for kernel in KERNELS], "cases": rows}, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
