"""Executions a second under Atheris: the fuzz build, and Atheris' own instrumentation of the pure core, as JSON.

    python bench/atheris_rates.py [--copies 40] [--rounds 2]

Both replay the same inputs through the target of ``harnesses/atheris_cases.py``: its seeds and the kept Cases,
each as often as ``--copies`` says. libFuzzer takes a copy for another input, and collects coverage for it. CPU time
counts, since the machine may have other work, once a quarter of the inputs has run: code that is met for the first time
costs more in all of them. Rounds take turns, and the best counts.
Status 1 if the ratio is below 12. Makes the fuzz build if the user's cache has none; needs the extra ``instrument``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmufuzz.build.cache import make
from mmufuzz.build.compilers import compilers
from mmufuzz.build.core import INSTRUMENTED, snapshot
from mmufuzz.build.loader import CORE_VARIABLE, PURE_VARIABLE
from mmufuzz.campaign.engine_atheris import libfuzzer_flags, preload

ROOT = Path(__file__).resolve().parents[1]
TARGET_RATIO = 12

MEASURE = """
import contextlib, os, sys, time
import atheris

directory, inputs, bytecode = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "bytecode"
from mmufuzz.build.core import MODULES, ROOMS
packages = ["mmufuzz." + name.removesuffix(".py") for name in (*ROOMS, *MODULES)]
with atheris.instrument_imports(include=packages) if bytecode else contextlib.nullcontext():
    from mmufuzz.campaign.coverage_table import CoverageTable
    from mmufuzz.campaign.harness import session
    from mmufuzz.case import bytes as case_bytes
    from mmufuzz.kvm.counters import N_COUNTERS
from mmufuzz.build.loader import in_use

work = session("atheris_cases", ["--findings", directory + "/findings", "--cases", "1000000"])
recorder = work.recorder
recorder.reduce_findings = False
table = CoverageTable(N_COUNTERS)
count, started = 0, 0.0

def target(data):
    global count, started
    if not data:
        return
    if count == inputs // 4:
        started = time.process_time()
    count += 1
    recorder.case()
    outcome = recorder.check(recorder.kernel.dress(case_bytes.decode(data)))
    table.add(outcome.counters)
    if count == inputs:
        rate = (count - inputs // 4) / (time.process_time() - started)
        print(f"rate {rate} {in_use().kind} {table.attached}", flush=True)
        os._exit(0)

atheris.Setup([sys.argv[0], *sys.argv[4:]], target)
atheris.Fuzz()
"""

ENCODE = """
import sys
from pathlib import Path
from mmufuzz.case import bytes as case_bytes, toml
for path in sorted(Path(sys.argv[1]).glob("*.toml")):
    (Path(sys.argv[2]) / path.with_suffix(".case").name).write_bytes(case_bytes.encode(toml.load(path)))
"""


def inputs(directory: Path, copies: int) -> int:
    """Write the inputs to ``directory``; how many there are."""
    subprocess.run([sys.executable, "-c", ENCODE, str(ROOT / "corpus" / "regressions"), str(directory)], check=True)
    for path in (ROOT / "corpus" / "seeds" / "atheris_cases").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    units = list(directory.iterdir())
    for path in units:
        for number in range(1, copies):
            (directory / f"{path.stem}-{number}.case").write_bytes(path.read_bytes())
    return len(units) * copies


def rate(core: dict[str, str], how: str, directory: Path, count: int) -> float:
    """Executions per CPU second with the core that the environment variables ``core`` choose."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MMUFUZZ_")}
    with tempfile.TemporaryDirectory() as work:
        script = Path(work) / "measure.py"
        script.write_text(MEASURE)
        flags = [*libfuzzer_flags(None, 0, [directory]), "-runs=0"]
        command = [sys.executable, str(script), work, str(count), how, *flags]
        environment = {**kept, **preload(False), **core}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = done.stdout.split("rate ")[-1].split()
    expected = "pure" if PURE_VARIABLE in core else INSTRUMENTED
    if done.returncode or line[1:] != [expected, "True"]:
        sys.exit(f"the {how} process failed:\n{done.stdout}{done.stderr}")
    return float(line[0])


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    candidates = [compiler for compiler in compilers() if compiler.kind == INSTRUMENTED]
    made = make(snapshot(), candidates, lambda step: None)
    if made.directory is None:
        sys.exit(f"no {INSTRUMENTED} core: {'; '.join(made.notes)}")
    cores = {"fuzz_build": ({CORE_VARIABLE: str(made.directory)}, "fuzz build")}
    cores["bytecode"] = ({PURE_VARIABLE: "1"}, "bytecode")
    # For comparison: what the bytecode instrumentation itself costs.
    cores["pure"] = ({PURE_VARIABLE: "1"}, "plain")
    best = dict.fromkeys(cores, 0.0)
    with tempfile.TemporaryDirectory() as directory:
        count = inputs(Path(directory), given.copies)
        for _ in range(given.rounds):
            for name, (core, how) in cores.items():
                best[name] = max(best[name], rate(core, how, Path(directory), count))
    ratio = best["fuzz_build"] / best["bytecode"]
    compiler = json.loads((made.directory / "build.json").read_text())["compiler"]
    figures: dict[str, Any] = {"python": platform.python_version(), "compiler": compiler, "executions": count}
    figures |= {f"{name}_per_cpu_second": round(value, 1) for name, value in best.items()}
    print(json.dumps({**figures, "ratio": round(ratio, 1)}, indent=2))
    return 0 if ratio >= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
