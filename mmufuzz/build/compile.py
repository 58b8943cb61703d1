"""From a snapshot of the core to one shared library: mypyc to C, the C files side by side, one link, one import."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from mmufuzz.build.compilers import AT_LINK_TIME, COVERAGE, Compiler, cannot_generate, version
from mmufuzz.build.core import COMPILED, DESCRIPTION, HERE, INSTRUMENTED, Core

POLL_SECONDS: Final = 0.02

OWN_C: Final = {COMPILED: [HERE / "traceback.c"], INSTRUMENTED: [HERE / "traceback.c", HERE / "coverage.c"]}
"""C of our own that goes into a core of each kind."""

PROBE: Final = "#include <Python.h>\nint main(void) { return 0; }\n"

IMPORT_ALL: Final = """
import importlib, sys
from pathlib import Path
from mmufuzz.build.loader import use
built = use(Path(sys.argv[1]), "just built")
for name in built.modules:
    importlib.import_module(name)
"""

_COMPLAINT: Final = re.compile(r"\berror\b|Error\b")

Progress = Callable[[str], None]


class BuildError(Exception):
    """The core could not be built; the text says why, in one line."""


def compile_core(core: Core, compiler: Compiler, target: Path, progress: Progress) -> None:
    """Build ``core`` into the empty directory ``target``: the library and its description, nothing else.

    Raises ``BuildError`` if a step fails, ``OSError`` if ``target`` cannot be written.
    """
    started, cpu = time.monotonic(), _children_seconds()
    why = cannot_generate()
    if why:
        raise BuildError(why)
    work = target / "work"
    work.mkdir()
    builder = _Builder(core, compiler, work, progress)
    builder.probe()
    progress("mypyc: Python to C")
    builder.generate()
    objects = builder.compile()
    library = target / f"{core.library}{sysconfig.get_config_var('EXT_SUFFIX')}"
    progress("linking")
    builder.link(objects, library)
    description = {
        "kind": compiler.kind,
        "compiler": compiler.name,
        "sources": core.digest,
        "python": platform.python_version(),
        "mypy": version("mypy"),
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(_children_seconds() - cpu, 1),
        "package": core.package,
        "library": library.name,
        "modules": list(core.modules),
    }
    (target / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    progress("importing it")
    builder.run([sys.executable, "-c", IMPORT_ALL, str(target)])
    shutil.rmtree(work)


def write_sources(core: Core, root: Path) -> None:
    """Write the snapshot to a tree of its own, so that nobody edits it while it is compiled."""
    for path, data in core.files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        for directory in (file.parent, *file.parent.parents):
            if directory == root:
                break
            (directory / "__init__.py").touch()
        file.write_bytes(data)


class _Builder:
    """The steps, in the directory ``work``. C and objects go there, and whatever the compiler wants to cache."""

    def __init__(self, core: Core, compiler: Compiler, work: Path, progress: Progress) -> None:
        self.core = core
        self.compiler = compiler
        self.work = work
        self.progress = progress
        self.runtime = f"__native_{core.library.removesuffix('__mypyc')}.c"
        """The file that has mypyc's runtime in it."""
        self.at_link_time: tuple[str, ...] = ()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("MMUFUZZ_")}
        self.environment.pop("LD_PRELOAD", None)
        self.environment["ZIG_GLOBAL_CACHE_DIR"] = self.environment["ZIG_LOCAL_CACHE_DIR"] = str(work / "zig")
        roots = [str(HERE.parents[1]), str(work / "source"), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)

    def probe(self) -> None:
        """Fail within a second if there are no headers of Python, or the compiler does not work at all."""
        probe = self.work / "probe.c"
        probe.write_text(PROBE)
        self.run(self._command(probe, instrumented=True))
        if self.compiler.kind == COMPILED:
            self.at_link_time = AT_LINK_TIME
            try:
                self.run(self._command(probe, instrumented=False))
                self.link([self._object(probe)], self.work / "probe.so")
            except BuildError:
                self.at_link_time = ()

    def generate(self) -> None:
        """Write the sources and, with mypyc, the C for them."""
        source = self.work / "source"
        write_sources(self.core, source)
        program = str(HERE / "generate.py")
        # Paths relative to the tree: they end up in tracebacks.
        self.run([sys.executable, program, self.core.library, str(self.work / "c"), *self.core.files], cwd=source)

    def compile(self) -> list[Path]:
        """Compile all C files, the largest first; the object files."""
        files = sorted((self.work / "c").glob("*.c"), key=lambda path: (-path.stat().st_size, path.name))
        commands = [self._command(path, instrumented=self._guides(path)) for path in files]
        for path in OWN_C[self.compiler.kind]:
            files.append(path)
            commands.append(self._command(path, instrumented=False))
        for done in _side_by_side(commands, self.environment):
            self.progress(f"{self.compiler.name}: {done} of {len(commands)} files")
        return [self._object(path) for path in files]

    def link(self, objects: list[Path], library: Path) -> None:
        """Make the shared library. Raises ``BuildError``."""
        command = [*self.compiler.linker, *self.at_link_time, "-shared", *_platform_link_flags(), "-o", str(library)]
        self.run([*command, *map(str, objects)])

    def run(self, command: list[str], cwd: Path | None = None) -> None:
        """Run one step to its end. Raises ``BuildError``."""
        _Step(command, self.environment, cwd).require()

    def _guides(self, path: Path) -> bool:
        return path.name != self.runtime and self.core.guides(path.name)

    def _object(self, path: Path) -> Path:
        return self.work / f"{path.stem}.o"

    def _command(self, path: Path, instrumented: bool) -> list[str]:
        # The runtime's edges are reference counts and conversions: coverage of them would say nothing of the model.
        coverage = list(COVERAGE) if instrumented and self.compiler.kind == INSTRUMENTED else []
        runtime = []
        if path.parent == self.work / "c":
            runtime = ["-I", str(_mypyc_runtime()), "-I", str(self.work / "c")]
            runtime += ["-include", str(HERE / "runtime.h")]
            if path.name != self.runtime:
                runtime += ["-include", str(HERE / "traceback.h")]
        headers = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
        includes = [word for directory in headers for word in ("-I", directory)]
        flags = [*self.compiler.flags, *self.at_link_time, *coverage, *runtime, *includes]
        return [*self.compiler.command, *flags, "-c", str(path), "-o", str(self._object(path))]


