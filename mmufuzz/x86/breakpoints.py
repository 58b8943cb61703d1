"""Breakpoints in the debug registers, on instructions and data (SDM vol. 3, 18.2). Those on ports are left out."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.bus import Bus, FrontBus
from mmufuzz.x86.state import DR6_BS, FLAG_RF, SHADOW_MOV_SS, Regs

_DR6_RESERVED_ONE: Final = 0xFFFE0FF0
_DR6_RTM: Final = 1 << 16

DR7_ENABLED: Final = 0xFF
"""L0, G0, …, L3, G3."""
DR7_GD: Final = 1 << 13

_WRITES: Final = 1
_ACCESSES: Final = 3
"""Of R/W: data breakpoints."""
_LENGTHS: Final = (1, 2, 8, 4)
"""Bytes by LEN."""


def code_breakpoint(regs: Regs) -> int:
    """Bits B0 to B3 of DR6 for the breakpoints on the instruction at RIP; 0 for none.

    RFLAGS.RF inhibits them, and so does a load of SS right before (SDM vol. 3, 6.8.3).
    """
    dr7 = regs.dr[7]
    if not dr7 & DR7_ENABLED or regs.rflags & FLAG_RF or regs.shadow & SHADOW_MOV_SS:
        return 0
    hit = 0
    for number in range(4):
        # R/W = 0 is execution, for which LEN must be 0.
        if dr7 >> 2 * number & 3 and dr7 >> 16 + 4 * number & 15 == 0 and regs.dr[number] == regs.rip:
            hit |= 1 << number
    return hit


class WatchedBus(FrontBus):
    """The bus of one instruction, with the data breakpoints of ``regs``.

    They report accesses by descriptors and handlers' stacks too, and accesses of instructions that then fault, whose
    ``hit`` does not count (SDM vol. 3, 18.2.5 and 18.3.1.2).
    """

    def __init__(self, bus: Bus, regs: Regs) -> None:
        super().__init__(bus)
        self.hit = 0
        """Bits B0 to B3 of DR6: what was accessed so far."""
        self.numbers: list[int] = []
        self.mask = (1 << 64) - 1 if regs.long_mode else (1 << 32) - 1
        dr7 = regs.dr[7]
        for number in range(4):
            if dr7 >> 2 * number & 3 and dr7 >> 16 + 4 * number & 3 in (_WRITES, _ACCESSES):
                self.numbers.append(number)

    def _watch(self, regs: Regs, gva: int, size: int, write: bool) -> None:
        for number in self.numbers:
            field = regs.dr[7] >> 16 + 4 * number
            length = _LENGTHS[field >> 2 & 3]
            # The low bits of the address do not count.
            start = regs.dr[number] & -length & self.mask
            overlaps = gva - start & self.mask < length or start - gva & self.mask < size
            if overlaps and (write or field & 3 == _ACCESSES):
                self.hit |= 1 << number

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """See ``Bus``."""
        self._watch(regs, gva, size, False)
        return self.bus.load(regs, gva, size, rmw, locked)

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """See ``Bus``."""
        self._watch(regs, gva, size, True)
        self.bus.store(regs, gva, size, value, locked)

    def load_system(self, regs: Regs, gva: int, size: int) -> int:
        """See ``Bus``."""
        self._watch(regs, gva, size, False)
        return self.bus.load_system(regs, gva, size)

    def store_system(self, regs: Regs, gva: int, size: int, value: int) -> None:
        """See ``Bus``."""
        self._watch(regs, gva, size, True)
        self.bus.store_system(regs, gva, size, value)


def is_debug_trap(regs: Regs, payload: int) -> bool:
    """Whether a #DB with these bits of DR6 comes behind the instruction that it reports: a step, or accessed data."""
    if payload & DR6_BS:
        return True
    return any(payload >> number & 1 and regs.dr[7] >> 16 + 4 * number & 3 for number in range(4))


def deliver_debug_payload(regs: Regs, payload: int) -> None:
    """DR6 and DR7 as #DB leaves them; ``payload`` are its bits (SDM vol. 3, 18.2.3: B0 to B3 are cleared, BS stays)."""
    regs.dr[6] = regs.dr[6] & ~15 | payload | _DR6_RESERVED_ONE | _DR6_RTM
    regs.dr[7] &= ~DR7_GD
