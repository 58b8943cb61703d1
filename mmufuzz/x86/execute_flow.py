"""Branches and the stack."""

from __future__ import annotations

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    RSP,
    advance,
    check_canonical,
    condition,
    effective_address,
    is_canonical,
    load_operand,
    rip_mask,
    uses_stack_segment,
    write_reg,
)
from mmufuzz.x86.insn import MEM, REL, Insn
from mmufuzz.x86.state import VECTOR_GP, Fault, Regs


def _check_target(regs: Regs, target: int) -> None:
    """#GP(0) for a non-canonical branch target (SDM vol. 2, JMP). Near branches check before they commit anything."""
    if not is_canonical(regs, target):
        raise Fault(VECTOR_GP, 0)


def _branch_target(regs: Regs, insn: Insn, bus: Bus) -> int:
    """Where CALL, JMP or a taken Jcc goes: RIP + displacement, or a register or memory operand."""
    operand = insn.operands[0]
    if operand.kind == REL:
        target = regs.rip + insn.length + operand.value & alu.mask(insn.size)
    else:
        target = load_operand(regs, insn, bus, operand)
    _check_target(regs, target)
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


def call(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CALL, near."""
    target = _branch_target(regs, insn, bus)
    size = insn.size
    _push(regs, bus, size, regs.rip + insn.length & alu.mask(size))
    regs.rip = target


def ret(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RET, near, with or without an immediate."""
    size = insn.size
    target = _peek(regs, bus, size)
    _check_target(regs, target)
    released = insn.operands[0].value if insn.operands else 0
    regs.gpr[RSP] = regs.gpr[RSP] + size + released & rip_mask(regs)
    regs.rip = target


def push(regs: Regs, insn: Insn, bus: Bus) -> None:
    """PUSH of a register, an immediate or memory; PUSH RSP stores the value before the push."""
    _push(regs, bus, insn.size, load_operand(regs, insn, bus, insn.operands[0]))
    advance(regs, insn)


def pop(regs: Regs, insn: Insn, bus: Bus) -> None:
    """POP. A destination [RSP + …] is addressed after the increment; POP RSP keeps the value, not the increment."""
    dst = insn.operands[0]
    size = insn.size
    value = _peek(regs, bus, size)
    if dst.kind == MEM:
        address = effective_address(regs, insn)
        if insn.base == RSP:
            address = address + size & alu.mask(insn.asize)
        check_canonical(regs, address, size, uses_stack_segment(insn))
        bus.store(regs, address, size, value, False)
    regs.gpr[RSP] = regs.gpr[RSP] + size & rip_mask(regs)
    if dst.kind != MEM:
        write_reg(regs, dst.index, size, value)
    advance(regs, insn)


def _push(regs: Regs, bus: Bus, size: int, value: int) -> None:
    """Store below RSP; RSP moves only if the store succeeded."""
    top = regs.gpr[RSP] - size & rip_mask(regs)
    check_canonical(regs, top, size, True)
    bus.store(regs, top, size, value, False)
    regs.gpr[RSP] = top


def _peek(regs: Regs, bus: Bus, size: int) -> int:
    top = regs.gpr[RSP] & rip_mask(regs)
    check_canonical(regs, top, size, True)
    return bus.load(regs, top, size, False, False)
