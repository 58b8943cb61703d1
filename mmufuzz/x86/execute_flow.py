"""Near branches and the stack."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    MASK32,
    RBP,
    RCX,
    RSP,
    advance,
    condition,
    effective_address,
    is_canonical,
    linear,
    load_operand,
    load_stack,
    push,
    read_reg,
    rip_mask,
    set_stack,
    stack_offset,
    store_stack,
    write_reg,
)
from mmufuzz.x86.insn import CS, MEM, REL, SREG, Insn
from mmufuzz.x86.state import (
    FLAG_AC,
    FLAG_FIXED,
    FLAG_ID,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_RF,
    FLAG_VM,
    FLAG_ZF,
    VECTOR_GP,
    Fault,
    Regs,
)

# What POPF and IRET may change at any privilege: CF, PF, AF, ZF, SF, TF, DF, OF, NT, and with 32 bits AC and ID.
_POPF_FLAGS: Final = 0xDD5 | FLAG_NT
_POPF_FLAGS32: Final = _POPF_FLAGS | FLAG_AC | FLAG_ID


def check_target(regs: Regs, target: int) -> None:
    """#GP(0) for a branch target that is not canonical, or beyond the limit of CS (SDM vol. 2, JMP).

    Near branches check before they commit anything.
    """
    if regs.long_mode:
        if not is_canonical(regs, target):
            raise Fault(VECTOR_GP, 0)
    elif not regs.flat and target > regs.segments[CS].limit:
        raise Fault(VECTOR_GP, 0)


def _branch_target(regs: Regs, insn: Insn, bus: Bus) -> int:
    """Where CALL, JMP or a taken Jcc goes: RIP + displacement, or a register or memory operand."""
    operand = insn.operands[0]
    if operand.kind == REL:
        target = regs.rip + insn.length + operand.value
        if not 0 <= target < 0x10000:
            target &= alu.mask(insn.size)
    else:
        target = load_operand(regs, insn, bus, operand)
    check_target(regs, target)
    return target


def jump(regs: Regs, insn: Insn, bus: Bus) -> None:
    """JMP, near."""
    regs.rip = _branch_target(regs, insn, bus)


def jump_if(regs: Regs, insn: Insn, bus: Bus) -> None:
    """Jcc."""
    if condition(regs.rflags, insn.condition):
        regs.rip = _branch_target(regs, insn, bus)
    else:
        advance(regs, insn)


def loop(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LOOP, LOOPE, LOOPNE: the counter has the address size, and changes only if the branch does not fault."""
    count = read_reg(regs, RCX, insn.asize) - 1 & alu.mask(insn.asize)
    taken = count != 0
    if insn.opcode != 0xE2:
        taken = taken and (regs.rflags & FLAG_ZF != 0) == (insn.opcode == 0xE1)
    target = _branch_target(regs, insn, bus) if taken else regs.rip + insn.length & rip_mask(regs)
    write_reg(regs, RCX, insn.asize, count)
    regs.rip = target


def jump_if_no_count(regs: Regs, insn: Insn, bus: Bus) -> None:
    """JCXZ, JECXZ, JRCXZ."""
    if read_reg(regs, RCX, insn.asize) == 0:
        regs.rip = _branch_target(regs, insn, bus)
    else:
        advance(regs, insn)


