"""Events on the guest's CPU: breakpoints, single steps, and delivery of exceptions and software interrupts.

A guest that has loaded an IDT gets its exceptions through it, by its own shadow tables, so that delivery itself may
exit. Any other guest gets them logged and goes on at its next step, as the fixup table of a test kernel would have it.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.model import CODE_SLOT
from mmufuzz.kvm.exits import (
    EXIT_INVALID_STATE,
    EXIT_PF,
    EXIT_PREEMPTION_TIMER,
    EXIT_TASK_SWITCH,
    EXIT_TRIPLE_FAULT,
    VmExit,
)
from mmufuzz.kvm.interrupts import vmx_interrupt_blocked
from mmufuzz.kvm.structs import QueuedException, Vcpu
from mmufuzz.x86.breakpoints import deliver_debug_payload, is_debug_trap
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Unsupported
from mmufuzz.x86.event import deliver as deliver_by_idt
from mmufuzz.x86.event import second_exception
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.state import NO_ERROR_CODE, VECTOR_BP, VECTOR_DB, VECTOR_OF, VECTOR_PF, Fault

SVM_EXIT_NPF: Final = 0x400


def has_idt(vcpu: Vcpu) -> bool:
    """True if exceptions go through the guest's IDT."""
    return vcpu.regs.idt_limit != 0 and not vcpu.guest_mode


def program_end(vcpu: Vcpu) -> int:
    """gva behind the last step."""
    return vcpu.spec.code_gva + CODE_SLOT * len(vcpu.spec.program)


def settle_rip(vcpu: Vcpu) -> None:
    """An instruction ended: where the bytes of its step end, the next step begins."""
    offset = vcpu.regs.rip - vcpu.spec.code_gva
    program = vcpu.spec.program
    step = offset // CODE_SLOT
    if 0 <= step < len(program) and offset % CODE_SLOT >= len(program[step]):
        step += 1
        vcpu.regs.rip = vcpu.spec.code_gva + CODE_SLOT * step
    if 0 <= step < len(program):
        vcpu.thread.step = step
    if vcpu.regs.rip == program_end(vcpu):
        vcpu.finished = True


def next_step(vcpu: Vcpu) -> None:
    """Leave the current step: what a test kernel's fixup table does after an exception it expects."""
    step = vcpu.thread.step + 1
    vcpu.regs.shadow = 0
    vcpu.regs.rip = vcpu.spec.code_gva + CODE_SLOT * step
    if step < len(vcpu.spec.program):
        vcpu.thread.step = step
    else:
        vcpu.finished = True


def deliver(vcpu: Vcpu, exception: QueuedException) -> None:
    """The guest without an IDT takes an exception: it is logged, and the guest goes on at its next step.

    After a single step or a data breakpoint, which report an instruction that has retired, it goes on where it is.
    """
    _raise(vcpu, exception)
    _log(vcpu, exception, vcpu.regs.rip)
    vcpu.regs.shadow = 0
    if exception.vector == VECTOR_DB and is_debug_trap(vcpu.regs, exception.payload):
        return
    vcpu.progress += 1
    next_step(vcpu)


def _raise(vcpu: Vcpu, exception: QueuedException) -> None:
    """CR2, DR6 and the oracles get to know it."""
    vector = exception.vector
    if vector == VECTOR_PF:
        if vcpu.guest_mode:
            vector = SVM_EXIT_NPF  # the nested page fault goes to L1, which resumes L2 behind the instruction
        else:
            vcpu.regs.cr2 = exception.payload
        vcpu.kvm.observer.guest_fault(vcpu.index, exception.payload, exception.error_code)
    elif vector == VECTOR_DB:
        deliver_debug_payload(vcpu.regs, exception.payload)
    vcpu.kvm.observer.guest_exception(vcpu.index, exception.vector)
    vcpu.kvm.host.note("guest exception {0} error {1:#x}", vector, exception.error_code)


def _log(vcpu: Vcpu, exception: QueuedException, rip: int) -> None:
    """It has arrived, raised at ``rip``."""
    vector = exception.vector
    if vector == VECTOR_PF and vcpu.guest_mode:
        vector = SVM_EXIT_NPF
    address = exception.payload if exception.vector == VECTOR_PF else 0
    vcpu.exceptions.append((vector, exception.error_code, address, rip))


def inject_event(vcpu: Vcpu, bus: Bus) -> VmExit | None:
    """VM entry with an event: the CPU delivers it before it executes anything. None if no exit came in between.

    x86.c:kvm_check_and_inject_events: an exception first. What it leaves behind in ``Vcpu.interrupt`` does not survive
    the next exit (vmx.c:__vmx_complete_interrupts), which KVM asks for at once.
    """
    exception = vcpu.exception
    again = vcpu.exception_injected
    interrupt = vcpu.interrupt
    if exception is None:
        if interrupt is not None and interrupt.is_external and vmx_interrupt_blocked(vcpu):
            # SDM vol. 3, 27.3.1.4 and 27.3.1.5.
            return VmExit(EXIT_INVALID_STATE)
        exception = interrupt
        again = True
    vcpu.exception = None
    vcpu.exception_injected = False
    vcpu.interrupt = None
    assert exception is not None
    vmexit = deliver_event(vcpu, bus, exception, again)
    if vmexit is None and interrupt is not None and vcpu.irqchip is not None:
        return VmExit(EXIT_PREEMPTION_TIMER)
    return vmexit


def deliver_event(vcpu: Vcpu, bus: Bus, exception: QueuedException, again: bool) -> VmExit | None:
    """Hardware delivers through the IDT. ``again``: the guest's CR2 and DR6 have it already.

    A #PF on the way exits, with the event as IDT-vectoring information; what else happens on the way the CPU combines
    by itself (SDM vol. 3, 6.15).
    """
    regs = vcpu.regs
    while True:
        if not again:
            _raise(vcpu, exception)
        if exception.is_external:
            vcpu.kvm.observer.interrupt_begins(vcpu.index, exception.vector)
        rip = regs.rip
        try:
            software = exception.soft_length != 0
            deliver_by_idt(regs, bus, exception.vector, exception.error_code, rip + exception.soft_length, software)
        except Unsupported:
            return VmExit(EXIT_TASK_SWITCH)
        except Fault as fault:
            if fault.vector == VECTOR_PF:
                vmexit = VmExit(EXIT_PF, fault.address, fault.error_code)
                vmexit.event = exception
                return vmexit
            second = second_exception(exception.vector, fault)
            if second is None:
                return VmExit(EXIT_TRIPLE_FAULT)
            exception = QueuedException(second.vector, second.error_code, 0)
            again = False
            continue
        vcpu.kvm.mark("guest.idt")
        if exception.is_external:
            vcpu.kvm.mark("interrupt.delivered")
            vcpu.kvm.host.note("guest interrupt {0:#x}", exception.vector)
            vcpu.kvm.observer.interrupt_delivered(vcpu.index, exception.vector)
        if not software:
            _log(vcpu, exception, rip)
        vcpu.progress += 1
        return None


def software_event(insn: Insn) -> QueuedException | None:
    """The event that INT n, INT3 and INTO deliver, for a #PF on the way; None for any other instruction."""
    name = insn.mnemonic
    if name == "int":
        return QueuedException(insn.operands[0].value, NO_ERROR_CODE, 0, insn.length)
    if name == "int3":
        return QueuedException(VECTOR_BP, NO_ERROR_CODE, 0, insn.length)
    if name == "into":
        return QueuedException(VECTOR_OF, NO_ERROR_CODE, 0, insn.length)
    return None
