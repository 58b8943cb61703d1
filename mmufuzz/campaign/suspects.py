"""Which runs that the event limit cut short are worth a report."""

from __future__ import annotations

from mmufuzz.outcome import Outcome

STUCK_EVENTS = 200
"""Events a vCPU for each retired instruction, exception or exit to userspace above which such a run is reported."""

LONG_RUN = 10_000
"""Events of a run that had a chance: a Case may set itself a limit too low for any result."""


def stuck(outcome: Outcome) -> bool:
    """Whether a run that the event limit cut short looks like more than a guest whose own code loops.

    Looping code retires an instruction or takes an exception (a handler that faults) every few events, and every few
    dozen even if KVM emulates each of them; REP on MMIO does not retire, but each element goes to userspace. A long REP
    instruction in memory does neither, but it hardly ever exits; KVM and a guest that go round in circles exit all the
    time, and a circle through userspace has the progress oracle to see it. One vCPU that gets on may keep the others
    from it, each of which has its share of the events.
    """
    steps = outcome.instructions + outcome.exceptions + sum(len(exits) for exits in outcome.userspace)
    exits = sum(outcome.exits.values())
    return (
        outcome.events >= LONG_RUN
        and steps * STUCK_EVENTS * len(outcome.userspace) < outcome.events
        and exits * STUCK_EVENTS >= outcome.events
    )
