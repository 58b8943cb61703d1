"""A minimal corpus: the fewest and smallest Cases that reach all that a larger one reaches."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmufuzz.campaign.corpus import SUFFIX, files, load_file
from mmufuzz.campaign.files import writable_directory, write_atomic
from mmufuzz.campaign.reached import bucket
from mmufuzz.campaign.running import safe_run
from mmufuzz.campaign.units import load_units
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.model import Case

ReachesOf = Callable[[bytes], Sequence[int]]
"""What an input reaches, when it is run once."""


@dataclass
class Unit:
    """A Case in bytes form, and what its run reached: counters, each with its class of hits, in order."""

    data: bytes
    reaches: Sequence[int]

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{hashlib.sha256(self.data).hexdigest()[:16]}{SUFFIX}"


def reach(data: bytes) -> array[int]:
    """``Unit.reaches`` of a Case in bytes form, which is run once."""
    counters = safe_run(case_bytes.decode(data)).counters
    return array("I", sorted(index << 8 | bucket(count) for index, count in counters.items()))


def minimal(datas: Iterable[bytes], reaches_of: ReachesOf) -> list[Unit]:
    """Those of ``datas`` that are needed to reach what all reach; none of them can be left out.

    The smallest win: in order of size, then of contents, one is taken if it reaches anything that those before it do
    not; then those that later ones made superfluous go, the largest first. The order of ``datas`` is of no account.
    What is not taken is forgotten at once: there are thousands.
    """
    taken: list[Unit] = []
    times: dict[int, int] = {}
    for data in sorted(set(datas), key=lambda data: (len(data), data)):
        reaches = reaches_of(data)
        if any(item not in times for item in reaches):
            taken.append(Unit(data, reaches))
            for item in reaches:
                times[item] = times.get(item, 0) + 1
    for unit in reversed(taken[:]):
        if all(times[item] > 1 for item in unit.reaches):
            taken.remove(unit)
            for item in unit.reaches:
                times[item] -= 1
    return taken


def merge(paths: list[Path], out: Path, tick: Callable[[int], None]) -> tuple[int, list[Unit], int]:
    """Write the minimal corpus of the Cases in ``paths`` (files or directories) to directory ``out``.

    Every Case is written before any file goes: Cases in bytes form that were in ``out`` and are not needed are removed,
    whether or not it is one of ``paths``. Answers the number of Cases read, the units kept and the files removed.
    Raises ``InputError`` or ``CaseError`` for what cannot be read, before anything is written.
    """
    datas = [case_bytes.encode(case) for case in _cases(paths, out)]
    ran = 0

    def counted(data: bytes) -> Sequence[int]:
        nonlocal ran
        ran += 1
        tick(ran)
        return reach(data)

    kept = minimal(datas, counted)
    writable_directory(out)
    for unit in kept:
        write_atomic(out / unit.name, unit.data)
    names = {unit.name for unit in kept}
    removed = 0
    for path in sorted(out.glob(f"*{SUFFIX}")):
        if path.name not in names and not path.name.startswith("."):
            path.unlink()
            removed += 1
    return len(datas), kept, removed


def _cases(paths: list[Path], out: Path) -> list[Case]:
    """The Cases in ``paths``, libFuzzer's whole files among them, and those in ``out``."""
    found: dict[Path, Case] = {}
    for path in paths:
        raw = [unit for directory in _directories(path) for unit in load_units(directory)]
        for file, data in raw:
            found.setdefault(file.resolve(), case_bytes.decode(data))
        # ``files`` complains of a directory without any of ours.
        for file in files(path) if not raw or _has_ours(path) else ():
            found.setdefault(file.resolve(), load_file(file))
    for file in sorted(out.glob(f"*{SUFFIX}")) if out.is_dir() else ():
        if not file.name.startswith("."):
            found.setdefault(file.resolve(), load_file(file))
    return list(found.values())


def _directories(path: Path) -> list[Path]:
    return sorted([path, *(below for below in path.rglob("*") if below.is_dir())]) if path.is_dir() else []


def _has_ours(path: Path) -> bool:
    return any(file.suffix in (".toml", SUFFIX) for file in path.rglob("*"))
