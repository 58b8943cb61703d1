"""Running code without a hypervisor: flat memory, one CPU, no paging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import MAX_LENGTH, Truncated, Unsupported, decode, decode16
from mmufuzz.x86.event import TripleFault, deliver, deliver_exception
from mmufuzz.x86.executor import execute as execute_insn
from mmufuzz.x86.flat_registers import apply_registers, initial_registers, register_values
from mmufuzz.x86.insn import CS, Insn
from mmufuzz.x86.segments import refresh
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    FLAG_IF,
    MSR_TSC,
    NO_ERROR_CODE,
    VECTOR_GP,
    Fault,
    Regs,
)

STOP_END: Final = "end"
STOP_LIMIT: Final = "limit"
STOP_HALT: Final = "halt"
STOP_EXCEPTION: Final = "exception"
STOP_SHUTDOWN: Final = "shutdown"
STOP_UNMAPPED: Final = "unmapped"
STOP_UNSUPPORTED: Final = "unsupported"

_CR0_CD: Final = 1 << 30
_CR0_NW: Final = 1 << 29


@mypyc_attr(native_class=False)
class Unmapped(Exception):
    """An access to an address that the caller gave no memory for."""

    def __init__(self, address: int) -> None:
        super().__init__(address)
        self.address = address


@mypyc_attr(native_class=False)
class Halted(Exception):
    """HLT."""


class Region:
    """Bytes of memory from ``start`` to ``end``, kept as aligned 64-bit words: what most accesses touch one of."""

    def __init__(self, start: int, data: bytes) -> None:
        self.start = start
        self.end = start + len(data)
        self.base = start & ~7
        padded = bytes(start & 7) + data + bytes(7)
        self.words: list[int] = [
            int.from_bytes(padded[place : place + 8], "little") for place in range(0, len(padded) - 7, 8)
        ]
        self.code_start = self.end
        self.code_end = start
        """Instructions between these two have been decoded and are remembered."""

    def load(self, gva: int, size: int) -> int:
        """``size`` bytes, all of them inside."""
        offset = gva - self.base
        index = offset >> 3
        shift = (offset & 7) << 3
        if shift + (size << 3) <= 64:
            if size == 8:
                return self.words[index]
            return self.words[index] >> shift & (1 << (size << 3)) - 1
        value = self.words[index] >> shift
        done = 64 - shift
        while done < size << 3:
            index += 1
            value |= self.words[index] << done
            done += 64
        return value & (1 << (size << 3)) - 1

    def store(self, gva: int, size: int, value: int) -> None:
        """``size`` bytes, all of them inside."""
        offset = gva - self.base
        index = offset >> 3
        shift = (offset & 7) << 3
        if size == 8 and shift == 0:
            self.words[index] = value
            return
        left = size << 3
        while left > 0:
            count = min(left, 64 - shift)
            ones = (1 << count) - 1
            word = self.words[index]
            self.words[index] = word ^ ((word >> shift ^ value) & ones) << shift
            value >>= count
            left -= count
            shift = 0
            index += 1

    def contents(self) -> bytes:
        """All bytes."""
        whole = b"".join([word.to_bytes(8, "little") for word in self.words])
        return whole[self.start - self.base : self.end - self.base]


class FlatBus(Bus):
    """Memory in regions that do not overlap; everything else of the machine is as ``Bus`` has it."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions
        self.last = regions[0]
        self.decoded64: dict[int, Insn] = {}
        self.decoded32: dict[int, Insn] = {}
        self.decoded16: dict[int, Insn] = {}
        """Instructions by linear address and code size, until a store hits decoded code."""

    def look_up(self, gva: int) -> Region | None:
        """The region that holds ``gva``."""
        last = self.last
        if last.start <= gva < last.end:
            return last
        for region in self.regions:
            if region.start <= gva < region.end:
                self.last = region
                return region
        return None

    def find(self, gva: int) -> Region:
        """The region that holds ``gva``; raises ``Unmapped``."""
        region = self.look_up(gva)
        if region is None:
            raise Unmapped(gva)
        return region

    def forget_code(self) -> None:
        """The program changed itself."""
        self.decoded64.clear()
        self.decoded32.clear()
        self.decoded16.clear()
        for region in self.regions:
            region.code_start = region.end
            region.code_end = region.start

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """Bytes of one region, or of two that touch."""
        region = self.find(gva)
        if gva + size <= region.end:
            return region.load(gva, size)
        value = 0
        for place in range(size):
            value |= self.find(gva + place).load(gva + place, 1) << 8 * place
        return value

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """All bytes or, if one of them is unmapped, none."""
        region = self.find(gva)
        if gva + size <= region.end:
            if gva < region.code_end and gva + size > region.code_start:
                self.forget_code()
            region.store(gva, size, value)
            return
        for place in range(size):
            self.find(gva + place)
        self.forget_code()
        for place in range(size):
            self.find(gva + place).store(gva + place, 1, value >> 8 * place & 0xFF)

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """At most ``size`` code bytes: fewer where memory ends."""
        code = b""
        region: Region | None = self.find(gva)
        while region is not None:
            at = gva + len(code)
            count = min(size - len(code), region.end - at)
            code += region.load(at, count).to_bytes(count, "little")
            region.code_start = min(region.code_start, at)
            region.code_end = max(region.code_end, at + count)
            if len(code) == size:
                break
            region = self.look_up(gva + len(code))
        return code

    def fence(self, regs: Regs) -> None:
        """One CPU sees its own stores."""

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """CR0, CR3, CR4, with the checks of CR0 (SDM vol. 3, 2.5). Paging is not modelled here."""
        if number == 3:
            regs.cr3 = value
        elif number == 4:
            regs.cr4 = value
        else:
            if value & CR0_PG:
                raise Unsupported
            if value >> 32 or (value & _CR0_NW and not value & _CR0_CD):
                raise Fault(VECTOR_GP, 0)
            if not value & CR0_PE and regs.long_mode:
                raise Fault(VECTOR_GP, 0)
            regs.cr0 = value
            refresh(regs)

    def invlpg(self, regs: Regs, gva: int) -> None:
        """There is no TLB."""

    def halt(self, regs: Regs) -> None:
        """Ends the run."""
        raise Halted


