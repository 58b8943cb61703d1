"""Atheris as an engine: libFuzzer owns its process, so the harness runs as one of ours and reports through a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mmufuzz.campaign.budget import Budget
from mmufuzz.campaign.corpus import OWN
from mmufuzz.campaign.files import writable_directory
from mmufuzz.campaign.recorder import Recorder

GRACE_SECONDS: Final = 10.0
"""How long past its time the process may take to save before it is killed."""

MAX_LEN: Final = 4096


def libfuzzer_flags(seconds: float | None, seed: int, corpora: list[Path]) -> list[str]:
    """Arguments for libFuzzer; it reads all of ``corpora`` and adds to the first.

    ``-len_control=0``: its default starves structured inputs. The harness ends by its own clock; libFuzzer's is the
    backstop. Signals are left to the harness.
    """
    flags = ["-len_control=0", f"-max_len={MAX_LEN}", "-handle_int=0", "-handle_term=0", "-print_final_stats=0"]
    flags.append("-verbosity=0")
    flags.append(f"-seed={seed % 0x7FFFFFFF + 1}")
    if seconds is not None:
        flags.append(f"-max_total_time={int(seconds + GRACE_SECONDS)}")
    return flags + [str(corpus) for corpus in corpora]


def preload() -> dict[str, str]:
    """Environment in which libFuzzer's symbols are global, so that the harness' counters can be its coverage.

    Uses the library that the Atheris wheel installs beside its package; empty if there is none.
    """
    import atheris  # noqa: PLC0415 - an extra; only this engine needs it

    library = Path(atheris.path()).parent / "ubsan_with_fuzzer.so"
    if not library.is_file():
        library = Path(atheris.__file__).parent.parent / "ubsan_with_fuzzer.so"
    return {"LD_PRELOAD": str(library)} if library.is_file() else {}


def run_atheris(
    harness: Path,
    recorder: Recorder,
    seed: int,
    budget: Budget,
    tick: Callable[[], None],
    workdir: Path,
    corpus: Path,
) -> None:
    """Run ``harness`` for the rest of ``budget``; take over its sums and findings, also if it ends early.

    It starts from its seeds in the checkout, its own directory in ``corpus``, and, if it takes Cases, those kept there;
    it grows its own. Findings are already saved by the harness process when this sees them.
    """
    report = workdir / f"{harness.stem}.json"
    command = [sys.executable, str(harness), "--report", str(report), "--seed", str(seed)]
    command += ["--kernel", recorder.kernel.name, "--findings", str(recorder.store.directory)]
    for name in recorder.kernel.revert:
        command += ["--revert", name]
    for name in recorder.kernel.apply:
        command += ["--apply", name]
    own = writable_directory(corpus / harness.stem)
    for directory in (own, harness.parents[1] / "corpus" / "seeds" / harness.stem, corpus / OWN):
        if directory.is_dir() and (directory.name != OWN or harness.stem == "atheris_cases"):
            command += ["--corpus", str(directory)]
    if budget.cases is not None:
        command += ["--cases", str(budget.cases)]
    else:
        command += ["--time", f"{max(budget.left, 1.0):.1f}s"]
    log = workdir / f"{harness.stem}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=dict(os.environ),
        )
        try:
            ended = _wait(process, recorder, budget, tick)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    _take_over(report, recorder)
    if ended and process.returncode not in (0, 1):
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        recorder.share.note = f"{harness.name} ended with status {process.returncode}: {last[0][:200]}"


def _wait(process: subprocess.Popen[bytes], recorder: Recorder, budget: Budget, tick: Callable[[], None]) -> bool:
    """True once the process has ended by itself; False when it has to be stopped."""
    while process.poll() is None:
        tick()
        if recorder.stop.requested or budget.left < -GRACE_SECONDS:
            return False
        time.sleep(0.1)
    return True


def _take_over(report: Path, recorder: Recorder) -> None:
    """Add the sums and findings in ``report``, if the harness got as far as writing one."""
    try:
        fields: dict[str, Any] = json.loads(report.read_text())
    except (OSError, ValueError):
        recorder.share.note = "the harness left no report"
        return
    # The harness has one engine; its seconds are counted by whoever started it.
    (share,) = fields["tally"]["engines"].values()
    recorder.tally.absorb({**fields["tally"], "engines": {recorder.engine: {**share, "seconds": 0.0}}})
    recorder.corpus.reached.absorb(fields["reached"])
    for finding in fields["findings"]:
        recorder.store.merge(finding)
