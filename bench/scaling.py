"""How the cost of a run grows with guest instructions, schedule points and vCPUs, as JSON on standard output.

    python bench/scaling.py [--most 10000] [--rounds 3] [--svg FILE]

A scene is a loop that vCPUs run: 10 to ``--most`` instructions on one of them, then ``--most`` shared by 1 to 16. An
exponent is the slope of CPU seconds over size, both as logarithms, once what a run without a program costs is taken
off: 1 is linear. ``last`` is the slope over the last decade alone. A point is the best of several rounds, all in one
process. Status 1 if an exponent, of CPU time or of memory, is above 1.15. A plot goes to standard error, and to FILE as
SVG. ``MMUFUZZ_PURE`` and ``MMUFUZZ_CORE`` choose the build of the core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
import tracemalloc
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mmufuzz.build.loader import in_use
from mmufuzz.campaign.files import write_atomic
from mmufuzz.case.model import LONG4, Case, Options, Slot, Vcpu
from mmufuzz.case.tables import PAGE, TableBuilder, entry
from mmufuzz.case.validate import MAX_EVENTS
from mmufuzz.host.deviation import RUN, Deviation
from mmufuzz.host.sites import GUEST_STORE, label
from mmufuzz.outcome import OK, Outcome
from mmufuzz.run import run
from mmufuzz.x86.asm import assemble

VCPUS = (1, 2, 4, 8, 16)
TOLERANCE = 1.15
"""What passes for linear."""

CODE, DATA, OTHER, ROOT, TABLES = 1, 0x20, 0x30, 0x40, 0x41
"""gfns; each vCPU has its own code, data page and other page from these on. All are mapped where they lie."""
RAX, RDX, RBX, RSI, RDI, R8 = 0, 2, 3, 6, 7, 8
COPIES = 4
"""Of the loop, one after the other: within one step no label counts further than 65535."""
LOOPS = {
    # No exit once the data page is mapped.
    "guest": "add [rax], rdx",
    # The same, and after every store the next vCPU's turn, by a schedule of as many deviations.
    "switched": "add [rax], rdx",
    # Every store is to a page table and makes another value: it exits, and KVM emulates it.
    "emulated": "add [rbx], rdx",
    # A page's entry changes and the page is read: an emulated store and a page fault in turn.
    "remapped": "xchg rsi, rdi; mov [rbx], rsi; mov rdx, [rax]",
}


def loop(scene: str) -> tuple[bytes, int]:
    """The scene's loop as one step, and its number of instructions."""
    lines = [*LOOPS[scene].split("; "), "dec ecx"]
    code = b"".join(assemble(line) for line in lines)
    return code + assemble(f"jnz {-len(code) - 2}"), len(lines) + 1


