"""All builds of the core on this Python, as JSON on standard output: ``tox -e py311-builds``, or
``python bench/builds.py [SECONDS]``. Status 1 if one cannot be made or a digest is not the committed one.

For each: whether its digests are those of tests/data/digests.json, and runs per CPU second of the corpus' Cases.
Builds are taken from the user's cache, or made there.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmufuzz.build.cache import make
from mmufuzz.build.compilers import compilers
from mmufuzz.build.core import COMPILED, INSTRUMENTED, PURE, snapshot
from mmufuzz.build.loader import CORE_VARIABLE, PURE_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
DIGESTS = ROOT / "tests" / "data" / "make_digests.py"
SECONDS = 5.0

MEASURE = """
import sys, time
from pathlib import Path
from mmufuzz.campaign.corpus import load_directory
from mmufuzz.run import run
cases = load_directory(Path(sys.argv[1]))
for case in cases:
    run(case)
runs, started = 0, time.process_time()
while (elapsed := time.process_time() - started) < float(sys.argv[2]):
    for case in cases:
        run(case)
    runs += len(cases)
print(runs / elapsed)
"""


def environments() -> dict[str, dict[str, str]]:
    """Environment variables that choose each build."""
    chosen = {PURE: {PURE_VARIABLE: "1"}}
    for kind in (COMPILED, INSTRUMENTED):
        candidates = [compiler for compiler in compilers() if compiler.kind == kind]
        made = make(snapshot(), candidates, lambda step: None)
        if made.directory is None:
            sys.exit(f"no {kind} core: {'; '.join(made.notes)}")
        chosen[kind] = {CORE_VARIABLE: str(made.directory)}
    return chosen


def main(seconds: float) -> int:
    """Measure and print; the exit status."""
    committed = json.loads((ROOT / "tests" / "data" / "digests.json").read_text())
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MMUFUZZ_")}
    builds: dict[str, Any] = {}
    for kind, variables in environments().items():
        environment = {**kept, **variables}

        def python(*arguments: str, environment: dict[str, str] = environment) -> str:
            command = [sys.executable, *arguments]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

        assert python("-c", "from mmufuzz.build.loader import in_use; print(in_use().kind)").strip() == kind
        digests = json.loads(python(str(DIGESTS), "--print"))
        different = [name for name in committed if digests.get(name) != committed[name]]
        rate = float(python("-c", MEASURE, str(ROOT / "corpus"), str(seconds)))
        builds[kind] = {"digests": len(digests), "different": different, "runs_per_cpu_second": round(rate, 1)}
        if kind != PURE:
            described = json.loads((Path(variables[CORE_VARIABLE]) / "build.json").read_text())
            builds[kind] |= {name: described[name] for name in ("compiler", "seconds", "cpu_seconds")}
        builds[kind]["times_pure"] = round(rate / builds[PURE]["runs_per_cpu_second"], 2)
    print(json.dumps({"python": platform.python_version(), "builds": builds}, indent=2))
    return 1 if any(build["different"] for build in builds.values()) else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS))
