"""An external interrupt that KVM has taken from userspace is delivered once, as soon as the guest lets it."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.structs import Kvm
from mmufuzz.oracle.sink import Sink

_NONE: Final = -1
_LOST: Final = "an interrupt that KVM took is lost"


class Interrupts:
    """Remembers, for each vCPU, the vector that KVM owes the guest.

    An exception that the delivery itself raises replaces the interrupt, on hardware too (SDM vol. 3, 6.15: it is
    benign), and a shutdown ends everything, as does a task switch that failed.
    """

    def __init__(self, kvm: Kvm, sink: Sink) -> None:
        self.kvm = kvm
        self.sink = sink
        self.owed: list[int] = [_NONE] * len(kvm.vcpus)
        self.begun: list[bool] = [False] * len(kvm.vcpus)
        """The CPU has begun to deliver it, and nothing else has been executed since."""
        self.how: list[str] = [""] * len(kvm.vcpus)
        """What was out of the ordinary on its way, which tells findings apart."""

    def _violated(self, index: int, what: str, vector: int) -> None:
        vcpu = self.kvm.vcpus[index]
        detail = f"{vcpu.thread.name} at rip {vcpu.regs.rip:#x}: vector {vector:#x}"
        self.sink.violated("architecture", what + self.how[index], detail)

    def queued(self, index: int, vector: int) -> None:
        """``Observer.interrupt_queued``."""
        if self._is_lost(index):
            self._violated(index, _LOST, self.owed[index])
        if self.owed[index] != _NONE:
            self._violated(index, "an interrupt is overwritten before it was delivered", self.owed[index])
        self.owed[index] = vector
        self.begun[index] = False
        vcpu = self.kvm.vcpus[index]
        midway = vcpu.mmio.exit_pending or vcpu.pio.exit_pending
        self.how[index] = " (taken with an instruction to be completed)" if midway else ""

    def begins(self, index: int, vector: int) -> None:
        """``Observer.interrupt_begins``."""
        if self.owed[index] != vector:
            self._violated(index, "an interrupt is delivered that nobody raised, or twice", vector)
        self.begun[index] = True

    def delivered(self, index: int) -> None:
        """``Observer.interrupt_delivered``, ``Observer.events_ended``: nothing is owed any more."""
        self.owed[index] = _NONE
        self.begun[index] = False

    def emulation_begins(self, index: int) -> None:
        """``Observer.emulation_begins``: what is raised from here on is not of the delivery."""
        if self.begun[index]:
            self.begun[index] = False
            self.how[index] = " (its delivery exited, and an instruction was emulated)"

    def guest_exception(self, index: int) -> None:
        """``Observer.guest_exception``."""
        if self.begun[index]:
            self.delivered(index)

    def vm_entered(self, index: int) -> None:
        """``Observer.vm_entered``: nothing is forgotten, and what userspace still has will find its way."""
        vcpu = self.kvm.vcpus[index]
        if self._is_lost(index):
            self._violated(index, _LOST, self.owed[index])
        irqchip = vcpu.irqchip
        if irqchip is not None and irqchip.request_interrupt_window and not irqchip.window_exiting:
            self.how[index] = ""
            self._violated(index, "the guest runs, and nobody learns when it can take the interrupt that waits", 0)

    def _is_lost(self, index: int) -> bool:
        """Neither delivered nor queued any more."""
        return self.owed[index] != _NONE and self.kvm.vcpus[index].interrupt is None

    def vm_entry_failed(self, index: int) -> None:
        """``Observer.vm_entry_failed``."""
        what = "KVM_EXIT_FAIL_ENTRY: an interrupt is injected where the guest can take none"
        self._violated(index, what, self.owed[index])

    def at_end(self) -> None:
        """All threads have ended; a guest may end while one is queued."""
        for vcpu in self.kvm.vcpus:
            if self._is_lost(vcpu.index):
                what = _LOST + self.how[vcpu.index]
                self.sink.record("architecture", what, f"{vcpu.thread.name}: vector {self.owed[vcpu.index]:#x}")
