"""What a verb prints: lines for people, JSON for programs, progress on a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.status import Status as Spinner

from mmufuzz.campaign.files import InputError, reason, write_atomic

PLAIN_INTERVAL = 10.0
"""Seconds between progress lines where there is no terminal."""

FALLBACK = str.maketrans({"▶": ">", "⏸": "#", "⏵": "*", "→": "->", "…": "...", "·": "-", "│": "|", "─": "-", "├": "+",
                          "└": "+", "┌": "+", "←": "<-", "↺": "@"})  # fmt: skip
"""What to print where the stream's encoding lacks a character."""


class Output:
    """Standard output and standard error of one verb.

    With ``--json -`` standard output belongs to the JSON, and lines for people go to standard error. A reader that has
    gone away (``| head``) ends the printing, not the verb: its exit status stays true.
    """

    def __init__(self, json_path: str | None = None) -> None:
        self.json_path = json_path
        self.stream: TextIO = sys.stderr if json_path == "-" else sys.stdout
        self.gone = False
        self._spinner: Spinner | None = None
        self._last_plain = time.monotonic()
        if json_path is not None and json_path != "-":
            _require_writable(Path(json_path))

    def line(self, text: str = "") -> None:
        """Print ``text`` and a newline."""
        self._write(self.stream, f"{encodable(text, self.stream)}\n")

    def json(self, value: Any) -> None:
        """Write ``value`` where ``--json`` says; nothing without it. Raises ``InputError`` if that fails."""
        if self.json_path is None:
            return
        text = json.dumps(value, indent=2) + "\n"
        if self.json_path == "-":
            self._write(sys.stdout, text)
        else:
            write_atomic(Path(self.json_path), text)

    def progress(self, text: str) -> None:
        """Show that work goes on: in place on a terminal, else as a line now and then."""
        if sys.stderr.isatty():
            if self._spinner is None:
                self._spinner = Console(stderr=True).status(text)
                self._spinner.start()
            self._spinner.update(text)
        elif time.monotonic() - self._last_plain >= PLAIN_INTERVAL:
            self._last_plain = time.monotonic()
            self._write(sys.stderr, f"{encodable(text, sys.stderr)}\n")

    def done(self) -> None:
        """Take the progress display away."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _write(self, stream: TextIO, text: str) -> None:
        if self.gone:
            return
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:
            self.gone = True
            # The interpreter flushes its streams once more at exit; give it one that works.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def encodable(text: str, stream: TextIO) -> str:
    """``text`` as ``stream`` can carry it, with plain ASCII for what its encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return text.translate(FALLBACK).encode(encoding, "replace").decode(encoding)
    except LookupError:
        return text.translate(FALLBACK).encode("ascii", "replace").decode("ascii")


def _require_writable(path: Path) -> None:
    """Find out before hours of work, not after, that the JSON cannot be written."""
    directory = path.parent
    if path.is_dir() or not directory.is_dir():
        raise InputError(str(path), "expected a file name in an existing directory")
    probe = directory / f".{path.name}.{os.getpid()}.probe"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(str(path), f"expected a writable file ({reason(error)})") from error
