"""em_ functions on the stack, and near branches (emulate.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import (
    NONE,
    X86EmulateCtxt,
    address_mask,
    assign_eip_near,
    assign_reg,
    register_address_increment,
    rsp_increment,
    segmented_read,
    segmented_write,
    stack_mask,
)
from mmufuzz.kvm.emulate_ops import EmulationFailed
from mmufuzz.kvm.emulate_segments import load_segment_descriptor
from mmufuzz.x86 import alu
from mmufuzz.x86.execute_operands import MASK32, RBP, RCX, RSP, condition
from mmufuzz.x86.insn import SS
from mmufuzz.x86.state import (
    FLAG_AC,
    FLAG_ID,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_VM,
    FLAG_ZF,
    SHADOW_MOV_SS,
)

_POPF_FLAGS: Final = 0xDD5 | FLAG_NT | FLAG_AC | FLAG_ID


def emulate_push(ctxt: X86EmulateCtxt, value: int, size: int, local: bool = False) -> None:
    """emulate.c:emulate_push: the stack pointer moves in the register cache before the store.

    ``local``: the value is in a local variable of the caller.
    """
    rsp_increment(ctxt, -size)
    offset = ctxt.gpr[RSP] & stack_mask(ctxt)
    segmented_write(ctxt, SS, offset, size, value & (1 << (size << 3)) - 1, local)


def emulate_pop(ctxt: X86EmulateCtxt, size: int) -> int:
    """emulate.c:emulate_pop."""
    value = segmented_read(ctxt, SS, ctxt.gpr[RSP] & stack_mask(ctxt), size)
    rsp_increment(ctxt, size)
    return value


def em_push(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_push."""
    ctxt.dst.type = NONE
    emulate_push(ctxt, ctxt.src.val, ctxt.op_bytes)


def em_pop(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_pop."""
    ctxt.dst.val = emulate_pop(ctxt, ctxt.op_bytes)


def em_push_sreg(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_push_sreg: of 4 bytes only the selector's 2 are written."""
    if ctxt.op_bytes == 4:
        rsp_increment(ctxt, -2)
        ctxt.op_bytes = 2
    emulate_push(ctxt, ctxt.regs.segments[ctxt.src2.val].selector, ctxt.op_bytes)


def em_pop_sreg(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_pop_sreg."""
    selector = emulate_pop(ctxt, 2)
    # Before it was fixed, KVM looked at a ModRM byte that POP does not have.
    if (ctxt.src2.val if ctxt.fixes.pop_ss_shadow else ctxt.insn.modrm_reg) == SS:
        ctxt.interruptibility = SHADOW_MOV_SS
    if ctxt.op_bytes > 2:
        rsp_increment(ctxt, ctxt.op_bytes - 2)
    load_segment_descriptor(ctxt, selector, ctxt.src2.val)


def em_pusha(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_pusha: eight pushes, each of which may fault."""
    old_esp = ctxt.gpr[RSP]
    for index in range(8):
        emulate_push(ctxt, old_esp if index == RSP else ctxt.gpr[index], ctxt.op_bytes)


def em_popa(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_popa."""
    for index in range(7, -1, -1):
        if index == RSP:
            rsp_increment(ctxt, ctxt.op_bytes)
        else:
            assign_reg(ctxt.gpr, index, emulate_pop(ctxt, ctxt.op_bytes), ctxt.op_bytes)


def em_pushf(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_pushf."""
    emulate_push(ctxt, ctxt.eflags & ~FLAG_VM, ctxt.op_bytes)


def em_popf(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:emulate_popf. Real mode has CPL 0."""
    size = ctxt.op_bytes
    value = emulate_pop(ctxt, size)
    changes = _POPF_FLAGS
    if ctxt.regs.cpl == 0:
        changes |= FLAG_IOPL
    if ctxt.regs.cpl <= ctxt.eflags >> 12 & 3:
        changes |= FLAG_IF
    changes &= (1 << 8 * size) - 1
    ctxt.eflags = ctxt.eflags & ~changes | value & changes


def em_enter(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_enter: without nesting only; RBP is pushed in the width of the stack, whatever the prefixes say."""
    if ctxt.src2.val & 31:
        raise EmulationFailed
    mask = stack_mask(ctxt)
    emulate_push(ctxt, ctxt.gpr[RBP], 8 if mask > MASK32 else 4 if mask == MASK32 else 2, True)
    gpr = ctxt.gpr
    gpr[RBP] = gpr[RBP] & ~mask | gpr[RSP] & mask
    gpr[RSP] = gpr[RSP] & ~mask | gpr[RSP] - ctxt.src.val & mask


def em_leave(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_leave: the bytes popped replace the low ones of RBP."""
    mask = stack_mask(ctxt)
    gpr = ctxt.gpr
    gpr[RSP] = gpr[RSP] & ~mask | gpr[RBP] & mask
    value = emulate_pop(ctxt, ctxt.op_bytes)
    low = alu.mask(ctxt.op_bytes)
    gpr[RBP] = gpr[RBP] & ~low | value


# Near branches.


def _jmp_rel(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:jmp_rel."""
    assign_eip_near(ctxt, ctxt.next_eip + ctxt.src.val)


def jump_relative(ctxt: X86EmulateCtxt) -> None:
    """JMP rel."""
    _jmp_rel(ctxt)
    ctxt.dst.type = NONE


def jump_if(ctxt: X86EmulateCtxt) -> None:
    """Jcc."""
    if condition(ctxt.eflags, ctxt.insn.b & 15):
        _jmp_rel(ctxt)


def em_loop(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_loop: LOOP, LOOPE, LOOPNE."""
    register_address_increment(ctxt, RCX, -1)
    if address_mask(ctxt.insn, ctxt.gpr[RCX]) == 0:
        return
    opcode = ctxt.insn.b
    if opcode == 0xE2 or (ctxt.eflags & FLAG_ZF != 0) == (opcode == 0xE1):
        _jmp_rel(ctxt)


def em_jcxz(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_jcxz."""
    if address_mask(ctxt.insn, ctxt.gpr[RCX]) == 0:
        _jmp_rel(ctxt)


def em_jmp_abs(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_jmp_abs."""
    assign_eip_near(ctxt, ctxt.src.val)


def em_call(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_call: the target is checked before the return address is pushed."""
    old_eip = ctxt.next_eip
    _jmp_rel(ctxt)
    emulate_push(ctxt, old_eip, ctxt.op_bytes)


def em_call_near_abs(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_call_near_abs."""
    old_eip = ctxt.next_eip
    assign_eip_near(ctxt, ctxt.src.val)
    ctxt.src.val = old_eip
    em_push(ctxt)


def em_ret(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_ret, em_ret_near_imm."""
    assign_eip_near(ctxt, emulate_pop(ctxt, ctxt.op_bytes))
    if ctxt.src.type != NONE:
        rsp_increment(ctxt, ctxt.src.val)
