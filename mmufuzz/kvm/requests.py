"""Requests, kicks and the remote TLB flush protocol (virt/kvm/kvm_main.c; Documentation/virt/kvm/vcpu-requests.rst)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import IPI_SEND, MODE_ATOMIC, REQUESTS_ATOMIC, REQUESTS_LOAD
from mmufuzz.host.thread import Waitable
from mmufuzz.kvm.counters import FREE_WAITS
from mmufuzz.kvm.structs import (
    EXITING_GUEST_MODE,
    IN_GUEST_MODE,
    OUTSIDE_GUEST_MODE,
    READING_SHADOW_PAGE_TABLES,
    Kvm,
    Vcpu,
)

REQ_MMU_FREE_OBSOLETE_ROOTS: Final = 1 << 0
REQ_MMU_SYNC: Final = 1 << 1
REQ_TLB_FLUSH: Final = 1 << 3
REQ_TLB_FLUSH_CURRENT: Final = 1 << 4
REQ_TLB_FLUSH_GUEST: Final = 1 << 5
REQ_TRIPLE_FAULT: Final = 1 << 6


class IpiAck(Waitable):
    """The target CPU has taken the interrupt: it has left guest mode, or it runs with interrupts on."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    def ready(self) -> bool:
        """True as soon as nothing keeps the interrupt off."""
        vcpu = self.vcpu
        return not vcpu.irqs_disabled or vcpu.kvm.memory.read(vcpu.ipi_address, 8) == 0


def kvm_make_request(vcpu: Vcpu, request: int) -> None:
    """kvm_host.h:kvm_make_request: set the bit; a LOCKed operation orders everything before it."""
    vcpu.kvm.host.current.fetch_or(REQUESTS_ATOMIC, vcpu.requests_address, request)


def kvm_test_request(vcpu: Vcpu, request: int) -> bool:
    """kvm_host.h:kvm_test_request."""
    return vcpu.kvm.host.current.load(REQUESTS_LOAD, vcpu.requests_address) & request != 0


def kvm_check_request(vcpu: Vcpu, pending: int, request: int) -> bool:
    """kvm_host.h:kvm_check_request: test and clear. ``pending`` is what the caller has read."""
    if not pending & request:
        return False
    vcpu.kvm.host.current.fetch_and(REQUESTS_ATOMIC, vcpu.requests_address, ~request & (1 << 64) - 1)
    return True


def kvm_make_all_cpus_request(kvm: Kvm, request: int) -> None:
    """kvm_main.c:kvm_make_all_cpus_request for a KVM_REQUEST_WAIT request.

    Sets the bit on every vCPU, interrupts those that are not outside guest mode and waits until each has taken the
    interrupt. So on return no other CPU runs guest code that has not serviced, or will not first service, the request.
    """
    thread = kvm.host.current
    targets: list[Vcpu] = []
    for vcpu in kvm.vcpus:
        kvm_make_request(vcpu, request)
        if vcpu.index == thread.index:
            continue
        # kvm_vcpu_exiting_guest_mode: the barrier of the store-buffering pair with vcpu_enter_guest.
        mode = thread.cmpxchg(MODE_ATOMIC, vcpu.mode_address, IN_GUEST_MODE, EXITING_GUEST_MODE)
        if mode != OUTSIDE_GUEST_MODE:
            targets.append(vcpu)
        if mode == READING_SHADOW_PAGE_TABLES:
            kvm.counters.near(FREE_WAITS)
    for vcpu in targets:
        thread.fetch_or(IPI_SEND, vcpu.ipi_address, 1)
    for vcpu in targets:
        kvm.host.block(IpiAck(vcpu))
        kvm_ack_ipi(vcpu)


def kvm_ack_ipi(vcpu: Vcpu) -> None:
    """The interrupt is taken: interrupt entry serialises the target CPU (kvm_main.c:ack_kick)."""
    vcpu.thread.drain()
    if vcpu.kvm.memory.read(vcpu.ipi_address, 8):
        vcpu.kvm.memory.write(vcpu.ipi_address, 8, 0)


def kvm_flush_remote_tlbs(kvm: Kvm) -> None:
    """kvm_main.c:kvm_flush_remote_tlbs."""
    kvm.mark("flush.remote")
    kvm_make_all_cpus_request(kvm, REQ_TLB_FLUSH)