class Execution:
    """How a run of ``execute`` ended.

    ``registers`` are by name, those of the mode; ``memory`` holds the regions by their start, the code among them.
    ``stop`` is why: "end" (RIP came to the end of the code), "limit" (``max_instructions``), "halt", "exception" (one
    that the guest has no IDT for: ``vector``, ``error_code`` or -1, and for #PF ``address``), "shutdown" (a triple
    fault), "unmapped" (an access to ``address``, which no memory was given for), or "unsupported" (the model lacks the
    instruction or the task switch). ``instructions`` counts those that retired.
    """

    def __init__(self, regs: Regs, mode: int) -> None:
        self.regs = regs
        self.mode = mode
        self.registers: dict[str, int] = {}
        self.memory: dict[int, bytes] = {}
        self.stop = STOP_LIMIT
        self.vector = -1
        self.error_code = NO_ERROR_CODE
        self.address = -1
        self.instructions = 0


class Machine:
    """A CPU on flat memory that can be run piece by piece."""

    def __init__(self, regs: Regs, regions: list[Region], mode: int) -> None:
        self.regs = regs
        self.bus = FlatBus(regions)
        self.mode = mode
        self.interrupts: list[tuple[int, int]] = []
        """(retired instructions, vector) in order: external interrupts that become pending then."""

    def fetch(self) -> Insn:
        """The instruction at CS:RIP."""
        regs = self.regs
        bus = self.bus
        address = regs.rip
        if regs.long_mode:
            decoded = bus.decoded64
        else:
            code_segment = regs.segments[CS]
            if address > code_segment.limit:
                raise Fault(VECTOR_GP, 0)
            address = address + code_segment.base & 0xFFFFFFFF
            decoded = bus.decoded16 if regs.code16 else bus.decoded32
        known = decoded.get(address)
        if known is not None:
            return known
        code = bus.fetch(regs, address, MAX_LENGTH)
        try:
            if regs.long_mode:
                insn = decode(code, True)
            else:
                insn = decode16(code) if regs.code16 else decode(code, False)
        except Truncated as truncated:
            raise Unmapped(address + len(code)) from truncated
        decoded[address] = insn
        return insn

    def run(self, end: int, limit: int) -> Execution:
        """Until RIP is ``end`` (-1: no such place), ``limit`` instructions have retired, or something stops the CPU."""
        regs = self.regs
        bus = self.bus
        made = Execution(regs, self.mode)
        count = 0
        length = 0
        try:
            while count < limit:
                if regs.rip == end:
                    made.stop = STOP_END
                    break
                try:
                    if self.interrupts and self.interrupts[0][0] <= count and regs.rflags & FLAG_IF and not regs.shadow:
                        deliver(regs, bus, self.interrupts.pop(0)[1], NO_ERROR_CODE, regs.rip, False)
                    insn = self.fetch()
                    length = insn.length
                    execute_insn(regs, insn, bus)
                except Unsupported:
                    raise
                except Fault as fault:
                    if regs.idt_limit == 0:
                        raise
                    deliver_exception(regs, bus, fault)
                    continue
                count += 1
        except Halted:
            made.stop = STOP_HALT
            regs.rip += length
            count += 1
        except Unmapped as unmapped:
            made.stop = STOP_UNMAPPED
            made.address = unmapped.address
        except Unsupported:
            made.stop = STOP_UNSUPPORTED
        except TripleFault:
            made.stop = STOP_SHUTDOWN
        except Fault as fault:
            made.stop = STOP_EXCEPTION
            made.vector = fault.vector
            made.error_code = fault.error_code
            made.address = fault.address
        made.instructions = count
        made.registers = register_values(regs, self.mode)
        for region in bus.regions:
            made.memory[region.start] = region.contents()
        return made


