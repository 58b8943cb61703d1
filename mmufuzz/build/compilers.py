"""C compilers: which there are, what each can build, and its flags."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mmufuzz.build.core import COMPILED, INSTRUMENTED

FLAGS: Final = (
    *("-O2", "-g0", "-w", "-fPIC", "-fwrapv", "-DNDEBUG"),
    *("-fvisibility=hidden", "-fno-semantic-interposition"),
)
"""Without the last two every call between modules goes through a table: the core is 6 % slower."""

AT_LINK_TIME: Final = ("-flto=auto", "-fno-plt")
"""Across modules, where compiler and linker can: a compiled core is 4 % faster, and its build takes 8 % longer."""

# No comparisons (trace-cmp): their hooks are called thousands of times a run, and Cases hold no magic numbers to guess.
COVERAGE: Final = (
    "-DMMUFUZZ_COVERAGE",
    "-fsanitize-coverage=inline-8bit-counters,pc-table",
)

ZIG_FLAGS: Final = ("-fno-sanitize=undefined", "-mcpu=baseline")
"""zig would add checks for undefined behaviour, and instructions that another machine on the same home may lack."""

MYPYC: Final = ("mypy", "setuptools", "types-greenlet")
"""Packages that turning the core into C needs; all are in the extra ``compile``."""

ABI: Final = str(sysconfig.get_config_var("SOABI"))


@dataclass(frozen=True)
class Compiler:
    """``command`` builds a core of ``kind``; ``identity`` changes when the compiler does."""

    name: str
    kind: str
    command: tuple[str, ...]
    linker: tuple[str, ...]
    identity: str

    @property
    def flags(self) -> tuple[str, ...]:
        """For every C file; the instrumentation is added where it is wanted."""
        return FLAGS + (ZIG_FLAGS if self.name == "ziglang" else ())

    @property
    def key(self) -> str:
        """8 hex digits over everything but the sources that decides what comes out."""
        parts = (self.name, self.kind, *self.command, *self.linker, self.identity, version("mypy"))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def compilers() -> list[Compiler]:
    """Those on this machine, in the order in which a fuzz build tries them: instrumenting ones first."""
    found = []
    plain = plain_compiler()
    if sys.platform == "linux":
        clang = shutil.which("clang")
        if clang is not None:
            found.append(Compiler("clang", INSTRUMENTED, (clang,), (clang,), _stamp(clang)))
        zig = _zig()
        if zig is not None:
            command = (str(zig), "cc")
            # zig builds a C library of its own before its first link; the system's linker spares that half minute.
            linker = plain.linker if plain is not None else command
            found.append(Compiler("ziglang", INSTRUMENTED, command, linker, version("ziglang")))
    if plain is not None:
        found.append(plain)
    return found


def plain_compiler() -> Compiler | None:
    """The system's C compiler: ``CC`` if it is set, else cc, gcc or clang."""
    if sys.platform == "win32":
        return None
    for text in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(text)
        path = shutil.which(words[0]) if words else None
        if path is not None:
            command = (path, *words[1:])
            return Compiler(Path(path).name, COMPILED, command, command, _stamp(path))
    return None


def version(package: str) -> str:
    """The installed version of a package; "" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cannot_generate() -> str:
    """Why mypyc cannot run here; "" if it can."""
    missing = [name for name in MYPYC if not version(name)]
    return f"{' and '.join(missing)} not installed: pip install 'mmufuzz[compile]'" if missing else ""


def _zig() -> Path | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        return None
    zig = Path(spec.origin).with_name("zig")
    return zig if zig.is_file() else None


def _stamp(path: str) -> str:
    """What changes when a system package is upgraded, without the cost of starting the compiler."""
    status = os.stat(path)
    return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"
