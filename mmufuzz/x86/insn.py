"""A decoded instruction: what the decoder answers and the executor consumes."""

from __future__ import annotations

from typing import Final

# Operand kinds.
REG: Final = 0  # general register `index`, `size` bytes
HIGH8: Final = 1  # AH, CH, DH, BH: bits 15..8 of register `index` (0..3)
MEM: Final = 2  # the instruction's one ModRM or moffs memory operand, `size` bytes
IMM: Final = 3  # `value`, sign-extended, unsigned representation masked to `size` bytes
REL: Final = 4  # branch displacement `value`, signed, relative to the next instruction
CR: Final = 5  # control register `index`
XMM: Final = 6  # vector register `index`, `size` 4, 8, 16 or 32 bytes
ST0: Final = 7  # top of the x87 stack

NO_REG: Final = -1
RIP: Final = 16  # as `base`: RIP-relative

REP_NONE: Final = 0
REP_F3: Final = 1  # REP, REPE
REP_F2: Final = 2  # REPNE


class Operand:
    """One explicit operand; the meaning of ``index`` and ``value`` depends on ``kind``."""

    def __init__(self, kind: int, size: int, index: int = 0, value: int = 0) -> None:
        self.kind = kind
        self.size = size
        self.index = index
        self.value = value


class Insn:
    """A decoded instruction.

    ``mnemonic`` is lower case and generic ("mov", "add", "jcc", "cmpxchg16b"); ``condition`` (0..15)
    completes "jcc". ``size`` is the operand size in bytes, ``asize`` the address size in bytes.
    Operands are in Intel order, destination first. ``fep`` is set when KVM's forced-emulation
    prefix (ud2; .ascii "kvm") stands in front; its 5 bytes count in ``length``.
    """

    def __init__(self, mnemonic: str, length: int, size: int, asize: int) -> None:
        self.mnemonic = mnemonic
        self.length = length
        self.size = size
        self.asize = asize
        self.operands: list[Operand] = []
        self.condition = 0
        self.lock = False
        self.rep = REP_NONE
        self.fep = False
        # The memory operand: [base + index * scale + displacement].
        self.base = NO_REG
        self.index = NO_REG
        self.scale = 1
        self.displacement = 0
        # Opcode identity: map (0 one-byte, 1 0F, 2 0F38, 3 0F3A, 4 VEX), opcode byte, ModRM.reg or -1,
        # mandatory prefix (0x66, 0xF2, 0xF3 or 0).
        self.opcode_map = 0
        self.opcode = 0
        self.reg_field = -1
        self.prefix = 0

    @property
    def has_memory(self) -> bool:
        """True if an explicit operand is in memory."""
        for operand in self.operands:
            if operand.kind == MEM:
                return True
        return False
