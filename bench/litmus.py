"""The litmus tests of the corpus, on the right machine and on broken ones, as JSON: ``python bench/litmus.py``.

For each broken machine: the tests whose published verdict it fails. Needs the interpreted core, whose methods can be
replaced.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "host"))

from broken_buffers import MUTANTS, broken  # noqa: E402 - only importable with the line above

from mmufuzz.litmus.check import VALIDATED, check  # noqa: E402 - as above
from mmufuzz.litmus.reader import read  # noqa: E402 - as above


def measure(mutant: str) -> dict[str, Any]:
    """All tests on one machine; "" is the right one."""
    begun = time.monotonic()
    schedules = 0
    slowest = ("", 0.0)
    failed = []
    paths = sorted((ROOT / "corpus" / "litmus").glob("*.litmus"))
    for path in paths:
        started = time.monotonic()
        with broken(mutant) if mutant else nullcontext():
            result = check(read(path.name, path.read_text()), lambda case: case, lambda runs: False)
        schedules += result.runs
        if result.verdict != VALIDATED:
            failed.append(path.stem)
        slowest = max(slowest, (path.stem, round(time.monotonic() - started, 2)), key=lambda item: item[1])
    return {
        "tests": len(paths),
        "failed": len(failed),
        "schedules": schedules,
        "seconds": round(time.monotonic() - begun, 1),
        "slowest": slowest,
        "names": failed,
    }


def main() -> None:
    """Measure and print."""
    machines = {mutant or "x86-TSO": measure(mutant) for mutant in ("", *MUTANTS)}
    print(json.dumps({"python": platform.python_version(), "machines": machines}, indent=2))


if __name__ == "__main__":
    main()
