"""em_ functions that leave the code segment: far transfers, software interrupts, fast system calls (emulate.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import (
    MODE_PROT16,
    MODE_PROT32,
    MODE_PROT64,
    MODE_REAL,
    X86EmulateCtxt,
    assign_eip_far,
    is_noncanonical,
    linear_read_system,
    rsp_increment,
    set_segment,
)
from mmufuzz.kvm.emulate_ops import EmulationFailed
from mmufuzz.kvm.emulate_segments import (
    TRANSFER_CALL_JMP,
    TRANSFER_RET,
    load_descriptor,
    load_segment_descriptor,
)
from mmufuzz.kvm.emulate_stack import emulate_pop, emulate_push
from mmufuzz.kvm.opcode_table import OP_IMM_FAR
from mmufuzz.x86.execute_operands import MASK32, RCX, RDX, RSP
from mmufuzz.x86.insn import CS, SS
from mmufuzz.x86.state import (
    EFER_LMA,
    EFER_SCE,
    FLAG_AC,
    FLAG_FIXED,
    FLAG_ID,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_OF,
    FLAG_RF,
    FLAG_TF,
    FLAG_VIF,
    FLAG_VIP,
    FLAG_VM,
    MSR_FMASK,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    RIGHTS_DB,
    RIGHTS_L,
    VECTOR_GP,
    VECTOR_UD,
    Fault,
)

_IRET_FLAGS: Final = (
    0xDD5 | FLAG_IF | FLAG_IOPL | FLAG_NT | FLAG_RF | FLAG_AC | FLAG_ID | FLAG_FIXED
)
_RESERVED_ZEROS: Final = 0xFFC0802A
_G: Final = 1 << 15
_FLAT: Final = 0xFFFFFFFF


def _far_pointer(ctxt: X86EmulateCtxt) -> tuple[int, int]:
    """(selector, offset) of the source."""
    if ctxt.insn.entry.src == OP_IMM_FAR:
        return ctxt.insn.selector, ctxt.src.val
    bits = ctxt.op_bytes << 3
    return ctxt.src.val >> bits & 0xFFFF, ctxt.src.val & (1 << bits) - 1


def em_lseg(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_lseg: LES, LDS, LSS, LFS, LGS."""
    selector, offset = _far_pointer(ctxt)
    load_segment_descriptor(ctxt, selector, ctxt.src2.val)
    ctxt.dst.val = offset


