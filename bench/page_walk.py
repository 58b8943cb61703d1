"""What a page walk costs, next to a toy one, as JSON on standard output: ``python bench/page_walk.py``.

Measured in two processes: one interprets ``mmufuzz.x86`` and the toy, one runs both as mypyc and the C compiler made
them. Needs the extra ``compile``. In each process the walks take turns, and the best of many short turns counts.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parent
MODULES = ("state", "paging", "walk_result", "page_walk", "tlb", "mmu")
GVA = 0x1234_5678_9ABC
ROOT = 1
TURNS = 60
CALLS = 2000


def measure() -> dict[str, float]:
    """Nanoseconds for one call of each walk, less those for calling nothing."""
    from toy_walk import toy_walk  # noqa: PLC0415 - only once it is settled which build is imported

    from mmufuzz.x86 import ACCESS_WRITE, PagingRegisters, walk  # noqa: PLC0415
    from mmufuzz.x86.paging import PTE_A, PTE_D, PTE_NX, PTE_P, PTE_U, PTE_W, entry_address  # noqa: PLC0415

    flags = PTE_P | PTE_W | PTE_U | PTE_A | PTE_D
    memory = {entry_address(5 - level, GVA, level): (6 - level) << 12 | flags for level in (4, 3, 2, 1)}
    with_nx = dict(memory)
    with_nx[entry_address(4, GVA, 1)] |= PTE_NX
    cr0, cr4, efer = 0x8001_0001, 0x20, 0xD00
    registers = PagingRegisters(cr0=cr0, cr3=ROOT << 12, cr4=cr4, efer=efer, cpl=3)
    assert walk(memory, registers, GVA, ACCESS_WRITE).gpa == toy_walk(memory, ROOT, GVA, True, True)
    walks: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "toy": lambda: toy_walk(memory, ROOT, GVA, True, True),
        "walk": lambda: walk(memory, registers, GVA, ACCESS_WRITE),
        # The same with bit 63 in the leaf, which no small integer holds.
        "toy, NX": lambda: toy_walk(with_nx, ROOT, GVA, True, True),
        "walk, NX": lambda: walk(with_nx, registers, GVA, ACCESS_WRITE),
    }
    best = dict.fromkeys(walks, float("inf"))
    for _ in range(TURNS):
        for name, call in walks.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter() - started) / CALLS)
    return {name: (seconds - best["nothing"]) * 1e9 for name, seconds in best.items() if name != "nothing"}


def build(target: Path) -> None:
    """Compile the walk's modules and the toy into ``target``."""
    from mmufuzz.build.compile import compile_core  # noqa: PLC0415 - the measuring processes do without
    from mmufuzz.build.compilers import plain_compiler  # noqa: PLC0415
    from mmufuzz.build.core import Core  # noqa: PLC0415

    files = {f"mmufuzz/x86/{name}.py": (BENCH.parent / f"mmufuzz/x86/{name}.py").read_bytes() for name in MODULES}
    files["toy_walk.py"] = (BENCH / "toy_walk.py").read_bytes()
    compiler = plain_compiler()
    if compiler is None:
        sys.exit("bench/page_walk.py: no C compiler found (CC, cc, gcc)")
    compile_core(Core("mmufuzz", files), compiler, target, lambda line: print(line, file=sys.stderr))


def child(directory: str) -> dict[str, float]:
    """Figures of a process of its own; ``directory``: with the build, or empty for none."""
    environment = {**os.environ, "MMUFUZZ_PURE": "1"}
    command = [sys.executable, __file__, "--measure", directory]
    figures: dict[str, float] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    )
    return figures


def main() -> None:
    """Build, measure both, and print the figures and their ratios."""
    with tempfile.TemporaryDirectory() as directory:
        build(Path(directory))
        builds = {"interpreted": child(""), "compiled": child(directory)}
    figures: dict[str, object] = {"python": platform.python_version()}
    for build_name, times in builds.items():
        figures[build_name] = {
            "nanoseconds": {name: round(value) for name, value in times.items()},
            "walk_times_toy": round(times["walk"] / times["toy"], 2),
            "walk_times_toy, NX": round(times["walk, NX"] / times["toy, NX"], 2),
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        if sys.argv[2]:
            from mmufuzz.build.loader import use

            use(Path(sys.argv[2]), "of the bench")
        print(json.dumps(measure()))
    else:
        main()
