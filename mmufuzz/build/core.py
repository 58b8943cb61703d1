"""What the core is: the modules that mypyc compiles, as one snapshot of their sources."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOMS: Final = ("x86", "host", "kvm", "oracle", "case", "search")
MODULES: Final = ("run.py", "outcome.py")

GUIDING: Final = ("x86", "kvm")
"""Rooms whose edges guide a fuzzer: the machine that is under test.

What the others do, the semantic counters tell better, and libFuzzer pays for every edge that a run passes: with all
rooms a run costs it as much as the model.
"""

PURE: Final = "pure"
COMPILED: Final = "compiled"
INSTRUMENTED: Final = "instrumented"
"""The kinds of builds."""

DESCRIPTION: Final = "build.json"
"""Lies beside a built library and says what it is."""

HERE: Final = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Core:
    """Sources of a core. ``files``: the bytes by path below the import root, as in ``mmufuzz/x86/alu.py``; in order.

    ``guiding``: the rooms that an instrumented build has edge counters in; empty means all.
    """

    package: str
    files: dict[str, bytes]
    guiding: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted names, in the order of ``files``."""
        return tuple(path.removesuffix(".py").replace("/", ".") for path in self.files)

    @property
    def library(self) -> str:
        """Name of the shared library as a Python module; mypyc decides its ending."""
        return f"{self.package}_core__mypyc"

    def guides(self, c_file: str) -> bool:
        """Whether the C file, with the name that mypyc gives it, belongs to a room of ``guiding``."""
        return not self.guiding or any(f"_{self.package}___{room}___" in c_file for room in self.guiding)

    @property
    def digest(self) -> str:
        """16 hex digits over the sources and over this room, which decides how they are built."""
        total = hashlib.sha256()
        parts = list(self.files.items())
        recipe = [path for path in sorted(HERE.iterdir()) if path.suffix in (".py", ".c", ".h")]
        parts += [(path.name, path.read_bytes()) for path in recipe]
        for name, data in parts:
            total.update(f"{name} {len(data)}\n".encode())
            total.update(data)
        return total.hexdigest()[:16]


def snapshot(root: Path = HERE.parents[1]) -> Core:
    """The core of the mmufuzz package in ``root``, as its files are at this moment. Raises ``OSError``."""
    package = root / "mmufuzz"
    paths = [path for room in ROOMS for path in sorted((package / room).glob("*.py")) if path.name != "__init__.py"]
    paths += [package / name for name in MODULES]
    return Core("mmufuzz", {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}, GUIDING)
