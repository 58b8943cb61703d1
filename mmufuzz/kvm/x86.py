"""Exits that need the emulator, and the policy of retrying instead (x86.c), in its three historical forms."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.sites import COUNT_LOAD
from mmufuzz.kvm.counters import (
    RETRY_BEFORE,
    RETRY_CMPXCHG,
    RETRY_COUNT_ZERO,
    RETRY_FAILED,
    RETRY_TABLE_WRITE,
    RETRY_TO_TABLE,
)
from mmufuzz.kvm.emulate import (
    EMULATION_FAILED,
    EMULATION_RESTART,
    emulator_invalidate_register_cache,
    x86_decode_insn,
    x86_emulate_insn,
    x86_page_table_writing_insn,
)
from mmufuzz.kvm.emulate_ops import EmulationFailed, IoNeeded
from mmufuzz.kvm.emulator_access import kvm_read_guest_virt
from mmufuzz.kvm.exceptions import kvm_clear_exception_queue, kvm_inject_emulated_page_fault, kvm_queue_exception
from mmufuzz.kvm.fault import (
    EMULTYPE_ALLOW_RETRY_PF,
    EMULTYPE_NO_DECODE,
    EMULTYPE_PF,
    EMULTYPE_SKIP,
    EMULTYPE_TRAP_UD,
    EMULTYPE_TRAP_UD_FORCED,
    EMULTYPE_WRITE_PF_TO_SP,
)
from mmufuzz.kvm.io import MMIO_PIECE, POISON
from mmufuzz.kvm.memslots import gfn_to_memslot
from mmufuzz.kvm.structs import INVALID_GPA, Vcpu
from mmufuzz.kvm.track import kvm_mmu_unprotect_gfn_and_retry, kvm_mmu_unprotect_page
from mmufuzz.kvm.walker import gva_to_gpa
from mmufuzz.x86.breakpoints import code_breakpoint
from mmufuzz.x86.paging import ACCESS_WRITE
from mmufuzz.x86.state import DR6_BS, FLAG_RF, NO_ERROR_CODE, VECTOR_DB, VECTOR_PF, VECTOR_UD, Fault, Regs

RESUME_GUEST: Final = 1
EXIT_TO_USERSPACE: Final = 0

FORCED_EMULATION_PREFIX: Final = b"\x0f\x0bkvm"


def handle_ud(vcpu: Vcpu) -> int:
    """x86.c:handle_ud: a #UD exit, for the hypercall of the other vendor.

    With ``fep`` the forced-emulation prefix sends the instruction behind it to the emulator.
    """
    emultype = EMULTYPE_TRAP_UD
    if vcpu.kvm.options.fep:
        try:
            signature = kvm_read_guest_virt(vcpu, vcpu.regs.rip, len(FORCED_EMULATION_PREFIX))
            if signature == FORCED_EMULATION_PREFIX:
                vcpu.kvm.mark("emulate.forced")
                vcpu.regs.rip += len(FORCED_EMULATION_PREFIX)
                emultype = EMULTYPE_TRAP_UD_FORCED
        except (Fault, IoNeeded):
            pass
    return x86_emulate_instruction(vcpu, 0, emultype)


def x86_emulate_instruction(vcpu: Vcpu, gva: int, emultype: int) -> int:
    """x86.c:x86_emulate_instruction: RESUME_GUEST or EXIT_TO_USERSPACE. ``gva`` is CR2 of the #PF, if one led here."""
    kvm = vcpu.kvm
    if emultype & EMULTYPE_ALLOW_RETRY_PF:
        wrong = vcpu.guest_mode or not emultype & EMULTYPE_PF
        if kvm.warn_on(wrong, "x86_emulate_instruction", "a retry that is not for a #PF of L1"):
            emultype &= ~EMULTYPE_ALLOW_RETRY_PF
    if not emultype & EMULTYPE_NO_DECODE:
        kvm.mark("emulate")
        if vcpu.exception_injected:
            kvm.mark("event.dropped")
        kvm_clear_exception_queue(vcpu)
        if kvm_vcpu_check_code_breakpoint(vcpu, emultype):
            kvm.mark("emulate.code_breakpoint")
            if kvm.fixes.breakpoint_before_decode:
                return RESUME_GUEST
            # The answer of the check was taken for that of the decoder.
            return _on_decode_failure(vcpu, gva, emultype, None)
        try:
            x86_decode_insn(vcpu.emulate_ctxt, emultype & EMULTYPE_TRAP_UD != 0)
        except EmulationFailed:
            kvm.mark("emulate.decode_failed")
            kvm.host.note("the emulator cannot decode it")
            return _on_decode_failure(vcpu, gva, emultype, None)
        except Fault as fault:
            return _on_decode_failure(vcpu, gva, emultype, fault)
        if emultype & EMULTYPE_SKIP:
            return _skip(vcpu)
        if _retry_instruction(vcpu, gva, emultype):
            kvm.mark("emulate.retried")
            kvm.count_retry(RETRY_BEFORE)
            kvm.host.note("retry without emulating")
            return RESUME_GUEST
    else:
        emulator_invalidate_register_cache(vcpu.emulate_ctxt)
    kvm.observer.emulation_begins(vcpu.index)
    ctxt = vcpu.emulate_ctxt
    while True:
        result = x86_emulate_insn(ctxt)
        if result == EMULATION_FAILED:
            return _on_execution_failure(vcpu, gva, emultype)
        if result != EMULATION_RESTART or ctxt.have_exception or vcpu.mmio.needed or vcpu.pio.count:
            return _after_emulation(vcpu)


