"""Scenes with external interrupts: handlers that return, that invalidate, that let the next one in."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.generate_exits import load_system_tables
from mmufuzz.case.generate_insn import RCX, RDI, RMW, RSI, UNEMULATED, load_immediate
from mmufuzz.case.generate_vm import MMIO, Machine, Machines
from mmufuzz.case.host_ops import interrupt_op
from mmufuzz.x86.state import FIRST_INTERRUPT

_RSP: Final = 4
_IRETQ: Final = b"\x48\xcf"
_HANDLERS: Final = (
    _IRETQ,
    b"\x0f\x01\x3f" + _IRETQ,  # invlpg [rdi]: a shootdown
    b"\x48\x8b\x07" + _IRETQ,  # mov rax, [rdi]
    b"\xfb\x90" + _IRETQ,  # sti; nop: the next one nests
)
_STI: Final = b"\xfb"
_CLI: Final = b"\xfa"
_HLT: Final = b"\xf4"


def interrupt_scene(vm: Machines) -> None:
    """A 64-bit supervisor with an IDT, interrupted while it writes page tables, does I/O, waits or goes on.

    Sometimes its stack is a page table, and sometimes another vCPU changes an entry before it interrupts.
    """
    machine = vm.paged()
    machine.cpl = 0
    program = machine.program
    handlers = (_HANDLERS[vm.rng.below(len(_HANDLERS))], _HANDLERS[vm.rng.below(len(_HANDLERS))])
    load_system_tables(vm, machine, handlers)
    stacks = machine.aliases if machine.aliases and vm.percent(12) else machine.data
    if stacks:
        program.need(_RSP, vm.place(stacks)[0] + 0x800)
    if machine.data:
        program.need(RDI, vm.place(machine.data)[0])
    program.emit(_STI, vm.fep and vm.percent(20))
    for _ in range(1 + vm.rng.below(4)):
        _interruptible(vm, machine)
    if vm.percent(50):
        program.emit(_STI, vm.fep and vm.percent(20))
        program.emit(_HLT if vm.percent(50) else b"\x90")
    if vm.percent(30) and machine.aliases:
        _remap(vm, machine)
    for _ in range(1 + vm.rng.below(3)):
        vm.interrupts.append(interrupt_op(0, FIRST_INTERRUPT + vm.rng.below(2)))


def _interruptible(vm: Machines, machine: Machine) -> None:
    """Something that an interrupt may come before, behind or into."""
    program = machine.program
    choice = vm.rng.below(12)
    if choice < 3 and machine.aliases:
        gva = vm.place(machine.aliases)[0] | vm.rng.below(512) << 3
        program.store(vm.word(RMW if vm.percent(60) else UNEMULATED), gva, 0, 0, 0, vm.fep and vm.percent(30))
    elif choice < 5:
        _device_access(vm, machine)
    elif choice < 6:
        program.load(machine.free_page(), vm.fep and vm.percent(40))
    elif choice < 7:
        # PUSH 0x302; POPF: IF and TF.
        program.emit(b"\x68\x02\x03\0\0\x9d")
    elif choice < 8:
        program.emit(b"\xcd" + bytes((FIRST_INTERRUPT,)))
    elif choice < 10:
        program.emit(_CLI if vm.percent(50) else _STI, vm.fep and vm.percent(30))
    elif choice < 11:
        # MOV EAX, SS; MOV SS, EAX: a shadow.
        program.emit(b"\x8c\xd0\x8e\xd0")
        program.forget(0)
    elif machine.data:
        program.load(vm.place(machine.data)[0], vm.fep and vm.percent(40))


def _device_access(vm: Machines, machine: Machine) -> None:
    """A load from MMIO, MOVSB from it to a page that may be absent, or IN."""
    program = machine.program
    device = machine.free_page()
    vm.map_data(machine, device, vm.pick(MMIO))
    machine.data.pop()
    choice = vm.rng.below(3)
    if choice == 0:
        program.load(device, False)
    elif choice == 1:
        target = vm.place(machine.data)[0] if machine.data and vm.percent(60) else machine.free_page()
        program.emit(load_immediate(RSI, device, True) + load_immediate(RCX, target, True))
        # XCHG RCX, RDI; MOVSB: the handlers find RDI at a page again.
        program.emit(b"\x48\x87\xcf\xa4\x48\x87\xcf")
        program.forget(RSI)
        program.forget(RCX)
    else:
        program.emit(b"\xe4\x60", vm.fep and vm.percent(30))
        program.forget(0)


def _remap(vm: Machines, machine: Machine) -> None:
    """Another vCPU writes the entry of a page; the interrupt tells the first one."""
    if not machine.data:
        return
    gva = vm.place(machine.data)[0]
    path = vm.tables.path(machine.root, gva)
    table, level, position = path[-1]
    old = vm.tables.get(table, position)
    writer = vm.flat()
    writer.program.store("mov", table << 12 | position << 3, vm.new_entry(old, level, gva), old, 0, vm.fep)