def _side_by_side(commands: list[list[str]], environment: dict[str, str]) -> Iterator[int]:
    """Run ``commands`` on all CPUs; yields how many have ended. Raises ``BuildError`` at the first that fails."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = commands[::-1]
    running: list[_Step] = []
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < cpus:
                running.append(_Step(waiting.pop(), environment))
            ended = [step for step in running if step.process.poll() is not None]
            for step in ended:
                running.remove(step)
                step.require()
                done += 1
                yield done
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for step in running:
            step.kill()


class _Step:
    """A command at work. Its output goes to a file, not to a pipe that would have to be read all the time."""

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path | None = None) -> None:
        self.command = command
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the step
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=cwd,
            )
        except OSError as error:
            raise BuildError(f"{command[0]}: {error.strerror}") from error

    def require(self) -> None:
        """Wait for the end. Raises ``BuildError`` with what it said, in one line, unless its status is 0."""
        try:
            status = self.process.wait()
        except BaseException:
            self.kill()
            raise
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        self.output.close()
        if status:
            telling = [line for line in lines if _COMPLAINT.search(line)] or lines[-1:] or ["no output"]
            program = Path(self.command[0]).name
            raise BuildError(f"{program} ended with status {status}: {telling[0].strip()[:300]}")

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()
        self.output.close()


def _children_seconds() -> float:
    """CPU time of all children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _mypyc_runtime() -> Path:
    """The directory of mypyc's C runtime."""
    import mypyc  # noqa: PLC0415 - an extra

    return Path(mypyc.__file__).with_name("lib-rt")


def _platform_link_flags() -> list[str]:
    return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