def kvm_vcpu_check_code_breakpoint(vcpu: Vcpu, emultype: int) -> bool:
    """x86.c:kvm_vcpu_check_code_breakpoint: True if RIP is at one, and #DB is queued.

    Where hardware has raised an exception of lower priority it has looked itself.
    """
    if emultype & (EMULTYPE_SKIP | EMULTYPE_TRAP_UD | EMULTYPE_PF):
        return False
    hit = code_breakpoint(vcpu.regs)
    if hit:
        kvm_queue_exception(vcpu, VECTOR_DB, NO_ERROR_CODE, hit)
    return hit != 0


def _skip(vcpu: Vcpu) -> int:
    """x86.c:x86_emulate_instruction with EMULTYPE_SKIP: only the length was wanted."""
    vcpu.regs.rip = vcpu.emulate_ctxt.next_eip
    vcpu.regs.rflags &= ~FLAG_RF
    return RESUME_GUEST


def _on_execution_failure(vcpu: Vcpu, gva: int, emultype: int) -> int:
    """x86.c:x86_emulate_instruction, EMULATION_FAILED: retry natively or give up."""
    kvm = vcpu.kvm
    kvm.mark("emulate.execution_failed")
    kvm.host.note("the emulator cannot execute it")
    if _retry_on_failure(vcpu, gva, emultype):
        kvm.mark("emulate.reexecuted")
        kvm.count_retry(RETRY_FAILED)
        kvm.host.note("emulation failed: retry natively")
        return RESUME_GUEST
    return handle_emulation_failure(vcpu, emultype)


def _after_emulation(vcpu: Vcpu) -> int:
    """The rest of x86.c:x86_emulate_instruction, from the emulator's result to the write-back."""
    kvm = vcpu.kvm
    ctxt = vcpu.emulate_ctxt
    mmio = vcpu.mmio
    result = RESUME_GUEST
    if ctxt.have_exception:
        read = mmio.needed and not mmio.is_write
        kvm.warn_on(read, "x86_emulate_instruction", "an exception with an MMIO read under way")
        mmio.needed = False
        kvm.mark("emulate.fault")
        inject_emulated_exception(vcpu, ctxt.exception)
    elif vcpu.pio.count:
        kvm.mark("exit_userspace.io")
        result = EXIT_TO_USERSPACE
        if vcpu.pio.is_in:
            return result
        vcpu.pio.count = 0
    elif mmio.needed:
        kvm.mark("exit_userspace.mmio")
        mmio.exit_pending = True
        result = EXIT_TO_USERSPACE
        if not mmio.is_write:
            return result
    elif vcpu.halt_request:
        vcpu.halt_request = False
        result = EXIT_TO_USERSPACE
    if ctxt.cmpxchg_failed:
        # The guest executes the instruction again: neither RIP nor registers have changed.
        kvm.count_retry(RETRY_CMPXCHG)
    if not ctxt.have_exception or not kvm.fixes.no_singlestep_on_fault:
        vcpu.regs.rip = ctxt.eip
        vcpu.regs.rflags = ctxt.eflags
    toggle_interruptibility(vcpu.regs, ctxt.interruptibility)
    kvm.observer.emulation_ends(vcpu.index)
    if ctxt.completed:
        kvm.mark("emulate.done")
        kvm.host.note("emulated " + ctxt.insn.entry.mnemonic)
        vcpu.retired += 1
        vcpu.progress += 1
        vcpu.instruction_done = True
    if not ctxt.have_exception or not kvm.fixes.no_singlestep_on_fault:
        if result == RESUME_GUEST and ctxt.tf:
            kvm_queue_exception(vcpu, VECTOR_DB, NO_ERROR_CODE, DR6_BS)
    return result


def toggle_interruptibility(regs: Regs, mask: int) -> None:
    """x86.c:toggle_interruptibility: the shadow in which the instruction stood ends; its own does not prolong it."""
    if regs.shadow or mask:
        regs.shadow = mask & ~regs.shadow


