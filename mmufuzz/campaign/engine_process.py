"""A harness as a process of ours: it reports through a file, and ends when this one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mmufuzz.campaign.budget import PARENT, Budget
from mmufuzz.campaign.recorder import Recorder

GRACE_SECONDS: Final = 10.0
"""How long past its time the process may take to save before it is killed."""

LOOK_SECONDS: Final = 1.0
"""Between two looks at what the process has left behind."""

HARNESS_FAILED: Final = 70


def harness_command(harness: Path, recorder: Recorder, seed: int, budget: Budget) -> list[str]:
    """The command line of ``harness`` for the rest of ``budget``, but for its corpus and its report."""
    command = [sys.executable, str(harness), "--seed", str(seed)]
    command += ["--kernel", recorder.kernel.name, "--findings", str(recorder.store.directory)]
    for name in recorder.kernel.revert:
        command += ["--revert", name]
    for name in recorder.kernel.apply:
        command += ["--apply", name]
    if budget.cases is not None:
        return [*command, "--cases", str(budget.cases)]
    return [*command, "--time", f"{max(budget.left, 1.0):.1f}s"]


def run_harness(
    harness: Path,
    command: list[str],
    recorder: Recorder,
    budget: Budget,
    tick: Callable[[], None],
    workdir: Path,
    look: Callable[[], object],
) -> bool:
    """Run ``command``; take over its sums and findings, also if it ends early. True if it ended by itself, and well.

    Findings are already saved by the harness process when this sees them. ``look`` is called now and then, and at the
    end.
    """
    report = workdir / f"{harness.stem}.json"
    log = workdir / f"{harness.stem}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--report", str(report)],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, PARENT: str(os.getpid())},
        )
        try:
            ended = _wait(process, recorder, budget, tick, look)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            look()
    crashes = len(recorder.store.crashes)
    _take_over_report(report, recorder)
    if ended and process.returncode not in (0, 1):
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        recorder.share.note = f"{harness.name} ended with status {process.returncode}: {last[0][:200]}"
        explained = len(recorder.store.crashes) > crashes or recorder.store.errors
        if process.returncode != HARNESS_FAILED or not explained:
            recorder.store.crashes.append(recorder.share.note)
        return False
    return ended


def _wait(
    process: subprocess.Popen[bytes],
    recorder: Recorder,
    budget: Budget,
    tick: Callable[[], None],
    look: Callable[[], object],
) -> bool:
    """True once the process has ended by itself; False when it has to be stopped. ``look`` is called now and then."""
    looked = time.monotonic()
    while process.poll() is None:
        tick()
        if recorder.stop.requested or budget.left < -GRACE_SECONDS:
            return False
        if time.monotonic() - looked > LOOK_SECONDS:
            look()
            looked = time.monotonic()
        time.sleep(0.1)
    return True


def _take_over_report(report: Path, recorder: Recorder) -> None:
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
    recorder.corpus.added += fields["kept"]
    for finding in fields["findings"] + fields["harness_errors"]:
        recorder.store.merge(finding)
    recorder.store.crashes += fields["crashes"]
