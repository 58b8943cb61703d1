"""The instruction decoder: total over bytes, for 64-bit code and for 32-bit code in flat segments."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86 import opcodes as op
from mmufuzz.x86.insn import (
    CR,
    HIGH8,
    IMM,
    MEM,
    NO_REG,
    REG,
    REL,
    REP_F2,
    REP_F3,
    REP_NONE,
    RIP,
    ST0,
    XMM,
    Insn,
    Operand,
)
from mmufuzz.x86.state import VECTOR_GP, VECTOR_UD, Fault

MAX_LENGTH: Final = 15
"""Bytes of the longest instruction (SDM vol. 2, 2.3.11); the forced-emulation prefix comes on top."""
FEP: Final = b"\x0f\x0bkvm"
"""KVM's forced-emulation prefix, ``ud2; .ascii "kvm"`` (x86.c:handle_ud)."""

REX_B: Final = 1
REX_X: Final = 2
REX_R: Final = 4
REX_W: Final = 8

_ONE_BYTE: Final[list[op.Row | None]] = op.rows(op.MAP_ONE_BYTE)
_0F: Final[list[op.Row | None]] = op.rows(op.MAP_0F)
_VEX: Final[list[op.Row | None]] = op.rows(op.MAP_VEX)

# [BX+SI], [BX+DI], … of 16-bit addressing (SDM vol. 2, table 2-1).
_BASE16: Final = [3, 3, 5, 5, 6, 7, 5, 3]
_INDEX16: Final = [6, 7, 6, 7, NO_REG, NO_REG, NO_REG, NO_REG]

_CACHE_LIMIT: Final = 4096
_cache: Final[dict[tuple[bytes, bool, bool], Insn]] = {}


@mypyc_attr(native_class=False)
class Truncated(Exception):
    """The instruction needs more bytes than were given, and fewer than 15 were given."""


def decode(code: bytes, mode64: bool, fep: bool = False) -> Insn:
    """The instruction at the start of ``code``; bytes after it are ignored.

    With ``fep`` a complete forced-emulation prefix at the very start is skipped: its 5 bytes count in the
    length but not against the limit of 15. Without it, or with part of it, the prefix is a UD2.

    The Insn may be shared between callers and must not be changed. NOP never has operands, even
    where the encoding has a ModRM byte, because nothing is accessed.

    Raises ``Truncated``; ``Fault(VECTOR_UD)`` for undefined and unsupported encodings (SDM vol. 2,
    appendix A); ``Fault(VECTOR_GP, 0)`` for an instruction of more than 15 bytes (SDM vol. 3, 6.15).
    """
    key = (code, mode64, fep)
    known = _cache.get(key)
    if known is not None:
        return known
    start = len(FEP) if fep and code.startswith(FEP) else 0
    insn = _Decoder(code, start, mode64).run()
    if start:
        insn.fep = True
    # Emptying the whole cache keeps its contents a function of the calls made, cheaply.
    if len(_cache) >= _CACHE_LIMIT:
        _cache.clear()
    _cache[key] = insn
    return insn


def _undefined() -> Fault:
    return Fault(VECTOR_UD)


