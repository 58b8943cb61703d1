"""A schedule on the way in and on the way out: the deviations that are still to come, and those that were made."""

from __future__ import annotations

from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, label_thread


class Replay:
    """The recorded schedule, by label. What has come up is taken out; a label that never comes up has no effect."""

    def __init__(self) -> None:
        self.runs: dict[int, int] = {}
        """Which thread runs after an event."""
        self._holds: dict[int, bool] = {}
        """Stores that are held; the value says nothing."""
        self._releases: dict[int, list[int]] = {}
        """Which held stores drain after an event, in order."""
        self._tlb: dict[int, list[Deviation]] = {}
        """What happens to TLBs after an event."""
        self.events = 0
        """Events after which something is to happen that has not come up."""

    def follow(self, schedule: list[Deviation]) -> None:
        """Add ``schedule``. Of two runs at one event, or two holds of one store, the first counts."""
        for deviation in schedule:
            if deviation.kind == RUN:
                self.runs.setdefault(deviation.at, deviation.actor)
            elif deviation.kind == HOLD:
                if deviation.at not in self._holds:
                    self._holds[deviation.at] = True
                    if deviation.until != BOOT:
                        self._releases.setdefault(deviation.until, []).append(deviation.at)
            else:
                self._tlb.setdefault(deviation.at, []).append(deviation)
        self.events = len(self.runs) + len(self._releases) + len(self._tlb)

    def forget_choices(self) -> None:
        """Keep only TLB deviations: a strategy makes the choices."""
        self.runs = {}
        self._holds = {}
        self._releases = {}
        self.events = len(self._tlb)

    def forget(self) -> None:
        """Give up what has not come up."""
        self.forget_choices()
        self._tlb = {}
        self.events = 0

    def used_up(self) -> bool:
        """True if nothing is left."""
        return not (self.events or self._holds)

    def take_run(self, label: int) -> int:
        """The thread to run after event ``label``, which is one of ``runs``."""
        self.events -= 1
        return self.runs.pop(label)

    def take_hold(self, label: int) -> bool:
        """Whether the store ``label`` is to be held."""
        if not self._holds or label not in self._holds:
            return False
        del self._holds[label]
        return True

    def take_releases(self, label: int) -> list[int]:
        """The stores to drain after event ``label``."""
        if label not in self._releases:
            return []
        self.events -= 1
        return self._releases.pop(label)

    def take_tlb(self, label: int) -> list[Deviation]:
        """What happens to TLBs after event ``label``."""
        if label not in self._tlb:
            return []
        self.events -= 1
        return self._tlb.pop(label)


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
