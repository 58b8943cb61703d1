"""A virtual machine under construction: memory layout, page tables, vCPUs. The shapes of ``generate`` fill it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mmufuzz.case.generate_insn import Program
from mmufuzz.case.model import FLAT32, LONG4, NPT4, SC, TSO, ZAP_ALL_FAST, Case, HostThread, Options, Slot, Vcpu
from mmufuzz.case.rng import Rng
from mmufuzz.case.tables import (
    NX,
    PAGE,
    PS,
    RESERVED,
    TABLE,
    A,
    D,
    G,
    P,
    TableBuilder,
    U,
    W,
    entry,
    frame,
    index,
    sign_extend,
)

# Frames of slot 0.
FRAMES: Final = 32
_CODE: Final = 1
_TABLES: Final = list(range(4, 24))
DATA: Final = tuple(range(24, 32))
MMIO: Final = (0x40, 0x41, 0x7F)
"""Frames outside every slot."""
_ODD_SLOT: Final = Slot(0x60, 3)

_CODE_PAGE: Final = 0x10
_ALIAS_PAGE: Final = 0x20
_FREE_PAGE: Final = 0x30
PML4_SPAN: Final = 1 << 39


@dataclass(frozen=True)
class GenerateOptions:
    """What generated Cases may contain. ``max_vcpus`` is 1..3; a shape that needs two makes two all the same."""

    kernel: str = "v6.12"
    revert: tuple[str, ...] = ()
    apply: tuple[str, ...] = ()
    max_vcpus: int = 3
    fep: bool = True
    host: bool = True
    sc: bool = True
    nested: bool = True
    event_limit: int = 20000
    interrupts: bool = False


DEFAULT: Final = GenerateOptions()
CAMPAIGN: Final = GenerateOptions(interrupts=True)
"""What campaigns search."""


class Machine:
    """A vCPU under construction. ``data`` and ``aliases`` are (gva, gfn) of what it can reach."""

    def __init__(self, mode: str, number: int) -> None:
        self.mode = mode
        self.program = Program(mode == LONG4)
        self.code_gfn = _CODE + number
        self.code_gva = self.code_gfn << 12
        self.cpl = 0
        self.flags: list[str] = []
        self.root = 0
        self.data: list[tuple[int, int]] = []
        self.aliases: list[tuple[int, int]] = []
        """Page tables mapped as data."""
        self.pages = _FREE_PAGE

    @property
    def paged(self) -> bool:
        """True with page tables: its own or, for an L2 guest, those of L1's nested paging."""
        return self.mode != FLAT32

    def free_page(self) -> int:
        """A gva below 2 MiB that nothing is mapped at."""
        self.pages += 1
        return (self.pages - 1) << 12

    def vcpu(self) -> Vcpu:
        """The finished vCPU."""
        regs = tuple(self.program.initial.items())
        steps = tuple(self.program.steps)
        return Vcpu(
            self.mode, self.cpl, self.root, tuple(self.flags), self.code_gva, self.code_gfn, regs, steps
        )


