"""A cache of its own for each test, and one toy core compiled for all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toys import NEEDS_COMPILER, build, toy


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; where builds will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmufuzz" / "core"


@pytest.fixture(scope="session")
def compiled_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a compiled toy."""
    if NEEDS_COMPILER:
        pytest.skip("compiling needs a C compiler and the extra compile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("toy")))
        made = build(toy(), str(shutil.which("cc")))
    assert made.directory is not None, made.notes
    return made.directory
