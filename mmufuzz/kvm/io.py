"""MMIO and ports on their way to userspace and back (kvm_host.h:kvm_mmio_fragment, kvm_pio_request; kvm.h:kvm_run)."""

from __future__ import annotations

from typing import Final

MMIO_PIECE: Final = 8
"""Bytes that one KVM_EXIT_MMIO can carry."""
MAX_MMIO_FRAGMENTS: Final = 2
"""KVM_MAX_MMIO_FRAGMENTS: an access lies in at most two pages."""
POISON: Final = 0x6B6B_6B6B_6B6B_6B6B_6B6B_6B6B_6B6B_6B6B
"""What a temporary of the emulator holds when it is gone."""


class MmioFragment:
    """struct kvm_mmio_fragment: the part of an access that lies in one page.

    ``data`` is the value of a write, ``place`` the number of the first byte in the value of the access. ``dangling``:
    ``data`` is not a copy but a reference to a local variable of the emulator.
    """

    def __init__(self, gpa: int, length: int, place: int, data: int, dangling: bool) -> None:
        self.gpa = gpa
        self.length = length
        self.place = place
        self.data = data
        self.dangling = dangling


class Mmio:
    """vcpu->mmio_* and run->mmio: the MMIO access under way."""

    def __init__(self) -> None:
        self.needed = False
        self.is_write = False
        self.read_completed = False
        self.fragments: list[MmioFragment] = []
        self.current = 0
        """mmio_cur_fragment."""
        self.value = 0
        """What a read has read so far; the emulator's read cache in KVM."""
        self.run_gpa = 0
        self.run_length = 0
        self.run_data = 0
        self.exit_pending = False
        """complete_userspace_io is set: userspace has to answer ``run_*`` first."""

    def prepare_exit(self, fragment: MmioFragment) -> None:
        """Fill run->mmio with the next piece of ``fragment``."""
        length = min(MMIO_PIECE, fragment.length)
        self.run_gpa = fragment.gpa
        self.run_length = length
        self.run_data = fragment.data & (1 << 8 * length) - 1

    def state(self) -> list[int]:
        """Everything as numbers: equal lists mean equal states."""
        state = [self.needed | self.is_write << 1 | self.read_completed << 2 | self.exit_pending << 3]
        state += [self.current, self.value, self.run_gpa, self.run_length, self.run_data, len(self.fragments)]
        for fragment in self.fragments:
            state += [fragment.gpa, fragment.length, fragment.place, fragment.data, fragment.dangling]
        return state


class Pio:
    """struct kvm_pio_request: the access to a port under way.

    ``data`` are the ``count`` elements that are written, or were read; once they are taken ``count`` is 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self.is_in = False
        self.port = 0
        self.size = 0
        self.data: list[int] = []
        self.fast_length = 0
        """Bytes of the instruction if it exited by itself (kvm_fast_pio), 0 if the emulator runs it."""
        self.linear_rip = 0
        self.exit_pending = False
        """complete_userspace_io is set: userspace has to answer first."""

    def state(self) -> list[int]:
        """Everything as numbers: equal lists mean equal states."""
        state = [self.count, self.is_in, self.port, self.size, self.fast_length, self.linear_rip, self.exit_pending]
        return state + self.data


class Device:
    """The modelled userspace's answer to MMIO or ports: registers that keep what is written to them.

    ``fill``: a byte that was never written.
    """

    def __init__(self, fill: int) -> None:
        self.fill = fill
        self.contents: dict[int, int] = {}
        """Bytes by guest physical address, or by port."""

    def read(self, address: int, size: int) -> int:
        """``size`` bytes, little endian."""
        value = 0
        for place in range(size):
            value |= self.contents.get(address + place, self.fill) << 8 * place
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """``size`` bytes, little endian."""
        for place in range(size):
            self.contents[address + place] = value >> 8 * place & 0xFF

    def state(self) -> list[int]:
        """Everything as numbers."""
        state = [len(self.contents)]
        for address in sorted(self.contents):
            state += [address, self.contents[address]]
        return state
