"""Random page tables, walked here and by Unicorn and bochscpu: no difference that is not on the allow-list.

``tox -e oracle`` compares 100000 walks for each engine and paging mode, or as many as MMUFUZZ_WALKS says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from walk_cases import MODES, Generator, outcome, reachable, reference
from walk_divergences import DIVERGENCES
from walk_engines import ENGINES

SLICE = 2000
HEAVY = int(os.environ.get("MMUFUZZ_WALKS", "100000"))
# Each test runs on a slice, and in the environment of its own on the whole.
SIZES = [SLICE, pytest.param(HEAVY, marks=pytest.mark.oracle)]
# Engines whose absence is a failure; of the others the reason is shown.
REQUIRED = os.environ.get("MMUFUZZ_REQUIRE", "").split()
COMPARE = Path(__file__).with_name("compare_walks.py")


@cache
def compare(engine: str, mode: str, walks: int) -> dict[str, Any]:
    """The comparison's own account of itself; skips where the engine does not run."""
    command = [sys.executable, str(COMPARE), engine, mode, str(walks), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 77), done.stderr
    account: dict[str, Any] = json.loads(done.stdout)
    if "unavailable" in account:
        if engine in REQUIRED:
            pytest.fail(account["unavailable"])
        pytest.skip(account["unavailable"])
    print(json.dumps(account, indent=2))
    return account


@pytest.mark.parametrize("walks", SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("engine", ENGINES)
def test_walks_end_as_the_engine_says(engine: str, mode: str, walks: int) -> None:
    """Translation, error code, CR2 and the A and D bits, and every way that a walk can end is among the cases."""
    account = compare(engine, mode, walks)
    assert account["differences"] == []  # 10 at most are shown
    assert account["cases"] == walks
    assert set(account["outcomes"]) == reachable(mode, ENGINES[engine].pke)
    known = {divergence.name for divergence in DIVERGENCES if divergence.engine == engine}
    met = {name for names in account["divergences"] for name in names.split(" + ")}
    assert met <= known


@pytest.mark.parametrize("walks", SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_no_divergence_is_listed_that_does_not_show(engine: str, walks: int) -> None:
    """Each entry of the allow-list is met: one that a later version of the engine mends has to go."""
    met = set()
    for mode in MODES:
        met.update(name for names in compare(engine, mode, walks)["divergences"] for name in names.split(" + "))
    assert met == {divergence.name for divergence in DIVERGENCES if divergence.engine == engine}


@pytest.mark.parametrize("mode", MODES)
def test_cases_are_the_same_for_the_same_seed(mode: str) -> None:
    first, second = (Generator(mode, 5, pke=True, linear_bits=48) for _ in range(2))
    assert [first.case() for _ in range(20)] == [second.case() for _ in range(20)]


@pytest.mark.parametrize("mode", MODES)
def test_most_walks_get_past_the_topmost_table(mode: str) -> None:
    generator = Generator(mode, 1, pke=True, linear_bits=48)
    deep = 0
    for _ in range(500):
        case = generator.case()
        result = reference(case)
        deep += len(result.entries) > 1 or result.page_shift > 12
        assert outcome(case, result)
    assert deep > 300
