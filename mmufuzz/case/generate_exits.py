"""Scenes around exits: MMIO and ports, instructions that exit, breakpoints, single steps, and a guest's IDT."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.encodings import edge_value
from mmufuzz.case.generate_insn import RAX, RCX, RDI, RDX, RSI, UNEMULATED, memory_form
from mmufuzz.case.generate_vm import MMIO, Machine, Machines
from mmufuzz.case.model import CODE_SLOT
from mmufuzz.case.tables import NX, PAGE, P, U, W
from mmufuzz.x86.state import FIRST_INTERRUPT

_RSP: Final = 4
_MSR_EFER: Final = 0xC0000080
_MSR_KERNEL_GS_BASE: Final = 0xC0000102
_EFER: Final = (0x500, 0xD00, 0xD01, 0x501)
"""LME and LMA, with and without NX, with and without SCE."""

_DESCRIPTORS: Final = (0x00AF9B000000FFFF, 0x00CF93000000FFFF)
"""64-bit code and data."""
_FIRST_VECTORS: Final = 15
_ERROR_CODES: Final = (8, 10, 11, 12, 13, 14)
_NEXT: Final = b"\x48\x83\x04\x24\x10\x48\x83\x24\x24\xf0\x48\xcf"
"""A handler that returns to the next step: add qword [rsp], 16; and qword [rsp], -16; iretq."""
_HANDLERS: Final = (_NEXT, b"\x48\x83\xc4\x08" + _NEXT, b"\x48\xcf")
"""Without and with an error code, and one that returns to where it came from."""


def exits_scene(vm: Machines) -> None:
    """One of the scenes, on one vCPU, sometimes with another that gets in its way."""
    choice = vm.rng.below(10)
    if choice < 4:
        _mmio(vm)
    elif choice < 6:
        _intercepts(vm)
    elif choice < 8:
        _debug(vm)
    else:
        _idt(vm)


def _device(vm: Machines, machine: Machine) -> int:
    """gva of a page of MMIO whose neighbours are MMIO or memory, at random."""
    if not machine.paged:
        return vm.pick((0x40, 0x41, 0x60, 0x5F)) << 12
    machine.free_page()
    gva = machine.free_page()
    for page in (gva - 0x1000, gva, gva + 0x1000):
        vm.map_data(machine, page, vm.pick(MMIO) if page == gva or vm.percent(65) else -1)
        machine.data.pop()
    machine.free_page()
    return gva


def _mmio(vm: Machines) -> None:
    """Accesses to MMIO of every width, across its ends too, by single, repeated and stack instructions."""
    machine = vm.paged() if vm.percent(75) else vm.flat()
    program = machine.program
    device = _device(vm, machine)
    for _ in range(1 + vm.rng.below(3)):
        place = device + vm.pick((0, 8, 0xFF8, 0xFFC, 0xFFD, 0xFFF, -1, -3, -4))
        if not machine.paged and place < 0:
            place = device
        choice = vm.rng.below(12)
        if choice < 3:
            kind = vm.word(("mov", "mov imm", "xchg", "xadd", "lock add", "inc", "cmpxchg"))
            program.store(kind, place, vm.pick((1, 0x1122334455667788)), 0, 0, vm.fep and vm.percent(30))
        elif choice < 5:
            program.load(place, vm.fep and vm.percent(30))
        elif choice < 7:
            source = vm.place(machine.data)[0] if machine.data else place
            pair = (place, source) if vm.percent(50) else (source, place)
            program.string(vm.percent(60), pair[0], pair[1], 1 + vm.rng.below(3), False)
        elif choice < 8:
            program.vector(place)
        elif choice < 11:
            _push(vm, machine, device if vm.percent(60) else place)
        else:
            program.store(vm.word(UNEMULATED), place, 0, 0)


def _push(vm: Machines, machine: Machine, place: int) -> None:
    """The stack grows down to ``place``, or, if that begins a page, across one of its ends, which is two exits."""
    program = machine.program
    size = 8 if program.mode64 else 4
    if place & 0xFFF == 0:
        place += 0x1000 * vm.rng.below(2) - 1 - vm.rng.below(size - 1)
    program.need(_RSP, place + size)
    # ENTER 0, 0; PUSH RBX; CALL to the next instruction.
    program.emit((b"\xc8\0\0\0", b"\xc8\0\0\0", b"\x53", b"\xe8\0\0\0\0")[vm.rng.below(4)])
    program.forget(_RSP)


def _intercepts(vm: Machines) -> None:
    """CPUID, MSRs, ports and CR3, on a CPU that reports lengths or does not, while another unmaps the code."""
    machine = vm.paged()
    program = machine.program
    vm.decode_to_skip = vm.percent(40)
    for _ in range(1 + vm.rng.below(3)):
        choice = vm.rng.below(10)
        if choice < 2:
            program.emit(b"\x0f\xa2")
            for reg in (RAX, RCX, RDX, 3):
                program.forget(reg)
        elif choice < 5 and program.mode64:
            _write_msr(vm, machine)
        elif choice < 7:
            _port(vm, machine)
        elif choice < 8:
            program.emit(b"\x0f\x31")
            program.forget(RAX)
            program.forget(RDX)
        elif choice < 9 and program.mode64:
            roots = [gfn for gfn in vm.tables.levels if vm.tables.levels[gfn] == 4]
            program.load_cr3(vm.pick(roots) if vm.percent(70) else vm.pick(vm.data_gfns))
        else:
            program.invlpg(machine.code_gva)
        if machine.data and vm.percent(50):
            program.load(vm.place(machine.data)[0])
    if vm.percent(40):
        _unmap_code(vm, machine)


def _write_msr(vm: Machines, machine: Machine) -> None:
    """WRMSR to EFER, which may change the MMU's role, or to an MSR that means nothing to it."""
    program = machine.program
    efer = vm.percent(75)
    program.need(RCX, _MSR_EFER if efer else _MSR_KERNEL_GS_BASE)
    program.need(RAX, vm.pick(_EFER) if efer else 1)
    program.need(RDX, 0)
    program.emit(b"\x0f\x30", vm.fep and vm.percent(30))
    if efer and machine.data and vm.percent(50):
        gva, gfn = vm.place(machine.data)
        vm.tables.map(machine.root, gva, gfn, PAGE | NX)


