"""Speed, as JSON on standard output: ``tox -e bench``, or ``python bench/run.py [SECONDS]``.

Each figure comes with what it is to be compared with, measured in the same process or the same minute.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmufuzz.build.loader import in_use
from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import Corpus, load_directory
from mmufuzz.campaign.engine_atheris import preload
from mmufuzz.campaign.engine_hypothesis import load_harness
from mmufuzz.campaign.findings import FindingStore
from mmufuzz.campaign.kernel import Kernel
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.campaign.tally import Tally
from mmufuzz.case.generate import generate
from mmufuzz.case.rng import Rng
from mmufuzz.run import run

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 5.0
EXAMPLES = 60


def core(seconds: float) -> dict[str, Any]:
    """Runs of the corpus' Cases in turn: what one core of the machine does."""
    cases = load_directory(ROOT / "corpus") or [generate(Rng(number)) for number in range(40)]
    for case in cases:
        run(case)
    runs = points = instructions = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for case in cases:
            outcome = run(case)
            runs += 1
            points += outcome.events
            instructions += outcome.instructions
    return {
        "cases_in_the_set": len(cases),
        "cases_per_second": round(runs / elapsed, 1),
        "schedule_points_per_second": round(points / elapsed),
        "instructions_per_second": round(instructions / elapsed),
    }


def hypothesis_machine() -> dict[str, Any]:
    """The state machine's examples per second, and those of the same machine whose rules do nothing."""
    harness = load_harness(ROOT, "state_machine")
    empty = empty_copy(harness.ShadowPaging)
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(Kernel(), FindingStore(Path(directory), None), Corpus(None), Tally(), Stop(), Budget())
        recorder.begin("bench", 1)

        def rate(machine: type) -> float:
            started = time.perf_counter()
            harness.run_batch(machine, recorder, lambda: False, 1, EXAMPLES)
            return EXAMPLES / (time.perf_counter() - started)

        # In turn, so that a busy moment of the machine hits both.
        full_rate = empty_rate = 0.0
        for _ in range(3):
            full_rate = max(full_rate, rate(harness.ShadowPaging))
            empty_rate = max(empty_rate, rate(empty))
    return {
        "examples_per_second": round(full_rate, 1),
        "empty_machine_examples_per_second": round(empty_rate, 1),
        "ratio": round(full_rate / empty_rate, 2),
    }


def empty_copy(machine: type) -> type:
    """A subclass of ``machine`` with the same rules, none of which does anything."""
    from hypothesis.stateful import initialize, rule  # noqa: PLC0415 - an extra

    body: dict[str, Any] = {"teardown": lambda self: None}
    for name, function in vars(machine).items():
        for attribute, decorate in (
            ("hypothesis_stateful_rule", rule),
            ("hypothesis_stateful_initialize_rule", initialize),
        ):
            found = getattr(function, attribute, None)
            if found is not None:
                arguments = dict(found.arguments)
                body[name] = decorate(**arguments)(nothing(name, list(arguments)))
    return type(f"Empty{machine.__name__}", (machine,), body)


def nothing(name: str, parameters: list[str]) -> Callable[..., None]:
    """A method with these parameters that does nothing."""
    scope: dict[str, Any] = {}
    exec(f"def {name}(self, {', '.join(parameters)}): pass", scope)
    found: Callable[..., None] = scope[name]
    return found


EMPTY_TARGET = """
import atheris, sys, time, os
count, end = 0, time.monotonic() + float(sys.argv[1])
def one(data):
    global count
    count += 1
    if time.monotonic() > end:
        print(f"{count} executions in {float(sys.argv[1])} s", flush=True)
        os._exit(0)
atheris.Setup([sys.argv[0], "-len_control=0", "-max_len=4096", "-verbosity=0"], one)
atheris.Fuzz()
"""


def atheris_targets(seconds: float) -> dict[str, Any]:
    """Executions per second of both Atheris harnesses, and of a target that does nothing."""
    rates: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        empty = Path(directory) / "empty.py"
        empty.write_text(EMPTY_TARGET)
        commands = {"empty": [str(empty), str(seconds)]}
        for name in ("atheris_cases", "atheris_insn"):
            commands[name] = [str(ROOT / "harnesses" / f"{name}.py"), "--time", f"{seconds}s", "--findings", directory]
        for name, command in commands.items():
            extra = preload() if name == "empty" else {}
            done = subprocess.run(
                [sys.executable, *command], capture_output=True, text=True, env={**os.environ, **extra}, check=False
            )
            found = re.search(r"(\d+) (?:cases|executions)", done.stdout)
            rates[f"{name}_per_second"] = round(int(found.group(1)) / seconds, 1) if found else None
    return rates


def main(seconds: float) -> None:
    """Measure all that is installed and print it."""
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "core_build": in_use().kind,
        "core": core(seconds),
    }
    for name, measure in (("hypothesis", hypothesis_machine), ("atheris", lambda: atheris_targets(seconds))):
        figures[name] = measure() if importlib.util.find_spec(name) is not None else "not installed"
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
