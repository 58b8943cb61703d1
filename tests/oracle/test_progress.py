"""A state that comes back without progress is a livelock; progress, however endless, is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from oracle_vms import DATA_GVA, FRAMES, PT_GVA, SPIN, Machine, case, flat32, fstp, load, long4, store

from mmufuzz.case import toml
from mmufuzz.case.model import ZAP_ALL_FAST, HostThread, Options
from mmufuzz.host.memory import Pending
from mmufuzz.host.sched import RunStop
from mmufuzz.host.sites import label_site, label_thread
from mmufuzz.kvm.observer import Observer
from mmufuzz.kvm.structs import QueuedException
from mmufuzz.oracle.progress import CONFIRMATIONS, MOST_NUMBERS, Progress
from mmufuzz.oracle.state import MachineState
from mmufuzz.outcome import SUSPECT, Outcome
from mmufuzz.run import run
from mmufuzz.x86.tlb import TlbEntry

KNOWN = Path(__file__).parents[2] / "corpus" / "known"
OWN_TABLE = fstp(PT_GVA + 0x100)
"""An instruction KVM cannot emulate, writing the page table that maps it."""


def stuck() -> Outcome:
    """An endless unprotect-and-retry dance, on a kernel that lacks what ends it."""
    return run(case(long4(OWN_TABLE), revert=("retry-guard", "write-pf-to-sp")))


def sites(outcome: Outcome, start: int, end: int) -> list[tuple[int, int]]:
    """Thread and site of the events in a part of the trace."""
    return [(label_thread(at), label_site(at)) for at, _, _ in outcome.trace[start:end] if at > 0]


def test_an_endless_retry_is_a_livelock() -> None:
    outcome = stuck()
    assert [(finding.kind, finding.fingerprint) for finding in outcome.findings] == [
        ("livelock", "emulate.decode_failed,emulate.reexecuted,page_fault.WRITE_PROTECTED,unprotect.zapped")
    ]


def test_the_same_program_ends_where_nothing_was_reverted() -> None:
    outcome = run(case(long4(OWN_TABLE)))
    assert outcome.findings == []
    assert outcome.marks["emulate.decode_failed"] >= 1


def test_a_loop_that_drops_its_event_is_told_by_that_however_it_comes_to_emulate() -> None:
    outcomes = [run(toml.load(path)) for path in sorted(KNOWN.glob("event-frame-on-*.toml"))]
    ways = {
        tuple(name for name in outcome.marks if name.startswith(("unprotect.", "faultin."))) for outcome in outcomes
    }
    assert len(ways) > 3
    assert {outcome.findings[0].fingerprint for outcome in outcomes} == {
        "emulate.fault,event.delivery_exited,event.dropped"
    }


def test_vcpus_that_are_stuck_in_different_loops_are_two_findings() -> None:
    sgdt = b"\x0f\x01\x05" + (FRAMES + 5 << 12).to_bytes(4, "little")  # in MMIO
    outcome = run(case(long4(OWN_TABLE), flat32(b"\x90", sgdt), revert=("retry-guard", "write-pf-to-sp")))
    assert [finding.fingerprint for finding in outcome.findings] == [
        "emulate.decode_failed,emulate.reexecuted,page_fault.WRITE_PROTECTED,unprotect.zapped",
        "emulate.io_needed",
    ]


def test_the_reported_period_is_one_lap() -> None:
    outcome = stuck()
    start, end = outcome.period
    length = end - start
    assert 0 < length < start
    assert sites(outcome, start, end) == sites(outcome, end, end + length)


def test_the_livelock_is_found_long_before_the_event_limit() -> None:
    assert stuck().events < 1500


def test_one_stuck_vcpu_is_a_livelock_though_others_finish() -> None:
    outcome = run(case(long4(OWN_TABLE), flat32(b"\x90"), revert=("retry-guard", "write-pf-to-sp")))
    assert [finding.kind for finding in outcome.findings] == ["livelock"]


def test_a_guest_that_spins_makes_progress() -> None:
    outcome = run(case(flat32(SPIN), options=Options(event_limit=4000)))
    assert outcome.verdict == SUSPECT
    assert [finding.kind for finding in outcome.findings] == ["suspect"]


def test_host_operations_that_upset_a_guest_are_no_livelock() -> None:
    outcome = run(case(long4(load(DATA_GVA), store(DATA_GVA)), host=[HostThread((ZAP_ALL_FAST,) * 8)]))
    assert outcome.findings == []


# The canonical state.


def idle() -> Machine:
    """A machine after a run."""
    return Machine(case(long4(load(DATA_GVA), store(DATA_GVA)), host=[HostThread((ZAP_ALL_FAST,))])).run()


def state(m: Machine) -> tuple[object, ...]:
    """Its canonical state."""
    return MachineState(m.kvm).state(m.oracles.history.addresses())


def test_equal_runs_end_in_equal_states() -> None:
    assert state(idle()) == state(idle())


def renumber(m: Machine) -> None:
    """Move every shadow page to another frame, as if it had been freed and made again."""
    kvm = m.kvm
    shift = 1000
    words = kvm.memory.words
    moved = {sp.pfn: sp.pfn + shift for sp in kvm.by_pfn.values()}
    for sp in list(kvm.by_pfn.values()):
        for index in range(512):
            value = words.pop(sp.spte_address(index) >> 3, 0)
            if value >> 12 & (1 << 28) - 1 in moved:
                value += shift << 12
            if value:
                words[(sp.pfn + shift << 9) + index] = value
        sp.pfn += shift
    kvm.by_pfn = {sp.pfn: sp for sp in kvm.by_pfn.values()}
    for vcpu in kvm.vcpus:
        vcpu.mmu.root_pfn += shift
        for page in vcpu.tlb.entries():
            rights = {"writable": page.writable, "user": page.user, "nx": page.nx, "dirty": page.dirty}
            vcpu.tlb.insert(TlbEntry(page.vpn, page.pfn, tag=page.tag + (shift << 12), **rights))
        for level in vcpu.tlb._psc:
            level.clear()


def test_shadow_frames_count_by_position_not_by_number() -> None:
    m, other = idle(), idle()
    for level in m.kvm.vcpus[0].tlb._psc:
        level.clear()
    renumber(other)
    assert state(m) == state(other)


def test_counters_that_only_grow_do_not_count() -> None:
    m = idle()
    before = state(m)
    m.kvm.vcpus[0].progress += 1
    m.kvm.vcpus[0].retired += 1
    m.kvm.next_pfn += 1
    m.kvm.mark("emulate")
    assert state(m) == before


def change_register(m: Machine) -> None:
    m.kvm.vcpus[0].regs.gpr[3] ^= 1


def change_memory(m: Machine) -> None:
    m.kvm.memory.write(0x1010000, 8, 77)


def change_spte(m: Machine) -> None:
    sp = m.kvm.active_mmu_pages[0]
    index = sorted(sp.used)[0]
    m.poke(sp.spte_address(index), m.peek(sp.spte_address(index)) ^ 1 << 6)


def change_request(m: Machine) -> None:
    m.poke(m.kvm.vcpus[0].requests_address, 4)


def change_guard(m: Machine) -> None:
    m.kvm.vcpus[0].last_retry_addr += 8


def change_tlb(m: Machine) -> None:
    m.kvm.vcpus[0].tlb.flush_all()


def change_flooding(m: Machine) -> None:
    m.poke(m.kvm.active_mmu_pages[0].flooding_address, 2)


def change_root(m: Machine) -> None:
    m.kvm.vcpus[0].mmu.root_pfn = m.kvm.active_mmu_pages[0].pfn


def change_generation(m: Machine) -> None:
    m.kvm.mmu_valid_gen ^= 1


def change_order(m: Machine) -> None:
    m.kvm.active_mmu_pages.reverse()


def change_fault(m: Machine) -> None:
    m.kvm.vcpus[0].exception = QueuedException(14, 2, 0)


def change_buffer(m: Machine) -> None:
    m.host.threads[0].buffer.pending.append(Pending(0, 0x1000, 8, 1, True))


def change_wait(m: Machine) -> None:
    m.host.threads[1].waiting = m.kvm.mmu_lock


CHANGES = [
    change_register,
    change_memory,
    change_spte,
    change_request,
    change_guard,
    change_tlb,
    change_flooding,
    change_root,
    change_generation,
    change_order,
    change_fault,
    change_buffer,
    change_wait,
]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_whatever_the_future_depends_on_counts(change: Callable[[Machine], None]) -> None:
    m = idle()
    before = state(m)
    change(m)
    assert state(m) != before


# Long runs.


def test_a_livelock_is_found_after_the_states_so_far_were_forgotten() -> None:
    """What is recorded is bounded, so a run that is stuck for long starts looking for a period anew."""
    m = idle()
    progress = Progress(m.kvm, m.oracles.sink, m.oracles.history)
    m.kvm.vcpus[0].finished = False
    for _ in range(3):
        progress.at_yield()
    progress.recorded = MOST_NUMBERS
    for _ in range(CONFIRMATIONS + 1):
        progress.at_yield()
    assert m.found == [] and progress.recorded == (CONFIRMATIONS + 1) * len(state(m))
    with pytest.raises(RunStop):
        progress.at_yield()
    assert [kind for kind, _ in m.found] == ["livelock"]


class Unacknowledged(Observer):
    """Another CPU kicks the vCPU at every VM entry."""

    def __init__(self, m: Machine) -> None:
        self.m = m

    def vm_entered(self, vcpu: int) -> None:
        self.m.poke(self.m.kvm.vcpus[vcpu].ipi_address, 1)


def test_a_loop_that_no_mark_tells_is_told_by_its_exits() -> None:
    m = Machine(case(long4(b"\x90"), host=[HostThread(("interrupt vcpu0 0x20",))]))
    m.kvm.observer = Unacknowledged(m)
    m.run()
    assert m.found == [("livelock", "exit external-interrupt")]
