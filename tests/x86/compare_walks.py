"""Compare the reference walk with an engine; JSON on standard output.

    python compare_walks.py ENGINE MODE CASES SEED

A process of its own, since bochscpu crashes when the interpreter that loaded it ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

from walk_cases import CODE_FRAME, READ, Generator, WalkCase, outcome, reference
from walk_divergences import predictions
from walk_engines import ENGINES, Seen, Unavailable

from mmufuzz.x86 import WalkResult
from mmufuzz.x86.paging import PTE_A
from mmufuzz.x86.state import VECTOR_PF

SHOWN = 10


def expected(case: WalkCase, result: WalkResult) -> Seen:
    """What the reference says an engine should do."""
    words = dict(case.words)
    for gpa, bits in result.ad_updates:
        words[gpa & ~7] |= bits << (gpa & 4) * 8
    address = case.gva if result.vector == VECTOR_PF else 0
    gpa = -1 if result.fault else result.gpa
    return Seen(result.vector, result.error_code, address, gpa, words)


def accessed_on_the_way(case: WalkCase, result: WalkResult, leaf_1g: bool) -> dict[int, int]:
    """The case's words with A set in all entries that a faulting walk passed: hardware may do so (SDM 4.8)."""
    words = dict(case.words)
    passed = result.entries if leaf_1g and result.level == 3 else result.entries[:-1]
    for gpa, _ in passed:
        words[gpa & ~7] |= PTE_A << (gpa & 4) * 8
    return words


def agree(case: WalkCase, result: WalkResult, seen: Seen, leaf_1g: bool = False) -> bool:
    """True if an engine did what ``result`` says, or what the SDM lets it do instead."""
    want = expected(case, result)
    if (seen.vector, seen.error_code, seen.address, seen.gpa) != (want.vector, want.error_code, want.address, want.gpa):
        return False
    if not result.fault:
        return seen.words == want.words
    passed = accessed_on_the_way(case, result, leaf_1g)
    return all(
        word | was == word and word & ~passed[address] == 0
        for (address, word), was in zip(seen.words.items(), case.words.values(), strict=True)
    )


def overlaps(case: WalkCase, gpa: int) -> bool:
    """True if the access would change a table or the code, or its own code would lie there."""
    if case.kind == READ or gpa < 0:
        return False
    return gpa >> 12 == CODE_FRAME or any(gpa - 8 < address < gpa + 16 for address in case.words)


def compare(engine_name: str, mode: str, count: int, seed: int) -> dict[str, Any]:
    """Run ``count`` cases and say what came of them."""
    kind = ENGINES[engine_name]
    engine = kind(mode)
    generator = Generator(mode, seed, pke=kind.pke, linear_bits=kind.linear_bits[mode])
    outcomes: Counter[str] = Counter()
    divergences: Counter[str] = Counter()
    skipped = 0
    differences = []
    started = time.monotonic()
    while sum(outcomes.values()) < count:
        case = generator.case()
        result = reference(case)
        others = predictions(engine_name, case)
        landings = [result.gpa] + [other.gpa for _, other, _ in others]
        absent = result.no_memory or any(other.no_memory for _, other, _ in others)
        if absent or any(overlaps(case, gpa) for gpa in landings):
            skipped += 1
            continue
        outcomes[outcome(case, result)] += 1
        seen = engine.run(case, landings)
        if agree(case, result, seen):
            continue
        name = next((names for names, other, leaf_1g in others if agree(case, other, seen, leaf_1g)), "")
        if name:
            divergences[name] += 1
        elif len(differences) < SHOWN:
            differences.append({"case": repr(case), "expected": repr(expected(case, result)), "seen": repr(seen)})
    return {
        "engine": engine_name,
        "mode": mode,
        "cases": sum(outcomes.values()),
        "skipped": skipped,
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "divergences": dict(sorted(divergences.items())),
        "differences": differences,
    }


def main(engine: str, mode: str, count: str, seed: str) -> int:
    """Compare, print, and return an exit status: 0, or 77 if the engine does not run here."""
    try:
        print(json.dumps(compare(engine, mode, int(count), int(seed)), indent=2))
    except Unavailable as reason:
        print(json.dumps({"unavailable": str(reason)}))
        return 77
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # without finalizers: see above
