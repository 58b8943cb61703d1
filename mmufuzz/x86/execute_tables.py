"""Descriptor tables and segment registers."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    MASK32,
    RSP,
    advance,
    check_umip,
    is_canonical,
    load_operand,
    load_stack,
    operand_address,
    read_reg,
    require_cpl0,
    rip_mask,
    stack_offset,
    store_operand,
    write_reg,
)
from mmufuzz.x86.insn import FS, GS, LDTR, MEM, SREG, SS, TR, Insn
from mmufuzz.x86.segments import (
    TYPE_CODE,
    TYPE_RW,
    Descriptor,
    install,
    load_segment,
    read_descriptor,
    table_address,
)
from mmufuzz.x86.state import (
    EFER_LMA,
    FLAG_ZF,
    MSR_KERNEL_GS_BASE,
    RIGHTS_UNUSABLE,
    SHADOW_MOV_SS,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_UD,
    Fault,
    Regs,
)

_CR4_FSGSBASE: Final = 1 << 16


def mov_sreg(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOV to and from a segment register."""
    dst = insn.operands[0]
    src = insn.operands[1]
    if dst.kind == SREG:
        load_segment(regs, bus, dst.index, load_operand(regs, insn, bus, src) & 0xFFFF)
        if dst.index == SS:
            regs.shadow |= SHADOW_MOV_SS
    else:
        store_operand(regs, insn, bus, dst, regs.segments[src.index].selector)
    advance(regs, insn)


def pop_sreg(regs: Regs, insn: Insn, bus: Bus) -> None:
    """POP of a segment register, which reads its 16 bits in a slot of the operand size."""
    size = insn.size
    selector = load_stack(regs, bus, 0, 2)
    top = stack_offset(regs, size)
    if regs.stack16 and not regs.long_mode:
        # Of POP SS, too, the stack that it pops from says how much of ESP moves.
        top |= regs.gpr[RSP] & ~0xFFFF
    load_segment(regs, bus, insn.operands[0].index, selector)
    if insn.operands[0].index == SS:
        regs.shadow |= SHADOW_MOV_SS
    regs.gpr[RSP] = top
    advance(regs, insn)


