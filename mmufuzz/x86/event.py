"""Delivery of exceptions, interrupts and software interrupts through the IDT (SDM vol. 3, chapter 6)."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Unsupported
from mmufuzz.x86.execute_operands import MASK32, MASK64, RSP, is_canonical, push
from mmufuzz.x86.insn import CS, SS, TR
from mmufuzz.x86.segments import (
    Descriptor,
    check_stack_segment,
    code_rights,
    install,
    install_descriptor,
    mark_accessed,
    read_descriptor,
    table_address,
)
from mmufuzz.x86.state import (
    EFER_LMA,
    FIRST_INTERRUPT,
    FLAG_AC,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    NO_ERROR_CODE,
    RIGHTS_DB,
    RIGHTS_L,
    RIGHTS_UNUSABLE,
    VECTOR_DE,
    VECTOR_DF,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_TS,
    Fault,
    Regs,
)

_CONTRIBUTORY: Final = (VECTOR_DE, VECTOR_TS, VECTOR_NP, VECTOR_SS, VECTOR_GP)


@mypyc_attr(native_class=False)
class TripleFault(Exception):
    """An exception while #DF was being delivered: the CPU shuts down."""


class NewStack:
    """The stack that a transfer to an inner privilege pushes on, before anything is committed."""

    def __init__(
        self, regs: Regs, bus: Bus, selector: int, pointer: int, descriptor: Descriptor | None, external: int
    ) -> None:
        self.regs = regs
        self.bus = bus
        self.selector = selector
        self.pointer = pointer
        self.descriptor = descriptor
        self.external = external

    def push(self, size: int, value: int) -> None:
        """One value; #SS if it does not fit. In long mode the stack is flat and must be canonical."""
        descriptor = self.descriptor
        if descriptor is None:
            self.pointer = self.pointer - size & MASK64
            if not is_canonical(self.regs, self.pointer):
                raise Fault(VECTOR_SS, self.external)
            self.bus.store_system(self.regs, self.pointer, size, value & MASK64)
            return
        mask = MASK32 if descriptor.rights & RIGHTS_DB else 0xFFFF
        self.pointer = self.pointer & ~mask | self.pointer - size & mask
        offset = self.pointer & mask
        if descriptor.type & 4:
            inside = offset > descriptor.limit
        else:
            inside = offset + size - 1 <= descriptor.limit
        if not inside:
            raise Fault(VECTOR_SS, self.selector & 0xFFFC | self.external)
        self.bus.store_system(self.regs, descriptor.base + offset & MASK32, size, value & (1 << 8 * size) - 1)

    def install(self) -> None:
        """Make it the stack."""
        if self.descriptor is None:
            install(self.regs, SS, self.selector, 0, 0, RIGHTS_UNUSABLE | RIGHTS_DB)
        else:
            install_descriptor(self.regs, self.bus, SS, self.selector, self.descriptor)
        self.regs.gpr[RSP] = self.pointer


def inner_stack(regs: Regs, bus: Bus, level: int, external: int, ist: int = 0) -> NewStack:
    """The stack for privilege ``level`` in the TSS, or that of ``ist`` 1 to 7 in long mode (SDM vol. 3, 6.14.5)."""
    tss = regs.segments[TR]
    error = tss.selector & 0xFFFC | external
    if regs.efer & EFER_LMA:
        place = 0x1C + 8 * ist if ist else 4 + 8 * level
        if tss.rights & RIGHTS_UNUSABLE or place + 7 > tss.limit:
            raise Fault(VECTOR_TS, error)
        pointer = bus.load_system(regs, table_address(regs, tss.base + place), 8)
        return NewStack(regs, bus, level, pointer, None, external)
    if tss.rights & 0xD != 9:
        # A 16-bit TSS.
        raise Unsupported
    place = 4 + 8 * level
    if place + 5 > tss.limit:
        raise Fault(VECTOR_TS, error)
    pointer = bus.load_system(regs, table_address(regs, tss.base + place), 4)
    selector = bus.load_system(regs, table_address(regs, tss.base + place + 4), 2)
    if selector & 0xFFFC == 0:
        raise Fault(VECTOR_TS, external)
    descriptor = check_stack_segment(regs, bus, selector, level, VECTOR_TS, VECTOR_SS, external)
    return NewStack(regs, bus, selector, pointer, descriptor, external)


