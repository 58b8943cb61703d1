"""Reduction: the smallest Case, by one total order (``edits.key``), that shows the same finding.

Passes delete, then simplify; each accepts only Cases that are smaller in that order, so no pass undoes another's work
and the loop ends. Because schedules are labelled, deleting a step leaves the other deviations standing (delta
debugging over labels; Choi and Zeller, ISSTA 2002, cut raw schedules instead). At the fixed point a search over
schedules asks of each single deletion, and of a schedule with fewer deviations, whether *some* schedule still fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case, Options
from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import Outcome
from mmufuzz.run import run
from mmufuzz.search.edits import (
    drop_steps,
    drop_thread,
    key,
    merge_frames,
    step_count,
    table_levels,
    thread_count,
    vcpu_first,
    with_deviation,
    with_vcpu,
)
from mmufuzz.search.explore import explore
from mmufuzz.search.strategies import Sparse
from mmufuzz.search.trace_edits import earlier, slid, stored

RunFn = Callable[[Case, Strategy | None], Outcome]

SEARCH_SEEDS: Final = 6
"""Random schedules tried for each deletion that the recorded schedule does not survive."""

SEARCH_RUNS: Final = 120
"""Schedules tried for one with fewer deviations."""

MOVES: Final = 8
"""Earlier labels tried for each end of a deviation."""

REPLAYS: Final = 3

PAGE_OFFSET: Final = 0xFFF


@mypyc_attr(native_class=False)
class ReduceError(RuntimeError):
    """The Case does not show the finding, or does not show it each time it is run."""


class ReduceResult:
    """``case`` is the smallest found, ``outcome`` its run; ``runs`` counts all; ``exhausted``: the budget ran out."""

    def __init__(self, case: Case, outcome: Outcome, runs: int, exhausted: bool) -> None:
        self.case = case
        self.outcome = outcome
        self.runs = runs
        self.exhausted = exhausted


def reduce(
    case: Case, fingerprint: str, run_fn: RunFn = run, budget: int = 2000, keep_kernel: bool = False
) -> ReduceResult:
    """Make ``case`` as small as possible while a finding with ``fingerprint`` (and its kind) stays.

    At most ``budget`` runs, and three more that check the result. ``keep_kernel``: fixes that the Case reverts or
    applies stay as they are. Raises ``ReduceError`` if ``case`` does not show the finding or the result does not
    replay.
    """
    reducer = Reducer(case, fingerprint, run_fn, budget, keep_kernel)
    reducer.fixed_point()
    outcome = reducer.outcome
    for number in range(REPLAYS):
        again = run_fn(reducer.case, None)
        reducer.runs += 1
        if number and again.digest != outcome.digest:
            raise ReduceError("the reduced case does not give the same outcome each time it is run")
        if not reducer.shows(again):
            raise ReduceError("the reduced case does not replay")
        outcome = again
    return ReduceResult(reducer.case, outcome, reducer.runs, reducer.exhausted)


class Reducer:
    """The smallest Case so far and the runs left."""

    def __init__(self, case: Case, fingerprint: str, run_fn: RunFn, budget: int, keep_kernel: bool = False) -> None:
        self.run_fn = run_fn
        self.budget = budget
        self.keep_kernel = keep_kernel
        self.runs = 1
        self.exhausted = False
        self.kind = ""
        self.fingerprint = fingerprint
        self.tried: dict[Case, bool] = {}
        """Cases that do not show the finding."""
        self.outcome = run_fn(case, None)
        for finding in self.outcome.findings:
            if finding.fingerprint == fingerprint and not self.kind:
                self.kind = finding.kind
        if not self.shows(self.outcome):
            raise ReduceError(f"the case does not show {fingerprint}")
        self.case = case
        self._adopt_recorded()

    def shows(self, outcome: Outcome) -> bool:
        """Whether ``outcome`` has the finding."""
        for finding in outcome.findings:
            if finding.kind == self.kind and finding.fingerprint == self.fingerprint:
                return True
        return False

    def fixed_point(self) -> None:
        """Run all passes until none makes progress or the budget is used up."""
        while not self.exhausted:
            before = self.case
            self.drop_threads()
            self.drop_steps()
            self.drop_memory()
            self.merge_tables()
            self.drop_deviations()
            self.drop_configuration()
            if self.case == before:
                self.simplify_values()
                self.simplify_schedule()
            if self.case == before:
                self.search_schedules()
            if self.case == before:
                return

    # Trying.

    def attempt(self, candidate: Case) -> bool:
        """Adopt ``candidate`` if it is smaller and shows the finding."""
        if candidate in self.tried or not key(candidate) < key(self.case):
            return False
        outcome = self._run(candidate, None)
        if outcome is not None and self.shows(outcome):
            self.case = candidate
            self.outcome = outcome
            self._adopt_recorded()
            return True
        self.tried[candidate] = True
        return False

    def _run(self, candidate: Case, strategy: Strategy | None) -> Outcome | None:
        if self.runs >= self.budget:
            self.exhausted = True
            return None
        self.runs += 1
        try:
            return self.run_fn(candidate, strategy)
        except CaseError:
            return None

    def _adopt_recorded(self) -> None:
        """Deviations that had no effect are not in the recorded schedule."""
        recorded = replace(self.case, schedule=self.outcome.schedule)
        if key(recorded) < key(self.case):
            self.case = recorded

    # Deletion.

    def drop_threads(self) -> None:
        """Drop vCPUs and host threads."""
        thread = thread_count(self.case) - 1
        while thread >= 0:
            self.attempt(drop_thread(self.case, thread))
            thread -= 1

    def drop_steps(self) -> None:
        """Drop blocks of instructions and host operations, large ones first."""
        for thread in range(thread_count(self.case)):
            size = max(1, step_count(self.case, thread))
            while size:
                last = step_count(self.case, thread)
                while last > 0:
                    first = max(0, last - size)
                    if not self.attempt(drop_steps(self.case, thread, first, last)):
                        moved = slid(self.case, self.outcome.trace, thread, first, last)
                        if not self.attempt(drop_steps(moved, thread, first, last)):
                            done = stored(moved, self.outcome.trace, thread, first, last)
                            self.attempt(drop_steps(done, thread, first, last))
                    last = first
                size //= 2

    def drop_memory(self) -> None:
        """Drop blocks of initial memory words."""
        size = len(self.case.memory)
        while size:
            last = len(self.case.memory)
            while last > 0:
                first = max(0, last - size)
                memory = self.case.memory
                self.attempt(replace(self.case, memory=memory[:first] + memory[last:]))
                last = first
            size //= 2

    def merge_tables(self) -> None:
        """Merge page tables of one level. Not of several: a table that maps itself is harder to read, not simpler."""
        levels = table_levels(self.case)
        for gone in reversed(list(levels)):
            for kept in levels:
                if gone != kept and levels[gone] == levels[kept]:
                    self.attempt(merge_frames(self.case, gone, kept))

    def drop_deviations(self) -> None:
        """Drop blocks of deviations, then the choice of a first thread (by renumbering), then the ends of holds."""
        size = len(self.case.schedule)
        while size:
            last = len(self.case.schedule)
            while last > 0:
                first = max(0, last - size)
                schedule = self.case.schedule
                self.attempt(replace(self.case, schedule=schedule[:first] + schedule[last:]))
                last = min(first, len(self.case.schedule))
            size //= 2
        for deviation in self.case.schedule:
            if deviation.kind == RUN and deviation.at == BOOT and deviation.actor < len(self.case.vcpus):
                self.attempt(vcpu_first(self.case, deviation.actor))
                break
        index = 0
        while index < len(self.case.schedule):
            deviation = self.case.schedule[index]
            if deviation.kind == HOLD and deviation.until != BOOT:
                self.attempt(with_deviation(self.case, index, replace(deviation, until=BOOT)))
            index += 1

    def drop_configuration(self) -> None:
        """Drop registers, CPU flags, slots, options and fix changes."""
        for index in range(len(self.case.vcpus)):
            for at in range(len(self.case.vcpus[index].regs) - 1, -1, -1):
                vcpu = self.case.vcpus[index]
                self.attempt(with_vcpu(self.case, index, replace(vcpu, regs=vcpu.regs[:at] + vcpu.regs[at + 1 :])))
            for at in range(len(self.case.vcpus[index].flags) - 1, -1, -1):
                vcpu = self.case.vcpus[index]
                self.attempt(with_vcpu(self.case, index, replace(vcpu, flags=vcpu.flags[:at] + vcpu.flags[at + 1 :])))
        for at in range(len(self.case.slots) - 1, -1, -1):
            self.attempt(replace(self.case, slots=self.case.slots[:at] + self.case.slots[at + 1 :]))
        if not self.keep_kernel:
            self._drop_changes()
        self._reset_options()

    def _drop_changes(self) -> None:
        for at in range(len(self.case.revert) - 1, -1, -1):
            self.attempt(replace(self.case, revert=self.case.revert[:at] + self.case.revert[at + 1 :]))
        for at in range(len(self.case.apply) - 1, -1, -1):
            self.attempt(replace(self.case, apply=self.case.apply[:at] + self.case.apply[at + 1 :]))

    def _reset_options(self) -> None:
        default = Options()
        if self.attempt(replace(self.case, options=default)):
            return
        self.attempt(replace(self.case, options=replace(self.case.options, fep=default.fep)))
        self.attempt(replace(self.case, options=replace(self.case.options, decode_to_skip=default.decode_to_skip)))
        self.attempt(replace(self.case, options=replace(self.case.options, tsc=default.tsc)))
        pages = default.n_max_mmu_pages
        self.attempt(replace(self.case, options=replace(self.case.options, n_max_mmu_pages=pages)))
        self.attempt(replace(self.case, options=replace(self.case.options, event_limit=default.event_limit)))
        for at in range(len(self.case.options.write_track) - 1, -1, -1):
            gfns = self.case.options.write_track
            self.attempt(replace(self.case, options=replace(self.case.options, write_track=gfns[:at] + gfns[at + 1 :])))

    # Simplification.

    def simplify_values(self) -> None:
        """Clear bits of memory words and registers, bytes of instructions; shrink slots."""
        for index in range(len(self.case.memory)):
            for value in simpler_values(self.case.memory[index].value):
                word = self.case.memory[index]
                if value & word.value == value:
                    memory = (*self.case.memory[:index], replace(word, value=value), *self.case.memory[index + 1 :])
                    self.attempt(replace(self.case, memory=memory))
        for index in range(len(self.case.vcpus)):
            self._simplify_vcpu(index)
        for index in range(len(self.case.slots)):
            slot = self.case.slots[index]
            for smaller in (replace(slot, readonly=False), replace(slot, npages=max(1, slot.npages // 2))):
                slots = (*self.case.slots[:index], smaller, *self.case.slots[index + 1 :])
                self.attempt(replace(self.case, slots=slots))

    def _simplify_vcpu(self, index: int) -> None:
        self.attempt(with_vcpu(self.case, index, replace(self.case.vcpus[index], cpl=0)))
        for at in range(len(self.case.vcpus[index].regs)):
            for value in simpler_values(self.case.vcpus[index].regs[at][1]):
                vcpu = self.case.vcpus[index]
                number, old = vcpu.regs[at]
                if value & old == value:
                    regs = (*vcpu.regs[:at], (number, value), *vcpu.regs[at + 1 :])
                    self.attempt(with_vcpu(self.case, index, replace(vcpu, regs=regs)))
        for at in range(len(self.case.vcpus[index].program)):
            for position in range(len(self.case.vcpus[index].program[at]) - 1, 0, -1):
                vcpu = self.case.vcpus[index]
                code = vcpu.program[at]
                code = code[:position] + b"\0" + code[position + 1 :]
                program = (*vcpu.program[:at], code, *vcpu.program[at + 1 :])
                self.attempt(with_vcpu(self.case, index, replace(vcpu, program=program)))

    def simplify_schedule(self) -> None:
        """Move deviations to earlier events of the same thread, and run lower-numbered threads."""
        index = 0
        while index < len(self.case.schedule):
            for packed in earlier(self.outcome.trace, self.case.schedule[index].at, MOVES):
                if index < len(self.case.schedule):
                    self.attempt(with_deviation(self.case, index, replace(self.case.schedule[index], at=packed)))
            if index < len(self.case.schedule) and self.case.schedule[index].until != BOOT:
                for packed in earlier(self.outcome.trace, self.case.schedule[index].until, MOVES):
                    if index < len(self.case.schedule):
                        self.attempt(with_deviation(self.case, index, replace(self.case.schedule[index], until=packed)))
            if index < len(self.case.schedule) and self.case.schedule[index].kind == RUN:
                for actor in range(self.case.schedule[index].actor):
                    deviation = self.case.schedule[index]
                    self.attempt(with_deviation(self.case, index, Deviation(RUN, deviation.at, actor)))
            index += 1

    # Search over schedules.

    def search_schedules(self) -> None:
        """Look for a schedule with fewer deviations, then for one that fails after some single deletion."""
        if self._search_cheaper():
            return
        for thread in range(thread_count(self.case) - 1, -1, -1):
            if self._search(drop_thread(self.case, thread)):
                return
        for thread in range(thread_count(self.case)):
            for step in range(step_count(self.case, thread) - 1, -1, -1):
                if self._search(drop_steps(self.case, thread, step, step + 1)):
                    return
        for at in range(len(self.case.memory) - 1, -1, -1):
            if self._search(replace(self.case, memory=self.case.memory[:at] + self.case.memory[at + 1 :])):
                return

    def _search(self, candidate: Case) -> bool:
        runs = 0
        holds = 0
        for deviation in self.case.schedule:
            runs += deviation.kind == RUN
            holds += deviation.kind == HOLD
        if runs + holds == 0:
            return False
        for seed in range(SEARCH_SEEDS):
            strategy = Sparse(Rng(seed), max(1, self.outcome.events), runs, holds)
            outcome = self._run(candidate, strategy)
            if outcome is None:
                return False
            if self.shows(outcome) and self.attempt(replace(candidate, schedule=outcome.schedule)):
                return True
        return False

    def _search_cheaper(self) -> bool:
        cost = 0
        for deviation in self.case.schedule:
            cost += deviation.kind in (RUN, HOLD)
        if cost == 0:
            return False
        search = CheaperSearch(self, min(SEARCH_RUNS, (self.budget - self.runs) // 2))
        explore(search.run_with, cost - 1, search.should_stop, prune=False)
        if search.found is None:
            return False
        return self.attempt(replace(self.case, schedule=search.found.schedule))


class CheaperSearch:
    """Runs the Reducer's Case under the schedules that ``explore`` asks for."""

    def __init__(self, reducer: Reducer, limit: int) -> None:
        self.reducer = reducer
        self.limit = limit
        self.found: Outcome | None = None

    def run_with(self, strategy: Strategy) -> Outcome:
        """One run; remembers the first that shows the finding, and hides other findings from ``explore``."""
        self.limit -= 1
        self.reducer.runs += 1
        outcome = self.reducer.run_fn(self.reducer.case, strategy)
        if self.reducer.shows(outcome):
            self.found = outcome
            return outcome
        return Outcome()

    def should_stop(self) -> bool:
        """When the finding was seen or the runs are used up."""
        return self.found is not None or self.limit <= 0


def simpler_values(value: int) -> list[int]:
    """Zero, the page without the offset, the offset alone; then single bits cleared, high ones first; at most 15."""
    values = [0] if value else []
    for part in (value & ~PAGE_OFFSET, value & PAGE_OFFSET):
        if part and part != value:
            values.append(part)
    rest = value
    while rest and len(values) < 15:
        bit = 1 << (rest.bit_length() - 1)
        rest ^= bit
        values.append(value ^ bit)
    return values
