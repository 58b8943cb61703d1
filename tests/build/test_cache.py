"""Builds in the user's cache: made once, whole or not at all, and never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import NEEDS_COMPILER, build, logging_compiler, script, toy

from mmufuzz.build import cache as cache_module
from mmufuzz.build.cache import find, prune, remove_leftovers
from mmufuzz.build.core import COMPILED, INSTRUMENTED, snapshot

BUILDER = Path(__file__).with_name("toys.py")

HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""

needs_compiler = pytest.mark.skipif(NEEDS_COMPILER, reason="compiling needs a C compiler and the extra compile")


def start(command: str) -> subprocess.Popen[str]:
    """A process that builds the toy with the compiler ``command``."""
    return subprocess.Popen(
        [sys.executable, str(BUILDER), command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def starts(directory: Path) -> int:
    """How often the logging compiler was started."""
    log = directory / "log"
    return len(log.read_text().split()) if log.is_file() else 0


@needs_compiler
def test_the_second_run_takes_what_the_first_one_built(cache: Path, tmp_path: Path) -> None:
    command = logging_compiler(tmp_path)
    first = build(toy(), command)
    assert first.directory is not None and first.notes == ()
    compiled = starts(tmp_path)
    assert compiled > 0
    assert build(toy(), command) == first
    assert starts(tmp_path) == compiled


@needs_compiler
def test_other_sources_are_another_build(cache: Path, tmp_path: Path) -> None:
    command = logging_compiler(tmp_path)
    first = build(toy(), command)
    second = build(toy("# another\n"), command)
    assert second.directory not in (None, first.directory)
    assert find(toy(), (COMPILED,)) == first.directory
    assert find(toy(), (INSTRUMENTED,)) is None
    assert find(toy("# a third\n"), (COMPILED,)) is None


@needs_compiler
def test_a_build_holds_its_library_and_its_description_and_nothing_else(compiled_toy: Path) -> None:
    fields = json.loads((compiled_toy / "build.json").read_text())
    assert (fields["kind"], fields["package"], fields["modules"]) == (COMPILED, "toy", ["toy.one", "toy.two"])
    assert {path.name for path in compiled_toy.iterdir()} == {"build.json", fields["library"]}


@needs_compiler
def test_of_two_builders_at_once_one_waits_for_the_other(cache: Path, tmp_path: Path) -> None:
    command = logging_compiler(tmp_path)
    builders = [start(command) for _ in range(2)]
    answers = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], answers
    directories = [json.loads(out)[0] for out, _ in answers]
    assert directories[0] == directories[1] != "None"
    # Two probes and the link of one, mypyc's two files and its runtime, our own file, and the link: once.
    assert starts(tmp_path) == 8


@needs_compiler
def test_a_killed_build_leaves_nothing_that_is_used_and_the_next_one_cleans_up(cache: Path, tmp_path: Path) -> None:
    stuck = script(tmp_path / "cc", f"touch {tmp_path}/started\nsleep 60")
    builder = start(stuck)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=60)
    assert [path.name for path in cache.glob(".partial-*")] != []
    assert find(toy(), (COMPILED,)) is None
    # The same build again, by the compiler that has recovered.
    Path(logging_compiler(tmp_path)).replace(stuck)
    made = build(toy(), stuck)
    assert made.directory is not None, made.notes
    assert list(cache.glob(".partial-*")) == []


def test_what_an_interrupted_build_left_is_removed_by_any_later_one(tmp_path: Path) -> None:
    for name in ("mine", "dead", "alive"):
        (tmp_path / f".partial-{name}").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(tmp_path / ".lock-alive")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    remove_leftovers(tmp_path, "mine")
    holder.communicate(timeout=60)
    assert [path.name for path in tmp_path.glob(".partial-*")] == [".partial-alive"]


@needs_compiler
def test_a_broken_compiler_is_one_line_and_the_next_one_is_tried(cache: Path, tmp_path: Path) -> None:
    broken = script(tmp_path / "broken-cc", "echo 'broken-cc: fatal error: no disk'\nexit 3")
    made = build(toy(), broken, logging_compiler(tmp_path))
    assert made.directory is not None
    assert made.notes == ("broken-cc: broken-cc ended with status 3: broken-cc: fatal error: no disk",)
    assert list(cache.glob(".partial-*")) == []


@needs_compiler
def test_a_compiler_that_cannot_optimise_at_link_time_compiles_each_module_by_itself(
    cache: Path, tmp_path: Path
) -> None:
    refusal = f'case "$*" in *-flto*) echo "error: no plugin"; exit 1;; esac\nexec {shutil.which("cc")} "$@" -O0'
    made = build(toy(), script(tmp_path / "plain-cc", refusal))
    assert made.directory is not None
    assert made.notes == ()


def test_a_compiler_that_is_gone_is_one_line(cache: Path, tmp_path: Path) -> None:
    if NEEDS_COMPILER:
        pytest.skip("compiling needs a C compiler and the extra compile")
    made = build(toy(), str(tmp_path / "no-cc"))
    assert made.directory is None
    assert made.notes == (f"no-cc: {tmp_path}/no-cc: No such file or directory",)


@needs_compiler
def test_a_type_error_in_the_core_is_one_line_that_says_where(cache: Path, tmp_path: Path) -> None:
    made = build(toy("def wrong() -> int:\n    return ''\n"), logging_compiler(tmp_path))
    assert made.directory is None
    assert len(made.notes) == 1 and "toy/one.py:12: error: Incompatible return value type" in made.notes[0]


@needs_compiler
def test_a_build_that_cannot_be_imported_is_not_kept(cache: Path, tmp_path: Path) -> None:
    made = build(toy("NUMBERS = [1]\nFIRST = NUMBERS[3]\n"), logging_compiler(tmp_path))
    assert made.directory is None
    assert len(made.notes) == 1 and "IndexError" in made.notes[0]
    assert find(toy("NUMBERS = [1]\nFIRST = NUMBERS[3]\n"), (COMPILED,)) is None


def test_no_compiler_is_one_line(cache: Path) -> None:
    assert build(toy()).notes == ("no C compiler found",)


def test_an_unwritable_cache_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    made = build(toy(), logging_compiler(tmp_path))
    assert made.directory is None
    assert len(made.notes) == 1 and "Not a directory" in made.notes[0]


def test_without_mypyc_an_earlier_build_is_still_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "cannot_generate", lambda: "no mypy")
    command = logging_compiler(tmp_path)
    assert build(toy(), command) == cache_module.Made(None, ("no mypy",))
    place = cache / f"{toy().digest}-{cache_module.ABI}-{COMPILED}-00000000"
    place.mkdir(parents=True)
    assert build(toy(), command) == cache_module.Made(place, ("no mypy",))


def test_a_builder_that_never_ends_is_waited_for_only_so_long(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(cache_module, "cannot_generate", lambda: "")
    monkeypatch.setattr(cache_module, "_try_lock", lambda descriptor: False)
    made = build(toy(), logging_compiler(tmp_path))
    assert made.directory is None
    assert made.notes == ("logging-cc: another process has been building it for 0 s",)


def test_the_builds_last_used_are_kept(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"build{number:02}").mkdir()
        os.utime(tmp_path / f"build{number:02}", (number, number))
    (tmp_path / ".partial-build99").mkdir()
    prune(tmp_path, keep=tmp_path / "build00")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"build00", ".partial-build99", *(f"build{number:02}" for number in range(5, 12))}


def test_the_digest_tells_one_state_of_the_sources_from_another(tmp_path: Path) -> None:
    core = snapshot()
    assert core.digest == snapshot().digest
    assert core.modules[0] == "mmufuzz.x86.alu" and "mmufuzz.run" in core.modules
    path = "mmufuzz/x86/alu.py"
    changed = type(core)(core.package, {**core.files, path: core.files[path] + b"\n"})
    assert changed.digest != core.digest