def make_regions(code: bytes, origin: int, memory: Mapping[int, bytes], width: int) -> list[Region]:
    """The code and the caller's memory, checked to lie in ``width`` bits of address and not to overlap."""
    regions = [Region(origin, code)]
    for start in sorted(memory):
        if memory[start]:
            regions.append(Region(start, memory[start]))
    ordered = sorted(regions, key=_start)
    for place, region in enumerate(ordered):
        if region.start < 0 or region.end > 1 << width:
            raise ValueError(f"memory at {region.start:#x}: expected addresses below {1 << width:#x}")
        if place and ordered[place - 1].end > region.start:
            raise ValueError(f"memory at {region.start:#x} overlaps that at {ordered[place - 1].start:#x}")
    return regions


def _start(region: Region) -> int:
    return region.start


def execute(
    code: bytes,
    *,
    mode: int = 64,
    registers: Mapping[str, int] | Regs | None = None,
    memory: Mapping[int, bytes] | None = None,
    origin: int = 0x1000,
    max_instructions: int = 1000,
    interrupts: Mapping[int, int] | None = None,
    tsc: int = 0,
) -> Execution:
    """Run ``code``, placed at the linear address ``origin``, on a CPU of its own; see ``Execution`` for the answer.

    ``mode`` is 64 (long mode, without paging), 32 (protected mode) or 16 (real-address mode); code runs at CPL 0 in
    flat segments (in 16-bit mode at base 0). ``registers`` are by name ("rax", "eflags", "xmm3", "fs_base", "cr4",
    "idt_base", …: docs/reference/execute.md), the rest start at zero; or a ``Regs``, which is copied and whose RIP is
    set to ``origin``. ``memory`` maps addresses to contents; the code is memory too, and may change itself.
    ``interrupts`` maps numbers of retired instructions to the vectors of external interrupts, taken when RFLAGS.IF
    and the interrupt shadow allow. ``tsc`` is what RDTSC reads.

    Exceptions go through the IDT if its limit is not 0 and end the run otherwise. Raises ``ValueError`` for a
    register that the mode lacks, a value that does not fit, or memory that overlaps.
    """
    if mode not in (64, 32, 16):
        raise ValueError(f"mode {mode}: expected 64, 32 or 16")
    if not code:
        raise ValueError("code: expected at least one byte")
    if isinstance(registers, Regs):
        regs = registers.copy()
    else:
        regs = initial_registers(mode)
        if registers is not None:
            apply_registers(regs, mode, registers)
    regs.rip = origin
    if tsc:
        regs.msr[MSR_TSC] = tsc
    machine = Machine(regs, make_regions(code, origin, memory or {}, 64 if mode == 64 else 32), mode)
    if interrupts is not None:
        for number in sorted(interrupts):
            machine.interrupts.append((number, interrupts[number]))
    return machine.run(origin + len(code), max_instructions)
