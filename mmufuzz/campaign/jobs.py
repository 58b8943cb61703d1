"""``--jobs``: more processes, each a whole ``mmufuzz fuzz`` of its own with a seed of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mmufuzz.campaign.budget import PARENT
from mmufuzz.campaign.findings import FindingStore
from mmufuzz.campaign.plan import Plan
from mmufuzz.campaign.tally import Tally
from mmufuzz.case.rng import Rng

GRACE_SECONDS: Final = 60.0
"""How long past its budget a job may take: reductions, and saving."""


@dataclass
class Job:
    """A running process, and where its JSON will be."""

    process: subprocess.Popen[bytes]
    report: Path
    log: Path


def job_seed(seed: int, index: int) -> int:
    """The seed of job ``index``; job 0 has the campaign's own."""
    return seed if index == 0 else Rng(seed ^ index << 40).next64() >> 32


def start_jobs(plan: Plan, workdir: Path) -> list[Job]:
    """Start jobs 1 to ``plan.jobs`` - 1; the calling process is job 0."""
    jobs = []
    for index in range(1, plan.jobs):
        report = workdir / f"job{index}.json"
        log = workdir / f"job{index}.log"
        command = [sys.executable, "-m", "mmufuzz.cli.main", "fuzz", "--no-coverage", "--json", str(report)]
        command += ["--seed", str(job_seed(plan.seed, index)), "--engine", plan.engine]
        command += ["--corpus", str(plan.corpus), "--findings", str(plan.findings)]
        command += ["--kernel", plan.kernel.name]
        for name in plan.kernel.revert:
            command += ["--revert", name]
        for name in plan.kernel.apply:
            command += ["--apply", name]
        if plan.harness:
            command += ["--harness", plan.harness]
        if plan.cases is not None:
            command += ["--cases", str(plan.cases)]
        else:
            command += ["--time", f"{plan.seconds}s"]
        with log.open("wb") as stream:
            # A session of its own: Ctrl-C reaches this process alone, which then asks the jobs to end.
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, PARENT: str(os.getpid())},
            )
        jobs.append(Job(process, report, log))
    return jobs


def collect(jobs: list[Job], stopped: bool, tally: Tally, store: FindingStore) -> list[str]:
    """Wait for ``jobs`` (asking them to end if ``stopped``) and add up what they did; a line for each that failed."""
    failed = []
    for job in jobs:
        if stopped and job.process.poll() is None:
            job.process.terminate()
    for index, job in enumerate(jobs, 1):
        try:
            job.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
        try:
            fields: dict[str, Any] = json.loads(job.report.read_text())
        except (OSError, ValueError):
            last = job.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            failed.append(f"job {index} left no report, status {job.process.returncode}: {last[0][:200]}")
            continue
        tally.absorb(fields)
        for finding in fields["findings"] + fields["harness_errors"]:
            store.merge(finding)
        store.crashes += fields["crashes"]
    return failed