def inject_emulated_exception(vcpu: Vcpu, fault: Fault) -> None:
    """x86.c:inject_emulated_exception."""
    if fault.vector == VECTOR_PF:
        kvm_inject_emulated_page_fault(vcpu, fault.address, fault.error_code)
    else:
        kvm_queue_exception(vcpu, fault.vector, fault.error_code, fault.address)


def complete_emulated_pio(vcpu: Vcpu) -> int:
    """x86.c:complete_emulated_pio: userspace has answered an access to a port. After OUT nothing is left to do."""
    vcpu.pio.exit_pending = False
    if not vcpu.pio.count:
        return RESUME_GUEST
    return x86_emulate_instruction(vcpu, 0, EMULTYPE_NO_DECODE)


def complete_emulated_mmio(vcpu: Vcpu) -> int:
    """x86.c:complete_emulated_mmio: userspace has answered one piece of an MMIO access.

    The next piece exits again. After the last one a write is done; a read runs the instruction once more, with what
    was read in the emulator's read cache.
    """
    mmio = vcpu.mmio
    mmio.exit_pending = False
    if mmio.current < len(mmio.fragments):
        fragment = mmio.fragments[mmio.current]
        length = min(MMIO_PIECE, fragment.length)
        if not mmio.is_write:
            mmio.value |= mmio.run_data << (fragment.place << 3)
        if fragment.length <= MMIO_PIECE:
            mmio.current += 1
        else:
            fragment.data >>= length << 3
            fragment.place += length
            fragment.gpa += length
            fragment.length -= length
    else:
        # Fragments of an MMIO write that a later store of the instruction has dropped.
        mmio.current += 1
    if mmio.current >= len(mmio.fragments):
        mmio.needed = False
        if mmio.is_write:
            return RESUME_GUEST
        mmio.read_completed = True
        return x86_emulate_instruction(vcpu, 0, EMULTYPE_NO_DECODE)
    fragment = mmio.fragments[mmio.current]
    if fragment.dangling:
        vcpu.kvm.observer.temporary_used(vcpu.index, "complete_emulated_mmio")
        fragment.data = POISON
    mmio.prepare_exit(fragment)
    mmio.exit_pending = True
    return EXIT_TO_USERSPACE


def _on_decode_failure(vcpu: Vcpu, gva: int, emultype: int, fault: Fault | None) -> int:
    """x86.c:x86_emulate_instruction, decoding failed: retry natively, raise what the fetch raised, or give up."""
    if emultype & (EMULTYPE_TRAP_UD | EMULTYPE_TRAP_UD_FORCED):
        kvm_queue_exception(vcpu, VECTOR_UD)
        return RESUME_GUEST
    if _retry_on_failure(vcpu, gva, emultype):
        vcpu.kvm.mark("emulate.reexecuted")
        vcpu.kvm.count_retry(RETRY_FAILED)
        vcpu.kvm.host.note("emulation failed: retry natively")
        return RESUME_GUEST
    if fault is not None and not (emultype & EMULTYPE_SKIP and vcpu.kvm.fixes.skip_fails_on_exception):
        inject_emulated_exception(vcpu, fault)
        return RESUME_GUEST
    return handle_emulation_failure(vcpu, emultype)


def _retry_instruction(vcpu: Vcpu, gva: int, emultype: int) -> bool:
    """Before emulating: unprotect the gfn and let the CPU retry, unless the instruction looks like a gPTE update."""
    kvm = vcpu.kvm
    if not kvm.fixes.retry_rewrite:
        return _retry_instruction_before_rewrite(vcpu, gva, emultype)
    if not emultype & EMULTYPE_ALLOW_RETRY_PF:
        return False
    if x86_page_table_writing_insn(vcpu.emulate_ctxt):
        kvm.count_retry(RETRY_TABLE_WRITE)
        return False
    zapped = kvm_mmu_unprotect_gfn_and_retry(vcpu, gva, False)
    return zapped or not kvm.fixes.unprotect_iff_zapped


def _retry_instruction_before_rewrite(vcpu: Vcpu, gva: int, emultype: int) -> bool:
    """x86.c:retry_instruction (6.1 to 6.11): reads and clears the guard, and retries even if nothing was zapped."""
    last_eip = vcpu.last_retry_eip
    last_addr = vcpu.last_retry_addr
    vcpu.last_retry_eip = 0
    vcpu.last_retry_addr = 0
    if not emultype & EMULTYPE_ALLOW_RETRY_PF or x86_page_table_writing_insn(vcpu.emulate_ctxt):
        return False
    if vcpu.regs.rip == last_eip and gva == last_addr:
        return False
    vcpu.last_retry_eip = vcpu.regs.rip
    vcpu.last_retry_addr = gva
    gpa, _ = gva_to_gpa(vcpu, gva, ACCESS_WRITE)
    # Also for INVALID_GPA, which no page shadows.
    kvm_mmu_unprotect_page(vcpu.kvm, gpa >> PAGE_SHIFT)
    return True


