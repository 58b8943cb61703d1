"""``mmufuzz corpus``: what a corpus holds, and whether it is in order."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmufuzz.campaign.corpus import INSN_HARNESS, SUFFIX, files, load_file
from mmufuzz.campaign.files import InputError, checkout
from mmufuzz.campaign.findings import size
from mmufuzz.campaign.minimal import merge
from mmufuzz.campaign.opcode_reach import reach_of
from mmufuzz.campaign.reached import Reached, summary
from mmufuzz.campaign.running import safe_run
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case import toml
from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case
from mmufuzz.cli.arguments import add_json
from mmufuzz.cli.output import Output
from mmufuzz.cli.replay import replay
from mmufuzz.cli.status import Status


def add_parser(verbs: Any) -> None:
    """The verb's arguments."""
    parser = verbs.add_parser("corpus", help="describe, check or minimize a corpus")
    parser.add_argument("what", choices=("stats", "verify", "merge", "opcodes"))
    parser.add_argument("paths", metavar="PATH", nargs="*", help="default: the checkout's corpus/; merge needs one")
    parser.add_argument("-o", "--output", metavar="DIR", help="merge: where the minimal corpus goes")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, output: Output) -> Status:
    """JSON: ``stats``, ``merge`` and ``opcodes`` an object of sums; ``verify`` a list like ``replay``'s."""
    paths = [Path(name) for name in arguments.paths]
    if arguments.what == "merge":
        return _merge(paths, arguments.output, output)
    if arguments.output is not None:
        raise InputError("--output", f"expected with merge only, got it with {arguments.what}")
    if not paths:
        root = checkout()
        if root is None:
            raise InputError("corpus", "expected a PATH (the default corpus is in the source checkout; run from there)")
        paths = [root / "corpus" / "seeds" / INSN_HARNESS if arguments.what == "opcodes" else root / "corpus"]
    if arguments.what == "opcodes":
        return _opcodes(paths, output)
    found = [file for path in paths for file in files(path)]
    if arguments.what == "stats":
        return _stats(found, output)
    return _verify(found, output)


def _stats(found: list[Path], output: Output) -> Status:
    sums = {"files": len(found), "toml": 0, "bytes": 0, "expect_ok": 0, "expect_finding": 0}
    kinds: dict[str, int] = {}
    kernels: dict[str, int] = {}
    totals = [0, 0, 0]
    reached = Reached()
    for path in found:
        case = load_file(path)
        reached.add(safe_run(case).counters)
        sums["toml" if path.suffix == ".toml" else "bytes"] += 1
        sums["expect_finding" if case.expect.verdict == "finding" else "expect_ok"] += 1
        if case.expect.kind:
            kinds[case.expect.kind] = kinds.get(case.expect.kind, 0) + 1
        kernels[case.kernel] = kernels.get(case.kernel, 0) + 1
        for position, number in enumerate(size(case)):
            totals[position] += number
    fields: dict[str, Any] = {**sums, "kinds": kinds, "kernels": kernels}
    fields.update(zip(("instructions", "edits", "deviations"), totals, strict=True))
    for name, value in fields.items():
        shown = (
            ", ".join(f"{key} {number}" for key, number in sorted(value.items())) if isinstance(value, dict) else value
        )
        output.line(f"{name:<15} {shown}")
    output.line(f"{'counters':<15} {summary(reached)}")
    output.json({**fields, "counters": reached.by_block()})
    return Status.CLEAN


def _merge(paths: list[Path], target: str | None, output: Output) -> Status:
    """The smallest Cases that reach what all of ``paths`` reach."""
    if not paths or target is None:
        raise InputError("corpus merge", "expected a PATH or more to read and -o DIR to write to")
    read, kept, removed = merge(paths, Path(target), lambda number: output.progress(f"{number} run"))
    output.done()
    counters = len({item >> 8 for unit in kept for item in unit.reaches})
    size = sum(len(unit.data) for unit in kept)
    output.line(f"{read} Cases read, {len(kept)} kept ({size} bytes) that reach the same {counters} counters: {target}")
    if removed:
        output.line(f"{removed} files that were not needed removed from {target}")
    fields = {"read": read, "kept": len(kept), "removed": removed, "bytes": size, "counters": counters, "out": target}
    output.json(fields)
    return Status.CLEAN


def _opcodes(paths: list[Path], output: Output) -> Status:
    """Opcode-table entries that inputs of the instruction harness reach; status 1 if one is missing."""
    reach = reach_of(paths)
    modes = reach.as_json()
    output.line(f"{reach.inputs} inputs")
    columns = ("entries", "executed", "retired", "emulator_entries", "emulated")
    output.line("mode    " + "".join(f"{column.replace('_', ' '):>{len(column) + 2}}" for column in columns))
    for name, row in modes.items():
        output.line(f"{name:<8}" + "".join(f"{row[column]:>{len(column) + 2}}" for column in columns))
    for name, row in modes.items():
        for entry in row["missing"]:
            output.line(f"not reached: {name} {entry}")
    for text in reach.differing:
        output.line(text)
    output.json({"inputs": reach.inputs, "modes": modes, "differing": reach.differing})
    return Status.FOUND if reach.differing or any(row["missing"] for row in modes.values()) else Status.CLEAN


def _verify(found: list[Path], output: Output) -> Status:
    """Every file reads, means the same in both forms, and shows what it expects."""
    rows: list[dict[str, Any]] = []
    for path in found:
        try:
            case = load_file(path)
        except (CaseError, InputError) as error:
            rows.append({"case": str(path), "ok": False, "verdict": "malformed", "digest": "", "unmet": [str(error)]})
        else:
            row, _ = replay(path, case, 1)
            row["unmet"].extend(_forms(case, path))
            row["ok"] = not row["unmet"]
            rows.append(row)
        for complaint in rows[-1]["unmet"]:
            output.line(f"FAIL {path}: {complaint}")
    failed = sum(1 for row in rows if not row["ok"])
    output.line(f"{len(rows)} verified, {failed} not in order")
    output.json(rows)
    return Status.FOUND if failed else Status.CLEAN


def _forms(case: Case, path: Path) -> list[str]:
    complaints = []
    if case_bytes.encode(case_bytes.decode(case_bytes.encode(case))) != case_bytes.encode(case):
        complaints.append("its bytes form does not say the same")
    if toml.loads(toml.dumps(case), str(path)) != case:
        complaints.append("its TOML form does not say the same")
    if path.suffix not in (".toml", SUFFIX):
        complaints.append(f"expected a name that ends in .toml or {SUFFIX}")
    return complaints