def _port(vm: Machines, machine: Machine) -> None:
    """IN, OUT, REP INS or REP OUTS."""
    program = machine.program
    program.need(RDX, 0x60)
    choice = vm.rng.below(4)
    if choice < 2 or not machine.data:
        program.emit((b"\xec", b"\xee")[choice & 1], vm.fep and vm.percent(30))
        program.forget(RAX)
        return
    pointer = (RDI, RSI)[choice & 1]
    program.need(pointer, vm.place(machine.data)[0])
    program.need(RCX, 2)
    program.emit((b"\xf3\x6c", b"\xf3\x6e")[choice & 1])
    program.forget(pointer)
    program.forget(RCX)


def _unmap_code(vm: Machines, machine: Machine) -> None:
    """Another vCPU takes an entry on the way to the code away."""
    table, _, position = vm.tables.path(machine.root, machine.code_gva)[vm.rng.below(4)]
    writer = vm.flat()
    writer.program.store("mov", table << 12 | position << 3, 0, vm.tables.get(table, position), 0, vm.fep)


def _debug(vm: Machines) -> None:
    """Code breakpoints and single steps over whatever comes: stores to tables, MMIO, faults."""
    machine = vm.paged() if vm.percent(80) else vm.flat()
    program = machine.program
    mode64 = program.mode64
    stepping = vm.percent(50) and len(machine.data) > 0
    if stepping:
        program.need(_RSP, vm.place(machine.data)[0] + 0x800)
        # PUSH 0x102; POPF: TF.
        program.emit(b"\x68\x02\x01\0\0\x9d")
        program.forget(_RSP)
    if not stepping or vm.percent(30):
        # MOV DR0, RAX; MOV DR7, RCX: the breakpoint is on one of the next steps, behind a prefix or not.
        target = machine.code_gva + CODE_SLOT * (len(program.steps) + 1 + vm.rng.below(2))
        program.need(RAX, target + (5 if vm.fep and vm.percent(50) else 0))
        program.need(RCX, 1)
        program.emit(b"\x0f\x23\xc0\x0f\x23\xf9")
    if stepping and vm.percent(40):
        _fault_in_emulator(vm, machine)
    for _ in range(1 + vm.rng.below(3)):
        choice = vm.rng.below(6)
        gva = _victim_page(vm, machine)
        if choice < 3:
            kind = vm.word(("mov", "add", "lock xadd", "xchg"))
            program.store(kind, gva | vm.pick((0, 8, 0xFFC)), 1, 0, 0, vm.fep and vm.percent(60))
        elif choice < 4:
            program.load(gva | 8, vm.fep and vm.percent(60))
        elif choice < 5:
            program.emit(memory_form(b"\x8b", 5, program.address(_device(vm, machine)), mode64, mode64))
            program.forget(5)
        else:
            program.emit((b"\x0f\x0b", b"\xcc", b"\x0f\xa2")[vm.rng.below(3)])
            program.forget(RAX)
            program.forget(RCX)


