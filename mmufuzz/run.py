"""``run(case) -> Outcome``: the only way in."""

from __future__ import annotations

import gc

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import TSO, Case
from mmufuzz.case.validate import validate
from mmufuzz.host.deviation import EVICT, FILL
from mmufuzz.host.memory import Memory
from mmufuzz.host.sched import DEADLOCK, EVENT_LIMIT, Host, RunStop
from mmufuzz.host.strategy import Strategy
from mmufuzz.kvm.counters import HALF_SPENT, Counters
from mmufuzz.kvm.marks import MARKS
from mmufuzz.kvm.structs import Kvm
from mmufuzz.kvm.vm import build, dismantle
from mmufuzz.oracle.interleaving import count_interleavings
from mmufuzz.oracle.oracles import Oracles
from mmufuzz.outcome import FINDING, HARNESS_ERROR, OK, SUSPECT, Finding, GuestView, Outcome, Reached


def run(case: Case, strategy: Strategy | None = None, track: bool = False) -> Outcome:
    """Execute ``case``.

    With ``strategy`` (whose horizon is above 0) the strategy decides instead of the schedule of the Case (TLB
    deviations of the Case still apply); ``Outcome.schedule`` then repeats its decisions. ``track`` keeps state
    fingerprints for the exhaustive search. Raises CaseError if the Case is not valid.

    The cyclic garbage collector rests meanwhile: a run leaves no cycles behind.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _run(case, strategy, track)
    finally:
        if collecting:
            gc.enable()


def _run(case: Case, strategy: Strategy | None, track: bool) -> Outcome:
    validate(case)
    for mark in case.expect.reach:
        if mark not in MARKS:
            raise CaseError(f"expect.reach {mark!r}", "expected a mark; the reference of sites and labels lists them")
    host = Host(Memory(), case.memory_model == TSO, case.options.event_limit)
    host.track = track
    host.memory.track = track
    kvm = build(case, host)
    oracles = Oracles(kvm)
    host.follow(list(case.schedule))
    if strategy is not None:
        host.decide_with(strategy)
    outcome = Outcome()
    try:
        host.run()
        oracles.at_end(host.status)
    except RunStop:
        pass
    except Exception as error:  # Whatever fails inside the model is a finding about mmufuzz itself.
        place = _place(error)
        detail = f"{type(error).__name__}: {error} in {place}"
        oracles.findings.append(Finding(HARNESS_ERROR, f"{type(error).__name__} in {place}", detail, host.last))
    _fill(outcome, case, host, kvm, oracles)
    # Without references that run in circles the machine is freed at once, and not by the collector.
    oracles.detach()
    dismantle(kvm)
    host.dismantle()
    return outcome


def _place(error: BaseException) -> str:
    """Module and function where ``error`` was raised."""
    trace = error.__traceback__
    place = "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        place = f"{trace.tb_frame.f_globals.get('__name__', '?')}.{code.co_name}"
        trace = trace.tb_next
    return place


class _Reached(Reached):
    """The counters that the model hit, and those that follow from the rest of the outcome."""

    def __init__(self, hit: Counters, outcome: Outcome) -> None:
        self.hit = hit
        self.marks = outcome.marks
        self.exits = outcome.exits
        self.record = outcome.record
        self.threads = len(outcome.threads)

    def counters(self) -> dict[int, int]:
        """See ``Reached``."""
        self.hit.add_names(self.marks, self.exits)
        count_interleavings(self.record, self.threads, self.hit)
        return self.hit.hits


def _fill(outcome: Outcome, case: Case, host: Host, kvm: Kvm, oracles: Oracles) -> None:
    outcome.findings = oracles.findings
    if host.status == EVENT_LIMIT and not oracles.findings:
        outcome.findings.append(Finding(SUSPECT, "event limit", f"{host.events} visible operations", host.last))
        outcome.verdict = SUSPECT
    elif not oracles.findings:
        outcome.verdict = OK
    else:
        outcome.verdict = HARNESS_ERROR if oracles.findings[0].kind == HARNESS_ERROR else FINDING
    kept = [deviation for deviation in case.schedule if deviation.kind in (EVICT, FILL)]
    outcome.schedule = tuple(host.deviations + kept)
    outcome.marks = kvm.marks
    outcome.exits = kvm.exits
    outcome.events = host.events
    outcome.instructions = sum(vcpu.retired for vcpu in kvm.vcpus)
    outcome.exceptions = sum(len(vcpu.exceptions) for vcpu in kvm.vcpus)
    outcome.locks = {lock.name: lock.acquisitions for lock in (kvm.mmu_lock, kvm.slots_lock)}
    outcome.threads = tuple(thread.name for thread in host.threads)
    outcome.record = host.trace
    outcome.period = oracles.period
    if host.events * 2 > host.event_limit:
        kvm.counters.near(HALF_SPENT)
    outcome.reached = _Reached(kvm.counters, outcome)
    outcome.registers = tuple([tuple(vcpu.regs.gpr) for vcpu in kvm.vcpus])
    outcome.userspace = tuple([tuple(vcpu.userspace_exits) for vcpu in kvm.vcpus])
    outcome.words = host.memory.words
    outcome.view = _guest_view(host, kvm)


def _guest_view(host: Host, kvm: Kvm) -> GuestView:
    seen: list[object] = []
    for vcpu in kvm.vcpus:
        regs = vcpu.regs
        seen.append((regs.gpr, regs.rip, regs.rflags, regs.cr0, regs.cr2, regs.cr3, regs.cr4, regs.xmm))
        seen.append((vcpu.exceptions, vcpu.userspace_exits, vcpu.finished))
    return GuestView(seen, host.status == DEADLOCK)
