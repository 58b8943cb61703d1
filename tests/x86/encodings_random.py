"""Random encodings of every form of the opcode tables: what the decoder, assembler and execution tests draw from."""

from __future__ import annotations

from mmufuzz.x86 import opcodes as op

MASK64 = (1 << 64) - 1
ESCAPES = [b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"]


class Random:
    """splitmix64."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def word(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK64
        z = self.state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
        return z ^ z >> 31

    def below(self, bound: int) -> int:
        return self.word() % bound

    def bytes(self, count: int) -> bytes:
        return b"".join(self.word().to_bytes(8, "little") for _ in range(-(-count // 8)))[:count]

    def value(self) -> int:
        """A word that is often near a power of two, where flags change."""
        if self.below(2):
            return self.word()
        return ((1 << self.below(65)) + self.below(5) - 2) & MASK64


def encode(rng: Random, form: op.Form, mode64: bool, mod3: bool | None = None) -> bytes:
    """Prefixes, opcode and ModRM of one form, and 12 random bytes more.

    ``mod3`` asks for a register (True) or memory (False) where ModRM leaves it open.
    """
    code = bytearray()
    if form.opcode_map < op.MAP_VEX:
        code += _legacy_prefixes(rng, form, mode64, mod3)
    else:
        code += _vex_prefix(rng, form, mode64)
    opcode = form.opcode if form.modrm >= 0 else form.opcode + rng.below(form.low_bits)
    code.append(opcode)
    if form.modrm >= 0:
        code.append(form.modrm + rng.below(form.low_bits))
    elif form.needs_modrm:
        reg = form.reg if form.reg >= 0 else rng.below(8)
        code.append(_mod(rng, form, mod3) << 6 | reg << 3 | rng.below(8))
    if op.METHOD_MOFFS in form.methods:
        # In the data of the execution tests.
        code += (0x2000 + 16 * rng.below(0x400)).to_bytes(8, "little")
    return bytes(code) + rng.bytes(12)


def _mod(rng: Random, form: op.Form, mod3: bool | None) -> int:
    if form.flags & op.REG_ONLY:
        return 3
    if form.flags & op.MEM_ONLY or op.METHOD_MEM in form.methods or mod3 is False:
        return rng.below(3)
    return 3 if mod3 or rng.below(3) == 0 else rng.below(3)


def _legacy_prefixes(rng: Random, form: op.Form, mode64: bool, mod3: bool | None) -> bytes:
    code = bytearray()
    if form.prefix > 0:
        code.append(op.PREFIX_BYTES[form.prefix])
    elif form.prefix < 0 and rng.below(4) == 0:
        code.append(0x66)
    if form.flags & op.STRING and rng.below(2):
        code.append(0xF2 + rng.below(2))
    if rng.below(8) == 0:
        code.append(0x67)
    if form.flags & op.LOCKABLE and mod3 is not True and rng.below(4) == 0:
        code.append(0xF0)
    if mode64 and (rng.below(2) or form.flags & op.WIDE):
        code.append((0x40 | rng.below(16) | (8 if form.flags & op.WIDE else 0)) & ~(8 if form.flags & op.NARROW else 0))
    return bytes(code) + ESCAPES[form.opcode_map]


def _vex_prefix(rng: Random, form: op.Form, mode64: bool) -> bytes:
    last = (rng.below(16) if form.has_vvvv else 15) << 3 | form.prefix
    if form.flags & op.VEX_L1 or (not form.flags & op.VEX_L0 and rng.below(2)):
        last |= 4
    if form.flags & op.WIDE or (not form.flags & op.NARROW and rng.below(2)):
        last |= 0x80
    high = (rng.below(8) if mode64 else 7) << 5
    return bytes([0xC4, high | form.opcode_map - op.MAP_VEX + 1, last])
