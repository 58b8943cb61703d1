"""``mmufuzz``: the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import FrameType

from mmufuzz.campaign.files import InputError
from mmufuzz.case.error import CaseError
from mmufuzz.cli import corpus, doctor, explain, explore, fixes, fuzz, litmus, reduce, replay
from mmufuzz.cli.arguments import Parser
from mmufuzz.cli.output import Output
from mmufuzz.cli.status import Status

VERBS = (fuzz, replay, reduce, explain, explore, litmus, fixes, corpus, doctor)


def version() -> str:
    """The installed version."""
    return importlib.metadata.version("mmufuzz")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="mmufuzz",
        description="Property-based fuzzing of a model of KVM's x86 shadow MMU.",
        epilog="Exit status: 0 nothing new found, 1 a finding, 2 bad input, 3 cut short by a limit, 70 internal error, "
        "130 interrupted.",
    )
    top.add_argument("--version", action="version", version=f"mmufuzz {version()}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in VERBS:
        module.add_parser(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status. Never raises for anything the user did."""
    try:
        arguments = parser().parse_args(argv)
        arguments.may_restart = argv is None
    except SystemExit as stop:
        return _flushed(int(stop.code or 0))
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        output = Output(arguments.json)
        try:
            status: Status = arguments.run(arguments, output)
        finally:
            output.done()
    except (InputError, CaseError) as error:
        _complain(arguments.verb, str(error))
        status = Status.USAGE
    except KeyboardInterrupt:
        _complain(arguments.verb, "interrupted")
        status = Status.INTERRUPTED
    except Exception as error:
        _complain(
            arguments.verb, f"internal error: {type(error).__name__}: {_one_line(error)}; report: {_report(error)}"
        )
        status = Status.INTERNAL
    finally:
        signal.signal(signal.SIGTERM, previous)
    return _flushed(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _complain(verb: str, text: str) -> None:
    try:
        sys.stderr.write(f"mmufuzz {verb}: {text}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        pass


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _report(error: Exception) -> str:
    """Write the traceback to a file; its path."""
    text = "".join(traceback.format_exception(error))
    header = f"mmufuzz {version()}, Python {sys.version}\n{' '.join(sys.argv)}\n\n"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="mmufuzz-crash-", suffix=".txt", delete=False) as file:
            file.write(header + text)
            return file.name
    except OSError:
        return "(no file could be written)"


def _flushed(status: int) -> int:
    """``status``, once nothing is left that the interpreter could fail to flush."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
