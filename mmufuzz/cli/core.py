"""Which core a verb runs on: any uses a build from the cache that fits; ``fuzz`` alone makes one."""

from __future__ import annotations

import contextlib
import os
import sys

from mmufuzz.build import cache, loader
from mmufuzz.build.compilers import compilers
from mmufuzz.build.core import COMPILED, INSTRUMENTED, PURE, snapshot
from mmufuzz.cli.output import Output


def pick_core(fuzzing: bool) -> None:
    """Use a build in the cache that was made from exactly these sources, if there is one.

    ``fuzz`` wants an instrumented one, and takes it although a compiled core is installed.
    """
    if _settled() or (loader.in_use().kind == COMPILED and not fuzzing):
        return
    with contextlib.suppress(loader.CannotLoad, OSError):
        core = snapshot()
        kinds = (INSTRUMENTED,) if fuzzing else (COMPILED, INSTRUMENTED)
        directory = cache.find(core, kinds)
        if directory is not None:
            loader.use(directory, loader.SAME_SOURCES)
            # For the processes that this one starts.
            os.environ[loader.CORE_VARIABLE] = str(directory)


def prepare_core(output: Output) -> None:
    """For ``fuzz``: make the best build that this machine can make, and start again with it.

    Returns if the core is settled: by the environment, from the cache, or because nothing can be built, which it says.
    """
    if _settled():
        return
    told = False

    def progress(step: str) -> None:
        nonlocal told
        if not told:
            output.line("building the core for fuzzing; once for this version, Python and compiler")
            told = True
        output.progress(f"building the core: {step}")

    made = cache.make(snapshot(), compilers(), progress)
    output.done()
    if made.directory is None and loader.in_use().kind == PURE:
        loader.settle(loader.InUse(PURE, "; ".join(made.notes)))
    else:
        for note in made.notes:
            output.line(f"core not built: {note}")
    if made.directory is not None:
        os.environ[loader.CORE_VARIABLE] = str(made.directory)
        _restart()
    # Whatever this process starts need not try again.
    os.environ[loader.CORE_VARIABLE] = loader.INSTALLED


def _settled() -> bool:
    return bool(os.environ.get(loader.CORE_VARIABLE)) or loader.pure_wanted()


def _restart() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
