"""What the guest may see of KVM's handling of exits, whatever the instruction (SDM vol. 3, chapters 6 and 18)."""

from __future__ import annotations

from mmufuzz.kvm.structs import Kvm
from mmufuzz.oracle.sink import Sink
from mmufuzz.x86.breakpoints import code_breakpoint
from mmufuzz.x86.state import VECTOR_DB


class Architecture:
    """Remembers, for each vCPU, the instruction that KVM has carried out and not yet skipped."""

    def __init__(self, kvm: Kvm, sink: Sink) -> None:
        self.kvm = kvm
        self.sink = sink
        self.done: list[int] = [-1] * len(kvm.vcpus)
        """RIP of that instruction, -1 for none."""

    def guest_exception(self, index: int, vector: int) -> None:
        """``Observer.guest_exception``: nothing comes before a code breakpoint, nor after an instruction's effect."""
        regs = self.kvm.vcpus[index].regs
        name = self.kvm.vcpus[index].thread.name
        if vector != VECTOR_DB and code_breakpoint(regs):
            what = f"exception {vector} at a code breakpoint, which comes first"
            self.sink.violated("architecture", what, f"{name} at rip {regs.rip:#x}")
        if self.done[index] == regs.rip:
            what = f"exception {vector} of an instruction that has had its effect"
            self.sink.violated("architecture", what, f"{name} at rip {regs.rip:#x}: it will be executed again")

    def internal_error(self, index: int) -> None:
        """``Observer.internal_error``: user code, or that of an L2 guest, must not be able to end the VM."""
        vcpu = self.kvm.vcpus[index]
        if vcpu.regs.cpl != 0 or vcpu.guest_mode:
            who = "an L2 guest" if vcpu.guest_mode else "guest user code"
            which = " that has had its effect" if self.done[index] == vcpu.regs.rip else ""
            what = f"KVM_EXIT_INTERNAL_ERROR for an instruction of {who}{which}"
            self.sink.violated("architecture", what, f"{vcpu.thread.name} at rip {vcpu.regs.rip:#x}")

    def instruction_done(self, index: int) -> None:
        """``Observer.instruction_done``."""
        self.done[index] = self.kvm.vcpus[index].regs.rip

    def instruction_skipped(self, index: int) -> None:
        """``Observer.instruction_skipped``."""
        self.done[index] = -1
