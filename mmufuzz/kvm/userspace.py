"""The modelled userspace between two KVM_RUN of a vCPU: it answers the exit and runs the vCPU again."""

from __future__ import annotations

from mmufuzz.host.sites import EMUL_LOAD, EMUL_STORE
from mmufuzz.kvm.guest_events import next_step
from mmufuzz.kvm.intercepts import answer_pio
from mmufuzz.kvm.interrupts import kvm_arch_pre_run, kvm_vcpu_ready_for_interrupt_injection, wait_halted
from mmufuzz.kvm.structs import Vcpu


def userspace(vcpu: Vcpu) -> None:
    """KVM_RUN returned: the modelled userspace handles the exit and runs the vCPU again."""
    irqchip = vcpu.irqchip
    if irqchip is not None:
        # post_kvm_run_save
        irqchip.ready_for_interrupt_injection = kvm_vcpu_ready_for_interrupt_injection(vcpu)
    if vcpu.mmio.exit_pending:
        answer_mmio(vcpu)
    elif vcpu.pio.exit_pending:
        answer_pio(vcpu)
    if vcpu.skip_step:
        vcpu.skip_step = False
        vcpu.progress += 1
        next_step(vcpu)
    if irqchip is not None and not vcpu.finished:
        wait_halted(vcpu, irqchip)
        kvm_arch_pre_run(vcpu, irqchip)


def answer_mmio(vcpu: Vcpu) -> None:
    """KVM_EXIT_MMIO: a register of the modelled device. Devices are shared, so this is a visible operation."""
    mmio = vcpu.mmio
    kvm = vcpu.kvm
    if mmio.is_write:
        kvm.host.point(EMUL_STORE)
        kvm.device.write(mmio.run_gpa, mmio.run_length, mmio.run_data)
    else:
        kvm.host.point(EMUL_LOAD)
        mmio.run_data = kvm.device.read(mmio.run_gpa, mmio.run_length)
    what = "write" if mmio.is_write else "read"
    line = f"mmio {what} {mmio.run_gpa:#x} {mmio.run_length} {mmio.run_data:#x}"
    kvm.host.note("exit to userspace: " + line)
    vcpu.userspace_exits.append(line)
