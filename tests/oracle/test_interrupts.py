"""An interrupt that KVM has taken is delivered once: what is found when it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from oracle_vms import Machine, case, long4, ran

from mmufuzz.case.model import HostThread
from mmufuzz.host.sched import ENDED, RunStop
from mmufuzz.kvm.observer import Observer
from mmufuzz.kvm.structs import QueuedException

IRQ = 0x20
LOST = "an interrupt that KVM took is lost"


def queued() -> tuple[Machine, Observer]:
    """A machine whose vCPU has been handed an interrupt."""
    m = ran()
    m.kvm.observer.interrupt_queued(0, IRQ)
    m.kvm.vcpus[0].interrupt = QueuedException(IRQ, -1, 0)
    return m, m.kvm.observer


def finding(m: Machine, call: Callable[[], None]) -> str:
    """The fingerprint of what ``call`` finds."""
    assert m.found == []
    with pytest.raises(RunStop):
        call()
    ((kind, what),) = m.found
    assert kind == "architecture"
    return what


def test_an_interrupt_that_is_queued_or_delivered_is_no_finding() -> None:
    m, observer = queued()
    observer.vm_entered(0)
    observer.interrupt_begins(0, IRQ)
    observer.interrupt_begins(0, IRQ)
    observer.interrupt_delivered(0, IRQ)
    m.kvm.vcpus[0].interrupt = None
    observer.vm_entered(0)
    observer.interrupt_queued(0, IRQ)
    assert m.found == []


def test_an_interrupt_that_is_forgotten_is_found_at_the_next_entry() -> None:
    m, observer = queued()
    m.kvm.vcpus[0].interrupt = None
    assert finding(m, lambda: observer.vm_entered(0)) == LOST


def test_an_interrupt_that_is_forgotten_is_found_when_the_next_one_comes() -> None:
    m, observer = queued()
    m.kvm.vcpus[0].interrupt = None
    assert finding(m, lambda: observer.interrupt_queued(0, IRQ + 1)) == LOST


def test_an_interrupt_that_is_forgotten_is_found_at_the_end_and_one_that_is_queued_is_not() -> None:
    m, _ = queued()
    m.oracles.at_end(ENDED)
    assert m.found == []
    m.kvm.vcpus[0].interrupt = None
    m.oracles.at_end(ENDED)
    assert m.found == [("architecture", LOST)]


def test_an_interrupt_that_overwrites_another_is_found() -> None:
    m, observer = queued()
    what = finding(m, lambda: observer.interrupt_queued(0, IRQ + 1))
    assert what == "an interrupt is overwritten before it was delivered"


@pytest.mark.parametrize("vector", [IRQ, IRQ + 1])
def test_a_delivery_that_nobody_asked_for_is_found(vector: int) -> None:
    m, observer = queued()
    if vector == IRQ:
        observer.interrupt_begins(0, IRQ)
        observer.interrupt_delivered(0, IRQ)
    what = finding(m, lambda: observer.interrupt_begins(0, vector))
    assert what == "an interrupt is delivered that nobody raised, or twice"


def test_an_exception_of_the_delivery_itself_replaces_the_interrupt() -> None:
    m, observer = queued()
    observer.interrupt_begins(0, IRQ)
    observer.guest_exception(0, 14)
    m.kvm.vcpus[0].interrupt = None
    observer.vm_entered(0)
    assert m.found == []


def test_an_exception_of_an_instruction_does_not() -> None:
    m, observer = queued()
    observer.guest_exception(0, 14)
    m.kvm.vcpus[0].interrupt = None
    assert finding(m, lambda: observer.vm_entered(0)) == LOST


def test_nor_does_one_of_an_instruction_that_was_emulated_in_place_of_the_delivery() -> None:
    m, observer = queued()
    observer.interrupt_begins(0, IRQ)
    m.oracles.observer.interrupts.emulation_begins(0)
    observer.guest_exception(0, 14)
    m.kvm.vcpus[0].interrupt = None
    what = finding(m, lambda: observer.vm_entered(0))
    assert what == LOST + " (its delivery exited, and an instruction was emulated)"


def test_an_interrupt_taken_while_an_instruction_waits_for_its_answer_is_told_apart() -> None:
    m = ran()
    m.kvm.vcpus[0].mmio.exit_pending = True
    m.kvm.observer.interrupt_queued(0, IRQ)
    what = finding(m, lambda: m.kvm.observer.vm_entered(0))
    assert what == LOST + " (taken with an instruction to be completed)"


def test_a_shutdown_or_a_failed_task_switch_ends_what_was_queued() -> None:
    m, observer = queued()
    m.kvm.vcpus[0].interrupt = None
    observer.events_ended(0)
    observer.vm_entered(0)
    assert m.found == []


def test_a_failed_vm_entry_is_found() -> None:
    m, observer = queued()
    what = finding(m, lambda: observer.vm_entry_failed(0))
    assert what == "KVM_EXIT_FAIL_ENTRY: an interrupt is injected where the guest can take none"


def test_a_window_that_kvm_does_not_wait_for_is_found() -> None:
    m = Machine(case(long4(b"\x90"), host=[HostThread(("interrupt vcpu0 0x20",))])).run()
    irqchip = m.kvm.vcpus[0].irqchip
    assert irqchip is not None
    irqchip.request_interrupt_window = irqchip.window_exiting = True
    m.kvm.observer.vm_entered(0)
    irqchip.window_exiting = False
    what = finding(m, lambda: m.kvm.observer.vm_entered(0))
    assert what == "the guest runs, and nobody learns when it can take the interrupt that waits"
