"""The run loop of a vCPU (x86.c:vcpu_run, vcpu_enter_guest) and the handling of its exits."""

from __future__ import annotations

from mmufuzz.case.host_ops import interrupt_of
from mmufuzz.case.model import ZAP_ALL_FAST
from mmufuzz.host.sites import (
    IRQ_LOAD,
    MB,
    MODE_LOAD,
    MODE_STORE,
    REQUESTS_LOAD,
    VCPU_ENTRY,
    VCPU_EXIT,
)
from mmufuzz.host.thread import Body
from mmufuzz.kvm.counters import RETRY_ENTRY, STALL_BLOCK, stall_class
from mmufuzz.kvm.emulator_access import set_cr
from mmufuzz.kvm.exceptions import kvm_clear_exception_queue, kvm_queue_exception, kvm_requeue_exception
from mmufuzz.kvm.exits import (
    EXIT_AC,
    EXIT_CR,
    EXIT_DB,
    EXIT_DONE,
    EXIT_HLT,
    EXIT_HYPERCALL,
    EXIT_INTERRUPT_WINDOW,
    EXIT_INVALID_STATE,
    EXIT_INVLPG,
    EXIT_INVPCID,
    EXIT_IO,
    EXIT_PF,
    EXIT_TASK_SWITCH,
    EXIT_TRIPLE_FAULT,
    EXIT_UD,
    VmExit,
)
from mmufuzz.kvm.fault import EMULATE, EMULTYPE_SKIP, RESUME, kvm_ack_ipi_if_sent, kvm_mmu_page_fault
from mmufuzz.kvm.guest import GuestBus, run_guest
from mmufuzz.kvm.guest_events import deliver, has_idt, settle_rip
from mmufuzz.kvm.intercepts import carry_out, complete_fast_pio, kvm_emulate_hypercall, kvm_fast_pio
from mmufuzz.kvm.interrupts import (
    kvm_arch_pre_run,
    kvm_cpu_accept_dm_intr,
    leaves_vcpu_run,
    raise_interrupt,
)
from mmufuzz.kvm.requests import (
    REQ_MMU_FREE_OBSOLETE_ROOTS,
    REQ_MMU_SYNC,
    REQ_TLB_FLUSH,
    REQ_TLB_FLUSH_CURRENT,
    REQ_TLB_FLUSH_GUEST,
    REQ_TRIPLE_FAULT,
    kvm_check_request,
)
from mmufuzz.kvm.root import (
    TRIPLE_FAULT,
    kvm_handle_invpcid,
    kvm_init_shadow_mmu,
    kvm_mmu_free_obsolete_roots,
    kvm_mmu_invalidate_addr,
    kvm_mmu_load,
    kvm_mmu_sync_roots,
)
from mmufuzz.kvm.structs import IN_GUEST_MODE, INVALID_PFN, OUTSIDE_GUEST_MODE, Irqchip, Kvm, QueuedException, Vcpu
from mmufuzz.kvm.userspace import userspace
from mmufuzz.kvm.x86 import (
    EXIT_TO_USERSPACE,
    RESUME_GUEST,
    complete_emulated_mmio,
    complete_emulated_pio,
    handle_ud,
    x86_emulate_instruction,
)
from mmufuzz.kvm.zap import gsps_at, kvm_mmu_zap_all_fast
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.paging import INVPCID_ADDRESS
from mmufuzz.x86.state import (
    DR6_BS,
    FLAG_TF,
    NO_ERROR_CODE,
    VECTOR_AC,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_OF,
    Fault,
)


class HostBody(Body):
    """A host thread: its operations one after the other."""

    def __init__(self, kvm: Kvm, ops: tuple[str, ...]) -> None:
        self.kvm = kvm
        self.ops = ops

    def run(self) -> None:
        """To the last operation."""
        thread = self.kvm.host.current
        for step in range(len(self.ops)):
            thread.step = step
            target, vector = interrupt_of(self.ops[step])
            if self.ops[step] == ZAP_ALL_FAST:
                self.kvm.mark("host.zap_all_fast")
                kvm_mmu_zap_all_fast(self.kvm)
            elif target >= 0:
                vcpu = self.kvm.vcpus[target]
                if vcpu.irqchip is not None:
                    raise_interrupt(vcpu, vcpu.irqchip, vector)


