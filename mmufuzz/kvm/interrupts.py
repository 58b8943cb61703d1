"""External interrupts of a VM without an interrupt controller in the kernel: userspace's side and KVM's (x86.c).

The modelled userspace does what QEMU does with ``kernel-irqchip=off``: a line that is raised stays pending there, and
a signal gets the vCPU's thread out of KVM_RUN. Whenever the thread is in userspace and KVM has said that it is ready,
KVM_INTERRUPT hands over the highest vector; while one is left, KVM is asked to return as soon as it is ready.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import IPI_SEND, IRQ_ATOMIC, IRQ_LOAD
from mmufuzz.host.thread import Waitable
from mmufuzz.kvm.exceptions import kvm_event_needs_reinjection
from mmufuzz.kvm.requests import kvm_ack_ipi
from mmufuzz.kvm.structs import Irqchip, QueuedException, Vcpu
from mmufuzz.x86.state import FLAG_IF, NO_ERROR_CODE

_ALL: Final = (1 << 64) - 1


class Halted(Waitable):
    """KVM_EXIT_HLT of a vCPU that takes interrupts: one is pending, or no host thread is left that could raise one."""

    def __init__(self, vcpu: Vcpu, irqchip: Irqchip) -> None:
        self.vcpu = vcpu
        self.irqchip = irqchip

    def ready(self) -> bool:
        """True as soon as the vCPU may go on."""
        if _highest(self.vcpu, self.irqchip):
            return True
        threads = self.vcpu.kvm.host.threads
        for index in range(self.vcpu.kvm.vcpu_count, len(threads)):
            if not threads[index].done:
                return False
        return True


def raise_interrupt(vcpu: Vcpu, irqchip: Irqchip, vector: int) -> None:
    """A device of userspace raises a line (QEMU hw/core/cpu: cpu_interrupt), from a thread of its own.

    The signal (kernel/signal.c:signal_wake_up_state) interrupts the CPU that runs the vCPU's thread.
    """
    thread = vcpu.kvm.host.current
    vcpu.kvm.mark("host.interrupt")
    thread.fetch_or(IRQ_ATOMIC, irqchip.irr_address + 8 * (vector >> 6), 1 << (vector & 63))
    thread.fetch_or(IRQ_ATOMIC, irqchip.signal_address, 1)
    thread.fetch_or(IPI_SEND, vcpu.ipi_address, 1)
    if not vcpu.irqs_disabled:
        kvm_ack_ipi(vcpu)


def _highest(vcpu: Vcpu, irqchip: Irqchip) -> int:
    """The highest vector that is pending; 0 for none. Not a visible operation."""
    for place in range(3, -1, -1):
        bits = vcpu.kvm.memory.read(irqchip.irr_address + 8 * place, 8)
        if bits:
            return place << 6 | bits.bit_length() - 1
    return 0


def _pending(vcpu: Vcpu, irqchip: Irqchip) -> int:
    """The same as a visible operation: userspace looks at its controller under a lock of its own."""
    host = vcpu.kvm.host
    host.point(IRQ_LOAD)
    vector = _highest(vcpu, irqchip)
    vcpu.thread.observed(vector)
    host.detail(vcpu.thread.last, irqchip.irr_address + 8 * (vector >> 6), vector)
    return vector


def kvm_arch_pre_run(vcpu: Vcpu, irqchip: Irqchip) -> None:
    """QEMU target/i386/kvm/kvm.c:kvm_arch_pre_run: hand over an interrupt, or ask for the window."""
    thread = vcpu.thread
    if thread.load(IRQ_LOAD, irqchip.signal_address):
        # kvm_eat_signals, before it looks at what is pending.
        thread.fetch_and(IRQ_ATOMIC, irqchip.signal_address, 0)
    vector = _pending(vcpu, irqchip)
    if vector and irqchip.ready_for_interrupt_injection:
        thread.fetch_and(IRQ_ATOMIC, irqchip.irr_address + 8 * (vector >> 6), _ALL ^ 1 << (vector & 63))
        kvm_vcpu_ioctl_interrupt(vcpu, vector)
        vector = _pending(vcpu, irqchip)
    irqchip.request_interrupt_window = vector != 0


def wait_halted(vcpu: Vcpu, irqchip: Irqchip) -> None:
    """QEMU target/i386/kvm/kvm.c:kvm_handle_halt. A guest that no interrupt can wake goes on all the same."""
    if irqchip.halted and irqchip.ready_for_interrupt_injection:
        vcpu.kvm.host.block(Halted(vcpu, irqchip))
        if _highest(vcpu, irqchip):
            vcpu.kvm.mark("interrupt.woke")
    irqchip.halted = False


def kvm_vcpu_ioctl_interrupt(vcpu: Vcpu, vector: int) -> None:
    """x86.c:kvm_vcpu_ioctl_interrupt without an irqchip: it counts as injected at once, whatever happens next."""
    vcpu.kvm.host.note("KVM_INTERRUPT {0:#x}", vector)
    vcpu.kvm.mark("interrupt.queued")
    vcpu.kvm.observer.interrupt_queued(vcpu.index, vector)
    vcpu.interrupt = QueuedException(vector, NO_ERROR_CODE, 0)


def vmx_interrupt_blocked(vcpu: Vcpu) -> bool:
    """vmx.c:vmx_interrupt_blocked: IF is clear, or the instruction at RIP is in an interrupt shadow."""
    return not vcpu.regs.rflags & FLAG_IF or vcpu.regs.shadow != 0


def kvm_cpu_accept_dm_intr(vcpu: Vcpu) -> bool:
    """x86.c:kvm_cpu_accept_dm_intr: there is room for a vector."""
    return vcpu.interrupt is None


def kvm_vcpu_ready_for_interrupt_injection(vcpu: Vcpu) -> bool:
    """x86.c:kvm_vcpu_ready_for_interrupt_injection."""
    if vmx_interrupt_blocked(vcpu) or not kvm_cpu_accept_dm_intr(vcpu):
        return False
    return not kvm_event_needs_reinjection(vcpu) and vcpu.exception is None


def leaves_vcpu_run(vcpu: Vcpu, irqchip: Irqchip) -> bool:
    """The end of a round in x86.c:vcpu_run: KVM_EXIT_IRQ_WINDOW_OPEN, or KVM_EXIT_INTR for a signal."""
    if irqchip.request_interrupt_window and kvm_vcpu_ready_for_interrupt_injection(vcpu):
        vcpu.kvm.mark("exit_userspace.irq_window")
        vcpu.kvm.host.note("KVM_EXIT_IRQ_WINDOW_OPEN")
        return True
    return vcpu.thread.load(IRQ_LOAD, irqchip.signal_address) != 0
