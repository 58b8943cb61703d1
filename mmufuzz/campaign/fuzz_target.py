"""Running a target under Atheris: restart with libFuzzer's symbols preloaded, counters, and an end by our own clock."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Final

from mmufuzz.campaign.coverage_table import CoverageTable
from mmufuzz.campaign.engine_atheris import libfuzzer_flags, preload
from mmufuzz.campaign.harness import Session

_RESTARTED: Final = "MMUFUZZ_PRELOADED"


def restart_with_preload() -> None:
    """Start this program again with ``LD_PRELOAD`` set; returns the second time, or where there is none."""
    if _RESTARTED in os.environ:
        return
    extra = preload()
    if extra:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **extra, _RESTARTED: "1"})


def fuzz(
    work: Session, target: Callable[[bytes], None], mutate: Callable[[bytes, int, int], bytes] | None = None
) -> None:
    """Fuzz ``target`` until ``work`` is over; never returns.

    An exception from ``target`` is a bug of the harness: it ends the process with status 70.
    """
    import atheris  # noqa: PLC0415 - an extra; only this engine needs it

    def one(data: bytes) -> None:
        try:
            target(data)
        except Exception:
            _leave(work, 70, traceback.format_exc())
        work.tick()
        if work.over():
            _leave(work, work.finish(), "")

    flags = libfuzzer_flags(work.budget.seconds, work.seed, work.corpora)
    arguments = [sys.argv[0], *flags]
    if mutate is None:
        atheris.Setup(arguments, one)
    else:
        atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


def _leave(work: Session, status: int, complaint: str) -> None:
    """End at once: libFuzzer would not let go of the process otherwise."""
    with contextlib.suppress(OSError):
        if complaint:
            sys.stderr.write(complaint)
            work.write_report()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


__all__ = ["CoverageTable", "fuzz", "restart_with_preload"]