class VcpuBody(Body):
    """The host thread of one vCPU: KVM_RUN in a loop, as userspace does it."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.bus = GuestBus(vcpu)

    def run(self) -> None:
        """Until the guest's program ends."""
        vcpu = self.vcpu
        kvm_init_shadow_mmu(vcpu)
        if vcpu.irqchip is not None:
            kvm_arch_pre_run(vcpu, vcpu.irqchip)
        stalled = 0
        while not vcpu.finished:
            before = vcpu.progress
            if kvm_arch_vcpu_ioctl_run(vcpu, self.bus) != RESUME_GUEST:
                userspace(vcpu)
            if vcpu.progress == before and not vcpu.finished:
                # It re-enters without having got anywhere: the others go first.
                stalled += 1
                vcpu.kvm.counters.hit(STALL_BLOCK.at(vcpu.kind, stall_class(stalled)))
                vcpu.kvm.host.yield_()
            else:
                stalled = 0

    def evict(self, gva: int) -> None:
        """The TLB forgets the page."""
        self.vcpu.tlb.evict(gva >> 12)

    def fill(self, gva: int) -> None:
        """The CPU translates ahead, if it is in guest mode."""
        if self.vcpu.in_guest:
            self.bus.fill(gva)


def kvm_arch_vcpu_ioctl_run(vcpu: Vcpu, bus: GuestBus) -> int:
    """x86.c:kvm_arch_vcpu_ioctl_run: complete what userspace has answered, or one round of ``vcpu_run``."""
    if vcpu.mmio.exit_pending:
        return finish_emulation(vcpu, complete_emulated_mmio(vcpu))
    pio = vcpu.pio
    if pio.exit_pending:
        if not pio.fast_length:
            return finish_emulation(vcpu, complete_emulated_pio(vcpu))
        return kvm_skip_emulated_instruction(vcpu, pio.fast_length) if complete_fast_pio(vcpu) else RESUME_GUEST
    return vcpu_run(vcpu, bus)


def vcpu_run(vcpu: Vcpu, bus: GuestBus) -> int:
    """x86.c:vcpu_run, one round."""
    result = vcpu_enter_guest(vcpu, bus)
    if result == RESUME_GUEST and vcpu.irqchip is not None and leaves_vcpu_run(vcpu, vcpu.irqchip):
        return EXIT_TO_USERSPACE
    return result


def vcpu_enter_guest(vcpu: Vcpu, bus: GuestBus) -> int:
    """x86.c:vcpu_enter_guest: service requests, enter, handle the exit."""
    kvm = vcpu.kvm
    thread = kvm.host.current
    if not service_requests(vcpu):
        return exit_shutdown(vcpu)
    deliver_queued(vcpu)
    if vcpu.finished:
        return RESUME_GUEST
    if vcpu.mmu.root_pfn == INVALID_PFN:
        result = kvm_mmu_load(vcpu)
        if result != 0:
            if result == TRIPLE_FAULT:
                return exit_shutdown(vcpu)
            vcpu.userspace_exits.append("enospc")
            vcpu.skip_step = True
            return EXIT_TO_USERSPACE
    irqchip = vcpu.irqchip
    if irqchip is not None and irqchip.request_interrupt_window and kvm_cpu_accept_dm_intr(vcpu):
        # vmx_enable_irq_window
        irqchip.window_exiting = True
    vcpu.irqs_disabled = True
    thread.store(MODE_STORE, vcpu.mode_address, IN_GUEST_MODE)
    # The barrier of the store-buffering pair with kvm_make_all_cpus_request.
    thread.fence(MB)
    mode = thread.load(MODE_LOAD, vcpu.mode_address)
    stay = mode != IN_GUEST_MODE or thread.load(REQUESTS_LOAD, vcpu.requests_address) != 0
    if not stay and irqchip is not None:
        stay = thread.load(IRQ_LOAD, irqchip.signal_address) != 0
    if stay:
        kvm.mark("entry.cancelled")
        kvm.count_retry(RETRY_ENTRY)
        leave_guest_mode(vcpu)
        return RESUME_GUEST
    if vcpu.reexecuting_gfn >= 0:
        if gsps_at(kvm, vcpu.reexecuting_gfn):
            kvm.mark("reexecute.false_negative")
        vcpu.reexecuting_gfn = -1
    kvm.host.point(VCPU_ENTRY)
    thread.drain()
    vcpu.in_guest = True
    vmexit = run_guest(vcpu, bus)
    vcpu.in_guest = False
    kvm.host.point(VCPU_EXIT)
    thread.drain()
    leave_guest_mode(vcpu)
    kvm.exits[vmexit.reason] = kvm.exits.get(vmexit.reason, 0) + 1
    if vmexit.event is not None:
        vmx_complete_interrupts(vcpu, vmexit.event)
    return handle_exit(vcpu, vmexit)


