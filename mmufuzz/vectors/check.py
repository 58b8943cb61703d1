"""Runs a test vector on the model and says where it ends elsewhere than the CPU did."""

from __future__ import annotations

from typing import Final

from mmufuzz.vectors.vector import Vector
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import MAX_LENGTH, Truncated, Unsupported, decode, decode16
from mmufuzz.x86.event import TripleFault, deliver_exception
from mmufuzz.x86.executor import execute
from mmufuzz.x86.flat_registers import apply_registers, initial_registers, register_values
from mmufuzz.x86.insn import CS, Insn
from mmufuzz.x86.state import VECTOR_GP, Fault, Regs
from mmufuzz.x86.undefined import undefined_flags

_MAX_INSTRUCTIONS: Final = 1000
_WIDE: Final = {name: "e" + name for name in "ax bx cx dx sp bp si di ip flags".split()}  # noqa: SIM905 (names)
# What real-address mode keeps of the flags on every CPU since the 8086.
_FLAGS: Final = 0x0FD5
_IGNORED: Final = ("cr0", "cr3", "dr6", "dr7")


class _Halt(Exception):
    """HLT: the end of a test."""


class SparseBus(Bus):
    """Bytes by address; those that a test does not mention read as zero. Addresses have 32 bits, in 16-bit mode 24."""

    def __init__(self, ram: dict[int, int], width: int) -> None:
        self.ram = dict(ram)
        self.mask = (1 << width) - 1

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """Byte by byte."""
        return sum(self.ram.get(gva + place & self.mask, 0) << 8 * place for place in range(size))

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """Byte by byte."""
        for place in range(size):
            self.ram[gva + place & self.mask] = value >> 8 * place & 0xFF

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """Code bytes."""
        return self.load(regs, gva, size, False, False).to_bytes(size, "little")

    def fence(self, regs: Regs) -> None:
        """One CPU."""

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """Not part of these tests."""
        raise Unsupported

    def invlpg(self, regs: Regs, gva: int) -> None:
        """No TLB."""

    def halt(self, regs: Regs) -> None:
        """The end."""
        raise _Halt


def check(vector: Vector) -> list[str]:
    """Differences between the model's final state and the vector's, one line each; empty if they agree.

    The test runs from its initial state until HLT. Flags that the SDM leaves undefined after the first
    instruction are not compared, nor what the vector's own masks leave out. Raises ``Unsupported``, and
    ``ValueError`` for registers that the mode lacks.
    """
    if vector.unsupported:
        raise Unsupported
    regs = initial_registers(vector.mode)
    values = {_name(vector, name): value for name, value in vector.initial.regs.items() if name not in _IGNORED}
    start = values.pop("rip" if vector.mode == 64 else "eip", 0)
    flags_name = "rflags" if vector.mode == 64 else "eflags"
    if vector.mode == 16:
        values[flags_name] = values.get(flags_name, 0) & 0xFFFF
        regs.idt_limit = 0x3FF
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        if name in values:
            values[name] &= 0xFFFF
    apply_registers(regs, vector.mode, values)
    regs.rip = start
    bus = SparseBus(vector.initial.ram, 24 if vector.mode == 16 else 64)
    undefined = _run(regs, bus)
    return _compare(vector, regs, bus, undefined, flags_name)


def _name(vector: Vector, name: str) -> str:
    """16-bit tests of CPUs before the 386 name 16-bit registers."""
    return _WIDE.get(name, name) if vector.mode == 16 else name


def _run(regs: Regs, bus: SparseBus) -> int:
    """Until HLT; the answer is the mask of flags that the first instruction left undefined."""
    undefined = -1
    for _ in range(_MAX_INSTRUCTIONS):
        before = regs.copy() if undefined < 0 else regs
        try:
            insn = _fetch(regs, bus)
            if undefined < 0:
                undefined = undefined_flags(insn, before)
            execute(regs, insn, bus)
        except _Halt:
            regs.rip += 1
            break
        except Unsupported:
            raise
        except Fault as fault:
            try:
                deliver_exception(regs, bus, fault)
            except TripleFault:
                break
    return max(undefined, 0)


def _fetch(regs: Regs, bus: SparseBus) -> Insn:
    address = regs.rip
    if not regs.long_mode:
        if address > regs.segments[CS].limit:
            raise Fault(VECTOR_GP, 0)
        address += regs.segments[CS].base
    code = bus.fetch(regs, address, MAX_LENGTH)
    try:
        if regs.long_mode:
            return decode(code, True)
        return decode16(code) if regs.code16 else decode(code, False)
    except Truncated as truncated:
        raise AssertionError("15 bytes are always enough") from truncated


def _compare(vector: Vector, regs: Regs, bus: SparseBus, undefined: int, flags_name: str) -> list[str]:
    found = []
    ours = register_values(regs, vector.mode)
    expected = vector.initial.regs | vector.final.regs
    for name, value in expected.items():
        if name in _IGNORED:
            continue
        full = _name(vector, name)
        mask = vector.final.masks.get(name, -1)
        if full == flags_name:
            mask &= ~undefined & (_FLAGS if vector.mode == 16 else 0xFFFFFFFF)
        elif full != name or name in ("cs", "ds", "es", "fs", "gs", "ss"):
            mask &= 0xFFFF
        if (ours[full] ^ value) & mask:
            found.append(f"{name}: expected {value:#x}, got {ours[full]:#x}")
    for address, byte in sorted(vector.final.ram.items()):
        if vector.flags_address <= address < vector.flags_address + 2 and vector.flags_address >= 0:
            continue
        got = bus.ram.get(address, 0)
        if got != byte:
            found.append(f"memory {address:#x}: expected {byte:#04x}, got {got:#04x}")
    return found
