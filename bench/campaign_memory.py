"""Resident memory of a long campaign, as JSON: ``python bench/campaign_memory.py [--time 30m] [--engine E]``.

Runs ``mmufuzz fuzz`` and reads the resident size of the process, and the sum over its children, from /proc once a
second. ``growth``: the median of the last tenth by the median of the minute after the first, for the process itself.
Children come and go with their engines, so for them only the largest sum is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from mmufuzz.campaign.budget import parse_duration
from mmufuzz.campaign.files import checkout

WARM_UP = 60.0
"""Seconds after which the size is taken as the one to compare with, over as many more."""


def resident(process: int) -> int:
    """Resident size in KiB; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def children(process: int) -> list[int]:
    """Processes that ``process`` started."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            continue
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--time", type=parse_duration, default=1800.0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--revert", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "mmufuzz.cli.main", "fuzz", "--time", f"{given.time}s", "--seed", "1"]
        command += ["--engine", given.engine, "--no-coverage", "--json", str(report)]
        command += ["--corpus", f"{directory}/corpus", "--findings", f"{directory}/findings"]
        for name in given.revert:
            command += ["--revert", name]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=checkout())
        started = time.monotonic()
        samples: list[tuple[float, int]] = []
        most = 0
        while process.poll() is None:
            size = resident(process.pid)
            if size:
                samples.append((time.monotonic() - started, size))
            most = max(most, sum(map(resident, children(process.pid))))
            time.sleep(1)
        fields: dict[str, Any] = json.loads(report.read_text())
    warm = [size for at, size in samples if WARM_UP <= at < 2 * WARM_UP]
    last = [size for _, size in samples[-max(1, len(samples) // 10) :]]
    figures = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "engine": given.engine,
        "seconds": round(samples[-1][0]),
        "cases": fields["cases"],
        "schedules": fields["schedules"],
        "kept": fields["new_cases"],
        "kib_after_a_minute": median(warm),
        "kib_at_the_end": median(last),
        "growth": round(median(last) / median(warm), 3),
        "most_kib_of_children": most,
        "kib_by_minute": [size for index, (_, size) in enumerate(samples) if index % 60 == 0],
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
