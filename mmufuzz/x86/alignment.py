"""Alignment checks of user code: #AC (SDM vol. 3, 6.15, interrupt 17)."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.bus import Bus, FrontBus
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.state import CR0_AM, FLAG_AC, VECTOR_AC, Fault, Regs

_TABLES: Final = ("sgdt", "sidt")
"""The limit, and the base 2 bytes behind it, are each aligned to their size (SDM vol. 3, 3.5.1)."""
_IMAGES: Final = ("fnstenv", "fnsave", "fldenv", "frstor")
"""Of these the operand's address counts, by the width of the image's words, not that of each field."""


def checks_alignment(regs: Regs) -> bool:
    """CR0.AM and RFLAGS.AC are set at CPL 3."""
    return regs.cpl == 3 and regs.rflags & FLAG_AC != 0 and regs.cr0 & CR0_AM != 0


class AlignedBus(FrontBus):
    """The bus of one instruction whose accesses are checked.

    An access of 2, 4 or 8 bytes has to be aligned to its size, one of 10 bytes to 8 (table 6-7). What is wider faults
    with #GP or not at all. Descriptors, gates and handlers' stacks are accessed as a supervisor. The check comes
    before translation, as in Bochs; the SDM leaves the order of #AC and #PF open (vol. 3, table 6-2).
    """

    def __init__(self, bus: Bus, insn: Insn) -> None:
        super().__init__(bus)
        self.table = insn.mnemonic in _TABLES
        self.image = insn.mnemonic in _IMAGES
        self.width = 2 if insn.size == 2 else 4
        """Of the words of an x87 image."""

    def _check(self, gva: int, size: int) -> None:
        if self.image:
            mask = self.width - 1
            self.width = 1
        elif self.table:
            mask = size - 3
            gva += 2
        elif size > 8:
            mask = 7 if size == 10 else 0
        else:
            mask = size - 1
        if gva & mask:
            raise Fault(VECTOR_AC, 0)

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """See ``Bus``."""
        self._check(gva, size)
        return self.bus.load(regs, gva, size, rmw, locked)

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """See ``Bus``."""
        self._check(gva, size)
        self.bus.store(regs, gva, size, value, locked)
