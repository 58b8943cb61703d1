"""Scenes of segmentation: descriptors of every kind, loaded by code of every size and privilege, and fast system calls.

The emulator has its own __load_segment_descriptor() and em_sysenter(), with rules for null selectors, RPL, CPL and DPL,
the size of the code and interrupt shadows. A load says something only to a guest that has descriptors to load: so the
scene gives it a GDT, code of the size and privilege it is to have, and registers full of selectors.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.encodings import edge_value
from mmufuzz.case.generate_exits import load_system_tables, set_table_register, with_displacement
from mmufuzz.case.generate_insn import RAX, RBP, RBX, RCX, RDI, RDX, RSI
from mmufuzz.case.generate_vm import DATA, Machine, Machines
from mmufuzz.case.host_ops import interrupt_op
from mmufuzz.case.model import CODE_SLOT, LONG4
from mmufuzz.case.rng import Rng
from mmufuzz.case.tables import PAGE
from mmufuzz.x86.state import (
    FIRST_INTERRUPT,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
)

_RSP: Final = 4
_SELECTORS: Final = (RAX, RCX, RDX, RBX, RBP, RSI)
"""Registers that hold a selector each."""

# The GDT: two null entries, then flat segments that the guest itself runs on, then anything.
FLAT: Final = (
    *(0x00AF9B000000FFFF, 0x00CF93000000FFFF),  # 0x10, 0x18: DPL 0, 64-bit code and data
    *(0x00CF9B000000FFFF, 0x008F9B000000FFFF),  # 0x20, 0x28: 32-bit and 16-bit code
    *(0x00AFFB000000FFFF, 0x00CFF3000000FFFF),  # 0x30, 0x38: the same of DPL 3
    *(0x00CFFB000000FFFF, 0x008FFB000000FFFF),  # 0x40, 0x48
)
_DATA0: Final = 0x18
_DATA3: Final = 0x38 | 3
_OTHERS: Final = 6
_END: Final = 8 * (2 + len(FLAT) + _OTHERS)
"""Limit of the GDT plus 1; every selector below is a positive byte."""

_POINTERS: Final = 0xC00
_STACK: Final = 0xFF0
"""Where far pointers lie in the page of the tables, and the top of the stack, which grows down to them."""

_SS: Final = 2
_STI: Final = b"\xfb"
_IRETQ: Final = b"\x48\xcf"


class _Code:
    """The code the guest is in, as far as the generator knows: ``bits`` 64, 32 or 16, at privilege ``cpl``."""

    def __init__(self, bits: int, cpl: int) -> None:
        self.bits = bits
        self.cpl = cpl

    def wide(self, code: bytes) -> bytes:
        """``code`` with operands of 32 bits where code of 16 bits would have others."""
        return b"\x66" + code if self.bits == 16 else code


_LONG: Final = ((64, 0), (64, 3), (64, 3), (32, 0), (32, 3), (16, 0), (16, 3))
_LEGACY: Final = ((32, 0), (32, 3), (16, 0), (16, 3))
"""Sizes and privileges of code. A null SS is a matter of 64-bit code alone."""


def segments_scene(vm: Machines) -> None:
    """One vCPU with a GDT goes through code of several kinds, loads segment registers and makes fast system calls.

    Sometimes it has an IDT as well, and interrupts come; sometimes it is user code that can load no tables.
    """
    machine = vm.paged() if vm.percent(70) else vm.flat()
    vm.fep = vm.options.fep
    program = machine.program
    outer = "smep" not in machine.flags
    machine.cpl = 3 if outer and not vm.nested and vm.percent(10) else 0
    interrupts = machine.mode == LONG4 and machine.cpl == 0 and vm.options.interrupts and vm.percent(12)
    code = _Code(64 if program.mode64 else 32, machine.cpl)
    targets = _targets(vm, code, outer and not interrupts)
    for number in _SELECTORS:
        cpl = targets[vm.rng.below(len(targets))].cpl
        program.need(number, selector(vm, cpl) | edge_value(vm.rng) & 0xFFFF0000)
    page = _tables(vm, machine, interrupts, targets[0].cpl)
    program.need(_RSP, page + _STACK)
    entry_step = _system_call_registers(vm, machine) if vm.percent(40) else -1
    if interrupts:
        program.emit(_STI)
        for _ in range(1 + vm.rng.below(3)):
            vm.interrupts.append(interrupt_op(0, FIRST_INTERRUPT + vm.rng.below(2)))
    for number in range(len(targets)):
        target = targets[number]
        if target.bits != code.bits or target.cpl != code.cpl:
            _enter(vm, machine, code, target)
        code = target
        if vm.percent(40):
            _system_call(vm, machine, code, entry_step)
            entry_step = -1
        for _ in range(4 + vm.rng.below(5)):
            _load(vm, machine, code)


def _targets(vm: Machines, code: _Code, outer: bool) -> list[_Code]:
    """What the guest goes through from ``code`` on, CPL 3 last. User code without tables stays what it is."""
    if code.cpl == 3:
        return [code]
    kinds = _LONG if code.bits == 64 else _LEGACY
    cpl = 0
    targets: list[_Code] = []
    for _ in range(1 + vm.rng.below(3)):
        bits, level = kinds[vm.rng.below(len(kinds))]
        if outer:
            cpl = max(cpl, level)
        targets.append(_Code(bits, cpl))
    return targets


# Tables.


def descriptor(rng: Rng) -> int:
    """A descriptor of any type and privilege, mostly of a segment that is present, from one byte to 4 GiB.

    Code has base 0: its steps are mapped where the program says.
    """
    kind = rng.below(16)
    memory = rng.chance(5, 6)
    base = 0 if (memory and kind & 8) or rng.chance(1, 2) else edge_value(rng) & 0xFFFFFFFF
    limit = (0xFFFFF, 0, 0xFFF, rng.below(1 << 20))[rng.below(4)]
    access = kind | (0x10 if memory else 0) | rng.below(4) << 5 | (0x80 if rng.chance(4, 5) else 0)
    word = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | access << 40 | base >> 24 << 56
    return word | limit >> 16 << 48 | rng.below(16) << 52


def selector(vm: Machines, cpl: int) -> int:
    """Null, a flat data segment, mostly one that SS takes at ``cpl``, any entry of the GDT, one beyond it or of an LDT.

    RPL is ``cpl`` more often than not.
    """
    choice = vm.rng.below(20)
    privilege = cpl if vm.percent(50) else vm.rng.below(4)
    if choice < 6:
        return privilege
    if choice < 11:
        fits = _DATA3 if cpl == 3 else _DATA0
        return fits if vm.percent(60) else vm.pick((_DATA0, _DATA3 & ~3)) | privilege
    if choice < 19:
        return 0x10 + 8 * vm.rng.below((_END - 0x10) >> 3) | privilege
    return vm.pick((_END, 4, 0xFFF8, 0x8000 | _DATA0)) | privilege


def _tables(vm: Machines, machine: Machine, interrupts: bool, cpl: int) -> int:
    """The gva of a page with a GDT, which is loaded, far pointers and a stack."""
    words = [*FLAT, *[descriptor(vm.rng) for _ in range(_OTHERS)]]
    if interrupts:
        page, frame = load_system_tables(vm, machine, (_IRETQ, _STI + b"\x90" + _IRETQ), tuple(words))
    else:
        page, frame = _gdt(vm, machine, words)
    for place in range(8):
        # The selector is in the pointer, whatever the width of its offset.
        word = selector(vm, cpl) * 0x1000100010001
        vm.tables.set(frame, (_POINTERS >> 3) + 2 * place, word)
        vm.tables.set(frame, (_POINTERS >> 3) + 2 * place + 1, word)
    machine.program.need(RDI, page)
    return page


def _gdt(vm: Machines, machine: Machine, words: list[int]) -> tuple[int, int]:
    """(gva, gfn) of a page with a GDT, which is loaded."""
    frame = vm.pick(DATA)
    page = frame << 12
    if machine.paged:
        page = machine.free_page()
        vm.tables.map(machine.root, page, frame, PAGE)
    for position in range(len(words)):
        vm.tables.set(frame, 2 + position, words[position])
    set_table_register(vm, frame, 0x1F0, page, _END - 1)
    machine.program.need(RDI, page)
    # LGDT [RDI + 0x1f0].
    machine.program.emit(with_displacement(2, RDI, 0x1F0))
    return page, frame


# Privilege and size of code.


def _enter(vm: Machines, machine: Machine, code: _Code, target: _Code) -> None:
    """RETF or IRET from ``code`` to ``target``."""
    program = machine.program
    iret = vm.percent(50)
    if target.cpl > code.cpl or (iret and code.bits == 64):
        # PUSH SS; PUSH RSP: for an outer level, and always for IRET in 64-bit code.
        stack = bytes((0x6A, _DATA3 if target.cpl == 3 else _DATA0))
        program.emit(code.wide(stack) + code.wide(b"\x54"))
    place = {64: 0x10, 32: 0x20, 16: 0x28}[target.bits] + (0x23 if target.cpl == 3 else 0)
    following = machine.code_gva + CODE_SLOT * (len(program.steps) + 1)
    # PUSHF; PUSH CS; PUSH RIP.
    frame = code.wide(bytes((0x6A, place))) + code.wide(b"\x68" + following.to_bytes(4, "little"))
    leave = b"\xcf" if iret else b"\xcb"
    leave = b"\x48" + leave if code.bits == 64 else code.wide(leave)
    program.emit((code.wide(b"\x9c") if iret else b"") + frame + leave)
    program.mode64 = target.bits == 64


# Loads.


def _load(vm: Machines, machine: Machine, code: _Code) -> None:
    """A load of a segment register by the emulator: MOV, POP, LSS and the like, far transfers, LLDT and LTR."""
    program = machine.program
    fep = vm.fep and vm.percent(90)
    register = _SS if vm.percent(40) else vm.pick((0, 3, 4, 5, 1))
    choice = vm.rng.below(20)
    # POP ES, SS and DS are #UD in 64-bit code.
    pops = code.bits != 64 or register > 3 or vm.percent(10)
    if choice < 8 or (choice < 13 and not pops):
        # MOV Sreg, r16.
        program.emit(bytes((0x8E, 0xC0 | register << 3 | vm.pick(_SELECTORS))), fep)
    elif choice < 13:
        # PUSH imm8, then POP ES, SS, DS, FS or GS.
        program.emit(bytes((0x6A, selector(vm, code.cpl) & 0x7F)))
        program.emit((b"\x07", b"\x0f\xa1", b"\x17", b"\x1f", b"\x0f\xa1", b"\x0f\xa9")[register], fep)
    elif choice < 15:
        program.emit(_pointer(vm, code, b"\x8e", register), fep)
    elif choice < 17:
        # LES, LSS, LDS, LFS, LGS into EAX.
        opcode = (b"\xc4", b"\x0f\xb2", b"\x0f\xb2", b"\xc5", b"\x0f\xb4", b"\x0f\xb5")[register]
        program.emit(_pointer(vm, code, opcode, RAX), fep)
    elif choice < 18:
        # LLDT or LTR r16.
        program.emit(bytes((0x0F, 0x00, 0xD0 | vm.rng.below(2) << 3 | vm.pick(_SELECTORS))), fep)
    elif choice < 19:
        _far_return(vm, machine, code, fep)
    else:
        program.emit(_STI if vm.percent(60) else b"\xfa", fep)


def _pointer(vm: Machines, code: _Code, opcode: bytes, reg: int) -> bytes:
    """``opcode`` with the operands ``reg`` and a far pointer at [EDI + disp32]."""
    prefix = b"\x67" if code.bits == 16 else b""
    if vm.percent(20):
        prefix += b"\x66"
    elif code.bits == 64 and vm.percent(30):
        prefix += b"\x48"
    place = _POINTERS + 16 * vm.rng.below(8)
    return prefix + opcode + bytes((0x87 | reg << 3,)) + place.to_bytes(4, "little")


def _far_return(vm: Machines, machine: Machine, code: _Code, fep: bool) -> None:
    """RETF through any selector, to the step behind it."""
    program = machine.program
    following = machine.code_gva + CODE_SLOT * (len(program.steps) + 2)
    push = code.wide(bytes((0x6A, selector(vm, code.cpl) & 0x7F)))
    program.emit(push + code.wide(b"\x68" + following.to_bytes(4, "little")))
    program.emit(b"\x48\xcb" if code.bits == 64 else code.wide(b"\xcb"), fep)


# Fast system calls.


def _system_call_registers(vm: Machines, machine: Machine) -> int:
    """WRMSR to SYSENTER's MSRs: null selectors, edges, addresses that are not canonical. The step that writes EIP."""
    program = machine.program
    values = (vm.pick((0, 1, 2, 3, 0x10, 0x20, 0x10000, selector(vm, 0))), edge_value(vm.rng), edge_value(vm.rng))
    numbers = (MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP)
    for place in range(3):
        low = (values[place] & 0xFFFFFFFF).to_bytes(4, "little")
        # MOV EAX, low; MOV ECX, MSR; XOR EDX, EDX, or CDQ, or MOV EDX, EAX; WRMSR.
        high = (b"\x31\xd2", b"\x31\xd2", b"\x99", b"\x89\xc2")[vm.rng.below(4) if place else 0]
        program.emit(b"\xb8" + low + b"\xb9" + numbers[place].to_bytes(4, "little") + high + b"\x0f\x30")
    for number in (RAX, RCX, RDX):
        program.forget(number)
    return len(program.steps) - 1


def _system_call(vm: Machines, machine: Machine, code: _Code, entry_step: int) -> None:
    """SYSENTER, or SYSEXIT to the next step.

    ``entry_step`` writes SYSENTER's EIP, which mostly becomes what comes behind it; -1 leaves that as it is.
    """
    program = machine.program
    if vm.percent(70):
        program.emit(b"\x0f\x34", vm.fep and vm.percent(90))
        if entry_step >= 0 and vm.percent(70):
            following = machine.code_gva + CODE_SLOT * len(program.steps)
            written = program.steps[entry_step]
            program.steps[entry_step] = written[:1] + following.to_bytes(4, "little") + written[5:]
        return
    following = machine.code_gva + CODE_SLOT * (len(program.steps) + 2)
    # MOV EDX, next step; LEA ECX, [ESP] or, of 16 bits, MOV ECX, ESP.
    program.emit(code.wide(b"\xba" + following.to_bytes(4, "little")) + code.wide(b"\x89\xe1"))
    program.emit(b"\x48\x0f\x35" if code.bits == 64 and vm.percent(50) else b"\x0f\x35", vm.fep and vm.percent(90))
