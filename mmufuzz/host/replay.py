"""A schedule on the way in and on the way out: the deviations that are still to come, and those that were made."""

from __future__ import annotations

from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, label_thread


class Replay:
    """The recorded schedule, by label. What has come up is taken out; a label that never comes up has no effect."""

    def __init__(self) -> None:
        self.runs: dict[int, int] = {}
        """Which thread runs after an event."""
        self.holds: dict[int, bool] = {}
        """Stores that are held; the value says nothing."""
        self.releases: dict[int, list[int]] = {}
        """Which held stores drain after an event, in order."""
        self.tlb: dict[int, list[Deviation]] = {}
        """What happens to TLBs after an event."""

    def follow(self, schedule: list[Deviation]) -> None:
        """Add ``schedule``. Of two runs at one event, or two holds of one store, the first counts."""
        for deviation in schedule:
            if deviation.kind == RUN:
                self.runs.setdefault(deviation.at, deviation.actor)
            elif deviation.kind == HOLD:
                if deviation.at not in self.holds:
                    self.holds[deviation.at] = True
                    if deviation.until != BOOT:
                        self.releases.setdefault(deviation.until, []).append(deviation.at)
            else:
                self.tlb.setdefault(deviation.at, []).append(deviation)

    def forget_choices(self) -> None:
        """Keep only TLB deviations: a strategy makes the choices."""
        self.runs = {}
        self.holds = {}
        self.releases = {}

    def forget(self) -> None:
        """Give up what has not come up."""
        self.forget_choices()
        self.tlb = {}

    def used_up(self) -> bool:
        """True if nothing is left."""
        return not (self.runs or self.releases or self.tlb or self.holds)


class Record:
    """The choices that a run has made, by recorded schedule or strategy. TLB deviations are not choices."""

    def __init__(self) -> None:
        self._runs: list[Deviation] = []
        self._holds: dict[int, int] = {}
        """Held stores with the event after which each was released, BOOT while it has not been."""

    def switched(self, label: int, index: int) -> None:
        """After event ``label`` thread ``index`` ran, where the default schedule would have run another."""
        self._runs.append(Deviation(RUN, label, index))

    def held(self, label: int) -> None:
        """The store ``label`` is held."""
        self._holds[label] = BOOT

    def released(self, label: int, until: int) -> None:
        """The held store ``label`` was released after event ``until``."""
        del self._holds[label]
        self._holds[label] = until

    def deviations(self) -> list[Deviation]:
        """The schedule that repeats the run. Holds that end at one event come in the order of their releases."""
        holds = [Deviation(HOLD, at, label_thread(at), until) for at, until in self._holds.items()]
        return self._runs + holds