def call(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CALL, near."""
    target = _branch_target(regs, insn, bus)
    size = insn.size
    push(regs, bus, size, regs.rip + insn.length & alu.mask(size))
    regs.rip = target


def ret(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RET, near, with or without an immediate."""
    size = insn.size
    target = load_stack(regs, bus, 0, size)
    check_target(regs, target)
    released = insn.operands[0].value if insn.operands else 0
    set_stack(regs, stack_offset(regs, size + released))
    regs.rip = target


def push_operand(regs: Regs, insn: Insn, bus: Bus) -> None:
    """PUSH of a register, an immediate or memory; PUSH RSP stores the value before the push.

    A segment register is zero-extended in 64-bit code; with a 32-bit operand only its 16 bits are written, as current
    Intel CPUs do (SDM vol. 2, PUSH).
    """
    operand = insn.operands[0]
    size = insn.size
    if operand.kind == SREG:
        value = regs.segments[operand.index].selector
        store_stack(regs, bus, -size, 2 if size == 4 else size, value)
        set_stack(regs, stack_offset(regs, -size))
    else:
        push(regs, bus, size, load_operand(regs, insn, bus, operand))
    advance(regs, insn)


def pop_operand(regs: Regs, insn: Insn, bus: Bus) -> None:
    """POP. A destination [RSP + …] is addressed after the increment; POP RSP keeps the value, not the increment."""
    dst = insn.operands[0]
    size = insn.size
    value = load_stack(regs, bus, 0, size)
    if dst.kind == MEM:
        offset = effective_address(regs, insn)
        if insn.base == RSP:
            offset = offset + size & alu.mask(insn.asize)
        bus.store(regs, linear(regs, insn.segment, offset, size, True), size, value, False)
    set_stack(regs, stack_offset(regs, size))
    if dst.kind != MEM:
        write_reg(regs, dst.index, size, value)
    advance(regs, insn)


def push_all(regs: Regs, insn: Insn, bus: Bus) -> None:
    """PUSHA, PUSHAD: AX, CX, DX, BX, the old SP, BP, SI, DI."""
    size = insn.size
    for index in range(8):
        store_stack(regs, bus, -size * (index + 1), size, read_reg(regs, index, size))
    set_stack(regs, stack_offset(regs, -8 * size))
    advance(regs, insn)


def pop_all(regs: Regs, insn: Insn, bus: Bus) -> None:
    """POPA, POPAD: PUSHA backwards, but the stored SP is skipped."""
    size = insn.size
    values = [0 if place == 7 - RSP else load_stack(regs, bus, size * place, size) for place in range(8)]
    set_stack(regs, stack_offset(regs, 8 * size))
    for index in range(8):
        if index != RSP:
            write_reg(regs, index, size, values[7 - index])
    advance(regs, insn)


def enter(regs: Regs, insn: Insn, bus: Bus) -> None:
    """ENTER, with up to 31 frame pointers of enclosing procedures (SDM vol. 2, ENTER)."""
    size = insn.size
    level = insn.operands[1].value & 31
    store_stack(regs, bus, -size, size, read_reg(regs, RBP, size))
    frame = stack_offset(regs, -size)
    below = -size
    mask = rip_mask(regs) if not regs.stack16 or regs.long_mode else 0xFFFF
    for place in range(1, level):
        at = linear(regs, 2, regs.gpr[RBP] - place * size & mask, size, False)
        below -= size
        store_stack(regs, bus, below, size, bus.load(regs, at, size, False, False))
    if level:
        below -= size
        store_stack(regs, bus, below, size, frame & alu.mask(size))
    bottom = stack_offset(regs, below - insn.operands[0].value)
    # The new top must be writable, though nothing is written there.
    linear(regs, 2, bottom, size, True)
    write_reg(regs, RBP, size, frame & alu.mask(size))
    set_stack(regs, bottom)
    advance(regs, insn)


def leave(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LEAVE: the stack pointer becomes the frame pointer, of the width of the stack, and the old one is popped."""
    size = insn.size
    width = 8 if regs.long_mode else 2 if regs.stack16 else 4
    frame = read_reg(regs, RBP, width)
    value = bus.load(regs, linear(regs, 2, frame, size, False), size, False, False)
    set_stack(regs, frame + size & alu.mask(width))
    write_reg(regs, RBP, size, value)
    advance(regs, insn)


def push_flags(regs: Regs, insn: Insn, bus: Bus) -> None:
    """PUSHF: VM and RF read as zero."""
    push(regs, bus, insn.size, regs.rflags & ~(FLAG_VM | FLAG_RF) & alu.mask(insn.size))
    advance(regs, insn)


def pop_flags(regs: Regs, insn: Insn, bus: Bus) -> None:
    """POPF: IOPL changes only at CPL 0, IF only if CPL <= IOPL, without a fault (SDM vol. 2, table 4-16)."""
    value = load_stack(regs, bus, 0, insn.size)
    set_stack(regs, stack_offset(regs, insn.size))
    set_flags(regs, value, insn.size)
    advance(regs, insn)


def set_flags(regs: Regs, value: int, size: int) -> None:
    """Load RFLAGS from ``size`` bytes as POPF does outside virtual-8086 mode: RF is cleared; VM, VIF, VIP are kept."""
    changes = _POPF_FLAGS if size == 2 else _POPF_FLAGS32
    if regs.cpl == 0:
        changes |= FLAG_IOPL | FLAG_IF
    elif regs.cpl <= regs.rflags >> 12 & 3:
        changes |= FLAG_IF
    keep = MASK32 ^ (changes | FLAG_RF)
    regs.rflags = regs.rflags & keep | value & changes | FLAG_FIXED
