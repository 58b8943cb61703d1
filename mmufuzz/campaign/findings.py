"""The store of findings: one minimized reproducer per fingerprint, and beside it when and how it was first seen.

A finding is *known* when ``corpus/known`` holds its fingerprint: somebody has analysed it and written that down. Every
other finding is *new*, however often it has been seen: a run that meets it again must not fall silent. Where it was met
before (``corpus/regressions``, an earlier run's findings) is told beside it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from mmufuzz.campaign.files import writable_directory, write_atomic
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case import toml
from mmufuzz.case.error import CaseError
from mmufuzz.case.model import FINDING, Case, Expect
from mmufuzz.outcome import HARNESS_ERROR, Finding

ERRORS: Final = "harness-errors"
"""Directory, in that of the findings, of what mmufuzz itself did wrong."""

MOST_RECORDS: Final = 1000
"""Fingerprints that one campaign keeps: a flood of them is one bug, most likely of a fingerprint."""


@dataclass
class Record:
    """One finding of a campaign, in the words of ``fuzz --json``.

    ``case``: path of the reproducer. ``instructions``, ``edits`` (words of initial guest memory) and ``deviations``
    measure it. ``seen_in``: a file that had the fingerprint before this campaign, or "". ``hits``: how often it came
    up. ``attributed``: whether the fixes that the campaign reverted or applied are to blame, False if the unchanged
    kernel shows it too or nothing was changed, None if nobody looked.
    """

    kind: str
    fingerprint: str
    new: bool
    case: str
    instructions: int
    edits: int
    deviations: int
    found_after_cases: int
    found_after_seconds: float
    engine: str = ""
    detail: str = ""
    seen_in: str = ""
    confirmed: bool = True
    attributed: bool | None = None
    hits: int = 1

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        fields = asdict(self)
        fields["found_after_seconds"] = round(self.found_after_seconds, 3)
        return fields


def size(case: Case) -> tuple[int, int, int]:
    """Instructions, words of initial memory, deviations."""
    return sum(len(vcpu.program) for vcpu in case.vcpus), len(case.memory), len(case.schedule)


def slug(fingerprint: str) -> str:
    """A file name for ``fingerprint``: its words, and a hash that keeps any two apart."""
    words = "".join(letter if letter.isalnum() else "-" for letter in fingerprint.lower())
    while "--" in words:
        words = words.replace("--", "-")
    return f"{words.strip('-')[:60].rstrip('-')}-{hashlib.sha256(fingerprint.encode()).hexdigest()[:8]}"


class FindingStore:
    """Findings in ``directory``, and those that were there, or in the corpus, before.

    ``corpus`` is the checkout's corpus directory, if there is a checkout. Raises ``InputError`` if the directory cannot
    be written, ``CaseError`` if a file of the corpus is malformed.
    """

    def __init__(self, directory: Path, corpus: Path | None) -> None:
        self.directory = writable_directory(directory)
        self.records: dict[str, Record] = {}
        self.errors: dict[str, Record] = {}
        """Errors of mmufuzz itself: kept apart, they say nothing about KVM."""
        self.crashes: list[str] = []
        """Harness processes that ended by themselves, a line each."""
        self.dropped = 0
        """Findings beyond ``MOST_RECORDS``."""
        self.known = fingerprints(corpus / "known") if corpus else {}
        self.seen = fingerprints(corpus / "regressions") if corpus else {}
        for fingerprint, path in fingerprints(self.directory, strict=False).items():
            self.seen.setdefault(fingerprint, path)

    def again(self, fingerprint: str) -> bool:
        """Whether this campaign has it already, or has too many to take another; counts the hit."""
        record = self.records.get(fingerprint) or self.errors.get(fingerprint)
        if record is not None:
            record.hits += 1
            return True
        if len(self.records) + len(self.errors) >= MOST_RECORDS:
            self.dropped += 1
            return True
        return False

    def directory_of(self, kind: str) -> Path:
        """Where findings of ``kind`` go; made if need be."""
        return writable_directory(self.directory / ERRORS) if kind == HARNESS_ERROR else self.directory

    def _of(self, kind: str) -> dict[str, Record]:
        return self.errors if kind == HARNESS_ERROR else self.records

    def add(self, original: Case, case: Case, finding: Finding, first_seen: dict[str, Any]) -> Record:
        """Save ``case``, reduced from ``original``, as the reproducer of ``finding``.

        ``first_seen`` says how it came up: engine, seed, cases, seconds, confirmed. A smaller reproducer of the same
        fingerprint from an earlier run stays.
        """
        path = self.directory_of(finding.kind) / f"{finding.kind}-{slug(finding.fingerprint)}.toml"
        place = self.known.get(finding.fingerprint) or self.seen.get(finding.fingerprint) or ""
        case = replace(
            case,
            expect=Expect(verdict=FINDING, kind=finding.kind, fingerprint=finding.fingerprint),
            comment=f"{finding.kind}: {finding.detail}",
        )
        if place == str(path):
            earlier = load_quietly(path)
            if earlier is not None and size(earlier) <= size(case) and _same_kernel(earlier, case):
                case = earlier
        instructions, edits, deviations = size(case)
        record = Record(
            finding.kind,
            finding.fingerprint,
            finding.fingerprint not in self.known,
            str(path),
            instructions,
            edits,
            deviations,
            int(first_seen.get("cases", 0)),
            float(first_seen.get("seconds", 0.0)),
            str(first_seen.get("engine", "")),
            finding.detail,
            place,
            bool(first_seen.get("confirmed", True)),
            first_seen.get("attributed"),
        )
        save(case, path)
        original_form = base64.b64encode(case_bytes.encode(original)).decode()
        sidecar = {**record.as_json(), "first_seen": first_seen, "original": original_form}
        write_atomic(path.with_suffix(".json"), json.dumps(sidecar, indent=2) + "\n")
        self._of(finding.kind)[finding.fingerprint] = record
        return record

    def merge(self, fields: dict[str, Any]) -> None:
        """Take over a finding that another process has already saved; ``fields`` in the form of ``Record.as_json``."""
        record = Record(**fields)
        records = self._of(record.kind)
        mine = records.get(record.fingerprint)
        if mine is None:
            records[record.fingerprint] = record
        else:
            mine.hits += record.hits


def save(case: Case, path: Path) -> None:
    """Write ``case`` as TOML, in one step. Raises ``InputError``."""
    write_atomic(path, toml.dumps(case))


def load_quietly(path: Path) -> Case | None:
    """The Case in ``path``, or None: for files of our own that another process may be replacing."""
    try:
        return toml.load(path)
    except CaseError:
        return None


def fingerprints(directory: Path, strict: bool = True) -> dict[str, str]:
    """Fingerprints that the Cases in ``directory`` expect, with the path of each.

    A malformed file raises ``CaseError``, or is passed over if not ``strict``.
    """
    found: dict[str, str] = {}
    for path in sorted(directory.glob("*.toml")):
        case = toml.load(path) if strict else load_quietly(path)
        if case is not None and case.expect.fingerprint:
            found.setdefault(case.expect.fingerprint, str(path))
    return found


def _same_kernel(one: Case, other: Case) -> bool:
    return (one.kernel, one.revert, one.apply) == (other.kernel, other.revert, other.apply)
