"""``python -m mmufuzz.vectors PATH…``: runs files of test vectors, or all files below directories.

Exit status: 0 if all agree, 1 if one does not, 2 for bad input.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from mmufuzz.vectors.check import check
from mmufuzz.vectors.reader import read
from mmufuzz.vectors.vector import VectorError
from mmufuzz.x86.decode import Unsupported

_SUFFIXES: Final = (".json", ".moo", ".def", ".gz")
_SHOWN: Final = 3


def files(path: Path) -> list[Path]:
    """The file, or the files of the formats below a directory, in order."""
    if path.is_dir():
        return sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in _SUFFIXES)
    return [path]


def run_file(path: Path) -> tuple[int, int, int]:
    """(tests, failures, unsupported) of one file; prints the first failures."""
    tests = failures = unsupported = 0
    for vector in read(path):
        tests += 1
        try:
            found = check(vector)
        except Unsupported:
            unsupported += 1
            continue
        except ValueError as error:
            raise VectorError(f"{vector.name}: {error}") from None
        if found:
            failures += 1
            if failures <= _SHOWN:
                print(f"{path.name}: {vector.name}: {'; '.join(found)}")
    return tests, failures, unsupported


def main(arguments: list[str]) -> int:
    """The command."""
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m mmufuzz.vectors PATH…", file=sys.stderr)
        return 2
    totals = [0, 0, 0]
    for argument in arguments:
        for path in files(Path(argument)):
            try:
                counts = run_file(path)
            except VectorError as error:
                print(f"{path}: {error}", file=sys.stderr)
                return 2
            except OSError as error:
                print(f"{path}: {error.strerror}", file=sys.stderr)
                return 2
            print(f"{path.name}: {counts[0]} tests, {counts[1]} failed, {counts[2]} unsupported")
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
    print(f"{totals[0]} tests, {totals[1]} failed, {totals[2]} unsupported")
    return 1 if totals[1] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
