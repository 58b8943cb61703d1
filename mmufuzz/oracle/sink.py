"""Where the oracles report. One finding ends the run: what follows a violated property proves nothing more."""

from __future__ import annotations

from mmufuzz.host.sched import STOPPED, Host
from mmufuzz.outcome import Finding


class Sink:
    """``findings`` in the order seen; ``period`` is ``Outcome.period``."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.findings: list[Finding] = []
        self.period: tuple[int, int] = (0, 0)

    def record(self, kind: str, what: str, detail: str) -> None:
        """Append a finding; for checks made when no thread runs any more."""
        self.findings.append(Finding(kind, what, detail, self.host.last))

    def violated(self, kind: str, what: str, detail: str) -> None:
        """Append a finding and end the run: raises ``RunStop`` through the current thread."""
        self.record(kind, what, detail)
        self.end()

    def end(self) -> None:
        """End the run after findings that were recorded: raises ``RunStop`` through the current thread."""
        self.host.stop(STOPPED)