def store_table(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SGDT and SIDT."""
    check_umip(regs)
    size = insn.operands[0].size
    address = operand_address(regs, insn, size, True)
    gdt = insn.mnemonic == "sgdt"
    base = regs.gdt_base if gdt else regs.idt_base
    limit = regs.gdt_limit if gdt else regs.idt_limit
    bus.store(regs, address, size, limit | (base & alu.mask(size - 2)) << 16, False)
    advance(regs, insn)


def load_table(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LGDT and LIDT."""
    require_cpl0(regs)
    size = insn.operands[0].size
    address = operand_address(regs, insn, size)
    limit = bus.load(regs, address, 2, False, False)
    base = bus.load(regs, address + 2 & rip_mask(regs), size - 2, False, False)
    if insn.size == 2 and not regs.long_mode:
        base &= 0xFFFFFF
    if not is_canonical(regs, base):
        raise Fault(VECTOR_GP, 0)
    if insn.mnemonic == "lgdt":
        regs.gdt_base = base
        regs.gdt_limit = limit
    else:
        regs.idt_base = base
        regs.idt_limit = limit
    advance(regs, insn)


def store_system_segment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SLDT and STR."""
    _require_protected(regs)
    check_umip(regs)
    index = LDTR if insn.mnemonic == "sldt" else TR
    store_operand(regs, insn, bus, insn.operands[0], regs.segments[index].selector)
    advance(regs, insn)


def _require_protected(regs: Regs) -> None:
    if regs.real_mode:
        raise Fault(VECTOR_UD)


def load_system_segment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LLDT and LTR. In long mode the descriptor has 16 bytes, and a TSS becomes busy."""
    _require_protected(regs)
    require_cpl0(regs)
    selector = load_operand(regs, insn, bus, insn.operands[0]) & 0xFFFF
    index = LDTR if insn.mnemonic == "lldt" else TR
    error = selector & 0xFFFC
    if error == 0:
        if index == TR:
            raise Fault(VECTOR_GP, 0)
        install(regs, index, selector, 0, 0, RIGHTS_UNUSABLE)
        advance(regs, insn)
        return
    long = regs.efer & EFER_LMA != 0
    if selector & 4 or (selector | 7) + (8 if long else 0) > regs.gdt_limit:
        raise Fault(VECTOR_GP, error)
    descriptor = read_descriptor(regs, bus, selector)
    wanted = (2,) if index == LDTR else (9,) if long else (1, 9)
    if not descriptor.is_system or descriptor.type not in wanted:
        raise Fault(VECTOR_GP, error)
    if not descriptor.present:
        raise Fault(VECTOR_NP, error)
    base = descriptor.base
    if long:
        base |= (bus.load_system(regs, table_address(regs, descriptor.address + 8), 8) & MASK32) << 32
        if not is_canonical(regs, base):
            raise Fault(VECTOR_GP, error)
    rights = descriptor.rights
    if index == TR:
        bus.store_system(regs, table_address(regs, descriptor.address + 5), 1, rights & 0xFF | 2)
        rights |= 2
    install(regs, index, selector, base, descriptor.limit, rights)
    advance(regs, insn)


def _visible(regs: Regs, bus: Bus, selector: int) -> Descriptor | None:
    """The descriptor that LAR and the like may look at, or None. They raise nothing but page faults."""
    if selector & 0xFFFC == 0:
        return None
    try:
        descriptor = read_descriptor(regs, bus, selector)
    except Fault as fault:
        if fault.vector == VECTOR_GP:
            return None
        raise
    if not descriptor.is_conforming and (descriptor.dpl < regs.cpl or descriptor.dpl < selector & 3):
        return None
    return descriptor


def look_at_segment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LAR, LSL, VERR, VERW: ZF tells whether the selector may be used so."""
    _require_protected(regs)
    name = insn.mnemonic
    selector = load_operand(regs, insn, bus, insn.operands[len(insn.operands) - 1]) & 0xFFFF
    descriptor = _visible(regs, bus, selector)
    value = -1
    if descriptor is not None:
        kind = descriptor.type
        long = regs.efer & EFER_LMA != 0
        if name == "lar":
            # Interrupt and trap gates have no access rights to show.
            known = not descriptor.is_system or kind in ((2, 9, 11, 12) if long else (1, 2, 3, 4, 5, 9, 11, 12))
            value = descriptor.word >> 32 & 0xF0FF00 if known else -1
        elif name == "lsl":
            known = not descriptor.is_system or kind in ((2, 9, 11) if long else (1, 2, 3, 9, 11))
            value = descriptor.limit if known else -1
        elif name == "verr":
            known = not descriptor.is_system and (kind & TYPE_CODE == 0 or kind & TYPE_RW != 0)
            value = 0 if known else -1
        else:
            value = 0 if descriptor.is_writable else -1
    if value < 0:
        regs.rflags &= ~FLAG_ZF
    else:
        regs.rflags |= FLAG_ZF
        if len(insn.operands) == 2:
            dst = insn.operands[0]
            write_reg(regs, dst.index, dst.size, value & alu.mask(dst.size))
    advance(regs, insn)


def adjust_privilege(regs: Regs, insn: Insn, bus: Bus) -> None:
    """ARPL."""
    _require_protected(regs)
    dst = insn.operands[0]
    old = load_operand(regs, insn, bus, dst, True)
    level = load_operand(regs, insn, bus, insn.operands[1]) & 3
    if old & 3 < level:
        value = old & ~3 | level
        if dst.kind != MEM:
            write_reg(regs, dst.index, 2, value & 0xFFFF)
        else:
            store_operand(regs, insn, bus, dst, value)
        regs.rflags |= FLAG_ZF
    else:
        regs.rflags &= ~FLAG_ZF
    advance(regs, insn)


def swap_gs(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SWAPGS."""
    require_cpl0(regs)
    base = regs.segments[GS].base
    regs.segments[GS].base = regs.msr.get(MSR_KERNEL_GS_BASE, 0)
    regs.msr[MSR_KERNEL_GS_BASE] = base
    advance(regs, insn)


def fs_gs_base(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE."""
    if not regs.cr4 & _CR4_FSGSBASE:
        raise Fault(VECTOR_UD)
    operand = insn.operands[0]
    segment = regs.segments[FS + (insn.reg_field & 1)]
    if insn.reg_field < 2:
        write_reg(regs, operand.index, operand.size, segment.base & alu.mask(operand.size))
    else:
        base = read_reg(regs, operand.index, operand.size)
        if not is_canonical(regs, base):
            raise Fault(VECTOR_GP, 0)
        segment.base = base
    advance(regs, insn)
