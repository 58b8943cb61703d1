"""Random Cases, weighted towards what makes shadow paging hard.

Each Case has one *shape*, a small scene known to be delicate (a page table that is written while it comes into use, a
store that KVM cannot emulate to a table the vCPU itself needs, …), dressed in random tables, values and neighbours.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.generate_emulate import emulate_scene
from mmufuzz.case.generate_exits import exits_scene
from mmufuzz.case.generate_insn import PLAIN, RMW, UNEMULATED, VECTOR
from mmufuzz.case.generate_irq import interrupt_scene
from mmufuzz.case.generate_segments import segments_scene
from mmufuzz.case.generate_vm import CAMPAIGN, DEFAULT, MMIO, PML4_SPAN, GenerateOptions, Machine, Machines
from mmufuzz.case.model import Case
from mmufuzz.case.mutate import mutate, splice
from mmufuzz.case.repair import repair
from mmufuzz.case.rng import Rng
from mmufuzz.case.tables import A, P, U, W, entry

__all__ = [
    "CAMPAIGN",
    "DEFAULT",
    "INTERRUPT",
    "SHAPES",
    "GenerateOptions",
    "generate",
    "generate_shape",
    "mutate",
    "splice",
]

ROOT_RACE: Final = "root-race"  # FLAT32 stores into the root of a paging vCPU that is about to use it
TABLE_RACE: Final = "table-race"  # the same with a table below the root
OWN_TABLE: Final = "own-table"  # a vCPU stores into a table its own code is mapped by
MMIO_ACCESS: Final = "mmio"  # an access outside every slot that KVM may be unable to emulate
FOREIGN_TABLE: Final = "foreign-table"  # FLAT32 stores, not to be emulated, into another vCPU's table
WRITE_TRACK: Final = "write-track"  # stores to a frame that an external user tracks
FREE: Final = "free"
SEGMENTS: Final = "segments"  # segment loads and fast system calls, emulated, in code of every size and privilege
EMULATE: Final = "emulate"  # any instruction at all, emulated
EXITS: Final = "exits"  # MMIO, ports, breakpoints, exceptions: what exits, and how KVM completes it

SHAPES: Final = (
    (ROOT_RACE, 18),
    (TABLE_RACE, 12),
    (OWN_TABLE, 18),
    (MMIO_ACCESS, 7),
    (FOREIGN_TABLE, 12),
    (WRITE_TRACK, 8),
    (FREE, 6),
    (SEGMENTS, 5),
    (EMULATE, 4),
    (EXITS, 10),
)
"""Shapes and how many of a hundred Cases have them."""

INTERRUPT: Final = "interrupt"  # external interrupts for a guest with an IDT
INTERRUPTS: Final = 5
"""Cases of a hundred that have this shape, if interrupts are asked for."""

NESTED_ROOT_RACE: Final = 50
"""Root races, of a hundred, that are on L1's nested page table.

