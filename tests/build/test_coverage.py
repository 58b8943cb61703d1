"""The instrumented build: imported anywhere, read in the process, and read by libFuzzer where that is preloaded."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_loader import USE_TOY, python
from toys import NEEDS_COMPILER, toy

from mmufuzz.build.cache import make
from mmufuzz.build.compilers import compilers
from mmufuzz.build.core import INSTRUMENTED
from mmufuzz.campaign.engine_atheris import preload

REGION = """
import ctypes
core = loader.in_use()
library = ctypes.CDLL(str(next(core.directory.glob("*.so"))))
start, stop = ctypes.c_void_p(), ctypes.c_void_p()
library.mmufuzz_coverage_region(ctypes.byref(start), ctypes.byref(stop))
counters = (ctypes.c_uint8 * (stop.value - start.value)).from_address(start.value)
"""
CALLS = """
sys.path.insert(0, sys.argv[2])
from toy.one import double
def reached(number):
    ctypes.memset(counters, 0, len(counters))
    double(number)
    return {index for index in range(len(counters)) if counters[index]}
small, large = reached(1), reached(41)
print(len(small - large) > 0, len(large - small) > 0, reached(2) == small)
"""
TARGET = """
import atheris
sys.path.insert(0, sys.argv[2])
from toy.one import double
def one(data):
    double(len(data))
atheris.Setup([sys.argv[0], "-atheris_runs=10", "-verbosity=1"], one)
atheris.Fuzz()
"""


@pytest.fixture(scope="module")
def instrumented_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an instrumented toy."""
    candidates = [compiler for compiler in compilers() if compiler.kind == INSTRUMENTED]
    if not candidates or NEEDS_COMPILER:
        pytest.skip("instrumenting needs clang, or the extra instrument")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("instrumented")))
        made = make(toy(), candidates, lambda step: None)
    assert made.directory is not None, made.notes
    return made.directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Where the package ``toy`` is found; its modules come from the build."""
    (tmp_path / "toy").mkdir()
    return tmp_path


def test_without_libfuzzer_a_process_can_read_its_own_edges(instrumented_toy: Path, source: Path) -> None:
    assert python(USE_TOY + REGION + CALLS, instrumented_toy, source) == "True True True"


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs the extra atheris")
def test_a_preloaded_libfuzzer_takes_the_edges(instrumented_toy: Path, source: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", USE_TOY + TARGET, str(instrumented_toy), str(source)],
        env={**os.environ, **preload(False), "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = re.search(r"Loaded 1 modules +\((\d+) inline 8-bit counters\)", done.stderr)
    assert loaded is not None and int(loaded[1]) > 10, done.stderr
