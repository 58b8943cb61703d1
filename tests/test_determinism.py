"""The same Case gives the same Outcome: again, in other processes, on every Python, and from its recorded schedule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data.make_digests import FILE, HORIZON, SEEDS, corpus, digests, generated

import mmufuzz
from mmufuzz.case.model import Case
from mmufuzz.outcome import Outcome
from mmufuzz.run import run
from mmufuzz.search.strategies import portfolio

CORPUS = corpus()


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    """Digests made by this process."""
    return digests()


def test_a_second_run_in_the_same_process_gives_the_same_digest(here: dict[str, str]) -> None:
    assert digests() == here


@pytest.mark.parametrize("hash_seed", ["0", "4242"])
def test_another_process_with_another_hash_seed_gives_the_same_digests(here: dict[str, str], hash_seed: str) -> None:
    script = FILE.with_name("make_digests.py")
    root = str(Path(mmufuzz.__file__).parents[1])
    made = subprocess.run(
        [sys.executable, str(script), "--print"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(made.stdout) == here


def test_every_python_gives_the_committed_digests(here: dict[str, str]) -> None:
    committed = json.loads(FILE.read_text())
    assert committed
    changed = [name for name in committed if here.get(name) != committed[name]]
    assert changed == [], "if this was meant to change, run: python tests/data/make_digests.py"


def replayed(case: Case, outcome: Outcome) -> Outcome:
    """``case`` once more, with the schedule that ``outcome`` recorded in place of its own."""
    return run(replace(case, schedule=outcome.schedule))


def check_replay(case: Case, outcome: Outcome) -> None:
    replay = replayed(case, outcome)
    if outcome.findings and outcome.findings[0].kind == "livelock":
        # The liveness phase begins when no choice is left to make, which a recording tells earlier than a strategy.
        assert replay.findings[0].fingerprint == outcome.findings[0].fingerprint
        assert replay.events <= outcome.events
        outcome = replay
        replay = replayed(case, outcome)
    assert replay.digest == outcome.digest


@pytest.mark.parametrize("name", CORPUS)
def test_the_recorded_schedule_of_a_reproducer_replays_to_the_same_digest(name: str) -> None:
    check_replay(CORPUS[name], run(CORPUS[name]))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_a_strategy_decided_replays_to_the_same_digest(seed: int) -> None:
    check_replay(generated(seed), run(generated(seed), portfolio(seed, HORIZON)))
