"""A generated Case's machine, watched while it runs."""

from __future__ import annotations

from contextlib import suppress

from mmufuzz.case.model import TSO, Case
from mmufuzz.host.memory import Memory
from mmufuzz.host.sched import Host, RunStop
from mmufuzz.kvm.observer import Observer
from mmufuzz.kvm.vm import build


class Watched(Observer):
    """Is told what the machine does; subclasses remember what they ask about."""

    def __init__(self, case: Case) -> None:
        self.host = Host(Memory(), case.memory_model == TSO, case.options.event_limit)
        self.kvm = build(case, self.host)
        self.kvm.observer = self

    def run(self) -> None:
        """To the end, or to the event limit."""
        with suppress(RunStop):
            self.host.run()
