"""Cases kept because they reach something no other one does, in memory and on disk (bytes form, named by contents)."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from mmufuzz.campaign.files import InputError, writable_directory, write_atomic
from mmufuzz.campaign.kernel import kernel_of
from mmufuzz.campaign.reached import Reached
from mmufuzz.campaign.units import load_units
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case import toml
from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case
from mmufuzz.case.rng import Rng

SUFFIX = ".case"
"""Of files in the bytes form."""

OWN = "cases"
"""Where in a corpus directory the Cases are that this package kept; each Atheris harness has a directory beside it."""

CASE_HARNESS = "atheris_cases"
"""The Atheris harness whose inputs are Cases."""

INSN_HARNESS = "atheris_insn"
"""The one whose inputs are instructions."""

MOST_CASES = 2000
"""Cases that a corpus has in memory."""

QUICK = 1
"""Level of compression in memory: the records of a schedule, of which it may have a thousand, resemble each other."""

LOAD_LIMIT = 4000
"""Files read from one directory: a corpus is a starting point, not an archive."""


class Corpus:
    """The Cases a campaign starts from and grows, and the counters they reach.

    ``directory`` None keeps everything in memory. There, at most ``MOST_CASES`` are kept, packed: of those chosen most
    often the oldest makes room. On disk there are never more than there are counters and classes of hits.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = writable_directory(directory) if directory is not None else None
        self._packed: list[bytes] = []
        """The bytes form of each Case, compressed: what a campaign has resident must not grow with what it keeps."""
        self._chosen: list[int] = []
        """How often each was chosen."""
        self.reached = Reached()
        self.added = 0
        """Files written."""

    def __len__(self) -> int:
        return len(self._packed)

    def at(self, index: int) -> Case:
        """The Case at ``index``, in the order in which they came."""
        return case_bytes.decode(zlib.decompress(self._packed[index]))

    def add(self, case: Case) -> None:
        """Add ``case`` in memory."""
        self._add(case_bytes.encode(case))

    def clear(self) -> None:
        """Forget the Cases in memory."""
        self._packed.clear()
        self._chosen.clear()

    def _add(self, data: bytes) -> None:
        if len(self._packed) >= MOST_CASES:
            worn = self._chosen.index(max(self._chosen))
            del self._packed[worn]
            del self._chosen[worn]
        self._packed.append(zlib.compress(data, QUICK))
        self._chosen.append(0)

    def choose(self, rng: Rng) -> Case:
        """A Case to go on from: of two random ones the one that was chosen less often."""
        one = rng.below(len(self))
        other = rng.below(len(self))
        if self._chosen[other] < self._chosen[one]:
            one = other
        self._chosen[one] += 1
        return self.at(one)

    def keep(self, case: Case) -> None:
        """Add ``case``, on disk too."""
        data = case_bytes.encode(case)
        self._add(data)
        if self.directory is not None:
            path = self.directory / f"{hashlib.sha256(data).hexdigest()[:16]}{SUFFIX}"
            if not path.exists():
                write_atomic(path, data)
                self.added += 1


def load_file(path: Path) -> Case:
    """The Case in ``path``, in either form, on a kernel that exists. Raises ``CaseError``."""
    case = toml.load(path)
    try:
        kernel_of(case).check()
    except CaseError as error:
        raise CaseError(f"{path}: {error.place}", error.expected) from error
    return case


def files(path: Path) -> list[Path]:
    """Files of Cases at ``path``: itself, or those below it, in order. Raises ``InputError`` if there is nothing."""
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in (".toml", SUFFIX) and file.is_file() and not file.name.startswith(".")
        )
        if not found:
            raise InputError(str(path), f"expected .toml or {SUFFIX} files in this directory")
        return found
    if not path.exists():
        raise InputError(str(path), "expected an existing file or directory")
    return [path]


def load_directory(directory: Path) -> list[Case]:
    """Cases that ``directory`` holds, at most ``LOAD_LIMIT``; those in bytes form are decoded totally.

    Temporary files, ours and others', are no Cases: their names begin with a dot. A malformed TOML file raises
    ``CaseError``.
    """
    cases: list[Case] = []
    if not directory.is_dir():
        return cases
    for path in sorted(directory.rglob("*"))[:LOAD_LIMIT]:
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.suffix == ".toml":
            cases.append(load_file(path))
        elif path.suffix == SUFFIX:
            cases.append(case_bytes.decode(path.read_bytes()))
    return cases


def load_harness_cases(directory: Path) -> list[Case]:
    """Cases in the directory of an Atheris harness that takes Cases: libFuzzer's whole files."""
    return [case_bytes.decode(data) for _, data in load_units(directory)]
