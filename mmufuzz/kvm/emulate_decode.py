"""Decoding for the emulator: bytes to an instruction whose operands are not looked at yet (emulate.c:x86_decode_insn).

What depends on the bytes and the code size alone is remembered; registers come in when an instruction is emulated.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.kvm.emulate_ops import EmulationFailed
from mmufuzz.kvm.opcode_table import (
    BY_PREFIX,
    BYTE_OP,
    MEM_ABS,
    MMX,
    MODRM,
    NEAR_BRANCH,
    NO16,
    NO_MOD,
    ONLY64,
    OP3264,
    OP_IMM,
    OP_IMM64,
    OP_IMM_BYTE,
    OP_IMM_FAR,
    OP_IMM_U16,
    OP_IMM_UBYTE,
    SSE,
    STACK,
    TABLES,
    Opcode,
)
from mmufuzz.x86.insn import DS, NO_REG, SS

RIP: Final = 16  # as ``base``: RIP-relative

_BASE16: Final = (3, 3, 5, 5, 6, 7, 5, 3)
_INDEX16: Final = (6, 7, 6, 7, NO_REG, NO_REG, NO_REG, NO_REG)
_SEGMENT_PREFIXES: Final[dict[int, int]] = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}


@mypyc_attr(native_class=False)
class NeedsBytes(Exception):
    """The instruction does not end where the bytes do."""


class Decoded:
    """An instruction as its bytes say. Immediates are as ``decode_imm`` leaves them: signed, or cut to their size."""

    def __init__(self, entry: Opcode) -> None:
        self.entry = entry
        self.name = entry.name
        self.d = entry.flags
        self.length = 0
        self.op_bytes = 0
        self.ad_bytes = 0
        self.rex = 0
        self.lock = False
        self.rep = 0
        self.b = entry.opcode
        self.modrm = -1
        self.segment = DS
        """seg_override: of the memory operand, and of the source of string instructions."""
        self.in_memory = False
        """The ModRM operand, or that of an absolute address, is in memory."""
        self.modrm_reg = 0
        self.modrm_rm = 0
        self.base = NO_REG
        self.index = NO_REG
        self.scale = 0
        self.displacement = 0
        self.imm = 0
        """The immediate of the source operand."""
        self.imm2 = 0
        """The immediate of the second source, or of the destination of OUT."""
        self.selector = 0
        """The selector of a far pointer in the instruction, whose offset is ``imm``."""

    @property
    def high_registers(self) -> bool:
        """Byte registers 4 to 7 are AH to BH: there is no REX prefix."""
        return self.rex == 0


NO_INSN: Final = Decoded(Opcode(1, 0x90, "90 nop - - -"))
"""What an emulator holds before its first instruction."""


class _Decoder:
    """One decoding; ``bits`` is 64, 32 or 16."""

    def __init__(self, code: bytes, bits: int) -> None:
        self.code = code
        self.position = 0
        self.bits = bits
        self.operand_prefix = False
        self.address_prefix = False
        self.segment_prefix = -1
        self.lock = False
        self.rep = 0
        self.rex = 0
        self.modrm = -1

    def take(self, count: int) -> int:
        """insn_fetch: the next ``count`` bytes, unsigned."""
        end = self.position + count
        if end > len(self.code):
            raise NeedsBytes
        value = int.from_bytes(self.code[self.position : end], "little")
        self.position = end
        return value

    def take_signed(self, count: int) -> int:
        """insn_fetch of a signed type."""
        value = self.take(count)
        return value - (1 << 8 * count) if value >> (8 * count - 1) else value

    def prefixes(self) -> int:
        """Legacy and REX prefixes, in any order and number; answers the first opcode byte."""
        while True:
            byte = self.take(1)
            if byte == 0x66:
                self.operand_prefix = True
            elif byte == 0x67:
                self.address_prefix = True
            elif byte in _SEGMENT_PREFIXES:
                self.segment_prefix = _SEGMENT_PREFIXES[byte]
            elif byte == 0xF0:
                self.lock = True
            elif byte in (0xF2, 0xF3):
                self.rep = byte
            elif byte & 0xF0 == 0x40 and self.bits == 64:
                self.rex = byte
                continue
            else:
                return byte
            self.rex = 0

    def entry(self) -> Opcode:
        """The table entry, through groups and prefix tables; reads the opcode and ModRM."""
        byte = self.prefixes()
        length = 1
        if byte == 0x0F:
            length = 2
            byte = self.take(1)
            if byte == 0x38:
                length = 3
                byte = self.take(1)
        row = TABLES[length - 1][byte]
        if row is None:
            raise EmulationFailed
        if row.modrm:
            self.modrm = self.take(1)
        if length == 1 and byte in (0xC4, 0xC5) and (self.bits == 64 or self.modrm >= 0xC0):
            # VEX.
            raise EmulationFailed
        entry: Opcode | None = row.exact.get(self.modrm) if self.modrm >= 0xC0 else None
        if entry is None:
            place = 0
            if row.modrm:
                place = self.modrm >> 3 & 7 | (8 if self.modrm >= 0xC0 else 0)
            if self.operand_prefix:
                place += 16
            elif self.rep:
                place += 32 if self.rep == 0xF2 else 48
            entry = row.entries[place]
        if entry is None or (entry.flags & ONLY64 and self.bits != 64):
            raise EmulationFailed
        if entry.flags & BY_PREFIX and self.operand_prefix and self.rep:
            raise EmulationFailed
        return entry

    def run(self) -> Decoded:
        """x86_decode_insn, but for the registers."""
        entry = self.entry()
        insn = Decoded(entry)
        insn.op_bytes = self.operand_size(entry.flags)
        wide = 8 if self.bits == 64 else self.bits // 8
        if not self.address_prefix:
            insn.ad_bytes = wide
        elif self.bits == 64:
            insn.ad_bytes = 4
        else:
            insn.ad_bytes = wide ^ 6
        insn.rex = self.rex
        insn.lock = self.lock
        insn.rep = self.rep
        insn.modrm = self.modrm
        default = DS
        if entry.flags & MODRM:
            default = self.decode_modrm(insn)
        elif entry.flags & MEM_ABS:
            insn.in_memory = True
            insn.displacement = self.take(insn.ad_bytes)
        insn.segment = default if self.segment_prefix < 0 else self.segment_prefix
        insn.imm = self.decode_imm(insn, entry.src)
        if entry.src == OP_IMM_FAR:
            insn.selector = self.take(2)
        if entry.src2 in (OP_IMM_BYTE, OP_IMM):
            insn.imm2 = self.decode_imm(insn, entry.src2)
        elif entry.dst == OP_IMM_UBYTE:
            insn.imm2 = self.take(1)
        insn.length = self.position
        return insn

    def operand_size(self, flags: int) -> int:
        """op_bytes, with the fix-ups of the entry (reference section 5.1, item 7)."""
        size = 2 if self.bits == 16 else 4
        if self.operand_prefix:
            size ^= 6
        if self.rex & 8:
            size = 8
        if self.bits == 64 and ((size == 4 and flags & STACK) or flags & NEAR_BRANCH):
            size = 8
        if flags & OP3264:
            size = 8 if self.bits == 64 else 4
        if flags & NO16 and size == 2:
            size = 4
        if flags & SSE:
            return 16
        return 8 if flags & MMX else size

    def decode_modrm(self, insn: Decoded) -> int:
        """emulate.c:decode_modrm: SIB and displacement; answers the default segment."""
        modrm = self.modrm
        mod = modrm >> 6
        rm = modrm & 7
        insn.modrm_reg = modrm >> 3 & 7 | (self.rex << 1 & 8)
        insn.modrm_rm = rm | (self.rex << 3 & 8)
        if mod == 3 or insn.d & NO_MOD:
            return DS
        insn.in_memory = True
        if insn.ad_bytes == 2:
            if mod == 0 and rm == 6:
                insn.displacement = self.take(2)
                return DS
            insn.base = _BASE16[rm]
            insn.index = _INDEX16[rm]
            if mod:
                insn.displacement = self.take_signed(mod)
            return SS if insn.base == 5 else DS
        base = insn.modrm_rm
        if rm == 4:
            sib = self.take(1)
            index = sib >> 3 & 7 | (self.rex << 2 & 8)
            if index != 4:
                insn.index = index
                insn.scale = sib >> 6
            base = sib & 7 | (self.rex << 3 & 8)
            if base & 7 == 5 and mod == 0:
                insn.displacement = self.take_signed(4)
                return DS
        elif rm == 5 and mod == 0:
            insn.displacement = self.take_signed(4)
            if self.bits == 64:
                insn.base = RIP
            return DS
        insn.base = base
        if mod:
            insn.displacement = self.take_signed(1 if mod == 1 else 4)
        return SS if base in (4, 5) else DS

    def decode_imm(self, insn: Decoded, kind: int) -> int:
        """emulate.c:decode_imm for an immediate of ``kind``; 0 for operands that are none."""
        if kind == OP_IMM:
            size = 1 if insn.d & BYTE_OP else min(insn.op_bytes, 4)
            return self.take_signed(size)
        if kind == OP_IMM_BYTE:
            return self.take_signed(1)
        if kind == OP_IMM_UBYTE:
            return self.take(1)
        if kind == OP_IMM_U16:
            return self.take(2)
        if kind in (OP_IMM64, OP_IMM_FAR):
            return self.take(insn.op_bytes)
        return 0


_CACHE_LIMIT: Final = 512
_cache64: Final[dict[bytes, Decoded]] = {}
_cache32: Final[dict[bytes, Decoded]] = {}
_cache16: Final[dict[bytes, Decoded]] = {}


def decode(code: bytes, bits: int) -> Decoded:
    """The instruction at the start of ``code``, of ``bits``-bit code (64, 32 or 16); it is shared between callers.

    Raises ``NeedsBytes``, and ``EmulationFailed`` where the tables have no entry.
    """
    cache = _cache64 if bits == 64 else _cache32 if bits == 32 else _cache16
    known = cache.get(code)
    if known is None:
        known = _Decoder(code, bits).run()
        # Emptying the whole cache keeps its contents a function of the calls made, cheaply.
        if len(cache) >= _CACHE_LIMIT:
            cache.clear()
        cache[code] = known
    return known
