"""KVM's side of the emulator's operations (x86.c:emulate_ops)."""

from __future__ import annotations

from mmufuzz.kvm.emulate_ops import VMCALL, VMMCALL, CmpxchgFailed, X86EmulateOps
from mmufuzz.kvm.emulator_access import (
    emulator_cmpxchg_emulated,
    emulator_pio_in_emulated,
    emulator_pio_out,
    emulator_read_emulated,
    emulator_read_std,
    emulator_write_emulated,
    emulator_write_std,
    kvm_fetch_guest_virt,
    set_cr,
    set_efer,
)
from mmufuzz.kvm.root import kvm_mmu_invalidate_addr
from mmufuzz.kvm.structs import Vcpu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_msr import get_msr, set_msr
from mmufuzz.x86.state import Regs


class MsrBus(Bus):
    """What an MSR reaches beyond the registers."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    def write_efer(self, regs: Regs, value: int) -> None:
        """x86.c:set_efer."""
        set_efer(self.vcpu, value)


class EmulatorOps(X86EmulateOps):
    """The emulator of one vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.msrs = MsrBus(vcpu)

    def fetch(self, gva: int, size: int) -> bytes:
        """x86.c:kvm_fetch_guest_virt."""
        return kvm_fetch_guest_virt(self.vcpu, gva, size)

    def read_emulated(self, gva: int, size: int) -> int:
        """x86.c:emulator_read_emulated."""
        return emulator_read_emulated(self.vcpu, gva, size)

    def write_emulated(self, gva: int, size: int, value: int, local: bool) -> None:
        """x86.c:emulator_write_emulated."""
        emulator_write_emulated(self.vcpu, gva, size, value, local)

    def cmpxchg_emulated(self, gva: int, size: int, old: int, new: int) -> None:
        """x86.c:emulator_cmpxchg_emulated."""
        if not emulator_cmpxchg_emulated(self.vcpu, gva, size, old, new):
            raise CmpxchgFailed

    def read_std(self, gva: int, size: int, system: bool) -> int:
        """x86.c:emulator_read_std."""
        return emulator_read_std(self.vcpu, gva, size, system)

    def write_std(self, gva: int, size: int, value: int, system: bool) -> None:
        """x86.c:emulator_write_std."""
        emulator_write_std(self.vcpu, gva, size, value, system)

    def set_cr(self, number: int, value: int) -> bool:
        """x86.c:emulator_set_cr. An L1 that lets L2 page is not modelled."""
        regs = self.vcpu.regs
        if number == 2:
            regs.cr2 = value
            return True
        if number == 8:
            if value > 15:
                return False
            regs.cr8 = value
            return True
        return not self.vcpu.guest_mode and set_cr(self.vcpu, number, value)

    def get_msr(self, number: int) -> int:
        """x86.c:emulator_get_msr."""
        return get_msr(self.vcpu.regs, self.msrs, number)

    def set_msr(self, number: int, value: int) -> None:
        """x86.c:emulator_set_msr_with_filter."""
        set_msr(self.vcpu.regs, self.msrs, number, value)

    def invlpg(self, gva: int) -> None:
        """x86.c:emulator_invlpg."""
        kvm_mmu_invalidate_addr(self.vcpu, gva)
        self.vcpu.kvm.observer.guest_invalidated(self.vcpu.index, gva)

    def halt(self) -> None:
        """x86.c:kvm_emulate_halt."""
        self.vcpu.userspace_exits.append("hlt")
        self.vcpu.halt_request = True

    def patch_hypercall(self) -> int:
        """vmx.c:vmx_patch_hypercall, svm.c:svm_patch_hypercall: nested paging is SVM's."""
        return VMMCALL if self.vcpu.guest_mode else VMCALL

    def pio_in(self, port: int, size: int, count: int) -> list[int]:
        """x86.c:emulator_pio_in_emulated."""
        return emulator_pio_in_emulated(self.vcpu, port, size, count)

    def pio_out(self, port: int, size: int, value: int) -> None:
        """x86.c:emulator_pio_out_emulated."""
        emulator_pio_out(self.vcpu, port, size, value)

    def bug(self, site: str, text: str) -> None:
        """An oops of the host."""
        self.vcpu.kvm.observer.warn(site, text)