KVM write-protects a guest's own root before the guest runs, but L1's, below a pass-through root, only in the page fault
that first reads it.
"""


def generate(rng: Rng, options: GenerateOptions = DEFAULT) -> Case:
    """A random valid Case."""
    if options.interrupts and rng.chance(INTERRUPTS, 100):
        return generate_shape(rng, INTERRUPT, options)
    choice = rng.below(100)
    for shape, weight in SHAPES:
        choice -= weight
        if choice < 0:
            return generate_shape(rng, shape, options)
    return generate_shape(rng, FREE, options)


def generate_shape(rng: Rng, shape: str, options: GenerateOptions = DEFAULT) -> Case:
    """A random valid Case of one shape."""
    # What is not modelled of L2 guests: interrupts.
    nested = NESTED_ROOT_RACE if shape == ROOT_RACE else 0 if shape == INTERRUPT else 12
    vm = Machines(rng, options, nested)
    if shape == ROOT_RACE:
        _race(vm, 4)
    elif shape == TABLE_RACE:
        _race(vm, 1 + rng.below(3))
    elif shape == OWN_TABLE:
        _own_table(vm)
    elif shape == MMIO_ACCESS:
        _mmio(vm)
    elif shape == FOREIGN_TABLE:
        _foreign_table(vm)
    elif shape == WRITE_TRACK:
        _write_track(vm)
    elif shape == EMULATE:
        emulate_scene(vm)
    elif shape == EXITS:
        exits_scene(vm)
    elif shape == INTERRUPT:
        interrupt_scene(vm)
    elif shape == SEGMENTS:
        segments_scene(vm)
    else:
        _free(vm)
    if shape != FREE and vm.percent(20):
        _step(vm, vm.vcpus[rng.below(len(vm.vcpus))])
    if vm.percent(6) and len(vm.vcpus) < options.max_vcpus:
        _bystander(vm)
    return repair(vm.finish())


def _victim(vm: Machines, machine: Machine, level: int) -> tuple[int, int, int]:
    """Map a page through an entry of ``level`` that the code does not need; (gva, table, index) of the entry."""
    gva = machine.free_page()
    # L2 has 32-bit addresses and so only one entry in the root.
    if level > 1 and not (vm.nested and level == 4) and vm.percent(85):
        gva |= (1 + vm.rng.below(3)) << (12 + 9 * (level - 1))
    vm.map_data(machine, gva)
    for table, depth, position in vm.tables.path(machine.root, gva):
        if depth == level:
            return gva, table, position
    return gva, machine.root, gva >> 39 & 511


def _loads(vm: Machines, machine: Machine, gva: int) -> None:
    """Load through an entry that somebody changes: once or twice, with or without an invalidation between."""
    machine.program.load(gva)
    if vm.percent(65):
        choice = vm.rng.below(10)
        if choice < 3:
            machine.program.invlpg(gva)
        elif choice < 5 and not vm.nested:
            machine.program.load_cr3(machine.root)
        elif choice < 6:
            machine.program.fence()
        machine.program.load(gva)


def _race(vm: Machines, level: int) -> None:
    """vCPU0 stores an entry of ``level`` that vCPU1 loads through, by the emulator if the VM has the prefix."""
    writer = vm.flat()
    vm.fep = vm.options.fep
    reader = vm.paged()
    gva, table, position = _victim(vm, reader, level)
    old = vm.tables.get(table, position)
    address = table << 12 | position << 3
    value = vm.new_entry(old, level, gva)
    if vm.percent(15) and gva >> 12 + 9 * (level - 1):
        # The other way round: an entry appears.
        vm.tables.set(table, position, 0)
        old, value = 0, old
    kind = vm.word(PLAIN) if vm.percent(80) else vm.word(RMW)
    fep = vm.fep and vm.percent(92)
    writer.program.store(kind, address, value, old, 0, fep)
    if vm.percent(25):
        writer.program.store("mov", address, old if vm.percent(50) else vm.new_entry(old, level, gva), value, 0, fep)
    _loads(vm, reader, gva)


def _target_word(vm: Machines, machine: Machine, table: int, level: int) -> tuple[int, int]:
    """(index, value): an entry of ``table`` to store to, and what to store."""
    used = vm.tables.used(table)
    if vm.percent(50) or not used:
        # A free entry: the table stays as good as it was, which is when the guest has every right to get through.
        position = 300 + vm.rng.below(100)
        return position, vm.pick((0, 1, entry(vm.pick(vm.data_gfns), P | W | U | A)))
    position = vm.pick(used)
    old = vm.tables.get(table, position)
    steps = vm.tables.path(machine.root, machine.code_gva)
    for step_table, _, step_position in steps:
        if step_table == table and step_position == position:
            # The entry the code is fetched through: keep it good more often than not.
            return position, old ^ vm.pick((0, 0, A, W)) if vm.percent(80) else 0
    return position, vm.new_entry(old, level)


def _store_word(vm: Machines, machine: Machine, kind: str, gva: int, gfn: int, position: int, value: int) -> None:
    """Store ``value`` to a word of frame ``gfn``, which ``machine`` sees at page ``gva``."""
    tables = vm.tables
    fep = vm.fep and vm.percent(10)
    if kind in VECTOR and machine.data and vm.percent(50):
        source, frame = vm.place(machine.data)
        slot = 2 * vm.rng.below(8)
        if gfn != frame:
            tables.set(frame, slot, value)
            machine.program.vector(source | slot << 3)
    old = tables.get(gfn, position)
    machine.program.store(kind, gva | position << 3, value, old, tables.get(gfn, position ^ 1), fep)


def _own_table(vm: Machines) -> None:
    """A vCPU stores into its own root, or into a table that maps its own code."""
    machine = vm.paged()
    path = vm.tables.path(machine.root, machine.code_gva)
    table, level, _ = path[0] if vm.percent(50) else path[vm.rng.below(len(path))]
    gva = vm.alias(machine, table)
    for _ in range(1 if vm.percent(70) else 2):
        position, value = _target_word(vm, machine, table, level)
        choice = vm.rng.below(10)
        kind = vm.word(UNEMULATED if choice < 6 else RMW if choice < 9 else PLAIN)
        _store_word(vm, machine, kind, gva, table, position, value)
        if vm.percent(30) and machine.data:
            machine.program.load(vm.place(machine.data)[0])
    if vm.percent(30) and vm.options.max_vcpus > 1:
        other = vm.paged()
        _step(vm, other)


def _mmio(vm: Machines) -> None:
    """An access outside every slot; what KVM cannot emulate there it must report and not retry for ever."""
    machine = vm.paged() if vm.percent(60) else vm.flat()
    gfn = vm.pick(MMIO)
    gva = gfn << 12
    if machine.paged:
        gva = machine.free_page()
        vm.map_data(machine, gva, gfn)
        machine.data.pop()
    if vm.percent(40):
        _step(vm, machine)
    choice = vm.rng.below(10)
    gva |= 16 * vm.rng.below(4)
    if choice < 6:
        machine.program.store(vm.word(UNEMULATED), gva, 0, 0)
    elif choice < 8:
        machine.program.load_unemulated(gva)
    else:
        machine.program.store(vm.word(PLAIN + RMW), gva, 1, 0, 0, vm.fep and vm.percent(30))
    if vm.percent(40):
        _step(vm, machine)


def _foreign_table(vm: Machines) -> None:
    """A FLAT32 vCPU stores into a frame that is a page table of another vCPU; KVM cannot emulate the store."""
    writer = vm.flat()
    reader = vm.paged()
    level = 1 + vm.rng.below(4)
    gva, table, position = _victim(vm, reader, level)
    old = vm.tables.get(table, position)
    for _ in range(1 if vm.percent(70) else 2):
        kind = vm.word(UNEMULATED if vm.percent(80) else RMW)
        if vm.percent(50):
            _store_word(vm, writer, kind, table << 12, table, position, vm.new_entry(old, level, gva))
        else:
            free = 300 + vm.rng.below(100)
            _store_word(vm, writer, kind, table << 12, table, free, vm.pick((0, 1)))
    _loads(vm, reader, gva)


def _write_track(vm: Machines) -> None:
    """Stores to a frame under external write tracking: data, or a page table as well."""
    machine = vm.paged() if vm.percent(65) else vm.flat()
    if machine.paged and vm.percent(30):
        table, level, _ = vm.tables.path(machine.root, machine.code_gva)[vm.rng.below(4)]
        gva, gfn = vm.alias(machine, table), table
        position, value = _target_word(vm, machine, table, level)
    else:
        if machine.paged:
            vm.map_data(machine, machine.free_page())
        gva, gfn = vm.place(machine.data)
        position, value = 2 * vm.rng.below(4), vm.pick((0, 1, 0x1234))
    vm.tracked.append(gfn)
    choice = vm.rng.below(10)
    kind = vm.word(UNEMULATED if choice < 5 else RMW if choice < 9 else PLAIN)
    _store_word(vm, machine, kind, gva, gfn, position, value)
    if vm.percent(30):
        _step(vm, machine)


def _free(vm: Machines) -> None:
    """Anything: 1..3 vCPUs of 1..5 random instructions each."""
    count = 1 + vm.rng.below(vm.options.max_vcpus)
    flats = 0
    for _ in range(count):
        if vm.percent(35) and flats == 0:
            flats += 1
            vm.flat()
        else:
            vm.paged()
    for machine in vm.vcpus:
        for _ in range(1 + vm.rng.below(5)):
            _step(vm, machine)


def _bystander(vm: Machines) -> None:
    """Another vCPU that does something else."""
    machine = vm.paged() if vm.percent(50) else vm.flat()
    _step(vm, machine)


def _step(vm: Machines, machine: Machine) -> None:
    """One random instruction."""
    choice = vm.rng.below(100)
    program = machine.program
    if choice < 25:
        _random_load(vm, machine)
    elif choice < 72:
        _random_store(vm, machine)
    elif choice < 80 and machine.paged:
        pairs = machine.data + machine.aliases
        program.invlpg(vm.place(pairs)[0] if pairs else machine.code_gva)
    elif choice < 86 and machine.program.mode64:
        roots = [gfn for gfn in vm.tables.levels if vm.tables.levels[gfn] == 4]
        program.load_cr3(machine.root if vm.percent(70) else vm.pick(roots))
    elif choice < 92:
        pairs = machine.data + machine.aliases
        if pairs:
            source = vm.place(machine.data)[0] if machine.data else vm.place(pairs)[0]
            destination = vm.place(pairs)[0] | 8 * vm.rng.below(4)
            program.string(vm.percent(50), destination, source, 1 + vm.rng.below(3), vm.fep and vm.percent(20))
    elif choice < 96:
        program.fence()
    elif choice < 98:
        program.undefined()
    else:
        program.halt()


def _random_load(vm: Machines, machine: Machine) -> None:
    pairs = machine.aliases if machine.aliases and vm.percent(25) else machine.data
    if pairs:
        machine.program.load(vm.place(pairs)[0] | 8 * vm.rng.below(4), vm.fep and vm.percent(15))


def _random_store(vm: Machines, machine: Machine) -> None:
    """A store to a page-table word that is mapped as data, or to plain data."""
    choice = vm.rng.below(10)
    kind = vm.word(PLAIN if choice < 5 else RMW if choice < 8 else UNEMULATED)
    levels = vm.tables.levels
    if machine.paged and machine.aliases and vm.percent(65):
        gva, gfn = vm.place(machine.aliases)
        position, value = _target_word(vm, machine, gfn, levels.get(gfn, 1))
        _store_word(vm, machine, kind, gva, gfn, position, value)
    elif not machine.paged and levels and vm.percent(65):
        gfn = vm.pick(list(levels))
        used = vm.tables.used(gfn)
        position = vm.pick(used) if used else 0
        value = vm.new_entry(vm.tables.get(gfn, position), levels[gfn])
        _store_word(vm, machine, kind, gfn << 12, gfn, position, value)
    elif machine.data:
        gva, gfn = vm.place(machine.data)
        value = vm.pick((0, 1, entry(vm.pick(vm.data_gfns), P | W | U | A)))
        _store_word(vm, machine, kind, gva, gfn, 2 * vm.rng.below(4), value)
    if vm.percent(20):
        for other in vm.vcpus:
            if other is not machine and other.paged and other.data:
                gva = vm.place(other.data)[0]
                other.program.load(gva if gva < PML4_SPAN or vm.percent(50) else gva & (PML4_SPAN - 1))
