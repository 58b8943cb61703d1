"""Far transfers: JMP, CALL and RET to another code segment, IRET, and the fast system calls."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Unsupported
from mmufuzz.x86.event import inner_stack
from mmufuzz.x86.execute_flow import set_flags
from mmufuzz.x86.execute_operands import (
    MASK32,
    RCX,
    RDX,
    RSP,
    advance,
    is_canonical,
    load_stack,
    operand_address,
    require_cpl0,
    rip_mask,
    set_stack,
    stack_offset,
    store_stack,
    write_reg,
)
from mmufuzz.x86.insn import CS, MEM, SS, Insn
from mmufuzz.x86.segments import (
    Descriptor,
    check_stack_segment,
    code_rights,
    drop_inaccessible,
    install,
    install_descriptor,
    install_flat,
    load_segment,
    mark_accessed,
    read_descriptor,
    table_address,
    table_limit,
)
from mmufuzz.x86.state import (
    EFER_LMA,
    EFER_SCE,
    FLAG_FIXED,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
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
    RIGHTS_UNUSABLE,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_SS,
    VECTOR_UD,
    Fault,
    Regs,
)

_GATE_CALL: Final = 12


def _far_pointer(regs: Regs, insn: Insn, bus: Bus) -> tuple[int, int]:
    """(selector, offset) of a far pointer in the instruction or in memory."""
    operand = insn.operands[len(insn.operands) - 1]
    if operand.kind != MEM:
        return operand.index, operand.value
    size = operand.size - 2
    address = operand_address(regs, insn, operand.size)
    offset = bus.load(regs, address, size, False, False)
    return bus.load(regs, address + size & rip_mask(regs), 2, False, False), offset


def load_far_pointer(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LES, LDS, LSS, LFS, LGS."""
    selector, offset = _far_pointer(regs, insn, bus)
    index = {"les": 0, "lss": 2, "lds": 3, "lfs": 4, "lgs": 5}[insn.mnemonic]
    load_segment(regs, bus, index, selector)
    dst = insn.operands[0]
    write_reg(regs, dst.index, dst.size, offset)
    advance(regs, insn)


def _check_code(regs: Regs, bus: Bus, selector: int) -> Descriptor:
    """The target of a far JMP or CALL: code of this privilege, or conforming code of a higher one; or a call gate."""
    if selector & 0xFFFC == 0:
        raise Fault(VECTOR_GP, 0)
    error = selector & 0xFFFC
    descriptor = read_descriptor(regs, bus, selector)
    if descriptor.is_system:
        return descriptor
    if not descriptor.is_code:
        raise Fault(VECTOR_GP, error)
    if descriptor.is_conforming:
        if descriptor.dpl > regs.cpl:
            raise Fault(VECTOR_GP, error)
    elif selector & 3 > regs.cpl or descriptor.dpl != regs.cpl:
        raise Fault(VECTOR_GP, error)
    code_rights(regs, selector, descriptor)
    return descriptor


def _check_offset(regs: Regs, descriptor: Descriptor, offset: int) -> None:
    """The new RIP must lie in the new code segment."""
    if regs.efer & EFER_LMA and descriptor.rights & RIGHTS_L:
        if not is_canonical(regs, offset) or (not regs.long_mode and offset >> 47 not in (0, 0x1FFFF)):
            raise Fault(VECTOR_GP, 0)
    elif offset & MASK32 > descriptor.limit or offset > MASK32:
        raise Fault(VECTOR_GP, 0)


def _enter_code(regs: Regs, bus: Bus, selector: int, descriptor: Descriptor, offset: int) -> None:
    install_descriptor(regs, bus, CS, selector & 0xFFFC | regs.cpl, descriptor)
    regs.rip = offset


def _real_code(regs: Regs, selector: int, offset: int) -> None:
    """Real-address mode: a selector is a paragraph number."""
    code = regs.segments[CS]
    if offset > code.limit:
        raise Fault(VECTOR_GP, 0)
    install(regs, CS, selector, selector << 4, code.limit, code.rights)
    regs.rip = offset


