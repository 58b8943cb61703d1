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
STI: Final = 7  # x87 register `index` places below the top of the stack
SREG: Final = 8  # segment register `index`
DR: Final = 9  # debug register `index`
FAR: Final = 10  # far pointer: selector `index`, offset `value` of `size` - 2 bytes
MMX: Final = 11  # MMX register `index`, `size` 4 or 8 bytes

# Segment registers in encoding order, and the two system segments.
ES: Final = 0
CS: Final = 1
SS: Final = 2
DS: Final = 3
FS: Final = 4
GS: Final = 5
LDTR: Final = 6
TR: Final = 7

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

    ``mnemonic`` is lower case and generic ("mov", "add", "jcc", "cmpxchg16b"), ``operation`` its place in
    ``opcodes.MNEMONICS``, ``form`` that of the table entry in ``opcodes.FORMS``; ``condition`` (0..15) completes "jcc".
    ``size`` is the operand size in bytes, ``asize`` the address size in bytes. Operands are in Intel order, destination
    first. ``fep`` is set when KVM's forced-emulation prefix (ud2; .ascii "kvm") stands in front; its 5 bytes count in
    ``length``.
    """

    def __init__(self, mnemonic: str, length: int, size: int, asize: int) -> None:
        self.mnemonic = mnemonic
        self.operation = 0
        self.form = -1
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
        self.segment = DS
        """Segment of the memory operand. In 64-bit code DS stands for ES and CS too, and SS says whose fault it is."""
        # Opcode identity: map (0 one-byte, 1 0F, 2 0F38, 3 0F3A, 4 to 6 the VEX maps), opcode byte, ModRM or -1,
        # ModRM.reg or -1, mandatory prefix (0x66, 0xF2, 0xF3 or 0).
        self.opcode_map = 0
        self.opcode = 0
        self.modrm = -1
        self.reg_field = -1
        self.prefix = 0

    @property
    def has_memory(self) -> bool:
        """True if an explicit operand is in memory."""
        for operand in self.operands:
            if operand.kind == MEM:
                return True
        return False


def renamed(insn: Insn, mnemonic: str, operation: int) -> Insn:
    """A copy of ``insn`` that is another operation on the same operands."""
    other = Insn(mnemonic, insn.length, insn.size, insn.asize)
    other.operation = operation
    other.form = insn.form
    other.operands = insn.operands
    other.condition = insn.condition
    other.lock = insn.lock
    other.rep = insn.rep
    other.fep = insn.fep
    other.base = insn.base
    other.index = insn.index
    other.scale = insn.scale
    other.displacement = insn.displacement
    other.segment = insn.segment
    other.opcode_map = insn.opcode_map
    other.opcode = insn.opcode
    other.modrm = insn.modrm
    other.reg_field = insn.reg_field
    other.prefix = insn.prefix
    return other
