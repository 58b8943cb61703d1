"""What an executing CPU needs from the world around it."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.state import MSR_TSC, Regs

WIDEST: Final = 32
"""Bytes of the widest access of a bus, which is that of the widest operand; save areas are wider."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Bus:
    """Memory and system operations behind an instruction.

    Addresses are linear (gva) and already masked to the address size. Implementations translate,
    may raise ``Fault``, and may end the instruction with an exception of their own (a VM exit).
    ``size`` is 1..32 bytes, or 10 for an 80-bit x87 value. The implementation
    splits an access that crosses a page.
    """

    system = False
    """The access under way is a supervisor's whatever CPL is."""

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """Read ``size`` bytes, little endian. With ``rmw`` a store to the same place follows: check for write."""
        raise NotImplementedError

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """Write ``size`` bytes. With ``locked``, it completes the atomic operation that the matching ``load`` began."""
        raise NotImplementedError

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """Read ``size`` code bytes at ``gva``; the range never crosses a page."""
        raise NotImplementedError

    def fence(self, regs: Regs) -> None:
        """MFENCE, and the ordering effect of serialising instructions."""
        raise NotImplementedError

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """MOV to CR ``number`` (0, 3 or 4)."""
        raise NotImplementedError

    def invlpg(self, regs: Regs, gva: int) -> None:
        """INVLPG of the page that holds ``gva``."""
        raise NotImplementedError

    def invpcid(self, regs: Regs, kind: int, pcid: int, gva: int) -> None:
        """INVPCID of type ``kind`` (0 to 3), after the checks that the CPU makes. Nothing, where nothing is cached."""

    def halt(self, regs: Regs) -> None:
        """HLT."""
        raise NotImplementedError

    def load_system(self, regs: Regs, gva: int, size: int) -> int:
        """Read a descriptor, a gate or a TSS field: a supervisor access whatever CPL is (SDM vol. 3, 4.6)."""
        self.system = True
        try:
            return self.load(regs, gva, size, False, False)
        finally:
            self.system = False

    def store_system(self, regs: Regs, gva: int, size: int, value: int) -> None:
        """Write to the stack of a handler, or a descriptor's accessed or busy bit, as a supervisor."""
        self.system = True
        try:
            self.store(regs, gva, size, value, False)
        finally:
            self.system = False

    def read_tsc(self, regs: Regs) -> int:
        """RDTSC: what the counter shows. It stands still, so that a run depends on nothing else."""
        return regs.msr.get(MSR_TSC, 0)

    def write_efer(self, regs: Regs, value: int) -> None:
        """WRMSR to EFER, after the checks that the CPU makes."""
        regs.efer = value

    def port_in(self, regs: Regs, port: int, size: int) -> int:
        """IN and INS of ``size`` 1, 2 or 4 bytes. Nothing answers: the bus floats high."""
        return (1 << 8 * size) - 1

    def port_out(self, regs: Regs, port: int, size: int, value: int) -> None:
        """OUT and OUTS; nothing listens."""


class FrontBus(Bus):
    """A bus in front of another, to which everything goes on."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """See ``Bus``."""
        return self.bus.load(regs, gva, size, rmw, locked)

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """See ``Bus``."""
        self.bus.store(regs, gva, size, value, locked)

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """See ``Bus``."""
        return self.bus.fetch(regs, gva, size)

    def fence(self, regs: Regs) -> None:
        """See ``Bus``."""
        self.bus.fence(regs)

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """See ``Bus``."""
        self.bus.write_cr(regs, number, value)

    def invlpg(self, regs: Regs, gva: int) -> None:
        """See ``Bus``."""
        self.bus.invlpg(regs, gva)

    def invpcid(self, regs: Regs, kind: int, pcid: int, gva: int) -> None:
        """See ``Bus``."""
        self.bus.invpcid(regs, kind, pcid, gva)

    def halt(self, regs: Regs) -> None:
        """See ``Bus``."""
        self.bus.halt(regs)

    def load_system(self, regs: Regs, gva: int, size: int) -> int:
        """See ``Bus``."""
        return self.bus.load_system(regs, gva, size)

    def store_system(self, regs: Regs, gva: int, size: int, value: int) -> None:
        """See ``Bus``."""
        self.bus.store_system(regs, gva, size, value)

    def read_tsc(self, regs: Regs) -> int:
        """See ``Bus``."""
        return self.bus.read_tsc(regs)

    def write_efer(self, regs: Regs, value: int) -> None:
        """See ``Bus``."""
        self.bus.write_efer(regs, value)

    def port_in(self, regs: Regs, port: int, size: int) -> int:
        """See ``Bus``."""
        return self.bus.port_in(regs, port, size)

    def port_out(self, regs: Regs, port: int, size: int, value: int) -> None:
        """See ``Bus``."""
        self.bus.port_out(regs, port, size, value)