def jump_far(regs: Regs, insn: Insn, bus: Bus) -> None:
    """JMP to another code segment, directly or through a call gate. Task switches are not modelled."""
    selector, offset = _far_pointer(regs, insn, bus)
    if regs.real_mode:
        _real_code(regs, selector, offset)
        return
    descriptor = _check_code(regs, bus, selector)
    if descriptor.is_system:
        selector, offset, _ = _read_gate(regs, bus, selector, descriptor)
        descriptor = _gate_target(regs, bus, selector)
        if descriptor.dpl < regs.cpl and not descriptor.is_conforming:
            raise Fault(VECTOR_GP, selector & 0xFFFC)
    _check_offset(regs, descriptor, offset)
    _enter_code(regs, bus, selector, descriptor, offset)


def call_far(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CALL to another code segment, directly or through a call gate, which may lead to an inner privilege."""
    selector, offset = _far_pointer(regs, insn, bus)
    size = insn.operands[0].size - 2
    following = regs.rip + insn.length & alu.mask(size)
    if regs.real_mode:
        if offset > regs.segments[CS].limit:
            raise Fault(VECTOR_GP, 0)
        _push_return(regs, bus, size, following)
        _real_code(regs, selector, offset)
        return
    descriptor = _check_code(regs, bus, selector)
    if descriptor.is_system:
        _call_gate(regs, bus, selector, descriptor, regs.rip + insn.length & rip_mask(regs))
        return
    _check_offset(regs, descriptor, offset)
    _push_return(regs, bus, size, following)
    _enter_code(regs, bus, selector, descriptor, offset)


def _push_return(regs: Regs, bus: Bus, size: int, following: int) -> None:
    """CS and RIP of ``size`` bytes each; the stack pointer moves last."""
    store_stack(regs, bus, -size, size, regs.segments[CS].selector)
    store_stack(regs, bus, -2 * size, size, following)
    set_stack(regs, stack_offset(regs, -2 * size))


def _read_gate(regs: Regs, bus: Bus, selector: int, gate: Descriptor) -> tuple[int, int, int]:
    """(selector, offset, parameter count) of a call gate; checks its privilege and presence (SDM vol. 3, 5.8.4)."""
    error = selector & 0xFFFC
    if gate.type != _GATE_CALL:
        if gate.type in (1, 4, 5, 9) and not regs.efer & EFER_LMA:
            raise Unsupported
        raise Fault(VECTOR_GP, error)
    if gate.dpl < regs.cpl or gate.dpl < selector & 3:
        raise Fault(VECTOR_GP, error)
    if not gate.present:
        raise Fault(VECTOR_NP, error)
    offset = gate.word & 0xFFFF | gate.word >> 32 & 0xFFFF0000
    if regs.efer & EFER_LMA:
        if (selector | 7) + 8 > table_limit(regs, selector):
            raise Fault(VECTOR_GP, error)
        high = bus.load_system(regs, table_address(regs, gate.address + 8), 8)
        if high >> 40 & 0x1F:
            raise Fault(VECTOR_GP, error)
        offset |= (high & MASK32) << 32
    return gate.word >> 16 & 0xFFFF, offset, gate.word >> 32 & 0x1F


def _gate_target(regs: Regs, bus: Bus, selector: int) -> Descriptor:
    """The code segment behind a call gate."""
    if selector & 0xFFFC == 0:
        raise Fault(VECTOR_GP, 0)
    error = selector & 0xFFFC
    descriptor = read_descriptor(regs, bus, selector)
    if not descriptor.is_code or descriptor.dpl > regs.cpl:
        raise Fault(VECTOR_GP, error)
    if regs.efer & EFER_LMA and descriptor.rights & (RIGHTS_L | RIGHTS_DB) != RIGHTS_L:
        raise Fault(VECTOR_GP, error)
    code_rights(regs, selector, descriptor)
    return descriptor


def _call_gate(regs: Regs, bus: Bus, selector: int, gate: Descriptor, following: int) -> None:
    selector, offset, count = _read_gate(regs, bus, selector, gate)
    descriptor = _gate_target(regs, bus, selector)
    size = 8 if regs.efer & EFER_LMA else 4
    if descriptor.is_conforming or descriptor.dpl == regs.cpl:
        _check_offset(regs, descriptor, offset)
        _push_return(regs, bus, size, following)
        _enter_code(regs, bus, selector, descriptor, offset)
        return
    stack = inner_stack(regs, bus, descriptor.dpl, 0)
    old = (regs.segments[SS].selector, regs.gpr[RSP], regs.segments[CS].selector)
    parameters = [] if size == 8 else [load_stack(regs, bus, 4 * place, 4) for place in range(count)]
    parameters.reverse()
    _check_offset(regs, descriptor, offset)
    stack.push(size, old[0])
    stack.push(size, old[1])
    for parameter in parameters:
        stack.push(size, parameter)
    stack.push(size, old[2])
    stack.push(size, following)
    regs.cpl = descriptor.dpl
    stack.install()
    _enter_code(regs, bus, selector, descriptor, offset)


def return_far(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RET to another code segment, of this privilege or an outer one."""
    size = insn.size
    offset = load_stack(regs, bus, 0, size)
    selector = load_stack(regs, bus, size, size) & 0xFFFF
    released = insn.operands[0].value if insn.operands else 0
    if regs.real_mode:
        _real_code(regs, selector, offset)
        set_stack(regs, stack_offset(regs, 2 * size + released))
        return
    _return(regs, bus, selector, offset, size, 2 * size + released, released)


def _return(regs: Regs, bus: Bus, selector: int, offset: int, size: int, below: int, released: int) -> None:
    """What RETF and IRET share in protected mode: an outer stack pointer lies ``below`` bytes above the inner one.

    ``released`` bytes are released on the outer stack too. A negative ``released`` is IRET in 64-bit code, which
    always takes a stack.
    """
    always = released < 0
    if selector & 0xFFFC == 0:
        raise Fault(VECTOR_GP, 0)
    error = selector & 0xFFFC
    descriptor = read_descriptor(regs, bus, selector)
    level = selector & 3
    if not descriptor.is_code or level < regs.cpl:
        raise Fault(VECTOR_GP, error)
    if descriptor.dpl > level or (descriptor.dpl != level and not descriptor.is_conforming):
        raise Fault(VECTOR_GP, error)
    code_rights(regs, selector, descriptor)
    outer = level > regs.cpl
    if not outer and not always:
        _check_offset(regs, descriptor, offset)
        mark_accessed(regs, bus, descriptor)
        set_stack(regs, stack_offset(regs, below))
        install(regs, CS, selector, descriptor.base, descriptor.limit, descriptor.rights)
        regs.rip = offset
        return
    stack_pointer = load_stack(regs, bus, below, size)
    stack_selector = load_stack(regs, bus, below + size, size) & 0xFFFF
    to_long = regs.efer & EFER_LMA != 0 and descriptor.rights & RIGHTS_L != 0
    stack: Descriptor | None = None
    if stack_selector & 0xFFFC == 0:
        if not to_long or level == 3 or stack_selector & 3 != level:
            raise Fault(VECTOR_GP, 0)
    else:
        stack = check_stack_segment(regs, bus, stack_selector, level, VECTOR_GP, VECTOR_SS, 0)
    _check_offset(regs, descriptor, offset)
    mark_accessed(regs, bus, descriptor)
    if stack is None:
        install(regs, SS, stack_selector, 0, 0, RIGHTS_UNUSABLE | RIGHTS_DB)
    else:
        install_descriptor(regs, bus, SS, stack_selector, stack)
    install(regs, CS, selector, descriptor.base, descriptor.limit, descriptor.rights)
    regs.rip = offset
    regs.cpl = level
    set_stack(regs, stack_pointer)
    set_stack(regs, stack_offset(regs, max(released, 0)))
    if outer:
        drop_inaccessible(regs)


def iret(regs: Regs, insn: Insn, bus: Bus) -> None:
    """IRET. Returns to virtual-8086 mode and from a nested task are not modelled."""
    size = insn.size
    if not regs.real_mode and regs.rflags & FLAG_NT:
        if regs.efer & EFER_LMA:
            raise Fault(VECTOR_GP, 0)
        raise Unsupported
    offset = load_stack(regs, bus, 0, size)
    selector = load_stack(regs, bus, size, size) & 0xFFFF
    flags = load_stack(regs, bus, 2 * size, size)
    if regs.real_mode:
        _real_code(regs, selector, offset)
        set_stack(regs, stack_offset(regs, 3 * size))
        set_flags(regs, flags, size)
        if size > 2:
            regs.rflags |= flags & FLAG_RF
        return
    if flags & FLAG_VM and size == 4 and regs.cpl == 0 and not regs.efer & EFER_LMA:
        raise Unsupported
    old_cpl = regs.cpl
    _return(regs, bus, selector, offset, size, 3 * size, -1 if regs.long_mode else 0)
    new_cpl = regs.cpl
    # Which flags change depends on the privilege before the return.
    regs.cpl = old_cpl
    set_flags(regs, flags, size)
    if size > 2:
        changes = FLAG_RF if old_cpl else FLAG_RF | FLAG_VIF | FLAG_VIP
        regs.rflags = regs.rflags & ~changes | flags & changes
    regs.cpl = new_cpl


# Fast system calls (SDM vol. 3, 5.8.7 and 5.8.8).


def syscall(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SYSCALL, in 64-bit code. The RPL of CS is cleared, that of SS is what STAR says (SDM vol. 2, SYSCALL)."""
    if not regs.efer & EFER_SCE:
        raise Fault(VECTOR_UD)
    star = regs.msr.get(MSR_STAR, 0)
    regs.gpr[RCX] = regs.rip + insn.length & rip_mask(regs)
    regs.gpr[11] = regs.rflags
    regs.rip = regs.msr.get(MSR_LSTAR, 0)
    regs.rflags = regs.rflags & ~(regs.msr.get(MSR_FMASK, 0) | FLAG_RF) | FLAG_FIXED
    selector = star >> 32 & 0xFFFF
    regs.cpl = 0
    install_flat(regs, CS, selector & 0xFFFC, True)
    install_flat(regs, SS, selector + 8 & 0xFFFF, False)


def sysret(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SYSRET, to 64-bit or to compatibility-mode code."""
    if not regs.efer & EFER_SCE:
        raise Fault(VECTOR_UD)
    require_cpl0(regs)
    star = regs.msr.get(MSR_STAR, 0) >> 48
    wide = insn.size == 8
    target = regs.gpr[RCX] if wide else regs.gpr[RCX] & MASK32
    if not is_canonical(regs, target):
        raise Fault(VECTOR_GP, 0)
    regs.rip = target
    regs.rflags = regs.gpr[11] & 0x3C7FD7 | FLAG_FIXED
    regs.cpl = 3
    install_flat(regs, CS, star + (16 if wide else 0) & 0xFFFF | 3, wide)
    install_flat(regs, SS, star + 8 & 0xFFFF | 3, False)


def sysenter(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SYSENTER."""
    selector = regs.msr.get(MSR_SYSENTER_CS, 0) & 0xFFFC
    if regs.real_mode or selector == 0:
        raise Fault(VECTOR_GP, 0)
    long = regs.efer & EFER_LMA != 0
    width = 0xFFFFFFFFFFFFFFFF if long else MASK32
    regs.rflags &= ~(FLAG_VM | FLAG_IF)
    regs.gpr[RSP] = regs.msr.get(MSR_SYSENTER_ESP, 0) & width
    regs.rip = regs.msr.get(MSR_SYSENTER_EIP, 0) & width
    regs.cpl = 0
    install_flat(regs, CS, selector, long)
    install_flat(regs, SS, selector + 8 & 0xFFFF, False)


def sysexit(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SYSEXIT."""
    selector = regs.msr.get(MSR_SYSENTER_CS, 0) & 0xFFFC
    if regs.real_mode or selector == 0:
        raise Fault(VECTOR_GP, 0)
    require_cpl0(regs)
    wide = insn.size == 8
    target = regs.gpr[RDX] if wide else regs.gpr[RDX] & MASK32
    stack = regs.gpr[RCX] if wide else regs.gpr[RCX] & MASK32
    if wide and not (is_canonical(regs, target) and is_canonical(regs, stack)):
        raise Fault(VECTOR_GP, 0)
    regs.rip = target
    regs.gpr[RSP] = stack
    regs.cpl = 3
    install_flat(regs, CS, selector + (32 if wide else 16) & 0xFFFF | 3, wide)
    install_flat(regs, SS, selector + (40 if wide else 24) & 0xFFFF | 3, False)
