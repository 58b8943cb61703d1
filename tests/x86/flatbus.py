"""A Bus over flat bytes, with a log of what went over it and ranges that fault, and a machine to run on it."""

from __future__ import annotations

from mmufuzz.x86.asm import assemble
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import decode
from mmufuzz.x86.executor import execute
from mmufuzz.x86.state import EFER_LMA, VECTOR_PF, Fault, Regs

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
DATA = 0x1000


class FlatBus(Bus):
    """Memory from ``base`` on. Addresses outside it, and those that ``deny`` was told, raise #PF."""

    def __init__(self, size: int, base: int = 0) -> None:
        self.memory = bytearray(size)
        self.base = base
        self.log: list[tuple[object, ...]] = []
        self.no_load: list[range] = []
        self.no_store: list[range] = []

    def deny(self, start: int, end: int, load: bool = True, store: bool = True) -> None:
        """Make ``start`` <= gva < ``end`` fault on loads, stores or both."""
        if load:
            self.no_load.append(range(start, end))
        if store:
            self.no_store.append(range(start, end))

    def peek(self, gva: int, size: int) -> int:
        """Memory contents, without going over the bus."""
        return int.from_bytes(self.memory[gva - self.base : gva - self.base + size], "little")

    def poke(self, gva: int, size: int, value: int) -> None:
        """Set memory contents, without going over the bus."""
        self.memory[gva - self.base : gva - self.base + size] = value.to_bytes(size, "little")

    def _check(self, gva: int, size: int, denied: list[range], error_code: int) -> None:
        for byte in range(gva, gva + size):
            if not self.base <= byte < self.base + len(self.memory) or any(byte in part for part in denied):
                raise Fault(VECTOR_PF, error_code, byte)

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        self.log.append(("load", gva, size, rmw, locked))
        self._check(gva, size, self.no_load, 0)
        if rmw:
            self._check(gva, size, self.no_store, 2)
        return self.peek(gva, size)

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        assert 0 <= value < 1 << 8 * size
        self.log.append(("store", gva, size, value, locked))
        self._check(gva, size, self.no_store, 2)
        self.poke(gva, size, value)

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        raise AssertionError("execute() gets a decoded instruction")

    def fence(self, regs: Regs) -> None:
        self.log.append(("fence",))

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        self.log.append(("write_cr", number, value))

    def invlpg(self, regs: Regs, gva: int) -> None:
        self.log.append(("invlpg", gva))

    def invpcid(self, regs: Regs, kind: int, pcid: int, gva: int) -> None:
        self.log.append(("invpcid", kind, pcid, gva))

    def halt(self, regs: Regs) -> None:
        self.log.append(("halt",))


def machine(mode64: bool = True) -> Regs:
    """Registers with a stack at 0x2000, RBX at the data, RIP at 0x400000."""
    regs = Regs()
    regs.efer = EFER_LMA if mode64 else 0
    regs.rip = 0x400000
    regs.gpr[RSP] = 0x2000
    regs.gpr[RBX] = DATA
    return regs


def run(text: str, regs: Regs, bus: Bus, mode64: bool = True) -> int:
    """Execute one instruction of assembly; answers its length."""
    insn = decode(assemble(text, mode64), mode64, True)
    execute(regs, insn, bus)
    return insn.length
