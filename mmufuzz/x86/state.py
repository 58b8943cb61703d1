"""Architectural register state of one logical CPU, and the faults it can raise.

Flat segments: every segment base is zero and every limit is maximal, so an effective address is
a linear address (SDM vol. 1, 3.3.4).
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

CR0_PE: Final = 1 << 0
CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_PGE: Final = 1 << 7
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11

FLAG_CF: Final = 1 << 0
FLAG_FIXED: Final = 1 << 1
FLAG_PF: Final = 1 << 2
FLAG_AF: Final = 1 << 4
FLAG_ZF: Final = 1 << 6
FLAG_SF: Final = 1 << 7
FLAG_TF: Final = 1 << 8
FLAG_IF: Final = 1 << 9
FLAG_DF: Final = 1 << 10
FLAG_OF: Final = 1 << 11
FLAG_AC: Final = 1 << 18

# Exception vectors (SDM vol. 3, 6.3.1).
VECTOR_DE: Final = 0
VECTOR_DB: Final = 1
VECTOR_BP: Final = 3
VECTOR_UD: Final = 6
VECTOR_NM: Final = 7
VECTOR_SS: Final = 12
VECTOR_GP: Final = 13
VECTOR_PF: Final = 14
VECTOR_MF: Final = 16

# Page-fault error code (SDM vol. 3, 4.7).
PFERR_PRESENT: Final = 1 << 0
PFERR_WRITE: Final = 1 << 1
PFERR_USER: Final = 1 << 2
PFERR_RSVD: Final = 1 << 3
PFERR_FETCH: Final = 1 << 4

NO_ERROR_CODE: Final = -1


@mypyc_attr(native_class=False)
class Fault(Exception):
    """An architectural exception: ``vector``, ``error_code`` (-1: none) and, for #PF, ``address``."""

    def __init__(self, vector: int, error_code: int = NO_ERROR_CODE, address: int = 0) -> None:
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address


class Regs:
    """Registers of one CPU. ``gpr`` holds 16 unsigned 64-bit values in encoding order (RAX, RCX, RDX, RBX, RSP, …)."""

    def __init__(self) -> None:
        self.gpr: list[int] = [0] * 16
        self.rip = 0
        self.rflags = FLAG_FIXED
        self.cr0 = CR0_PE
        self.cr2 = 0
        self.cr3 = 0
        self.cr4 = 0
        self.efer = 0
        self.cpl = 0
        self.xmm: list[int] = [0] * 16
        """YMM contents, 256-bit unsigned."""
        self.st0 = 0
        """Top of the x87 stack, 80-bit unsigned; enough for FSTP, the one x87 store modelled."""

    @property
    def long_mode(self) -> bool:
        """True if code runs as 64-bit code (EFER.LMA with a flat 64-bit code segment)."""
        return self.efer & EFER_LMA != 0

    def copy(self) -> Regs:
        """An independent copy."""
        other = Regs()
        other.gpr = self.gpr[:]
        other.rip = self.rip
        other.rflags = self.rflags
        other.cr0 = self.cr0
        other.cr2 = self.cr2
        other.cr3 = self.cr3
        other.cr4 = self.cr4
        other.efer = self.efer
        other.cpl = self.cpl
        other.xmm = self.xmm[:]
        other.st0 = self.st0
        return other