def _retry_on_failure(vcpu: Vcpu, gva: int, emultype: int) -> bool:
    """After a failed emulation: True to resume the guest and let the CPU execute the instruction."""
    kvm = vcpu.kvm
    if not kvm.fixes.reexecute_opt_in:
        # Before 4.19 re-execution was the default for every caller.
        emultype |= EMULTYPE_ALLOW_RETRY_PF
        emultype &= ~EMULTYPE_WRITE_PF_TO_SP
    if not emultype & EMULTYPE_ALLOW_RETRY_PF:
        return False
    if not kvm.fixes.retry_rewrite:
        return reexecute_instruction(vcpu, gva, emultype)
    # kvm_unprotect_and_retry_on_failure
    if emultype & EMULTYPE_WRITE_PF_TO_SP:
        kvm.mark("reexecute.write_pf_to_sp")
        kvm.count_retry(RETRY_TO_TABLE)
        return False
    kvm_mmu_unprotect_gfn_and_retry(vcpu, gva, True)
    return True


def reexecute_instruction(vcpu: Vcpu, gva: int, emultype: int) -> bool:
    """x86.c:reexecute_instruction (6.1 to 6.11), with each patch of the Feb 2024 series as a switch."""
    kvm = vcpu.kvm
    fixes = kvm.fixes
    gpa, _ = gva_to_gpa(vcpu, gva, ACCESS_WRITE)
    if gpa == INVALID_GPA:
        return True
    gfn = gpa >> PAGE_SHIFT
    slot = gfn_to_memslot(kvm, gfn)
    if (slot is None or slot.readonly) and fixes.reexecute_opt_in:
        # gfn_to_pfn, which asks for write access, gives an error.
        return False
    direct = vcpu.mmu.direct
    if direct and not fixes.reexecute_one_path:
        if _read_indirect_shadow_pages(vcpu, gfn):
            _unprotect_by_count(vcpu, gfn)
        return True
    if not fixes.reexecute_one_path:
        kvm_mmu_unprotect_page(kvm, gfn)
    elif _read_indirect_shadow_pages(vcpu, gfn):
        _unprotect_by_count(vcpu, gfn)
    if direct and not fixes.reexecute_flag_only:
        return True
    return not emultype & EMULTYPE_WRITE_PF_TO_SP


def _unprotect_by_count(vcpu: Vcpu, gfn: int) -> None:
    """The count said that there may be something to unprotect."""
    if not kvm_mmu_unprotect_page(vcpu.kvm, gfn):
        vcpu.kvm.mark("reexecute.false_positive")


def _read_indirect_shadow_pages(vcpu: Vcpu, gfn: int) -> bool:
    """The heuristic of the seed: is there any gSP at all? Before 6.9 mmu_lock was taken just to read it."""
    kvm = vcpu.kvm
    if kvm.fixes.reexecute_lockless:
        count = kvm.host.current.load(COUNT_LOAD, kvm.indirect_shadow_pages)
    else:
        kvm.mmu_lock.acquire()
        count = kvm.host.current.load(COUNT_LOAD, kvm.indirect_shadow_pages)
        kvm.mmu_lock.release()
    kvm.mark("reexecute.count_nonzero" if count else "reexecute.count_zero")
    if count == 0:
        kvm.count_retry(RETRY_COUNT_ZERO)
    vcpu.reexecuting_gfn = gfn if count == 0 else -1
    return count != 0


def handle_emulation_failure(vcpu: Vcpu, emultype: int) -> int:
    """x86.c:handle_emulation_failure: #UD, and for a supervisor an exit with KVM_EXIT_INTERNAL_ERROR.

    The modelled userspace takes the exit as the end of the instruction, in place of the #UD.
    """
    kvm = vcpu.kvm
    if not emultype & EMULTYPE_SKIP and (vcpu.regs.cpl != 0 or vcpu.guest_mode):
        kvm.mark("emulate.failure_ud")
        kvm_queue_exception(vcpu, VECTOR_UD)
        if kvm.fixes.user_failure_is_ud:
            return RESUME_GUEST
    kvm.mark("exit_userspace.internal_error")
    kvm.host.note("KVM_EXIT_INTERNAL_ERROR: emulation failed")
    kvm.observer.internal_error(vcpu.index)
    kvm_clear_exception_queue(vcpu)
    vcpu.userspace_exits.append("internal-error")
    vcpu.skip_step = True
    return EXIT_TO_USERSPACE
