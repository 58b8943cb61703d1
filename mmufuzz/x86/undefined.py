"""What the SDM leaves undefined: flags and results that a comparison with another CPU has to leave out."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.alu import ARITHMETIC_FLAGS
from mmufuzz.x86.execute_operands import RCX
from mmufuzz.x86.insn import REG, Insn
from mmufuzz.x86.state import FLAG_AF, FLAG_CF, FLAG_OF, FLAG_PF, FLAG_SF, FLAG_ZF, Regs

FLAGS: Final[dict[str, int]] = {
    "and": FLAG_AF,
    "or": FLAG_AF,
    "xor": FLAG_AF,
    "test": FLAG_AF,
    "mul": FLAG_SF | FLAG_ZF | FLAG_AF | FLAG_PF,
    "imul": FLAG_SF | FLAG_ZF | FLAG_AF | FLAG_PF,
    "div": ARITHMETIC_FLAGS,
    "idiv": ARITHMETIC_FLAGS,
    "bt": FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF,
    "bts": FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF,
    "btr": FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF,
    "btc": FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF,
    "bsf": ARITHMETIC_FLAGS & ~FLAG_ZF,
    "bsr": ARITHMETIC_FLAGS & ~FLAG_ZF,
    "tzcnt": FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF,
    "lzcnt": FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF,
    "andn": FLAG_AF | FLAG_PF,
    "bextr": FLAG_AF | FLAG_SF | FLAG_PF,
    "blsi": FLAG_AF | FLAG_PF,
    "blsmsk": FLAG_AF | FLAG_PF,
    "blsr": FLAG_AF | FLAG_PF,
    "bzhi": FLAG_AF | FLAG_PF,
    "daa": FLAG_OF,
    "das": FLAG_OF,
    "aaa": FLAG_OF | FLAG_SF | FLAG_ZF | FLAG_PF,
    "aas": FLAG_OF | FLAG_SF | FLAG_ZF | FLAG_PF,
    "aam": FLAG_OF | FLAG_AF | FLAG_CF,
    "aad": FLAG_OF | FLAG_AF | FLAG_CF,
}
"""Flags that are undefined after an instruction whatever its operands, by mnemonic (SDM vol. 2, "Flags Affected")."""

_SHIFTS: Final = ("shl", "shr", "sar")
_ROTATES: Final = ("rol", "ror", "rcl", "rcr")


def shift_count(insn: Insn, regs: Regs) -> int:
    """The masked count of a shift or rotate that is about to execute."""
    operand = insn.operands[len(insn.operands) - 1]
    count = regs.gpr[RCX] & 0xFF if operand.kind == REG else operand.value
    return count & (63 if insn.operands[0].size == 8 else 31)


def undefined_flags(insn: Insn, regs: Regs) -> int:
    """The flags that are undefined after ``insn``, which is about to execute in state ``regs``, as a mask."""
    name = insn.mnemonic
    if name in _SHIFTS or name in _ROTATES or name in ("shld", "shrd"):
        count = shift_count(insn, regs)
        if count == 0:
            return 0
        undefined = 0 if count == 1 else FLAG_OF
        if name in _ROTATES:
            return undefined
        undefined |= FLAG_AF
        bits = 8 * insn.operands[0].size
        if name in ("shl", "shr") and count >= bits:
            undefined |= FLAG_CF
        if name in ("shld", "shrd") and count > bits:
            undefined = ARITHMETIC_FLAGS
        return undefined
    return FLAGS.get(name, 0)


def undefined_decimal(image: int) -> bool:
    """True if what FBLD loads of these ten bytes is undefined: a digit is above 9 (SDM vol. 2, FBLD)."""
    for place in range(18):
        if image >> 4 * place & 0xF > 9:
            return True
    return False


def undefined_result(insn: Insn, regs: Regs, flags_after: int) -> bool:
    """True if the destination is undefined: SHLD and SHRD by more than the width, BSF and BSR of zero, 16-bit BSWAP.

    ``flags_after`` is RFLAGS after the instruction.
    """
    name = insn.mnemonic
    if name in ("shld", "shrd"):
        return shift_count(insn, regs) > 8 * insn.operands[0].size
    if name in ("bsf", "bsr"):
        return flags_after & FLAG_ZF != 0
    return name == "bswap" and insn.size == 2