class _Decoder:
    """State of one decoding: the position in the bytes and the prefixes seen."""

    def __init__(self, code: bytes, start: int, mode64: bool) -> None:
        self.code = code
        self.start = start
        self.position = start
        self.mode64 = mode64
        self.operand_prefix = False
        self.address_prefix = False
        self.lock = False
        self.rep = REP_NONE
        self.rex = 0
        self.rex_present = False
        self.vector_size = 16
        self.opcode_map = op.MAP_ONE_BYTE
        self.opcode = 0
        self.modrm = 0
        self.size = 0
        self.insn = Insn("", 0, 0, 0)

    def run(self) -> Insn:
        form = self.find_form()
        insn = self.insn
        mod = self.modrm >> 6
        reads_memory = False
        for method in form.methods:
            if method == op.METHOD_MEM and mod == 3:
                raise _undefined()
            if method in (op.METHOD_RM, op.METHOD_MEM, op.METHOD_XMM_RM, op.METHOD_UNUSED) and mod != 3:
                reads_memory = True
        if form.flags & op.REG_ONLY and mod != 3:
            raise _undefined()
        self.size = self.operand_size(form)
        insn.asize = self.address_size()
        if reads_memory:
            self.memory()
        for place in range(len(form.methods)):
            method = form.methods[place]
            if method != op.METHOD_UNUSED:
                insn.operands.append(self.operand(method, self.resolve(form.sizes[place])))
        if self.lock:
            allowed = form.flags & op.LOCKABLE and insn.operands[0].kind == MEM
            if not allowed:
                raise _undefined()
        insn.mnemonic = form.mnemonic
        insn.length = self.position
        insn.size = self.resolve(form.size)
        insn.lock = self.lock
        insn.opcode_map = self.opcode_map
        insn.opcode = self.opcode
        if form.low_bits == 16:
            insn.condition = self.opcode & 15
        if form.prefix > op.PREFIX_NONE:
            insn.prefix = op.PREFIX_BYTES[form.prefix]
        if form.prefix < 0:
            insn.rep = self.rep
        return insn

    # Bytes.

    def take(self, count: int) -> int:
        """The next ``count`` bytes as an unsigned number."""
        end = self.position + count
        limit = self.start + MAX_LENGTH
        if end > limit and len(self.code) >= limit:
            raise Fault(VECTOR_GP, 0)
        if end > len(self.code):
            raise Truncated
        value = 0
        for place in range(count):
            value |= self.code[self.position + place] << (8 * place)
        self.position = end
        return value

    def take_signed(self, count: int) -> int:
        """The next ``count`` bytes as a two's complement number."""
        value = self.take(count)
        if value >> (8 * count - 1):
            value -= 1 << (8 * count)
        return value

    # Prefixes, opcode, ModRM.

    def prefixes(self) -> int:
        """Reads legacy and REX prefixes; answers the first opcode byte."""
        while True:
            byte = self.take(1)
            if self.mode64 and byte & 0xF0 == 0x40:
                self.rex = byte & 15
                self.rex_present = True
                continue
            if byte == 0x66:
                self.operand_prefix = True
            elif byte == 0x67:
                self.address_prefix = True
            elif byte == 0xF0:
                self.lock = True
            elif byte == 0xF2:
                self.rep = REP_F2
            elif byte == 0xF3:
                self.rep = REP_F3
            elif byte not in (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65):
                return byte
            # A REX prefix that does not stand directly before the opcode is ignored (SDM vol. 2, 2.2.1).
            self.rex = 0
            self.rex_present = False

    def find_form(self) -> op.Form:
        """Reads the instruction up to and including ModRM and selects the table entry."""
        byte = self.prefixes()
        selector = op.PREFIX_NONE
        if self.rep == REP_F3:
            selector = op.PREFIX_F3
        elif self.rep == REP_F2:
            selector = op.PREFIX_F2
        elif self.operand_prefix:
            selector = op.PREFIX_66
        if byte == 0x0F:
            self.opcode_map = op.MAP_0F
            self.opcode = self.take(1)
            row = _0F[self.opcode]
        elif byte in (0xC4, 0xC5) and self.vex(byte):
            self.opcode_map = op.MAP_VEX
            selector = op.PREFIX_F3
            self.opcode = self.take(1)
            row = _VEX[self.opcode]
        else:
            self.opcode = byte
            row = _ONE_BYTE[byte]
            if byte == 0x90 and self.rex & REX_B and self.rep != REP_F3:
                # XCHG R8, rAX: only the exchange of rAX with itself is NOP. PAUSE ignores REX.B.
                row = _ONE_BYTE[0x91]
        if row is None:
            raise _undefined()
        reg = 0
        if row.modrm:
            self.modrm = self.take(1)
            reg = self.modrm >> 3 & 7
            self.insn.reg_field = reg
        forms = row.wide if self.rex & REX_W else row.forms
        form = forms[selector * 8 + reg]
        if form is None or form.flags & (op.ONLY32 if self.mode64 else op.ONLY64):
            raise _undefined()
        return form

    def vex(self, byte: int) -> bool:
        """Reads the payload of a VEX prefix; False if C4 or C5 is LES or LDS (SDM vol. 2, 2.3.5)."""
        payload = self.take(1)
        if not self.mode64 and payload < 0xC0:
            return False
        if self.operand_prefix or self.lock or self.rep != REP_NONE or self.rex_present:
            raise _undefined()
        # R, X and B are stored inverted.
        rex = (payload >> 5 ^ 7) & REX_R
        last = payload
        if byte == 0xC4:
            rex = payload >> 5 ^ 7
            last = self.take(1)
            if payload & 0x1F != 1:
                raise _undefined()
        # The two instructions supported have pp = F3 and no third operand in vvvv.
        if last & 3 != 2 or last >> 3 & 15 != 15:
            raise _undefined()
        self.vector_size = 32 if last & 4 else 16
        self.rex = rex if self.mode64 else 0
        return True

    # Sizes.

    def operand_size(self, form: op.Form) -> int:
        """The operand size in bytes (SDM vol. 1, 3.6)."""
        if self.mode64:
            if form.flags & op.NEAR or self.rex & REX_W:
                return 8
            if self.operand_prefix:
                return 2
            return 8 if form.flags & op.STACK else 4
        return 2 if self.operand_prefix else 4

    def address_size(self) -> int:
        """The address size in bytes (SDM vol. 1, 3.6)."""
        if self.mode64:
            return 4 if self.address_prefix else 8
        return 2 if self.address_prefix else 4

    def resolve(self, size: int) -> int:
        """Bytes meant by a ``SIZE_`` value of the tables."""
        if size > 0:
            return size
        if size == op.SIZE_OPERAND:
            return self.size
        if size == op.SIZE_NATIVE:
            return 8 if self.mode64 else 4
        if size == op.SIZE_VECTOR:
            return self.vector_size
        if size == op.SIZE_DWORD:
            return 2 if self.size == 2 else 4
        assert size == op.SIZE_ADDRESS
        return 0

    # Operands.

    def operand(self, method: int, size: int) -> Operand:
        """The operand of ``size`` bytes that ``method`` selects; reads immediates."""
        rm = self.modrm & 7 | (8 if self.rex & REX_B else 0)
        reg = self.modrm >> 3 & 7 | (8 if self.rex & REX_R else 0)
        if method in (op.METHOD_RM, op.METHOD_MEM):
            return Operand(MEM, size) if self.modrm < 0xC0 else self.register(rm, size)
        if method == op.METHOD_REG:
            return self.register(reg, size)
        if method in (op.METHOD_IMM, op.METHOD_IMM8, op.METHOD_IMM32):
            return self.immediate(method, size)
        if method == op.METHOD_OPCODE:
            return self.register(self.opcode & 7 | (8 if self.rex & REX_B else 0), size)
        if method == op.METHOD_ACC:
            return Operand(REG, size, 0)
        if method == op.METHOD_REL8:
            return Operand(REL, size, 0, self.take_signed(1))
        if method == op.METHOD_REL32:
            return Operand(REL, size, 0, self.take_signed(2 if size == 2 else 4))
        if method == op.METHOD_MOFFS:
            self.insn.displacement = self.take(self.insn.asize)
            return Operand(MEM, size)
        if method == op.METHOD_CL:
            return Operand(REG, 1, 1)
        if method == op.METHOD_ONE:
            return Operand(IMM, 1, 0, 1)
        if method == op.METHOD_XMM:
            return Operand(XMM, size, reg)
        if method == op.METHOD_XMM_RM:
            return Operand(MEM, size) if self.modrm < 0xC0 else Operand(XMM, size, rm)
        if method == op.METHOD_CR_GPR:
            return Operand(REG, size, rm)
        if method == op.METHOD_CR:
            if reg not in (0, 2, 3, 4):
                raise _undefined()
            return Operand(CR, size, reg)
        assert method == op.METHOD_ST0
        return Operand(ST0, size)

    def register(self, index: int, size: int) -> Operand:
        """A general register; without REX the byte registers 4..7 are AH..BH."""
        if size == 1 and not self.rex_present and 4 <= index < 8:
            return Operand(HIGH8, 1, index - 4)
        return Operand(REG, size, index)

    def immediate(self, method: int, size: int) -> Operand:
        """An immediate, sign-extended where its encoding is shorter than ``size``."""
        count = size
        if method == op.METHOD_IMM8:
            count = 1
        elif method == op.METHOD_IMM32:
            count = 2 if size == 2 else 4
        return Operand(IMM, size, 0, self.take_signed(count) & ((1 << (8 * size)) - 1))

    def memory(self) -> None:
        """Reads SIB and displacement of a memory operand (SDM vol. 2, tables 2-1 to 2-3)."""
        insn = self.insn
        mod = self.modrm >> 6
        rm = self.modrm & 7
        if insn.asize == 2:
            if mod == 0 and rm == 6:
                insn.displacement = self.take_signed(2)
                return
            insn.base = _BASE16[rm]
            insn.index = _INDEX16[rm]
            if mod:
                insn.displacement = self.take_signed(mod)
            return
        high = 8 if self.rex & REX_B else 0
        if rm == 4:
            sib = self.take(1)
            index = sib >> 3 & 7 | (8 if self.rex & REX_X else 0)
            if index != 4:
                insn.index = index
                insn.scale = 1 << (sib >> 6)
            rm = sib & 7
            if rm == 5 and mod == 0:
                insn.displacement = self.take_signed(4)
                return
        elif rm == 5 and mod == 0:
            if self.mode64:
                insn.base = RIP
            insn.displacement = self.take_signed(4)
            return
        insn.base = rm | high
        if mod == 1:
            insn.displacement = self.take_signed(1)
        elif mod == 2:
            insn.displacement = self.take_signed(4)
