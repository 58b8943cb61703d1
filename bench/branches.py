"""Branch coverage by room, from the JSON of ``coverage json``: ``python bench/branches.py FILE [PERCENT]``.

``coverage report`` counts statements and branches together; this counts branches. Status 1 below ``PERCENT`` (95).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PERCENT = 95.0


def main(arguments: list[str]) -> int:
    """Print a line a room, and a line for each file that is not covered wholly; the exit status."""
    wanted = float(arguments[1]) if len(arguments) > 1 else PERCENT
    rooms: dict[str, tuple[int, int]] = {}
    files = json.loads(Path(arguments[0]).read_text())["files"]
    for path, measured in sorted(files.items()):
        sums = measured["summary"]
        parts = Path(path).parts
        inside = parts[len(parts) - 1 - parts[::-1].index("mmufuzz") + 1 :]
        room = inside[0] if len(inside) > 1 else "run"
        total, covered = rooms.get(room, (0, 0))
        rooms[room] = (total + sums["num_branches"], covered + sums["covered_branches"])
        if sums["missing_branches"]:
            pairs = measured["missing_branches"]
            lines = ", ".join(f"{start}->{end if end > 0 else 'exit'}" for start, end in pairs)
            print(f"{'/'.join(inside)}: {sums['missing_branches']} of {sums['num_branches']} not taken: {lines}")
    print(f"{'room':<8} {'branches':>8} {'taken':>8} {'%':>6}")
    rooms["all"] = (sum(total for total, _ in rooms.values()), sum(covered for _, covered in rooms.values()))
    for room, (total, covered) in rooms.items():
        print(f"{room:<8} {total:>8} {covered:>8} {100 * covered / max(total, 1):>6.1f}")
    total, covered = rooms["all"]
    return 0 if 100 * covered >= wanted * total else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
