"""Branch coverage of the core by a sample of Cases, measured in a process of its own.

``python -m mmufuzz.campaign.covered SECONDS LIMIT PATH…`` prints one JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from mmufuzz.build.loader import PURE_VARIABLE

CORE: Final = ("x86", "host", "kvm", "oracle", "case", "search")
SECONDS: Final = 6.0
LIMIT: Final = 200


def measure(paths: list[Path], seconds: float = SECONDS, limit: int = LIMIT) -> dict[str, Any] | None:
    """Coverage of the core by the Cases in ``paths`` (files or directories).

    None without the ``coverage`` package, or if the measuring process fails.
    """
    if importlib.util.find_spec("coverage") is None:
        return None
    command = [sys.executable, "-m", "mmufuzz.campaign.covered", str(seconds), str(limit), *map(str, paths)]
    try:
        # Only Python code has lines that can be measured.
        environment = {**os.environ, PURE_VARIABLE: "1"}
        done = subprocess.run(command, capture_output=True, timeout=seconds + 30, check=False, env=environment)
        fields: dict[str, Any] = json.loads(done.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        return None
    return fields


def main(seconds: float, limit: int, paths: list[str]) -> None:
    """Replay under coverage and print the result."""
    import coverage  # noqa: PLC0415 - an optional package, and it must start before the core is imported

    root = Path(__file__).resolve().parents[1]
    include = [str(root / room / "*.py") for room in CORE] + [str(root / "run.py")]
    measured = coverage.Coverage(
        branch=True, concurrency=["greenlet"], include=include, data_file=None, config_file=False
    )
    deadline = time.monotonic() + seconds
    measured.start()
    replayed = _replay(paths, limit, deadline)
    measured.stop()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        measured.json_report(outfile=str(report))
        totals = json.loads(report.read_text())["totals"]
    fields = {
        "cases": replayed,
        "branches": totals["num_branches"],
        "covered_branches": totals["covered_branches"],
        "branch_percent": round(100 * totals["covered_branches"] / max(1, totals["num_branches"]), 1),
        "line_percent": round(100 * totals["covered_lines"] / max(1, totals["num_statements"]), 1),
    }
    print(json.dumps(fields))


def _replay(paths: list[str], limit: int, deadline: float) -> int:
    # Imported here, so that the import-time lines of the core count as run.
    from mmufuzz.campaign.corpus import load_directory  # noqa: PLC0415
    from mmufuzz.campaign.running import safe_run  # noqa: PLC0415

    cases = [case for path in paths for case in load_directory(Path(path))]
    step = max(1, len(cases) // limit)
    replayed = 0
    for case in cases[::step]:
        if time.monotonic() > deadline:
            break
        safe_run(case)
        replayed += 1
    return replayed


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
