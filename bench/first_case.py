"""How long a fresh machine takes to its first fuzzed Cases: ``python bench/first_case.py``; JSON on standard output.

A fresh clone, a fresh virtual environment with tox alone, an empty cache of builds and an empty pip cache; then the
README's command, ended after its first Cases, twice. ``seconds`` includes the packages' downloads. On a busy machine
read ``cpu_seconds``: on two free CPUs the first run takes about half of them plus the downloads.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ("-e", "fuzz", "--", "--cases", "8", "--no-coverage", "--json", "out.json")


def timed(command: list[str], directory: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run ``command``; wall clock, CPU time, load, and what it printed of the core."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="mmufuzz-first-") as name:
        scratch = Path(name)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MMUFUZZ_", "TOX", "VIRTUAL"))}
        environment = {
            **kept,
            "XDG_CACHE_HOME": str(scratch / "cache"),
            "PIP_CACHE_DIR": str(scratch / "pip"),
        }
        checkout = scratch / "mmufuzz"
        timed(["git", "clone", "--quiet", str(ROOT), str(checkout)], scratch, environment)
        timed([sys.executable, "-m", "venv", "venv"], scratch, environment)
        python = str(scratch / "venv" / "bin" / "python")
        figures: dict[str, Any] = {"python": sys.version.split()[0], "cpus": os.cpu_count()}
        figures["install_tox"] = timed([python, "-m", "pip", "install", "--quiet", "tox"], checkout, environment)
        for run in ("first_run", "second_run"):
            figures[run] = timed([python, "-m", "tox", *COMMAND], checkout, environment)
            result = json.loads((checkout / "out.json").read_text())
            figures[run] |= {"core": result["core"], "core_compiler": result["core_compiler"], "cases": result["cases"]}
            figures[run]["of_which_fuzzing"] = result["seconds"]
        for description in (scratch / "cache").rglob("build.json"):
            built = json.loads(description.read_text())
            figures["build_of_the_core"] = {key: built[key] for key in ("compiler", "seconds", "cpu_seconds")}
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
