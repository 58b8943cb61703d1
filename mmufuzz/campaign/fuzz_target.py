"""Running a target under Atheris: restart with libFuzzer's symbols preloaded, counters, and an end by our own clock."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Final

from mmufuzz.campaign.coverage_table import CoverageTable
from mmufuzz.campaign.engine_atheris import libfuzzer_flags, preload
from mmufuzz.campaign.files import write_atomic
from mmufuzz.campaign.harness import Session
from mmufuzz.campaign.mutators import dictionary_text
from mmufuzz.campaign.units import remove_torn
from mmufuzz.outcome import HARNESS_ERROR

_RESTARTED: Final = "MMUFUZZ_PRELOADED"


def restart_with_preload(custom: bool = False) -> None:
    """Start this program again with ``LD_PRELOAD`` set; returns the second time, or where there is none.

    ``custom``: it has a mutator and a crossover of its own.
    """
    if _RESTARTED in os.environ:
        return
    extra = preload(custom)
    if extra:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **extra, _RESTARTED: "1"})


def fuzz(
    work: Session,
    target: Callable[[bytes], None],
    words: list[bytes],
    mutate: Callable[[bytes, int, int], bytes] | None = None,
    cross: Callable[[bytes, bytes, int, int], bytes] | None = None,
    more_flags: tuple[str, ...] = (),
) -> None:
    """Fuzz ``target`` until ``work`` is over; never returns. ``words`` are libFuzzer's dictionary.

    What ``target`` finds it records for itself, and returns. An exception from it, or a crash of the process, is a bug
    of the harness: the input goes to a directory of its own, and the process ends with status 70.
    """
    import atheris  # noqa: PLC0415 - an extra; only this engine needs it

    errors = work.recorder.store.directory_of(HARNESS_ERROR)

    def one(data: bytes) -> None:
        try:
            target(data)
        except Exception:
            _crashed(work, data, traceback.format_exc())
        work.tick()
        if work.over():
            _leave(work.finish())

    if work.corpora:
        remove_torn(work.corpora[0])
    flags = libfuzzer_flags(work.budget.seconds, work.seed, work.corpora)
    flags += [f"-artifact_prefix={errors}/", f"-dict={_in_memory(dictionary_text(words))}"]
    flags += more_flags
    kwargs: dict[str, Any] = {}
    if mutate is not None:
        kwargs["custom_mutator"] = mutate
    if cross is not None:
        kwargs["custom_crossover"] = cross
    atheris.Setup([sys.argv[0], *flags], one, **kwargs)
    atheris.Fuzz()


def _in_memory(text: str) -> str:
    """Path of a file that only this process has, and that goes with it."""
    descriptor = os.memfd_create("dictionary")
    os.write(descriptor, text.encode())
    return f"/proc/self/fd/{descriptor}"


def record_crash(work: Session, data: bytes, text: str) -> None:
    """Save ``data``, which showed a bug of the harness or of the model; ``text`` is a traceback, or says what it is."""
    errors = work.recorder.store.directory_of(HARNESS_ERROR)
    name = f"crash-{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"
    write_atomic(errors / name, data)
    write_atomic(errors / f"{name}.txt", text)
    work.recorder.store.crashes.append(f"{work.name}: {text.strip().splitlines()[-1]} ({errors / name})")


def _crashed(work: Session, data: bytes, text: str) -> None:
    """Save ``data``, which made the target raise, and end."""
    record_crash(work, data, text)
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        work.write_report()
    _leave(70)


def _leave(status: int) -> None:
    """End at once: libFuzzer would not let go of the process otherwise."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


__all__ = ["CoverageTable", "fuzz", "record_crash", "restart_with_preload"]