def vmx_complete_interrupts(vcpu: Vcpu, event: QueuedException) -> None:
    """vmx.c:__vmx_complete_interrupts: the event whose delivery exited is delivered again at the next entry."""
    vcpu.kvm.mark("event.delivery_exited")
    if event.is_external or (event.soft_length and event.vector not in (VECTOR_BP, VECTOR_OF)):
        vcpu.interrupt = event
    else:
        kvm_requeue_exception(vcpu, event)


def leave_guest_mode(vcpu: Vcpu) -> None:
    """mode = OUTSIDE_GUEST_MODE, then interrupts on: a pending kick is taken."""
    vcpu.kvm.host.current.store(MODE_STORE, vcpu.mode_address, OUTSIDE_GUEST_MODE)
    vcpu.irqs_disabled = False
    kvm_ack_ipi_if_sent(vcpu)


def service_requests(vcpu: Vcpu) -> bool:
    """The requests in the order vcpu_enter_guest services them; False for a triple fault."""
    thread = vcpu.kvm.host.current
    pending = thread.load(REQUESTS_LOAD, vcpu.requests_address)
    if not pending:
        return True
    if kvm_check_request(vcpu, pending, REQ_MMU_FREE_OBSOLETE_ROOTS):
        kvm_mmu_free_obsolete_roots(vcpu)
        # Freeing the root may have asked this vCPU, too, to flush.
        pending = thread.load(REQUESTS_LOAD, vcpu.requests_address)
    if kvm_check_request(vcpu, pending, REQ_MMU_SYNC):
        kvm_mmu_sync_roots(vcpu)
    flush = kvm_check_request(vcpu, pending, REQ_TLB_FLUSH)
    flush = kvm_check_request(vcpu, pending, REQ_TLB_FLUSH_CURRENT) or flush
    if kvm_check_request(vcpu, pending, REQ_TLB_FLUSH_GUEST):
        # kvm_vcpu_flush_tlb_guest
        kvm_mmu_sync_roots(vcpu)
        flush = True
    if flush:
        vcpu.tlb.flush_all()
    return not kvm_check_request(vcpu, pending, REQ_TRIPLE_FAULT)


def exit_shutdown(vcpu: Vcpu) -> int:
    """KVM_EXIT_SHUTDOWN; the modelled userspace lets the guest go on at its next step, in place of a reset."""
    vcpu.kvm.mark("exit_userspace.shutdown")
    vcpu.kvm.observer.events_ended(vcpu.index)
    kvm_clear_exception_queue(vcpu)
    vcpu.interrupt = None
    vcpu.mmio.needed = False
    vcpu.userspace_exits.append("shutdown")
    vcpu.skip_step = True
    return EXIT_TO_USERSPACE


def deliver_queued(vcpu: Vcpu) -> None:
    """Event injection before entry, for a guest without an IDT; the others get their events from ``run_guest``."""
    exception = vcpu.exception
    if exception is not None and not has_idt(vcpu):
        kvm_clear_exception_queue(vcpu)
        deliver(vcpu, exception)


def handle_exit(vcpu: Vcpu, vmexit: VmExit) -> int:
    """vmx.c:vmx_handle_exit."""
    reason = vmexit.reason
    if reason == EXIT_PF:
        vcpu.kvm.host.note("exit #PF {0:#x} error {1:#x}", vmexit.a, vmexit.b)
        result = kvm_mmu_page_fault(vcpu, vmexit.a, vmexit.b)
        if result.code == RESUME:
            return RESUME_GUEST
        if result.code == EMULATE:
            return finish_emulation(vcpu, x86_emulate_instruction(vcpu, vmexit.a, result.emultype))
        vcpu.userspace_exits.append("enospc")
        vcpu.skip_step = True
        return EXIT_TO_USERSPACE
    if reason == EXIT_UD:
        return finish_emulation(vcpu, handle_ud(vcpu))
    if reason == EXIT_CR:
        if set_cr(vcpu, vmexit.a, vmexit.b):
            return kvm_skip_emulated_instruction(vcpu, vmexit.length)
        # kvm_complete_insn_gp
        kvm_queue_exception(vcpu, VECTOR_GP, 0)
    elif reason == EXIT_DB:
        kvm_queue_exception(vcpu, VECTOR_DB, NO_ERROR_CODE, vmexit.a)
    elif reason == EXIT_AC:
        # handle_exception_nmi: vmx_guest_inject_ac
        kvm_queue_exception(vcpu, VECTOR_AC, vmexit.a)
    elif reason == EXIT_INVLPG:
        kvm_mmu_invalidate_addr(vcpu, vmexit.a)
        vcpu.kvm.observer.guest_invalidated(vcpu.index, vmexit.a)
        return kvm_skip_emulated_instruction(vcpu, vmexit.length)
    elif reason == EXIT_INVPCID:
        kvm_handle_invpcid(vcpu, vmexit.a, vmexit.b)
        vcpu.kvm.observer.guest_invalidated(vcpu.index, vmexit.b if vmexit.a == INVPCID_ADDRESS else -1)
        return kvm_skip_emulated_instruction(vcpu, vmexit.length)
    elif reason == EXIT_HLT:
        vcpu.userspace_exits.append("hlt")
        kvm_skip_emulated_instruction(vcpu, vmexit.length)
        if vcpu.irqchip is not None:
            vcpu.irqchip.halted = True
        return EXIT_TO_USERSPACE
    elif vmexit.insn is not None:
        return handle_intercepted(vcpu, vmexit, vmexit.insn)
    elif reason == EXIT_TRIPLE_FAULT:
        return exit_shutdown(vcpu)
    elif reason == EXIT_TASK_SWITCH:
        # kvm_task_switch, which takes the event over, is not modelled; what KVM does where it fails.
        vcpu.kvm.observer.events_ended(vcpu.index)
        vcpu.userspace_exits.append("internal-error")
        vcpu.skip_step = True
        return EXIT_TO_USERSPACE
    elif reason == EXIT_DONE:
        vcpu.finished = True
    elif vcpu.irqchip is not None:
        return handle_interrupt_exit(vcpu, vcpu.irqchip, reason)
    return RESUME_GUEST


