"""Every order of the memory accesses of short straight-line programs: dynamic partial-order reduction.

The search is over *transitions*: a process (one thread and its store buffer) either performs its next access, or its
buffer drains one store. Two transitions are dependent if they belong to one process, or if one writes a location
that the other reads or writes. Of all orders that differ only in the order of independent transitions one is run
(source-DPOR with sleep sets: Abdulla, Aronis, Jonsson, Sagonas, POPL 2014), so every final state is reached.

A process has a choice wherever it can access and drain. All its choices are explored: for each fixed
sequence of them the programs are deterministic processes, which is what the algorithm expects. Where the first process
that a state explores has a choice that sleeps, further processes are explored beside it, so that no sequence of
choices is left without an awake process.

What the search does not assume is what litmus tests are for. A drain counts as a write to every location that may be
pending, whichever store it takes; a fence or a locked operation is tried with stores pending, too, and counts as a
write to all of them. So a buffer that is not FIFO and a fence that does not drain are explored like the right ones.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

# Transitions of process p are numbered 2 * p + action.
ACCESS: Final = 0
DRAIN: Final = 1

NOTHING: Final = -1
"""``Orders.decide``: no transition is left, the programs have ended."""
ASLEEP: Final = -2
"""``Orders.decide``: every transition left leads to orders that were run before."""


@mypyc_attr(native_class=False)
class OrderError(RuntimeError):
    """A run did not offer the transitions that it offered before: it depends on something else than the orders."""


class Foot:
    """What a transition touches: bit masks of locations."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads = reads
        self.writes = writes

    def conflicts(self, other: Foot) -> bool:
        """True if one writes what the other touches."""
        return self.writes & (other.reads | other.writes) != 0 or self.reads & other.writes != 0


class Node:
    """A state on the path of the current run, and the transition taken there."""

    def __init__(self, feet: dict[int, Foot], sleep: dict[int, Foot]) -> None:
        self.feet = feet
        """The transitions that are possible."""
        self.sleep = sleep
        """Transitions whose orders were run before; those taken here join them one by one."""
        self.explore = 0
        """Bit mask of the processes of which every transition must be taken."""
        self.taken = NOTHING

    def awake(self) -> int:
        """The next transition to take, or ASLEEP."""
        for transition in self.feet:
            if self.explore >> (transition >> 1) & 1 and transition not in self.sleep:
                return transition
        return ASLEEP

    def choose(self) -> int:
        """At a fresh node: choose the processes to explore, and the first transition; ASLEEP if all sleep."""
        awake = 0
        asleep = 0
        for transition in self.feet:
            if transition in self.sleep:
                asleep |= 1 << (transition >> 1)
            else:
                awake |= 1 << (transition >> 1)
        while awake:
            process = awake & -awake
            self.explore |= process
            awake ^= process
            if not process & asleep:
                break
        self.taken = self.awake()
        return self.taken


class Orders:
    """The search. Each run asks ``decide`` at every state; after it ``advance`` prepares the next run."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.depth = 0
        """States of the current run so far."""
        self.fresh = 0
        """The first node whose transition the races were not looked for yet."""

    def decide(self, feet: dict[int, Foot]) -> int:
        """The transition to take where those in ``feet`` are possible; NOTHING or ASLEEP where the run ends.

        ``feet`` holds them in ascending order. Raises ``OrderError`` if a run is not like the one it repeats.
        """
        if self.depth < len(self.nodes):
            node = self.nodes[self.depth]
            if list(node.feet) != list(feet):
                raise OrderError("a run offered other memory accesses than the one it was to repeat")
            self.depth += 1
            return node.taken
        if not feet:
            return NOTHING
        node = Node(feet, self._inherited())
        if node.choose() == ASLEEP:
            return ASLEEP
        self.nodes.append(node)
        self.depth += 1
        return node.taken

    def _inherited(self) -> dict[int, Foot]:
        """What sleeps in the state after the last node: all that slept there and does not depend on what it took."""
        sleep: dict[int, Foot] = {}
        if self.nodes:
            last = self.nodes[-1]
            taken = last.feet[last.taken]
            for transition, foot in last.sleep.items():
                if transition >> 1 != last.taken >> 1 and not foot.conflicts(taken):
                    sleep[transition] = foot
        return sleep

    def advance(self) -> bool:
        """After a run: the next one takes another transition at the last node where one is left; False at the end."""
        if self.depth != len(self.nodes):
            raise OrderError("a run ended before the accesses that it was to repeat")
        self._find_races()
        self.depth = 0
        while self.nodes:
            node = self.nodes[-1]
            node.sleep[node.taken] = node.feet[node.taken]
            node.taken = node.awake()
            if node.taken != ASLEEP:
                self.fresh = len(self.nodes) - 1
                return True
            self.nodes.pop()
        return False

    def _find_races(self) -> None:
        """For each race of the run: explore, where its first transition was taken, a process that reverses it."""
        before: list[int] = []
        """By transition of the run: bit mask of those that happen before it."""
        for second in range(len(self.nodes)):
            direct = self._direct(second)
            happens = direct
            through = 0
            for first in range(second):
                if direct >> first & 1:
                    happens |= before[first]
                    through |= before[first]
            before.append(happens)
            if second >= self.fresh:
                process = self.nodes[second].taken >> 1
                for first in range(second):
                    if direct & ~through & 1 << first and self.nodes[first].taken >> 1 != process:
                        self._reverse(first, second, before)

    def _direct(self, second: int) -> int:
        """Bit mask of the transitions before ``second`` that it depends on."""
        mask = 0
        taken = self.nodes[second].taken
        foot = self.nodes[second].feet[taken]
        for first in range(second):
            node = self.nodes[first]
            if node.taken >> 1 == taken >> 1 or foot.conflicts(node.feet[node.taken]):
                mask |= 1 << first
        return mask

    def _reverse(self, first: int, second: int, before: list[int]) -> None:
        """Explore at ``first`` a process that can begin what leads to ``second`` without ``first``, if none is yet."""
        others = 0
        starters = 0
        for position in [*range(first + 1, second), second]:
            if position != second and before[position] >> first & 1:
                continue
            if not before[position] & others:
                starters |= 1 << (self.nodes[position].taken >> 1)
            others |= 1 << position
        node = self.nodes[first]
        if not node.explore & starters:
            node.explore |= starters & -starters
