"""Writing files so that a reader, or a crash, never meets half of one; and where a source checkout keeps its things."""

from __future__ import annotations

import os
from pathlib import Path


class InputError(Exception):
    """Something the user gave cannot be used. ``place`` names it, ``expected`` says what it should have been."""

    def __init__(self, place: str, expected: str) -> None:
        super().__init__(f"{place}: {expected}")
        self.place = place
        self.expected = expected


def reason(error: OSError) -> str:
    """What the operating system said, without Python's decoration."""
    return error.strerror or str(error)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace ``path`` by ``data`` in one step. Raises ``InputError`` if the file system refuses."""
    raw = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(raw)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(str(path), f"expected a writable file ({reason(error)})") from error


def writable_directory(path: Path) -> Path:
    """Create ``path`` if need be and prove that files can be written there. Raises ``InputError``."""
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(str(path), f"expected a writable directory ({reason(error)})") from error
    return path


def sweep(directory: Path) -> int:
    """Remove temporary files below ``directory`` whose writers are dead; how many there were."""
    removed = 0
    for path in directory.rglob(".*") if directory.is_dir() else ():
        words = path.name.split(".")
        number = words[-2] if words[-1] == "partial" else words[-1] if words[1] == "probe" else ""
        if number.isdigit() and not _alive(int(number)):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists and is somebody else's
        return True
    return True


def checkout() -> Path | None:
    """The source checkout, which holds ``harnesses/`` and ``corpus/``: they are not part of the installed package.

    Looked for around the working directory first, then around the package (an editable install). None if there is none.
    """
    here = Path.cwd()
    for root in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (root / "harnesses" / "atheris_cases.py").is_file() and (root / "mmufuzz" / "run.py").is_file():
            return root
    return None