def _fault_in_emulator(vm: Machines, machine: Machine) -> None:
    """An instruction that only the emulator can execute, as its first page is write-protected or MMIO, and that faults.

    It is a store across the end of that page or a copy from it to a page that is not there, or DIV that overflows.
    """
    program = machine.program
    mode64 = program.mode64
    if not machine.paged or vm.percent(20):
        # DIV of RDX:RAX by an operand that is smaller than RDX.
        program.need(RDX, (1 << 64) - 1)
        program.emit(memory_form(b"\xf7", 6, program.address(_device(vm, machine)), mode64, mode64))
        program.forget(RAX)
        program.forget(RDX)
        return
    first = machine.free_page()
    hole = machine.free_page()
    gfn = vm.pick(MMIO)
    copied = vm.percent(25)
    if not copied and vm.percent(67):
        # Tables above level 1 are write-protected, and what somebody else tracks.
        upper = [table for table in vm.tables.levels if vm.tables.levels[table] > 1]
        gfn = vm.pick(upper if vm.percent(50) else vm.data_gfns)
        if gfn not in upper and gfn not in vm.tracked:
            vm.tracked.append(gfn)
    vm.tables.map(machine.root, first, gfn, PAGE)
    if copied:
        program.string(True, hole | 8, first | 8, 1 + vm.rng.below(2), False)
    else:
        kind = vm.word(("mov", "add", "xchg", "xadd", "or", "mov imm"))
        program.store(kind, hole - 1 - vm.rng.below(3), edge_value(vm.rng), 0)


def _victim_page(vm: Machines, machine: Machine) -> int:
    """A data page, a page table, a tracked page, or nothing at all."""
    choice = vm.rng.below(6)
    if choice < 2 and machine.aliases:
        return vm.place(machine.aliases)[0]
    if choice == 2:
        gva = machine.free_page() if machine.paged else 0x50 << 12
        return gva
    if not machine.data:
        return machine.code_gva
    gva, gfn = vm.place(machine.data)
    if choice == 3 and gfn not in vm.tracked:
        vm.tracked.append(gfn)
    return gva


def _idt(vm: Machines) -> None:
    """A guest with GDT, IDT and handlers takes exceptions and INT n, on a stack that may be a page table."""
    machine = vm.paged()
    program = machine.program
    if not program.mode64:
        _debug(vm)
        return
    load_system_tables(vm, machine)
    stacks = machine.aliases if machine.aliases and vm.percent(25) else machine.data
    if stacks:
        program.need(_RSP, vm.place(stacks)[0] + 0x800)
    for _ in range(1 + vm.rng.below(3)):
        choice = vm.rng.below(8)
        if choice < 2:
            program.emit(b"\x0f\x0b")
        elif choice < 4:
            program.emit(b"\xcd" + bytes((vm.pick((3, 4, 6, 0x20)),)))
        elif choice < 6:
            program.load(machine.free_page(), vm.fep and vm.percent(40))
        elif choice < 7 and machine.aliases:
            program.store("mov", vm.place(machine.aliases)[0] | 0xF00, 0, 0)
        else:
            # MOV CR0, RAX, which KVM does not allow: #GP from an exit handler.
            program.need(RAX, 0)
            program.emit(b"\x0f\x22\xc0")
    program.forget(_RSP)


