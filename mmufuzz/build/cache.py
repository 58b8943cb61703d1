"""Builds kept from one run to the next, in the user's cache directory.

A build is made in a directory beside its place and renamed when it is complete, under a lock that the system takes
away from a process that dies: a reader meets a whole build or none, two processes do not make the same one, and
what a killed one left is removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mmufuzz.build.compile import BuildError, Progress, compile_core
from mmufuzz.build.compilers import ABI, Compiler, cannot_generate
from mmufuzz.build.core import COMPILED, INSTRUMENTED, Core

KEEP: Final = 8
"""Builds of any sources, Python and compiler; the least recently used ones beyond are removed. Each is about 10 MB."""

LOCK_SECONDS: Final = 900.0
"""How long to wait for another process that makes the same build."""

POLL_SECONDS: Final = 0.2

PARTIAL: Final = ".partial-"


def cache_directory() -> Path:
    """Where this user's builds are; it need not exist. Raises ``BuildError`` if the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if given:
            base = Path(given)
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError("no home directory") from error
    return base.absolute() / "mmufuzz" / "core"


@dataclass(frozen=True)
class Made:
    """``directory`` holds a build, or is None; ``notes`` says in a line each what could not be built, and why."""

    directory: Path | None
    notes: tuple[str, ...] = ()


def find(core: Core, kinds: tuple[str, ...]) -> Path | None:
    """A complete build of exactly these sources for this Python, of the first kind in ``kinds`` that there is."""
    try:
        directory = cache_directory()
    except BuildError:
        return None
    for kind in kinds:
        for found in sorted(directory.glob(f"{core.digest}-{ABI}-{kind}-*")):
            if found.is_dir():
                return found
    return None


def make(core: Core, candidates: list[Compiler], progress: Progress) -> Made:
    """A build of ``core`` by the first of ``candidates`` that can make one, from the cache if it is there.

    Nothing raises but a ``KeyboardInterrupt``: a build that fails is a note.
    """
    notes = []
    try:
        directory = cache_directory()
    except BuildError as error:
        return Made(None, (str(error),))
    why = cannot_generate()
    if not candidates or why:
        notes.append(why or "no C compiler found")
    for compiler in candidates:
        place = directory / f"{core.digest}-{ABI}-{compiler.kind}-{compiler.key}"
        try:
            if not place.is_dir():
                if why:
                    continue
                _make_one(core, compiler, place, progress)
            _touch(place)
            return Made(place, tuple(notes))
        except BuildError as error:
            notes.append(f"{compiler.name}: {error}")
        except OSError as error:
            notes.append(f"{compiler.name}: {error.filename or directory}: {error.strerror}")
            break
    # What an earlier run built is still right for these sources.
    return Made(find(core, (INSTRUMENTED, COMPILED)), tuple(notes))


def _make_one(core: Core, compiler: Compiler, place: Path, progress: Progress) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with _lock(place, progress):
        if place.is_dir():
            return
        remove_leftovers(place.parent, place.name)
        partial = place.with_name(f"{PARTIAL}{place.name}")
        partial.mkdir()
        try:
            compile_core(core, compiler, partial, progress)
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        prune(place.parent, keep=place)


@contextlib.contextmanager
def _lock(place: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of ``place``, waiting for whoever has it. Raises ``BuildError`` after ``LOCK_SECONDS``."""
    deadline = time.monotonic() + LOCK_SECONDS
    with _lock_file(place.parent, place.name).open("w") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise BuildError(f"another process has been building it for {LOCK_SECONDS:.0f} s")
            progress("another process is building it; waiting")
            time.sleep(POLL_SECONDS)
        yield


def _lock_file(directory: Path, name: str) -> Path:
    return directory / f".lock-{name}"


def _try_lock(descriptor: int) -> bool:
    """Take the lock unless another process has it. Without such locks nobody waits: builds are renamed into place."""
    try:
        import fcntl  # noqa: PLC0415 - not on every platform
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A network file system that cannot lock.
        return True
    return True


def remove_leftovers(directory: Path, mine: str) -> None:
    """Remove what interrupted builds left: whose lock nobody holds, or ``mine``, whose lock the caller holds."""
    for partial in directory.glob(f"{PARTIAL}*"):
        name = partial.name.removeprefix(PARTIAL)
        if name == mine:
            shutil.rmtree(partial, ignore_errors=True)
            continue
        with contextlib.suppress(OSError), _lock_file(directory, name).open("w") as file:
            if _try_lock(file.fileno()):
                shutil.rmtree(partial, ignore_errors=True)


def prune(directory: Path, keep: Path) -> None:
    """Remove all but the ``KEEP`` builds last used; never ``keep``."""
    builds = [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")]
    builds.sort(key=lambda path: (path != keep, -_used(path), path.name))
    for old in builds[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
        _lock_file(directory, old.name).unlink(missing_ok=True)


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _touch(place: Path) -> None:
    """Note that a build was used. A cache that cannot be written can still be read."""
    with contextlib.suppress(OSError):
        os.utime(place)
