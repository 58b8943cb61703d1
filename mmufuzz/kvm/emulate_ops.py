"""What emulate.c asks of its host (kvm_emulate.h:struct x86_emulate_ops), and how an operation may end.

KVM's side of it is ``kvm.emulator_ops``; ``BusOps`` puts the emulator on the bus of a bare machine.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.bus import WIDEST, Bus
from mmufuzz.x86.execute_msr import get_msr, set_msr
from mmufuzz.x86.state import Fault, Regs

VMCALL: Final = 0xC1010F
VMMCALL: Final = 0xD9010F
"""0F 01 C1 and 0F 01 D9, little endian."""
HYPERCALL_LENGTH: Final = 3


@mypyc_attr(native_class=False)
class EmulationFailed(Exception):
    """X86EMUL_UNHANDLEABLE, EMULATION_FAILED: the emulator cannot do it."""


@mypyc_attr(native_class=False)
class IoNeeded(Exception):
    """X86EMUL_IO_NEEDED: nothing is committed; the instruction runs again once userspace has answered, or natively."""


@mypyc_attr(native_class=False)
class CmpxchgFailed(Exception):
    """X86EMUL_CMPXCHG_FAILED: somebody else changed the operand; the guest executes the instruction again."""


class X86EmulateOps:
    """Addresses are linear and checked; values are unsigned, little endian. Any operation may raise ``Fault``,
    ``EmulationFailed`` or ``IoNeeded``. ``system`` accesses are a supervisor's whatever CPL is.
    """

    def fetch(self, gva: int, size: int) -> bytes:
        """``size`` code bytes in one page."""
        raise NotImplementedError

    def read_emulated(self, gva: int, size: int) -> int:
        """An operand: memory or MMIO."""
        raise NotImplementedError

    def write_emulated(self, gva: int, size: int, value: int, local: bool) -> None:
        """An operand: memory or MMIO. ``local``: the value is in a local variable of the emulator."""
        raise NotImplementedError

    def cmpxchg_emulated(self, gva: int, size: int, old: int, new: int) -> None:
        """Atomic unless it cannot be, and then a plain write. Raises ``CmpxchgFailed`` if memory is not ``old``."""
        raise NotImplementedError

    def read_std(self, gva: int, size: int, system: bool) -> int:
        """Memory only: descriptors, tables, save areas."""
        raise NotImplementedError

    def write_std(self, gva: int, size: int, value: int, system: bool) -> None:
        """Memory only."""
        raise NotImplementedError

    def set_cr(self, number: int, value: int) -> bool:
        """False asks for #GP(0)."""
        raise NotImplementedError

    def get_msr(self, number: int) -> int:
        """RDMSR."""
        raise NotImplementedError

    def set_msr(self, number: int, value: int) -> None:
        """WRMSR."""
        raise NotImplementedError

    def invlpg(self, gva: int) -> None:
        """INVLPG."""
        raise NotImplementedError

    def halt(self) -> None:
        """HLT."""
        raise NotImplementedError

    def patch_hypercall(self) -> int:
        """The host's hypercall instruction, as a number of ``HYPERCALL_LENGTH`` bytes (kvm_x86_ops.patch_hypercall)."""
        raise NotImplementedError

    def pio_in(self, port: int, size: int, count: int) -> list[int]:
        """``count`` elements of IN or INS."""
        raise NotImplementedError

    def pio_out(self, port: int, size: int, value: int) -> None:
        """One element of OUT or OUTS."""
        raise NotImplementedError

    def bug(self, site: str, text: str) -> None:
        """What would crash the host happens in ``site``; the emulator goes on as if it had not."""
        raise NotImplementedError


class BusOps(X86EmulateOps):
    """The emulator on the bus of a bare machine: where its results are compared with the executor's."""

    def __init__(self, regs: Regs, bus: Bus) -> None:
        self.regs = regs
        self.bus = bus

    def fetch(self, gva: int, size: int) -> bytes:
        """As the CPU fetches."""
        return self.bus.fetch(self.regs, gva, size)

    def read_emulated(self, gva: int, size: int) -> int:
        """A load."""
        return self.bus.load(self.regs, gva, size, False, False)

    def write_emulated(self, gva: int, size: int, value: int, local: bool) -> None:
        """A store."""
        self.bus.store(self.regs, gva, size, value, False)

    def cmpxchg_emulated(self, gva: int, size: int, old: int, new: int) -> None:
        """A locked read-modify-write. Nobody else stores on a bare machine."""
        found = self.bus.load(self.regs, gva, size, True, True)
        assert found == old
        self.bus.store(self.regs, gva, size, new, True)

    def read_std(self, gva: int, size: int, system: bool) -> int:
        """A load, in pieces that a bus takes."""
        value = 0
        for at in range(0, size, 8):
            count = min(8, size - at)
            if system:
                part = self.bus.load_system(self.regs, gva + at, count)
            else:
                part = self.bus.load(self.regs, gva + at, count, False, False)
            value |= part << 8 * at
        return value

    def write_std(self, gva: int, size: int, value: int, system: bool) -> None:
        """A store, whole if a bus takes that, so that it leaves nothing behind if it faults; a save area in pieces."""
        piece = size if size <= WIDEST else 8
        for at in range(0, size, piece):
            count = min(piece, size - at)
            part = value >> 8 * at & (1 << 8 * count) - 1
            if system:
                self.bus.store_system(self.regs, gva + at, count, part)
            else:
                self.bus.store(self.regs, gva + at, count, part, False)

    def set_cr(self, number: int, value: int) -> bool:
        """CR2 and CR8 are the registers' own; the bus has the others."""
        if number == 2:
            self.regs.cr2 = value
        elif number == 8:
            if value > 15:
                return False
            self.regs.cr8 = value
        else:
            try:
                self.bus.write_cr(self.regs, number, value)
            except Fault:
                return False
        return True

    def get_msr(self, number: int) -> int:
        """As RDMSR reads."""
        return get_msr(self.regs, self.bus, number)

    def set_msr(self, number: int, value: int) -> None:
        """As WRMSR writes."""
        set_msr(self.regs, self.bus, number, value)

    def invlpg(self, gva: int) -> None:
        """As the CPU invalidates."""
        self.bus.invlpg(self.regs, gva)

    def halt(self) -> None:
        """As the CPU halts."""
        self.bus.halt(self.regs)

    def patch_hypercall(self) -> int:
        """That of VMX."""
        return VMCALL

    def pio_in(self, port: int, size: int, count: int) -> list[int]:
        """As the CPU reads a port."""
        return [self.bus.port_in(self.regs, port, size) for _ in range(count)]

    def pio_out(self, port: int, size: int, value: int) -> None:
        """As the CPU writes a port."""
        self.bus.port_out(self.regs, port, size, value)

    def bug(self, site: str, text: str) -> None:
        """A bare machine has no host to crash."""
        raise AssertionError(f"{site}: {text}")
