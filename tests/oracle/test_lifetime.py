"""Freed shadow pages stay untouched."""

from __future__ import annotations

import pytest
from oracle_vms import DATA_GVA, PT, Machine, case, load, long4, ran, store

from mmufuzz.case.model import ZAP_ALL_FAST, HostThread
from mmufuzz.host.sched import RunStop
from mmufuzz.host.sites import SPTE_LOAD, SPTE_STORE, SPTE_WALK


def freed(m: Machine) -> int:
    """Free the shadow page of the page table while everybody still points at it; address of an SPTE in it."""
    sp = m.page(PT)
    m.kvm.memory.free_frame(sp.pfn)
    return sp.spte_address(3)


def what_is_found(m: Machine) -> str:
    """The fingerprint of the one finding."""
    assert [kind for kind, _ in m.found] == ["lifetime"]
    return m.found[0][1]


def test_a_hardware_walk_through_a_freed_page_is_found() -> None:
    m = ran()
    address = freed(m)
    m.kvm.vcpus[0].in_guest = True
    with pytest.raises(RunStop):
        m.host.threads[0].load(SPTE_WALK, address)
    assert what_is_found(m) == "freed shadow page read by a hardware walk"


def test_a_lockless_walk_of_kvm_through_a_freed_page_is_found() -> None:
    m = ran()
    address = freed(m)
    with pytest.raises(RunStop):
        m.host.threads[0].load(SPTE_LOAD, address)
    assert what_is_found(m) == "freed shadow page read by KVM (spte.load)"


def test_a_store_under_mmu_lock_to_a_freed_page_is_found() -> None:
    m = ran()
    address = freed(m)
    m.kvm.mmu_lock.acquire()
    with pytest.raises(RunStop):
        m.host.threads[0].store(SPTE_STORE, address, 1)
    assert what_is_found(m) == "freed shadow page written by KVM under mmu_lock"


def test_a_speculative_walk_through_a_freed_page_is_found() -> None:
    m = ran()
    address = freed(m)
    with pytest.raises(RunStop):
        m.kvm.memory.read(address, 8)
    assert what_is_found(m) == "freed shadow page read by a speculative walk"


def test_pages_that_are_freed_while_a_guest_runs_are_not_touched_again() -> None:
    m = Machine(case(long4(load(DATA_GVA), store(DATA_GVA)), host=[HostThread((ZAP_ALL_FAST, ZAP_ALL_FAST))])).run()
    assert m.kvm.memory.freed
    assert m.found == []