def handle_interrupt_exit(vcpu: Vcpu, irqchip: Irqchip, reason: str) -> int:
    """vmx.c:handle_interrupt_window; a failed VM entry. Others only bring KVM back."""
    if reason == EXIT_INTERRUPT_WINDOW:
        irqchip.window_exiting = False
    elif reason == EXIT_INVALID_STATE:
        # KVM_EXIT_FAIL_ENTRY, after which a real userspace gives up.
        vcpu.kvm.observer.vm_entry_failed(vcpu.index)
        vcpu.interrupt = None
        vcpu.userspace_exits.append("fail-entry")
        vcpu.skip_step = True
        return EXIT_TO_USERSPACE
    return RESUME_GUEST


def handle_intercepted(vcpu: Vcpu, vmexit: VmExit, insn: Insn) -> int:
    """vmx.c:handle_io, x86.c:kvm_emulate_cpuid, kvm_emulate_hypercall, kvm_emulate_rdmsr, kvm_emulate_wrmsr."""
    if vmexit.reason == EXIT_HYPERCALL:
        kvm_emulate_hypercall(vcpu)
        return kvm_skip_emulated_instruction(vcpu, vmexit.length)
    if vmexit.reason == EXIT_IO:
        if insn.mnemonic in ("ins", "outs"):
            return finish_emulation(vcpu, x86_emulate_instruction(vcpu, 0, 0))
        vcpu.kvm.mark("exit_userspace.io")
        kvm_fast_pio(vcpu, insn, vmexit.length)
        return EXIT_TO_USERSPACE
    try:
        carry_out(vcpu, insn)
    except Fault as fault:
        kvm_queue_exception(vcpu, fault.vector, fault.error_code)
        return RESUME_GUEST
    return kvm_skip_emulated_instruction(vcpu, vmexit.length)


def finish_emulation(vcpu: Vcpu, result: int) -> int:
    """An instruction that the emulator completed may end its step, once userspace has answered."""
    if vcpu.instruction_done and not vcpu.mmio.exit_pending and not vcpu.pio.exit_pending:
        vcpu.instruction_done = False
        settle_rip(vcpu)
    return result


def kvm_skip_emulated_instruction(vcpu: Vcpu, length: int) -> int:
    """x86.c:kvm_skip_emulated_instruction: what exited has had its effect, and RIP goes behind it.

    Hardware reports its ``length``, or KVM decodes it (svm.c:svm_skip_emulated_instruction without next_rip).
    """
    observer = vcpu.kvm.observer
    observer.instruction_done(vcpu.index)
    if not vcpu.kvm.options.decode_to_skip:
        vcpu.regs.rip += length
    elif x86_emulate_instruction(vcpu, 0, EMULTYPE_SKIP) != RESUME_GUEST:
        observer.instruction_skipped(vcpu.index)
        return EXIT_TO_USERSPACE
    elif vcpu.exception is not None:
        return RESUME_GUEST
    observer.instruction_skipped(vcpu.index)
    vcpu.regs.shadow = 0
    vcpu.retired += 1
    vcpu.progress += 1
    if vcpu.regs.rflags & FLAG_TF:
        kvm_queue_exception(vcpu, VECTOR_DB, NO_ERROR_CODE, DR6_BS)
    settle_rip(vcpu)
    return RESUME_GUEST
