"""When a campaign ends: by time, by cases, or because somebody asked."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Final

PARENT: Final = "MMUFUZZ_PARENT"
"""Environment variable: the process whose end is a request to end, too. A killed campaign takes its children along."""


class Stop:
    """Turns the first SIGINT or SIGTERM into a flag, so that engines end between two runs and everything is saved.

    The second signal raises ``KeyboardInterrupt`` at once. Use as a context manager around the campaign.
    """

    def __init__(self) -> None:
        self._requested = False
        self._parent = int(os.environ.get(PARENT, "0"))
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to end."""
        return self._requested or (self._parent != 0 and os.getppid() != self._parent)

    @requested.setter
    def requested(self, value: bool) -> None:
        self._requested = value

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True


class Budget:
    """A limit in seconds, in cases, or in neither (then only ``Stop`` ends it)."""

    def __init__(self, seconds: float | None = None, cases: int | None = None) -> None:
        self.seconds = seconds
        self.cases = cases
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the budget was made."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds left, infinite without a time limit."""
        return float("inf") if self.seconds is None else self.seconds - self.elapsed

    def spent(self, cases: int) -> bool:
        """Whether the limit is reached after ``cases`` cases."""
        if self.cases is not None and cases >= self.cases:
            return True
        return self.seconds is not None and self.elapsed >= self.seconds


def parse_duration(text: str) -> float:
    """Seconds in "60s", "2m", "1.5h" or "30". Raises ``ValueError`` for anything else, zero and negatives included."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    factor = units.get(text[-1:], 0.0)
    number = text[:-1] if factor else text
    if not number or not number.replace(".", "", 1).isdigit():
        raise ValueError(text)
    seconds = float(number) * (factor or 1.0)
    if seconds <= 0:
        raise ValueError(text)
    return seconds