def scene_case(scene: str, instructions: int, vcpus: int) -> Case:
    """About ``instructions``, shared by ``vcpus`` with the same page tables; 0 for a run without programs."""
    code, length = loop(scene)
    rounds = max(1, (instructions // vcpus // COPIES - 1) // length)
    tables = TableBuilder(list(range(TABLES, TABLES + 3)))
    for gfn in range(TABLES + 3):
        tables.map(ROOT, gfn << 12, gfn, PAGE)
    leaf = tables.path(ROOT, 0)[-1][0]
    made = []
    for index in range(vcpus):
        data, other = DATA + index, OTHER + index
        regs = [(RAX, data << 12), (RDX, 0x1000), (R8, rounds)]
        # "emulated" counts in an entry that maps nothing else, "remapped" swaps what the data page's entry names.
        regs.append((RBX, leaf << 12 | (256 + index if scene == "emulated" else data) << 3))
        regs += [(RSI, entry(data, PAGE)), (RDI, entry(other, PAGE))]
        made.append(
            Vcpu(
                LONG4,
                cr3=ROOT,
                code_gva=(CODE + index) << 12,
                code_gfn=CODE + index,
                regs=tuple(regs),
                program=(assemble("mov ecx, r8d"), code) * COPIES if instructions else (),
            )
        )
    schedule = []
    if scene == "switched" and instructions:
        for step, turn, at in product(range(1, 2 * COPIES, 2), range(1, rounds + 1), range(vcpus)):
            schedule.append(Deviation(RUN, label(at, step, GUEST_STORE, turn), (at + 1) % vcpus))
    return Case(
        options=Options(event_limit=MAX_EVENTS, n_max_mmu_pages=64),
        slots=(Slot(0, 0x100),),
        memory=tables.memory(),
        vcpus=tuple(made),
        schedule=tuple(schedule),
    )


@dataclass
class Point:
    """One size of a scene, and the least CPU seconds that it took."""

    case: Case
    vcpus: int
    outcome: Outcome
    seconds: float = math.inf

    def measure(self) -> None:
        """Run it once more; small ones several times, so that the clock can tell."""
        times = max(1, 300 // max(1, self.outcome.events))
        started = time.process_time()
        for _ in range(times):
            run(self.case)
        self.seconds = min(self.seconds, (time.process_time() - started) / times)


def point(scene: str, instructions: int, vcpus: int) -> Point:
    """A point that has been run once."""
    case = scene_case(scene, instructions, vcpus)
    outcome = run(case)
    assert outcome.verdict == OK, outcome.findings
    return Point(case, vcpus, outcome)


def slope(pairs: list[tuple[float, float]]) -> float:
    """Least squares through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in pairs]
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return round(sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread, 3)


def sizes(most: int) -> list[int]:
    """10, 30, 100, 300, … up to ``most``."""
    found = {most}
    size = 10
    while size < most:
        found |= {size, min(3 * size, most)}
        size *= 10
    return sorted(found)


def measure(scene: str, most: int, rounds: int) -> tuple[dict[str, Any], list[Point], list[Point]]:
    """The scene's figures, its points by instructions and those by vCPUs."""
    first = 2 if scene == "switched" else 1
    by_size = [point(scene, size, first) for size in sizes(most)]
    by_vcpus = [point(scene, most, vcpus) for vcpus in VCPUS if vcpus >= first]
    empty = {vcpus: point(scene, 0, vcpus) for vcpus in VCPUS}
    for _ in range(rounds):
        for each in [*by_size, *by_vcpus, *empty.values()]:
            each.measure()

    def net(points: list[Point]) -> list[float]:
        return [max(each.seconds - empty[each.vcpus].seconds, 1e-9) for each in points]

    by_instructions = list(zip([float(each.outcome.instructions) for each in by_size], net(by_size), strict=True))
    by_events = list(zip([float(each.outcome.events) for each in by_size], net(by_size), strict=True))
    last = [pair for pair in by_instructions if pair[0] >= most / 12]
    figures = {
        "instructions": by_size[-1].outcome.instructions,
        "schedule_points": by_size[-1].outcome.events,
        "us_per_instruction": round(net(by_size)[-1] * 1e6 / by_size[-1].outcome.instructions, 2),
        "us_per_schedule_point": round(net(by_size)[-1] * 1e6 / by_size[-1].outcome.events, 2),
        "exponents": {
            "instructions": slope(by_instructions),
            "instructions, last": slope(last),
            "schedule points": slope(by_events),
            "vCPUs": slope(list(zip([float(each.vcpus) for each in by_vcpus], net(by_vcpus), strict=True))),
        },
        **memory(by_size[-3], by_size[-1]),
    }
    return figures, by_size, by_vcpus


def memory(small: Point, large: Point) -> dict[str, Any]:
    """The most that a run held, outcome included, by its schedule points."""
    peaks: list[tuple[float, float]] = []
    for each in (small, large):
        tracemalloc.start()
        outcome = run(each.case)
        peaks.append((float(outcome.events), float(tracemalloc.get_traced_memory()[1])))
        tracemalloc.stop()
    return {
        "peak_kib": round(peaks[-1][1] / 1024),
        "peak_bytes_per_schedule_point": round(peaks[-1][1] / peaks[-1][0], 1),
        "memory_exponent": slope(peaks),
    }


Curves = dict[str, list[tuple[float, float]]]


def text_plot(title: str, curves: Curves, width: int = 64, height: int = 16) -> str:
    """Curves on logarithmic axes; a letter each."""
    every = [(math.log10(x), math.log10(y)) for pairs in curves.values() for x, y in pairs]
    low_x, low_y = min(x for x, _ in every), min(y for _, y in every)
    span_x = max(x for x, _ in every) - low_x or 1.0
    span_y = max(y for _, y in every) - low_y or 1.0
    rows = [[" "] * (width + 1) for _ in range(height + 1)]
    for name, pairs in curves.items():
        for x, y in pairs:
            column = round((math.log10(x) - low_x) / span_x * width)
            rows[height - round((math.log10(y) - low_y) / span_y * height)][column] = name[0]
    legend = ", ".join(f"{name[0]} {name}" for name in curves)
    scale = f"{10**low_y * 1e3:.3g} to {10 ** (low_y + span_y) * 1e3:.3g} ms; {legend}"
    return "\n".join([f"{title}: {scale}", *("|" + "".join(row).rstrip() for row in rows), "+" + "-" * width])


COLOURS = ("#1b6ca8", "#c0392b", "#27864a", "#8e44ad")


def svg_plot(titled: dict[str, Curves], note: str) -> str:
    """The same side by side, with grey lines of slope 1 and axes in powers of ten."""
    size, margin = 360, 60
    parts = []
    for number, (title, curves) in enumerate(titled.items()):
        left = margin + number * (size + 2 * margin)
        every = [pair for pairs in curves.values() for pair in pairs]
        low = [math.log10(min(pair[axis] for pair in every)) for axis in (0, 1)]
        span = [math.log10(max(pair[axis] for pair in every)) - low[axis] or 1.0 for axis in (0, 1)]

        def place(x: float, y: float, left: int = left, low: list[float] = low, span: list[float] = span) -> str:
            across = left + (math.log10(x) - low[0]) / span[0] * size
            return f"{across:.1f},{margin + size - (math.log10(y) - low[1]) / span[1] * size:.1f}"

        parts.append(f'<rect x="{left}" y="{margin}" width="{size}" height="{size}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{left}" y="{margin - 12}">{title}</text>')
        for power in range(math.ceil(low[0]), math.floor(low[0] + span[0]) + 1):
            x, _ = place(10.0**power, 10 ** low[1]).split(",")
            parts.append(f'<text x="{x}" y="{margin + size + 16}">{10**power:,}</text>')
        for power in range(math.ceil(low[1]), math.floor(low[1] + span[1]) + 1):
            _, y = place(10 ** low[0], 10.0**power).split(",")
            parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{10.0 ** (power + 3):g} ms</text>')
        for colour, (name, pairs) in zip(COLOURS, curves.items(), strict=False):
            x0, y0 = pairs[-1]
            if number == 0:
                reach = min(span[0], math.log10(y0) - low[1])
                ideal = place(x0 / 10**reach, y0 / 10**reach)
                parts.append(f'<polyline points="{ideal} {place(x0, y0)}" stroke="#ccc" fill="none"/>')
            line = " ".join(place(x, y) for x, y in pairs)
            parts.append(f'<polyline points="{line}" stroke="{colour}" fill="none" stroke-width="2"/>')
            across, down = place(x0, y0).split(",")
            end = f'x="{across}" y="{down}" dx="-4" dy="-5" text-anchor="end"'
            parts.append(f'<text {end} fill="{colour}">{name}</text>')
    width = len(titled) * (size + 2 * margin)
    parts.append(f'<text x="{margin}" y="{size + 2 * margin - 8}">{note}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{size + 2 * margin}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="12">', *parts, "</svg>", ""])


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=10_000, help="instructions of the longest run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scene", choices=LOOPS, action="append")
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    if given.most < 1000:
        parser.error("--most: expected at least 1000")
    scenes: dict[str, dict[str, Any]] = {}
    plots: dict[str, Curves] = {"one Case, instructions": {}, f"{given.most:,} instructions, vCPUs": {}}
    for scene in given.scene or LOOPS:
        scenes[scene], by_size, by_vcpus = measure(scene, given.most, given.rounds)
        for curves, pairs in zip(
            plots.values(),
            (
                [(float(each.outcome.instructions), each.seconds) for each in by_size],
                [(float(each.vcpus), each.seconds) for each in by_vcpus],
            ),
            strict=True,
        ):
            curves[scene] = pairs
    figures = {
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "core_build": in_use().kind,
        "most": given.most,
        "rounds": given.rounds,
        "scenes": scenes,
    }
    print(json.dumps(figures, indent=2))
    for title, curves in plots.items():
        print(text_plot(title, curves), file=sys.stderr)
    if given.svg is not None:
        write_atomic(given.svg, svg_plot(plots, f"CPU time, {in_use().kind} core, logarithmic axes; grey: linear"))
    worst = max(max(*each["exponents"].values(), each["memory_exponent"]) for each in scenes.values())
    return 1 if worst > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