def deliver(regs: Regs, bus: Bus, vector: int, error_code: int, following: int, software: bool) -> None:
    """Enter the handler of ``vector``; it returns to ``following``.

    ``error_code`` is -1 for none. ``software`` is INT n, INT3 or INTO: the gate's privilege counts, and errors are not
    external. Raises ``Fault`` for what goes wrong on the way, with nothing committed.
    """
    external = 0 if software else 1
    if regs.real_mode:
        _deliver_real(regs, bus, vector, following)
        return
    long = regs.efer & EFER_LMA != 0
    error = vector << 3 | 2 | external
    width = 16 if long else 8
    if vector * width + width - 1 > regs.idt_limit:
        raise Fault(VECTOR_GP, error)
    gate = Descriptor(0, bus.load_system(regs, table_address(regs, regs.idt_base + vector * width), 8))
    if not gate.is_system or gate.type not in ((14, 15) if long else (5, 6, 7, 14, 15)):
        raise Fault(VECTOR_GP, error)
    if software and gate.dpl < regs.cpl:
        raise Fault(VECTOR_GP, error)
    if not gate.present:
        raise Fault(VECTOR_NP, error)
    if gate.type == 5:
        # A task gate.
        raise Unsupported
    offset = gate.word & 0xFFFF
    if gate.type >= 14:
        offset |= gate.word >> 32 & 0xFFFF0000
    if long:
        offset |= bus.load_system(regs, table_address(regs, regs.idt_base + vector * 16 + 8), 4) << 32
    selector = gate.word >> 16 & 0xFFFF
    code = _handler_code(regs, bus, selector, external)
    flags = regs.rflags
    if not software and vector < FIRST_INTERRUPT and vector != VECTOR_DF:
        # A fault's handler returns to the instruction, which must not meet its breakpoint again (SDM vol. 3, 18.3.1.1).
        flags |= FLAG_RF
    frame = [regs.segments[SS].selector, regs.gpr[RSP], flags, regs.segments[CS].selector, following]
    if error_code != NO_ERROR_CODE:
        frame.append(error_code)
    inner = not code.is_conforming and code.dpl < regs.cpl
    level = code.dpl if inner else regs.cpl
    if long:
        _push_long(regs, bus, frame, inner, level, gate.word >> 32 & 7, external)
    else:
        _push_legacy(regs, bus, frame, inner, level, 4 if gate.type >= 14 else 2, external)
    mark_accessed(regs, bus, code)
    regs.cpl = level
    install(regs, CS, selector & 0xFFFC | level, code.base, code.limit, code.rights)
    regs.rip = offset
    regs.shadow = 0
    regs.rflags &= ~(FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM)
    if gate.type & 1 == 0:
        regs.rflags &= ~FLAG_IF


def _handler_code(regs: Regs, bus: Bus, selector: int, external: int) -> Descriptor:
    """The code segment of a gate (SDM vol. 3, 6.12.1.2)."""
    if selector & 0xFFFC == 0:
        raise Fault(VECTOR_GP, external)
    error = selector & 0xFFFC | external
    code = read_descriptor(regs, bus, selector, VECTOR_GP, external)
    if not code.is_code or code.dpl > regs.cpl:
        raise Fault(VECTOR_GP, error)
    if regs.efer & EFER_LMA and code.rights & (RIGHTS_L | RIGHTS_DB) != RIGHTS_L:
        raise Fault(VECTOR_GP, error)
    code_rights(regs, selector, code, external)
    return code


