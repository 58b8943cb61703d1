"""Random encodings of every form of the opcode tables."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.rng import Rng
from mmufuzz.x86 import opcodes as op

_ESCAPES: Final = [b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"]


def encode(rng: Rng, form: op.Form, mode64: bool, mod3: bool | None = None) -> bytes:
    """Prefixes, opcode and ModRM of ``form``, and 12 random bytes more: enough for the rest of any instruction.

    The same bytes serve in 32-bit and 16-bit code. ``mod3`` asks for a register (True) or memory (False) where ModRM
    leaves it open. An absolute address lies in 0x2000 to 0x5FFF. Where two forms share an encoding the bytes may be
    the other one's.
    """
    code = b""
    if form.opcode_map < op.MAP_VEX:
        code += _legacy_prefixes(rng, form, mode64, mod3)
    else:
        code += _vex_prefix(rng, form, mode64)
    opcode = form.opcode if form.modrm >= 0 else form.opcode + rng.below(form.low_bits)
    code += bytes((opcode,))
    if form.modrm >= 0:
        code += bytes((form.modrm + rng.below(form.low_bits),))
    elif form.needs_modrm:
        reg = form.reg if form.reg >= 0 else rng.below(8)
        code += bytes((_mod(rng, form, mod3) << 6 | reg << 3 | rng.below(8),))
    if op.METHOD_MOFFS in form.methods:
        code += (0x2000 + 16 * rng.below(0x400)).to_bytes(8, "little")
    return code + rng.bytes(12)


def edge_value(rng: Rng) -> int:
    """A 64-bit value that is often near a power of two, where flags change."""
    if rng.below(2):
        return rng.next64()
    return ((1 << rng.below(65)) + rng.below(5) - 2) & (1 << 64) - 1


def _mod(rng: Rng, form: op.Form, mod3: bool | None) -> int:
    if form.flags & op.REG_ONLY:
        return 3
    if form.flags & op.MEM_ONLY or op.METHOD_MEM in form.methods or mod3 is False:
        return rng.below(3)
    return 3 if mod3 or rng.below(3) == 0 else rng.below(3)


def _legacy_prefixes(rng: Rng, form: op.Form, mode64: bool, mod3: bool | None) -> bytes:
    code = b""
    if form.prefix > 0:
        code += bytes((op.PREFIX_BYTES[form.prefix],))
    elif form.prefix < 0 and rng.below(4) == 0:
        code += b"\x66"
    if form.flags & op.STRING and rng.below(2):
        code += bytes((0xF2 + rng.below(2),))
    if rng.below(8) == 0:
        code += b"\x67"
    if form.flags & op.LOCKABLE and mod3 is not True and rng.below(4) == 0:
        code += b"\xf0"
    if mode64 and (rng.below(2) or form.flags & op.WIDE):
        rex = 0x40 | rng.below(16) | (8 if form.flags & op.WIDE else 0)
        code += bytes((rex & ~8 if form.flags & op.NARROW else rex,))
    return code + _ESCAPES[form.opcode_map]


def _vex_prefix(rng: Rng, form: op.Form, mode64: bool) -> bytes:
    last = (rng.below(16) if form.has_vvvv else 15) << 3 | form.prefix
    if form.flags & op.VEX_L1 or (not form.flags & op.VEX_L0 and rng.below(2)):
        last |= 4
    if form.flags & op.WIDE or (not form.flags & op.NARROW and rng.below(2)):
        last |= 0x80
    high = (rng.below(8) if mode64 else 7) << 5
    return bytes((0xC4, high | form.opcode_map - op.MAP_VEX + 1, last))
