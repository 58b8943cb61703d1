"""libFuzzer's files: written in place, so one may be torn; but named by the SHA-1 of their contents, which tells."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mmufuzz.campaign.files import write_atomic

LOAD_LIMIT: Final = 4000
"""Files read from one directory."""

_NAME_LENGTH: Final = 40


def whole(path: Path, data: bytes) -> bool:
    """Whether ``data`` is all of what libFuzzer meant to write to ``path``."""
    return path.name == hashlib.sha1(data, usedforsecurity=False).hexdigest()


def load_units(directory: Path) -> Iterator[tuple[Path, bytes]]:
    """The whole files in ``directory``, in order, at most ``LOAD_LIMIT``; nothing if there is no such directory."""
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir())[:LOAD_LIMIT]:
        if len(path.name) == _NAME_LENGTH and path.is_file():
            data = path.read_bytes()
            if whole(path, data):
                yield path, data


def remove_torn(directory: Path) -> int:
    """Remove files with a name of libFuzzer's and other contents; how many there were."""
    removed = 0
    for path in directory.iterdir() if directory.is_dir() else ():
        if len(path.name) == _NAME_LENGTH and path.is_file() and not whole(path, path.read_bytes()):
            path.unlink()
            removed += 1
    return removed


def take_over(source: Path, target: Path) -> int:
    """Copy the whole files of ``source`` that ``target`` lacks, each in one step; how many."""
    taken = 0
    for path, data in load_units(source):
        if not (target / path.name).exists():
            write_atomic(target / path.name, data)
            taken += 1
    return taken
