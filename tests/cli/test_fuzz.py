"""``mmufuzz fuzz``: the contract of its JSON and exit statuses, on real campaigns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_cases import Answer

Run = Callable[..., Answer]

FIELDS = {"verdict", "cases", "schedules", "seconds", "seed", "engines", "findings"}
FINDING_FIELDS = {
    "kind", "fingerprint", "new", "case", "instructions", "edits", "deviations", "found_after_cases",
    "found_after_seconds",
}  # fmt: skip


def test_a_campaign_on_a_healthy_kernel_is_0_and_says_what_it_did(mmufuzz: Run) -> None:
    answer = mmufuzz("fuzz", "--engine", "random", "--cases", 40, "--seed", 3, "--json", "-")
    assert answer.status == 0, answer.err
    assert answer.json.keys() >= FIELDS
    assert (answer.json["verdict"], answer.json["cases"]) == ("ok", 40)
    assert not any(found["new"] for found in answer.json["findings"])
    assert answer.json["schedules"] > 40 and answer.json["engines"]["random"]["cases"] == 40
    words = ("40 cases", "marks reached", "counters reached", "kinds of exits", "core coverage", "findings are in")
    for word in words:
        assert word in answer.err


def test_the_seed_decides_what_a_campaign_does(mmufuzz: Run) -> None:
    def campaign(seed: int, name: str) -> object:
        answer = mmufuzz(
            "fuzz",
            "--engine",
            "random",
            "--cases",
            15,
            "--seed",
            seed,
            "--corpus",
            name,
            "--json",
            "-",
            "--no-coverage",
        )
        return answer.json["marks"], answer.json["schedules"], answer.json["features"]

    assert campaign(5, "one") == campaign(5, "two")
    assert campaign(6, "three") != campaign(5, "four")


def test_a_reverted_fix_is_found_saved_and_replays(mmufuzz: Run, tmp_path: Path) -> None:
    answer = mmufuzz(
        "fuzz",
        "--engine",
        "random",
        "--cases",
        60,
        "--seed",
        1,
        "--revert",
        "retry-guard",
        "--json",
        "-",
        "--no-coverage",
    )
    assert answer.status == 1
    assert answer.json["verdict"] == "finding"
    found = answer.json["findings"][0]
    assert found.keys() >= FINDING_FIELDS
    assert found["new"] and found["confirmed"]
    assert mmufuzz("replay", found["case"], "--times", 3).status == 0
    first_seen = json.loads(Path(found["case"]).with_suffix(".json").read_text())["first_seen"]
    assert first_seen["engine"] == "random" and first_seen["cases"] >= 1


def test_a_finding_of_an_earlier_run_is_still_new_but_says_where_it_was_seen(mmufuzz: Run) -> None:
    arguments = ["fuzz", "--engine", "random", "--cases", 60, "--seed", 1, "--revert", "retry-guard", "--no-coverage"]
    first = mmufuzz(*arguments, "--corpus", "one", "--json", "-")
    second = mmufuzz(*arguments, "--corpus", "two", "--json", "-")
    assert second.status == 1
    # What corpus/known and corpus/regressions hold is named there; the rest must name the file of the first run.
    earlier = {found["case"] for found in first.json["findings"] if not found["seen_in"]}
    assert earlier
    assert {found["seen_in"] for found in second.json["findings"] if found["case"] in earlier} == earlier
    assert all(found["new"] for found in second.json["findings"] if found["case"] in earlier)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_campaign_is_130_with_everything_saved(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "mmufuzz.cli.main", "fuzz", "--engine", "random", "--time", "1h"]
    command += ["--seed", "1", "--revert", "retry-guard", "--json", "out.json"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "findings").glob("*.toml")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "everything above is saved" in out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["interrupted"]
    assert result["findings"] and all(Path(tmp_path, found["case"]).is_file() for found in result["findings"])
    assert not [path for path in tmp_path.rglob(".*partial")]


def test_two_jobs_add_up(mmufuzz: Run) -> None:
    answer = mmufuzz(
        "fuzz", "--engine", "random", "--cases", 10, "--jobs", 2, "--seed", 1, "--json", "-", "--no-coverage"
    )
    assert answer.status == 0
    assert answer.json["cases"] == 20


def test_the_hypothesis_engine_runs_apart_and_hands_over_what_it_found_and_kept(
    mmufuzz: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hypothesis")
    # An installed package finds the harnesses in the checkout that it is run from.
    monkeypatch.chdir(Path(__file__).parents[2])
    arguments = ["--harness", "state_machine", "--cases", 60, "--seed", 2, "--revert", "retry-guard", "--no-coverage"]
    places = ["--corpus", tmp_path / "corpus", "--findings", tmp_path / "findings"]
    answer = mmufuzz("fuzz", *arguments, *places, "--json", "-")
    assert answer.status == 1, answer.err
    assert answer.json["engines"]["hypothesis:state_machine"]["cases"] == 60
    assert answer.json["findings"][0]["kind"] == "livelock" and Path(answer.json["findings"][0]["case"]).is_file()
    kept = list((tmp_path / "corpus" / "cases").glob("*.case"))
    assert len(kept) == answer.json["new_cases"] > 0
