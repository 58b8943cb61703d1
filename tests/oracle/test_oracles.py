"""Warnings, locks, deadlocks, and how a finding ends the run."""

from __future__ import annotations

import pytest
from oracle_vms import DATA_GVA, Machine, case, load, long4, ran

from mmufuzz.case.model import ZAP_ALL_FAST, HostThread
from mmufuzz.host.deviation import RUN, Deviation
from mmufuzz.host.lock import Lock
from mmufuzz.host.sched import DEADLOCK, ENDED, EVENT_LIMIT, STOPPED, RunStop
from mmufuzz.host.sites import BOOT
from mmufuzz.host.thread import Body


class Taker(Body):
    """Takes some locks and ends."""

    def __init__(self, locks: list[Lock], release: bool) -> None:
        self.locks = locks
        self.release = release

    def run(self) -> None:
        """Take them, and perhaps give them back."""
        for lock in self.locks:
            lock.acquire()
        for lock in self.locks[::-1]:
            if self.release:
                lock.release()


def takers(*threads: tuple[str, bool]) -> Machine:
    """A VM without vCPUs; each thread takes the locks named (m: mmu_lock, s: slots_lock)."""
    m = Machine(case(host=[HostThread(())]))
    locks = {"m": m.kvm.mmu_lock, "s": m.kvm.slots_lock}
    for index, (names, release) in enumerate(threads):
        m.host.spawn(f"host{index + 1}", Taker([locks[name] for name in names], release))
    return m.run()


def test_locks_taken_in_order_are_fine() -> None:
    assert takers(("sm", True), ("sm", True)).found == []


def test_a_lock_taken_out_of_order_is_found() -> None:
    assert takers(("ms", True)).found == [("lock", "slots_lock taken by out of order")]


def test_a_lock_taken_twice_is_found() -> None:
    assert takers(("mm", True)).found == [("lock", "mmu_lock taken twice by")]


def test_a_lock_that_is_never_released_is_found_when_all_threads_have_ended() -> None:
    assert takers(("m", False)).found == [("lock", "mmu_lock held at the end")]


def test_a_deadlock_names_what_is_waited_for() -> None:
    m = takers(("s", False), ("s", True), ("s", True))
    assert m.host.status == DEADLOCK
    assert m.found == [("deadlock", "waiting for slots_lock")]


def test_a_halted_vcpu_may_be_part_of_a_deadlock() -> None:
    """The thread that would interrupt it waits for a lock that nobody releases."""
    m = Machine(case(long4(b"\xfb", b"\xf4", b"\x90"), host=[HostThread((ZAP_ALL_FAST, "interrupt vcpu0 0x20"))]))
    m.host.spawn("host1", Taker([m.kvm.slots_lock], False))
    m.host.follow([Deviation(RUN, BOOT, 2)])
    m.run()
    assert m.host.status == DEADLOCK
    assert m.found == [("deadlock", "waiting for an interrupt, slots_lock")]


def test_a_lock_released_by_a_stranger_is_found() -> None:
    m = ran(load(DATA_GVA))
    with pytest.raises(RunStop):
        m.kvm.mmu_lock.release()
    assert m.found[0][0] == "lock"


def test_a_warning_of_the_kernel_is_a_finding() -> None:
    m = ran(load(DATA_GVA))
    with pytest.raises(RunStop):
        m.kvm.warn_on(True, "pte_list_remove", "SPTE missing from its rmap")
    assert m.found == [("warn", "pte_list_remove: SPTE missing from its rmap")]


def test_a_condition_that_does_not_hold_is_no_warning() -> None:
    m = ran(load(DATA_GVA))
    assert not m.kvm.warn_on(False, "f", "text")
    assert m.found == []


def test_the_first_finding_ends_the_run() -> None:
    m = Machine(case(long4(load(DATA_GVA), load(DATA_GVA))))
    m.kvm.slots[0].disallow_lpage[0][0] = 5
    m.run()
    assert m.host.status == STOPPED
    assert [kind for kind, _ in m.found] == ["accounting"]
    assert m.oracles.findings[0].label == m.host.last
    assert m.kvm.vcpus[0].retired == 0


@pytest.mark.parametrize("status", [EVENT_LIMIT, STOPPED])
def test_a_run_that_was_cut_short_is_not_judged_at_the_end(status: int) -> None:
    m = ran(load(DATA_GVA))
    m.kvm.mmu_lock.owner = 0
    m.oracles.at_end(status)
    assert m.found == []
    m.oracles.at_end(ENDED)
    assert [kind for kind, _ in m.found] == ["lock"]
