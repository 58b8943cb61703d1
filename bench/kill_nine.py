"""``kill -9`` of a campaign at a random moment, again and again, as JSON: ``python bench/kill_nine.py [--times 20]``.

All campaigns share one corpus and one directory of findings. After each kill: every file of the corpus and of the
findings reads whole, every finding that was reported is on disk and replays, no process is left behind, and nothing but
whole files is taken as input, although torn and temporary files of every kind are planted among them. Exit status 1 if
anything of that does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from mmufuzz.campaign.corpus import CASE_HARNESS, OWN, SUFFIX, load_directory, load_harness_cases
from mmufuzz.campaign.expect import unmet
from mmufuzz.campaign.files import checkout
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case import toml
from mmufuzz.case.rng import Rng
from mmufuzz.run import run

ORPHAN_SECONDS: Final = 15.0
"""How long a child may take to notice that its campaign is gone: it looks between two runs."""

REPORTED: Final = re.compile(r"^(?:new|known).*\((\S+\.toml)\)$", re.MULTILINE)


def orphans(root: Path) -> list[int]:
    """Processes whose command line names ``root``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(root).encode() in command:
                found.append(int(entry.name))
    return found


def killed(root: Path, seed: int, seconds: float, campaign: float) -> list[str]:
    """Run a campaign of ``campaign`` seconds, kill it after ``seconds``; the findings that it had reported by then."""
    command = [sys.executable, "-m", "mmufuzz.cli.main", "fuzz", "--time", f"{campaign}s", "--seed", str(seed)]
    command += ["--revert", "track-write-barrier", "--revert", "retry-guard", "--no-coverage"]
    command += ["--corpus", str(root / "corpus"), "--findings", str(root / "findings")]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=checkout(), start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    return REPORTED.findall((root / "log").read_text(errors="replace"))


def complaints(root: Path, reported: list[str]) -> list[str]:
    """What is wrong with corpus and findings in ``root``."""
    wrong = []
    for path in sorted((root / "findings").rglob("*.toml")):
        try:
            case = toml.load(path)
        except Exception as error:
            wrong.append(f"{path}: {error}")
            continue
        if str(path) in reported and unmet(case, run(case)):
            wrong.append(f"{path}: does not replay")
    for path in sorted((root / "findings").rglob("*.json")):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            wrong.append(f"{path}: {error}")
    for name in reported:
        if not Path(name).is_file() or not Path(name).with_suffix(".json").is_file():
            wrong.append(f"{name}: reported and not there")
    for path in sorted((root / "corpus" / OWN).glob(f"[!.]*{SUFFIX}")):
        data = path.read_bytes()
        if path.stem != hashlib.sha256(data).hexdigest()[:16] or case_bytes.encode(case_bytes.decode(data)) != data:
            wrong.append(f"{path}: torn")
    for harness in (CASE_HARNESS, "atheris_insn"):
        for path in sorted((root / "corpus" / harness).glob("[!.]*")):
            if path.name != hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest():
                wrong.append(f"{path}: torn")
    return wrong


def decoys_are_ignored(root: Path) -> bool:
    """Plant torn and temporary files; True if the same Cases are read as without them. The plants go again."""
    own, raw = root / "corpus" / OWN, root / "corpus" / CASE_HARNESS
    own.mkdir(parents=True, exist_ok=True)
    raw.mkdir(parents=True, exist_ok=True)
    before = [case_bytes.encode(case) for case in load_directory(own) + load_harness_cases(raw)]
    plants = [
        own / f".0123456789abcdef{SUFFIX}.1.partial",
        own / ".probe.1",
        raw / f".{'a' * 40}.1.partial",
        raw / ("b" * 40),  # libFuzzer's, cut off
        raw / "crash",
    ]
    for path in plants:
        path.write_bytes(b"MMUZ\x01\x00\x00")
    after = [case_bytes.encode(case) for case in load_directory(own) + load_harness_cases(raw)]
    for path in plants:
        path.unlink()
    return before == after


def main() -> int:
    """Kill and check; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--campaign", type=float, default=10.0, help="seconds of one campaign that nobody kills")
    given = parser.parse_args()
    rng = Rng(given.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kill-nine-") as directory:
        root = Path(directory)
        for number in range(given.times):
            seconds = 0.2 + rng.below(int(given.campaign * 1000)) / 1000
            reported = killed(root, given.seed + number, seconds, given.campaign)
            deadline = time.monotonic() + ORPHAN_SECONDS
            while orphans(root) and time.monotonic() < deadline:
                time.sleep(0.1)
            row: dict[str, Any] = {"after_seconds": round(seconds, 2), "reported": len(reported)}
            row["orphans"] = len(orphans(root))
            row["wrong"] = complaints(root, reported)
            row["decoys_ignored"] = decoys_are_ignored(root)
            row["corpus_files"] = sum(path.is_file() for path in (root / "corpus").rglob("*"))
            row["findings"] = len(list((root / "findings").glob("*.toml")))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
        left = subprocess.run(
            [sys.executable, "-m", "mmufuzz.cli.main", "corpus", "stats", str(root / "corpus" / OWN), "--json", "-"],
            cwd=checkout(),
            capture_output=True,
            text=True,
            check=False,
        )
        readable = left.returncode == 0
    failed = [row for row in rows if row["orphans"] or row["wrong"] or not row["decoys_ignored"]]
    print(json.dumps({"times": len(rows), "failed": len(failed), "corpus_readable": readable, "kills": rows}, indent=2))
    return 1 if failed or not readable else 0


if __name__ == "__main__":
    sys.exit(main())