def load_system_tables(
    vm: Machines, machine: Machine, interrupts: tuple[bytes, ...] = (), descriptors: tuple[int, ...] = _DESCRIPTORS
) -> tuple[int, int]:
    """Give 64-bit code a page with GDT, IDT and handlers, and load its tables; (gva, gfn) of the page.

    ``interrupts`` handle 0x20 and so on. ``descriptors`` are the GDT from selector 0x10 on, which is 64-bit code.
    """
    program = machine.program
    system = machine.free_page()
    frame = vm.map_data(machine, system)
    machine.data.pop()
    vm.tables.map(machine.root, system, frame, P | W | U | 0x60)
    _fill_system_page(vm, system, frame, interrupts, descriptors)
    base = program.address(system)
    # LGDT [base + 0x1f0]; LIDT [base + 0x200].
    program.emit(with_displacement(2, base, 0x1F0))
    program.emit(with_displacement(3, base, 0x200))
    return system, frame


def with_displacement(extension: int, base: int, displacement: int) -> bytes:
    """0F 01 /``extension`` with the operand [``base`` + ``displacement``]."""
    prefix = b"\x41" if base >= 8 else b""
    modrm = 0x80 | extension << 3 | base & 7
    return prefix + bytes((0x0F, 0x01, modrm)) + displacement.to_bytes(4, "little")


def _fill_system_page(
    vm: Machines, gva: int, gfn: int, interrupts: tuple[bytes, ...], descriptors: tuple[int, ...]
) -> None:
    """GDT at 0, the operands of LGDT and LIDT at 0x1F0 and 0x200, IDT at 0x210, handlers behind it."""
    tables = vm.tables
    words = [0, 0, *descriptors]
    for position in range(len(words)):
        tables.set(gfn, position, words[position])
    set_table_register(vm, gfn, 0x1F0, gva, 8 * len(words) - 1)
    vectors = FIRST_INTERRUPT + len(interrupts) if interrupts else _FIRST_VECTORS
    set_table_register(vm, gfn, 0x200, gva + 0x210, 16 * vectors + 0xF)
    # A longer IDT comes to where the handlers are otherwise.
    place = 0x800 if interrupts else 0x400
    for vector in range(_FIRST_VECTORS):
        if vm.percent(15):
            continue
        handler = 1 if vector in _ERROR_CODES else 0
        if vm.percent(3):
            handler = vm.rng.below(len(_HANDLERS))
        _set_gate(vm, gfn, vector, gva + place + 16 * handler)
    handlers = _HANDLERS + interrupts
    for number in range(len(interrupts)):
        _set_gate(vm, gfn, FIRST_INTERRUPT + number, gva + place + 16 * (len(_HANDLERS) + number))
    for handler in range(len(handlers)):
        code = handlers[handler].ljust(16, b"\x90")
        tables.set(gfn, (place + 16 * handler) >> 3, int.from_bytes(code[:8], "little"))
        tables.set(gfn, (place + 8 + 16 * handler) >> 3, int.from_bytes(code[8:], "little"))


def _set_gate(vm: Machines, gfn: int, vector: int, address: int) -> None:
    """An interrupt gate of the IDT at 0x210."""
    low = address & 0xFFFF | 0x10 << 16 | 0x8E << 40 | (address >> 16 & 0xFFFF) << 48
    vm.tables.set(gfn, (0x210 + 16 * vector) >> 3, low)
    vm.tables.set(gfn, (0x218 + 16 * vector) >> 3, address >> 32)


def set_table_register(vm: Machines, gfn: int, offset: int, base: int, limit: int) -> None:
    """The 10 bytes that LGDT or LIDT reads."""
    vm.tables.set(gfn, offset >> 3, limit | (base & 0xFFFFFFFFFFFF) << 16)
    vm.tables.set(gfn, (offset >> 3) + 1, base >> 48)