def em_jmp_far(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_jmp_far: once CS is loaded, a bad offset is more than the emulator can undo."""
    selector, offset = _far_pointer(ctxt)
    load_descriptor(ctxt, selector, CS, TRANSFER_CALL_JMP)
    try:
        assign_eip_far(ctxt, offset)
    except Fault as fault:
        raise EmulationFailed from fault


def em_call_far(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_call_far: if a push faults CS is put back, but what the first push wrote stays."""
    selector, offset = _far_pointer(ctxt)
    old = ctxt.regs.segments[CS]
    old_mode = ctxt.mode
    old_eip = ctxt.next_eip
    load_descriptor(ctxt, selector, CS, TRANSFER_CALL_JMP)
    try:
        assign_eip_far(ctxt, offset)
        emulate_push(ctxt, old.selector, ctxt.op_bytes)
        emulate_push(ctxt, old_eip, ctxt.op_bytes)
    except Exception:
        set_segment(ctxt, CS, old.selector, old.base, old.limit, old.rights)
        ctxt.mode = old_mode
        raise


def em_ret_far(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_ret_far, em_ret_far_imm: to this privilege only."""
    offset = emulate_pop(ctxt, ctxt.op_bytes)
    selector = emulate_pop(ctxt, ctxt.op_bytes) & 0xFFFF
    load_descriptor(ctxt, selector, CS, TRANSFER_RET)
    try:
        assign_eip_far(ctxt, offset)
    except Fault as fault:
        raise EmulationFailed from fault
    if ctxt.insn.b == 0xCA:
        rsp_increment(ctxt, ctxt.src.val)


# Interrupts, in real mode only.


def _emulate_int(ctxt: X86EmulateCtxt, vector: int) -> None:
    """emulate.c:emulate_int, __emulate_int_real."""
    if ctxt.mode != MODE_REAL:
        raise EmulationFailed
    regs = ctxt.regs
    emulate_push(ctxt, ctxt.eflags, ctxt.op_bytes)
    ctxt.eflags &= ~(FLAG_IF | FLAG_TF | FLAG_AC)
    emulate_push(ctxt, regs.segments[CS].selector, ctxt.op_bytes)
    emulate_push(ctxt, ctxt.next_eip, ctxt.op_bytes)
    address = regs.idt_base + (vector << 2)
    selector = linear_read_system(ctxt, address + 2, 2)
    offset = linear_read_system(ctxt, address, 2)
    load_segment_descriptor(ctxt, selector, CS)
    ctxt.next_eip = offset


def int_n(ctxt: X86EmulateCtxt) -> None:
    """INT3, INT n, INTO."""
    name = ctxt.insn.name
    if name == "int3":
        _emulate_int(ctxt, 3)
    elif name == "int":
        _emulate_int(ctxt, ctxt.src.val & 0xFF)
    elif ctxt.eflags & FLAG_OF:
        _emulate_int(ctxt, 4)


def em_iret(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_iret, emulate_iret_real."""
    if ctxt.mode != MODE_REAL:
        raise EmulationFailed
    size = ctxt.op_bytes
    offset = emulate_pop(ctxt, size)
    if offset > 0xFFFF:
        raise Fault(VECTOR_GP, 0)
    selector = emulate_pop(ctxt, size) & 0xFFFF
    flags = emulate_pop(ctxt, size)
    load_segment_descriptor(ctxt, selector, CS)
    ctxt.next_eip = offset
    if size == 4:
        kept = FLAG_VM | FLAG_VIF | FLAG_VIP
        ctxt.eflags = flags & _IRET_FLAGS | ctxt.eflags & kept
    else:
        ctxt.eflags = ctxt.eflags & ~0xFFFF | flags & 0xFFFF
    ctxt.eflags = ctxt.eflags & ~_RESERVED_ZEROS | FLAG_FIXED


# Fast system calls.


def _set_flat(ctxt: X86EmulateCtxt, selector: int, code: bool, dpl: int, long_code: bool) -> None:
    """emulate.c:setup_syscalls_segments: flat code or data."""
    rights = 0x9B if code else 0x93
    size = RIGHTS_L if long_code else RIGHTS_DB
    set_segment(ctxt, CS if code else SS, selector & 0xFFFF, 0, _FLAT, rights | dpl << 5 | size | _G)


def em_syscall(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_syscall, for an Intel guest: 64-bit mode only."""
    regs = ctxt.regs
    if ctxt.mode != MODE_PROT64 or not regs.efer & EFER_SCE:
        raise Fault(VECTOR_UD)
    star = ctxt.ops.get_msr(MSR_STAR) >> 32
    _set_flat(ctxt, star & 0xFFFC, True, 0, True)
    _set_flat(ctxt, star + 8, False, 0, False)
    ctxt.gpr[RCX] = ctxt.next_eip
    ctxt.gpr[11] = ctxt.eflags
    ctxt.next_eip = ctxt.ops.get_msr(MSR_LSTAR)
    ctxt.eflags = ctxt.eflags & ~ctxt.ops.get_msr(MSR_FMASK) | FLAG_FIXED


def em_sysenter(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_sysenter: not from 64-bit mode. Without its fix 16-bit code may enter a null segment."""
    regs = ctxt.regs
    if ctxt.mode == MODE_REAL:
        raise Fault(VECTOR_GP, 0)
    if ctxt.mode == MODE_PROT64:
        raise EmulationFailed
    selector = ctxt.ops.get_msr(MSR_SYSENTER_CS)
    if selector & 0xFFFC == 0 and (ctxt.fixes.sysenter_cs or ctxt.mode != MODE_PROT16):
        raise Fault(VECTOR_GP, 0)
    long = regs.efer & EFER_LMA != 0
    width = (1 << 64) - 1 if long else MASK32
    ctxt.eflags &= ~(FLAG_VM | FLAG_IF)
    selector &= 0xFFFC
    _set_flat(ctxt, selector, True, 0, long)
    _set_flat(ctxt, selector + 8, False, 0, False)
    ctxt.next_eip = ctxt.ops.get_msr(MSR_SYSENTER_EIP) & width
    ctxt.gpr[RSP] = ctxt.ops.get_msr(MSR_SYSENTER_ESP) & width
    if long:
        ctxt.mode = MODE_PROT64


def em_sysexit(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_sysexit."""
    if ctxt.mode == MODE_REAL:
        raise Fault(VECTOR_GP, 0)
    wide = ctxt.insn.rex & 8 != 0
    selector = ctxt.ops.get_msr(MSR_SYSENTER_CS)
    rcx = ctxt.gpr[RCX]
    rdx = ctxt.gpr[RDX]
    if wide:
        if selector == 0 or is_noncanonical(ctxt, rcx) or is_noncanonical(ctxt, rdx):
            raise Fault(VECTOR_GP, 0)
    else:
        if selector & 0xFFFC == 0:
            raise Fault(VECTOR_GP, 0)
        rcx &= MASK32
        rdx &= MASK32
    offset = 32 if wide else 16
    _set_flat(ctxt, selector + offset | 3, True, 3, wide)
    _set_flat(ctxt, selector + offset + 8 | 3, False, 3, False)
    ctxt.next_eip = rdx
    ctxt.mode = MODE_PROT64 if wide else MODE_PROT32
    ctxt.gpr[RSP] = rcx
