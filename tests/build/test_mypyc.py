"""The core is in the subset of Python that mypyc compiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmufuzz.build.compile import write_sources
from mmufuzz.build.compilers import cannot_generate
from mmufuzz.build.core import HERE, snapshot


@pytest.mark.skipif(cannot_generate() != "", reason="needs the extra compile")
def test_mypyc_turns_every_module_of_the_core_into_c(tmp_path: Path) -> None:
    core = snapshot()
    write_sources(core, tmp_path / "source")
    command = [sys.executable, str(HERE / "generate.py"), core.library, str(tmp_path / "c"), *core.files]
    done = subprocess.run(command, cwd=tmp_path / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # And one for the runtime.
    assert len(list((tmp_path / "c").glob("*.c"))) == len(core.files) + 1