def _push_long(regs: Regs, bus: Bus, frame: list[int], inner: bool, level: int, ist: int, external: int) -> None:
    """The frame of long mode: always with the stack, aligned to 16 bytes (SDM vol. 3, 6.14.2)."""
    if inner or ist:
        stack = inner_stack(regs, bus, level, external, ist)
    else:
        stack = NewStack(regs, bus, regs.segments[SS].selector, regs.gpr[RSP], None, external)
    stack.pointer &= ~15
    for value in frame:
        stack.push(8, value)
    if inner:
        stack.install()
    regs.gpr[RSP] = stack.pointer


def _push_legacy(regs: Regs, bus: Bus, frame: list[int], inner: bool, level: int, size: int, external: int) -> None:
    """The frame outside long mode, with the old stack only if the privilege changes."""
    if inner:
        stack = inner_stack(regs, bus, level, external)
        for value in frame:
            stack.push(size, value)
        stack.install()
        return
    segment = regs.segments[SS]
    word = segment.base << 16 & 0xFFFFFF0000 | segment.base >> 24 << 56
    current = Descriptor(0, word | segment.rights << 40)
    current.limit = segment.limit
    stack = NewStack(regs, bus, 0, regs.gpr[RSP], current, external)
    for value in frame[2:]:
        stack.push(size, value)
    regs.gpr[RSP] = stack.pointer


def _deliver_real(regs: Regs, bus: Bus, vector: int, following: int) -> None:
    """Real-address mode: a far pointer in the table, a frame of three words, no error code (SDM vol. 3, 20.1.4)."""
    if vector * 4 + 3 > regs.idt_limit:
        raise Fault(VECTOR_GP, 0)
    old_rsp = regs.gpr[RSP]
    try:
        push(regs, bus, 2, regs.rflags & 0xFFFF)
        push(regs, bus, 2, regs.segments[CS].selector)
        push(regs, bus, 2, following & 0xFFFF)
        # Behind the pushes (SDM vol. 2, INT n), which may be into the table.
        pointer = bus.load_system(regs, table_address(regs, regs.idt_base + vector * 4), 4)
    except Fault:
        regs.gpr[RSP] = old_rsp
        raise
    code = regs.segments[CS]
    install(regs, CS, pointer >> 16, pointer >> 16 << 4, code.limit, code.rights)
    regs.rip = pointer & 0xFFFF
    regs.shadow = 0
    regs.rflags &= ~(FLAG_TF | FLAG_IF | FLAG_AC)


def second_exception(first: int, second: Fault) -> Fault | None:
    """What is delivered if ``second`` is raised while vector ``first`` is; None for a triple fault.

    SDM vol. 3, 6.15 and table 6-5.
    """
    if first == VECTOR_DF:
        return None
    contributory = second.vector in _CONTRIBUTORY
    if first in _CONTRIBUTORY and contributory:
        return Fault(VECTOR_DF, 0)
    if first == VECTOR_PF and (contributory or second.vector == VECTOR_PF):
        return Fault(VECTOR_DF, 0)
    return second


def deliver_exception(regs: Regs, bus: Bus, fault: Fault) -> None:
    """Enter the handler of an exception, or of what becomes of it on the way. ``Unsupported`` passes through.

    CR2 has the address of the last page fault, even if that becomes a double fault (SDM vol. 3, 6.15, interrupt 14).
    Raises ``TripleFault``.
    """
    if fault.vector == VECTOR_PF:
        regs.cr2 = fault.address
    while True:
        error_code = NO_ERROR_CODE if regs.real_mode else fault.error_code
        try:
            deliver(regs, bus, fault.vector, error_code, regs.rip, False)
            return
        except Unsupported:
            raise
        except Fault as second:
            if second.vector == VECTOR_PF:
                regs.cr2 = second.address
            combined = second_exception(fault.vector, second)
            if combined is None:
                raise TripleFault from second
            fault = combined