class Machines:
    """The VM: what all vCPUs share, and the random choices that build it."""

    def __init__(self, rng: Rng, options: GenerateOptions, nested: int = 12) -> None:
        """``nested``: in how many of a hundred the paging vCPUs are L2 guests."""
        self.rng = rng
        self.options = options
        self.tables = TableBuilder(list(_TABLES))
        self.vcpus: list[Machine] = []
        self.slots = [Slot(0, FRAMES)]
        self.data_gfns = list(DATA)
        self.tracked: list[int] = []
        self.decode_to_skip = False
        self.interrupts: list[str] = []
        """Operations of a host thread of their own."""
        self.fep = options.fep and rng.chance(3, 4)
        self.nested = options.nested and rng.chance(nested, 100)
        if rng.chance(1, 8):
            self.slots.append(Slot(_ODD_SLOT.base_gfn, _ODD_SLOT.npages, rng.chance(1, 2)))
            self.data_gfns.append(_ODD_SLOT.base_gfn + 1)

    # Choices.

    def percent(self, chance: int) -> bool:
        """True that often in a hundred."""
        return self.rng.chance(chance, 100)

    def pick(self, items: list[int] | tuple[int, ...]) -> int:
        """One of the items."""
        return items[self.rng.below(len(items))]

    def word(self, items: list[str] | tuple[str, ...]) -> str:
        """One of the words."""
        return items[self.rng.below(len(items))]

    def place(self, items: list[tuple[int, int]]) -> tuple[int, int]:
        """One of the (gva, gfn) pairs."""
        return items[self.rng.below(len(items))]

    def leaf_flags(self) -> int:
        """Flags of a data page: mostly writable for everybody, A, D and G at random."""
        flags = P | W | U
        if self.percent(12):
            flags ^= W
        if self.percent(10):
            flags ^= U
        if self.percent(60):
            flags |= A
            if self.percent(50):
                flags |= D
        if self.percent(5):
            flags |= G
        if self.percent(15):
            flags |= NX
        return flags

    def table_flags(self) -> int:
        """Flags of an entry that points at a table."""
        flags = P | W | U
        if self.percent(6):
            flags ^= W
        return flags | (A if self.percent(60) else 0)

    # vCPUs.

    def flat(self) -> Machine:
        """A FLAT32 vCPU: guest physical memory is its data, other vCPUs' page tables included."""
        machine = Machine(FLAT32, len(self.vcpus))
        self.vcpus.append(machine)
        machine.data = [(gfn << 12, gfn) for gfn in self.data_gfns]
        return machine

    def paged(self) -> Machine:
        """A LONG4 or NPT4 vCPU with tables of its own, or with another's, whole or in part."""
        machine = Machine(NPT4 if self.nested else LONG4, len(self.vcpus))
        others = [other for other in self.vcpus if other.paged]
        self.vcpus.append(machine)
        machine.code_gva = (_CODE_PAGE + len(self.vcpus)) << 12
        if self.percent(7) and not self.nested:
            machine.cpl = 3
        for flag, chance in (("wp", 85), ("smep", 10), ("smap", 4), ("nx", 90)):
            if self.percent(chance) and not (self.nested and flag != "wp"):
                machine.flags.append(flag)
        if others:
            self._share(machine, others[self.rng.below(len(others))])
        else:
            machine.root = self.tables.table(4)
        code_flags = P | A | (0 if "smep" in machine.flags and machine.cpl == 0 else U)
        if self.percent(50):
            code_flags |= W
        self.tables.map(machine.root, machine.code_gva, machine.code_gfn, code_flags, self.table_flags())
        for _ in range(1 + self.rng.below(2)):
            self.map_data(machine, machine.free_page())
        self._alias(machine)
        return machine

    def _share(self, machine: Machine, other: Machine) -> None:
        """Take over all of the other's tables, or a lower one under a root of its own, or nothing."""
        tables = self.tables
        machine.pages += 4 * len(self.vcpus)
        choice = self.rng.below(10)
        if choice < 4:
            machine.root = other.root
            machine.aliases = list(other.aliases)
            machine.data = list(other.data)
            return
        machine.root = tables.table(4)
        if choice < 7:
            shared = frame(tables.get(other.root, 0))
            flags = self.table_flags()
            if self.percent(50):
                position = index(other.code_gva, 3)
                low = tables.get(shared, position)
                if low & P and not low & PS:
                    pointers = tables.table(3)
                    tables.set(machine.root, 0, entry(pointers, TABLE))
                    tables.set(pointers, position, entry(frame(low), flags))
            else:
                tables.set(machine.root, 0, entry(shared, flags))
            machine.aliases = [pair for pair in other.aliases if pair[0] < PML4_SPAN]
            machine.data = [pair for pair in other.data if pair[0] < PML4_SPAN]

    def map_data(self, machine: Machine, gva: int, gfn: int = -1) -> int:
        """Map a data page at ``gva``; the gfn."""
        if gfn < 0:
            gfn = self.pick(self.data_gfns)
        flags = self.leaf_flags() & ~NX if "nx" not in machine.flags else self.leaf_flags()
        self.tables.map(machine.root, gva, gfn, flags, self.table_flags())
        machine.data.append((gva, gfn))
        return gfn

    def alias(self, machine: Machine, gfn: int) -> int:
        """A gva at which ``machine`` can write frame ``gfn``."""
        for gva, known in machine.aliases:
            if known == gfn:
                return gva
        gva = (_ALIAS_PAGE + gfn) << 12
        flags = PAGE if self.percent(60) else P | W | U
        self.tables.map(machine.root, gva, gfn, flags)
        machine.aliases.append((gva, gfn))
        return gva

    def _alias(self, machine: Machine) -> None:
        """Map page tables as data, in the ways guests do it and in some they do not."""
        tables = self.tables
        for table, _, _ in tables.path(machine.root, machine.code_gva):
            if self.percent(30):
                self.alias(machine, table)
        if self.percent(15) and not self.nested:
            position = self.pick((1, 255, 256, 511))
            tables.set(machine.root, position, entry(machine.root, self.table_flags()))
            # Three steps through the self-map and one through entry 0 show the table below the root, four the root.
            below = position << 39 | position << 30 | position << 21
            machine.aliases.append((sign_extend(below | position << 12), machine.root))
            machine.aliases.append((sign_extend(below), frame(tables.get(machine.root, 0))))
        if self.percent(12) and machine.data and not self.nested:
            # One table under two parents, one of them read-only or for the supervisor alone.
            flags = TABLE & ~self.pick((W, U, 0))
            tables.set(machine.root, 2, entry(frame(tables.get(machine.root, 0)), flags))
            gva, gfn = self.place(machine.data)
            if gva < PML4_SPAN:
                machine.data.append((gva | 2 * PML4_SPAN, gfn))
        if self.percent(10):
            # A 2M page over all of slot 0: every frame has one more alias.
            base = 5 << 21
            tables.map(machine.root, base, 0, self.leaf_flags() & ~NX | PS, TABLE, 2)
            machine.aliases.append((base | machine.root << 12, machine.root))
            gfn = self.pick(self.data_gfns[:8])
            machine.data.append((base | gfn << 12, gfn))

    # Page-table entries as targets.

    def new_entry(self, old: int, level: int, gva: int = 0) -> int:
        """A value for a store over the entry ``old`` of ``level``: gone, elsewhere, with other rights, or the same.

        Elsewhere means another page for ``gva``.
        """
        choice = self.rng.below(100)
        if choice < 25:
            return 0
        if choice < 60:
            return self.elsewhere(old, level, gva)
        if choice < 70:
            return old ^ W
        if choice < 76:
            return old ^ U
        if choice < 84:
            return old ^ self.pick((A, D, A | D))
        if choice < 87:
            return old ^ NX
        if choice < 90:
            return old | self.pick((RESERVED, PS))
        return old

    def elsewhere(self, old: int, level: int, gva: int) -> int:
        """The entry ``old`` with another frame: for a table, one that maps ``gva`` to another page."""
        flags = old & (0xFFF | NX) | P
        if level == 1:
            return entry(self.pick(self.data_gfns), flags)
        tables = self.tables
        same_level = [gfn for gfn in tables.levels if tables.levels[gfn] == level - 1 and gfn != frame(old)]
        if same_level and (self.percent(30) or len(tables.pool) < 3):
            return entry(self.pick(same_level), flags)
        if len(tables.pool) < 3:
            return entry(self.pick(self.data_gfns), flags)
        return entry(self.twin(frame(old), level - 1, gva), flags)

    def twin(self, table: int, level: int, gva: int) -> int:
        """A copy of ``table`` that maps ``gva`` to another page, by tables of its own."""
        tables = self.tables
        copy = tables.table(level)
        for position in tables.used(table):
            value = tables.get(table, position)
            if position == index(gva, level) and value & P and not value & PS:
                if level == 1:
                    value = entry(self.pick(self.data_gfns), value & (0xFFF | NX))
                elif tables.pool:
                    value = entry(self.twin(frame(value), level - 1, gva), value & (0xFFF | NX))
            tables.set(copy, position, value)
        return copy

    def finish(self) -> Case:
        """The Case, with a host thread and small budgets now and then."""
        options = self.options
        host: list[HostThread] = []
        if options.host and self.percent(15):
            host.append(HostThread((ZAP_ALL_FAST,) * (1 + self.rng.below(2))))
        if self.interrupts:
            host.append(HostThread(tuple(self.interrupts)))
        pages = self.pick((20, 22, 24)) if self.percent(6) else 64
        memory_model = SC if options.sc and self.percent(8) else TSO
        return Case(
            kernel=options.kernel,
            revert=options.revert,
            apply=options.apply,
            memory_model=memory_model,
            options=Options(self.fep, pages, tuple(self.tracked), options.event_limit, self.decode_to_skip),
            slots=tuple(self.slots),
            memory=self.tables.memory(),
            vcpus=tuple([machine.vcpu() for machine in self.vcpus]),
            host=tuple(host),
        )
