"""Which core a process uses, and what it says about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import toy

from mmufuzz.build import loader
from mmufuzz.build.core import COMPILED, PURE, snapshot

SHOW = "import mmufuzz; from mmufuzz.build.loader import in_use; core = in_use(); print(core.kind, '|', core.why)"
USE_TOY = """
import sys
from pathlib import Path
from mmufuzz.build import loader
loader.use(Path(sys.argv[1]), "a test")
"""


def python(code: str, *arguments: object, **environment: str) -> str:
    """What a process with this code prints."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MMUFUZZ_")}
    root = str(Path(loader.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**kept, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The toy's sources, so that its packages can be found."""
    for path, data in toy().files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    return tmp_path


def test_modules_come_from_the_library_although_their_python_files_lie_in_the_path(
    compiled_toy: Path, source: Path
) -> None:
    code = f"{USE_TOY}\nsys.path.insert(0, sys.argv[2])\nfrom toy import two\nprint(two.boxed(21).held, two.__file__)"
    held, file = python(code, compiled_toy, source).split()
    assert held == "42" and file.startswith(str(compiled_toy)) and not file.endswith(".py")


def test_a_traceback_of_compiled_code_names_every_frame_each_time(compiled_toy: Path, source: Path) -> None:
    code = f"""{USE_TOY}
sys.path.insert(0, sys.argv[2])
import traceback
from toy import two
for number in (6, 3, 6):
    try:
        two.quarter(number)
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        print(*[f"{{frame.filename}}:{{frame.lineno}}:{{frame.name}}" for frame in frames])
"""
    lines = python(code, compiled_toy, source).splitlines()
    assert [line.split()[1:] for line in lines] == [["toy/two.py:12:quarter", "toy/one.py:9:half"]] * 3


def test_modules_of_the_library_and_others_import_each_other(compiled_toy: Path, source: Path) -> None:
    (source / "toy" / "three.py").write_text("from toy.two import Box\nheld = Box(3).held\n")
    code = f"{USE_TOY}\nsys.path.insert(0, sys.argv[2])\nfrom toy import three, one\nprint(three.held, one.double(1))"
    assert python(code, compiled_toy, source) == "3 2"


def test_a_core_that_has_been_imported_cannot_be_replaced(compiled_toy: Path, source: Path) -> None:
    code = f"import sys\nsys.path.insert(0, sys.argv[2])\nimport toy.one\n{USE_TOY}"
    with pytest.raises(AssertionError, match=r"CannotLoad: toy\.one has been imported already"):
        python(code, compiled_toy, source)


def test_a_build_for_another_python_is_refused(compiled_toy: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled_toy, copy)
    fields = json.loads((copy / "build.json").read_text())
    fields["library"] = "toy_core__mypyc.cpython-26-x86_64-linux-gnu.so"
    (copy / "build.json").write_text(json.dumps(fields))
    with pytest.raises(loader.CannotLoad, match="it is not for Python 3"):
        loader.use(copy, "a test")


def test_a_build_of_other_sources_is_refused(compiled_toy: Path) -> None:
    with pytest.raises(loader.CannotLoad, match="it was built from other sources"):
        loader.use(compiled_toy, "a test", sources=snapshot().digest)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "compiled"}', '{"kind": 1, "library": 2}'])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "build.json").write_text(text)
    with pytest.raises(loader.CannotLoad, match="holds no build"):
        loader.use(tmp_path, "a test")


def test_a_build_that_the_environment_names_but_that_does_not_fit_is_said(compiled_toy: Path, tmp_path: Path) -> None:
    why = "the build that MMUFUZZ_CORE names cannot be used:"
    installed = python(SHOW, MMUFUZZ_CORE="installed").split(" | ")[0]
    expected = f"{installed} | {why}" if installed == PURE else f"{installed} | "
    assert python(SHOW, MMUFUZZ_CORE=str(tmp_path / "none")).startswith(expected)
    assert python(SHOW, MMUFUZZ_CORE=str(compiled_toy)).startswith(expected)


def test_the_environment_can_ask_for_pure_python() -> None:
    assert python(SHOW, MMUFUZZ_PURE="1") == "pure | MMUFUZZ_PURE is set"
    assert python(SHOW, MMUFUZZ_PURE="1", MMUFUZZ_CORE="/nowhere") == "pure | MMUFUZZ_PURE is set"
    assert "MMUFUZZ_PURE" not in python(SHOW, MMUFUZZ_PURE="0")


def test_the_reason_that_a_wheel_recorded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "build.json").write_text(json.dumps({"kind": PURE, "why": "no C compiler was found"}))
    monkeypatch.setattr(loader, "INSTALLED_DIRECTORY", tmp_path)
    for name in ("MMUFUZZ_PURE", "MMUFUZZ_CORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loader, "_current", loader.in_use())
    loader.choose()
    assert loader.in_use().line == "pure: no C compiler was found"


def test_the_line_names_the_compiler() -> None:
    assert loader.InUse(COMPILED, "installed with the package", Path("x"), "cc").line == (
        "compiled by cc: installed with the package"
    )
