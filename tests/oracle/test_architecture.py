"""What the guest may see of KVM's handling of exits."""

from __future__ import annotations

import pytest
from oracle_vms import Machine, ran
from test_lifetime import what_is_found as lifetime_found

from mmufuzz.host.sched import RunStop


def what_is_found(m: Machine) -> str:
    """The fingerprint of the one finding."""
    assert [kind for kind, _ in m.found] == ["architecture"]
    return m.found[0][1]


def test_an_internal_error_for_user_code_is_found() -> None:
    m = ran()
    m.kvm.observer.internal_error(0)
    assert m.found == []
    m.kvm.vcpus[0].regs.cpl = 3
    with pytest.raises(RunStop):
        m.kvm.observer.internal_error(0)
    assert what_is_found(m) == "KVM_EXIT_INTERNAL_ERROR for an instruction of guest user code"


def test_an_internal_error_where_user_code_had_only_to_be_skipped_is_told_apart() -> None:
    m = ran()
    m.kvm.vcpus[0].regs.cpl = 3
    m.kvm.observer.instruction_done(0)
    with pytest.raises(RunStop):
        m.kvm.observer.internal_error(0)
    assert what_is_found(m) == "KVM_EXIT_INTERNAL_ERROR for an instruction of guest user code that has had its effect"


def test_an_internal_error_for_an_l2_guest_is_found() -> None:
    m = ran()
    m.kvm.vcpus[0].guest_mode = True
    with pytest.raises(RunStop):
        m.kvm.observer.internal_error(0)
    assert what_is_found(m) == "KVM_EXIT_INTERNAL_ERROR for an instruction of an L2 guest"


def test_another_exception_than_db_at_a_code_breakpoint_is_found() -> None:
    m = ran()
    regs = m.kvm.vcpus[0].regs
    regs.dr[1], regs.dr[7] = regs.rip, 1 << 2
    m.kvm.observer.guest_exception(0, 1)
    regs.rflags |= 1 << 16
    m.kvm.observer.guest_exception(0, 14)
    regs.rflags &= ~(1 << 16)
    assert m.found == []
    with pytest.raises(RunStop):
        m.kvm.observer.guest_exception(0, 14)
    assert what_is_found(m) == "exception 14 at a code breakpoint, which comes first"


def test_an_exception_of_an_instruction_that_has_had_its_effect_is_found() -> None:
    m = ran()
    m.kvm.observer.instruction_done(0)
    m.kvm.observer.instruction_skipped(0)
    m.kvm.observer.guest_exception(0, 14)
    assert m.found == []
    m.kvm.observer.instruction_done(0)
    with pytest.raises(RunStop):
        m.kvm.observer.guest_exception(0, 14)
    assert what_is_found(m) == "exception 14 of an instruction that has had its effect"


def test_a_reference_to_a_local_variable_that_is_gone_is_found() -> None:
    m = ran()
    with pytest.raises(RunStop):
        m.kvm.observer.temporary_used(0, "complete_emulated_mmio")
    assert lifetime_found(m) == "complete_emulated_mmio reads a local variable of the emulator, which has returned"
