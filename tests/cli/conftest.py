"""Cases and a way to run the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_cases import Answer, livelock_case, small_case

from mmufuzz.case import toml
from mmufuzz.case.model import FINDING, Case, Expect
from mmufuzz.cli.main import main


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Case, str], Path]:
    """Save a Case under a name."""

    def save(case: Case, name: str) -> Path:
        path = tmp_path / name
        path.write_text(toml.dumps(case))
        return path

    return save


@pytest.fixture
def healthy(write: Callable[[Case, str], Path]) -> Path:
    """A file whose expectation holds."""
    return write(small_case(), "healthy.toml")


@pytest.fixture
def broken(write: Callable[[Case, str], Path]) -> Path:
    """A file with a livelock, and the expectation of it."""
    case = livelock_case()
    expect = Expect(FINDING, "livelock")
    return write(replace(case, expect=expect), "broken.toml")


@pytest.fixture
def mmufuzz(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Run the command line in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Answer:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return call
