"""Building the machine a Case describes."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.host_ops import interrupt_of
from mmufuzz.case.model import CODE_SLOT, LONG4, NPT4, Case
from mmufuzz.case.model import Vcpu as VcpuSpec
from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.sched import Host
from mmufuzz.kvm.emulate_ops import X86EmulateOps
from mmufuzz.kvm.emulator_ops import EmulatorOps
from mmufuzz.kvm.fixes import behaviours
from mmufuzz.kvm.memslots import gfn_to_pfn
from mmufuzz.kvm.structs import IRQCHIP_OFFSET, Irqchip, Kvm, MemSlot, Vcpu, vcpu_address
from mmufuzz.kvm.vcpu import HostBody, VcpuBody
from mmufuzz.kvm.write_track import write_track_address
from mmufuzz.x86.insn import CS, DS, ES, SS
from mmufuzz.x86.segments import install_flat
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    MSR_TSC,
    Regs,
)

# Flat segments as Linux numbers them (arch/x86/include/asm/segment.h); a guest that loads a GDT describes them so.
KERNEL_CS: Final = 0x10
KERNEL_DS: Final = 0x18
USER_DS: Final = 0x2B
USER_CS: Final = 0x33

ST0_PATTERN: Final = 0x3FFF_8000_0000_0000_0000
"""What FSTP stores: 1.0."""


def build(case: Case, host: Host) -> Kvm:
    """The VM of ``case`` on ``host``, one thread per vCPU and host thread, in that order.

    Expects a valid Case; raises CaseError for an unknown kernel profile or fix.
    """
    kvm = Kvm(host, case.options, behaviours(case.kernel, case.revert, case.apply))
    for slot in case.slots:
        kvm.slots.append(MemSlot(slot.base_gfn, slot.npages, slot.readonly))
    words = host.memory.words
    for word in case.memory:
        words[(gfn_to_pfn(word.gfn) << PAGE_SHIFT >> 3) + word.index] = word.value
    for gfn in case.options.write_track:
        words[write_track_address(gfn) >> 3] = 1
    for index, spec in enumerate(case.vcpus):
        load_program(host, spec)
        vcpu = Vcpu(kvm, index, spec)
        init_regs(vcpu.regs, spec)
        vcpu.regs.msr[MSR_TSC] = case.options.tsc
        vcpu.emulate_ctxt.ops = EmulatorOps(vcpu)
        kvm.vcpus.append(vcpu)
        vcpu.finished = not spec.program
    kvm.vcpu_count = len(kvm.vcpus)
    for host_thread in case.host:
        for op in host_thread.ops:
            target, _ = interrupt_of(op)
            if target >= 0 and kvm.vcpus[target].irqchip is None:
                kvm.vcpus[target].irqchip = Irqchip(vcpu_address(target) + IRQCHIP_OFFSET)
    for vcpu in kvm.vcpus:
        host.spawn(f"vcpu{vcpu.index}", VcpuBody(vcpu))
    for index, thread in enumerate(case.host):
        host.spawn(f"host{index}", HostBody(kvm, thread.ops))
    return kvm


def dismantle(kvm: Kvm) -> None:
    """Take out the references that run in circles: the machine is not used any more."""
    for vcpu in kvm.vcpus:
        vcpu.emulate_ctxt.ops = X86EmulateOps()
    kvm.vcpus.clear()


def load_program(host: Host, spec: VcpuSpec) -> None:
    """Write the steps to guest memory, each at its slot; the rest of a slot is zero."""
    base = gfn_to_pfn(spec.code_gfn) << PAGE_SHIFT
    for step, code in enumerate(spec.program):
        value = int.from_bytes(code, "little")
        index = (base >> 3) + step * (CODE_SLOT // 8)
        host.memory.words[index] = value & (1 << 64) - 1
        host.memory.words[index + 1] = value >> 64


def init_regs(regs: Regs, spec: VcpuSpec) -> None:
    """Registers as the guest finds them at its first instruction."""
    regs.rip = spec.code_gva
    regs.cpl = spec.cpl
    # A full x87 stack, so that up to 8 FSTP find something to store.
    regs.fpr = [ST0_PATTERN] * 8
    regs.ftw = 0xFF
    for number, value in spec.regs:
        regs.gpr[number] = value
    regs.cr0 = CR0_PE
    init_segments(regs, spec)
    if "wp" in spec.flags:
        regs.cr0 |= CR0_WP
    if spec.mode == LONG4:
        regs.cr0 |= CR0_PG
        regs.cr3 = spec.cr3 << PAGE_SHIFT
        regs.cr4 = CR4_PAE
        regs.efer = EFER_LME | EFER_LMA
        if "nx" in spec.flags:
            regs.efer |= EFER_NX
    if spec.mode == NPT4:
        regs.cr3 = spec.cr3 << PAGE_SHIFT
    if "smep" in spec.flags:
        regs.cr4 |= CR4_SMEP
    if "smap" in spec.flags:
        regs.cr4 |= CR4_SMAP


def init_segments(regs: Regs, spec: VcpuSpec) -> None:
    """Flat code and data segments of the vCPU's mode and privilege."""
    user = spec.cpl == 3
    install_flat(regs, CS, USER_CS if user else KERNEL_CS, spec.mode == LONG4)
    for number in (SS, DS, ES):
        install_flat(regs, number, USER_DS if user else KERNEL_DS, False)
