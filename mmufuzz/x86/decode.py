"""The instruction decoder: total over bytes, for 64-bit, 32-bit and 16-bit code."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import opcodes as op
from mmufuzz.x86.decode_form import (
    MAX_LENGTH,
    REX_B,
    REX_R,
    REX_W,
    REX_X,
    FormReader,
    Truncated,
    Unsupported,
    undefined,
)
from mmufuzz.x86.insn import (
    CR,
    DR,
    DS,
    FAR,
    FS,
    HIGH8,
    IMM,
    MEM,
    MMX,
    NO_REG,
    REG,
    REL,
    RIP,
    SREG,
    SS,
    STI,
    XMM,
    Insn,
    Operand,
)

__all__ = ["FEP", "MAX_LENGTH", "Truncated", "Unsupported", "decode", "decode16"]

FEP: Final = b"\x0f\x0bkvm"
"""KVM's forced-emulation prefix, ``ud2; .ascii "kvm"`` (x86.c:handle_ud)."""

# [BX+SI], [BX+DI], … of 16-bit addressing (SDM vol. 2, table 2-1).
_BASE16: Final = [3, 3, 5, 5, 6, 7, 5, 3]
_INDEX16: Final = [6, 7, 6, 7, NO_REG, NO_REG, NO_REG, NO_REG]

_ADDRESSED: Final = (op.METHOD_RM, op.METHOD_MEM, op.METHOD_XMM_RM, op.METHOD_MMX_RM, op.METHOD_UNUSED)

_CACHE_LIMIT: Final = 1024
_cache64: Final[dict[bytes, Insn]] = {}
_cache32: Final[dict[bytes, Insn]] = {}
_cache16: Final[dict[bytes, Insn]] = {}


def decode(code: bytes, mode64: bool, fep: bool = False) -> Insn:
    """The instruction at the start of ``code``, in 64-bit or 32-bit code; bytes after it are ignored.

    With ``fep`` a complete forced-emulation prefix at the very start is skipped: its 5 bytes count in the
    length but not against the limit of 15. Without it, or with part of it, the prefix is a UD2.

    The Insn may be shared between callers and must not be changed. NOP never has operands, even
    where the encoding has a ModRM byte, because nothing is accessed.

    Raises ``Truncated``; ``Fault(VECTOR_UD)`` for undefined encodings and for extensions this CPU lacks (SDM vol. 2,
    appendix A), ``Unsupported`` for what a CPU knows and the model does not; ``Fault(VECTOR_GP, 0)`` for an
    instruction of more than 15 bytes (SDM vol. 3, 6.15).
    """
    if fep and code.startswith(FEP):
        insn = _Decoder(code, len(FEP), 64 if mode64 else 32).run()
        insn.fep = True
        return insn
    return _cached(_cache64 if mode64 else _cache32, code, 64 if mode64 else 32)


def decode16(code: bytes) -> Insn:
    """``decode`` for 16-bit code."""
    return _cached(_cache16, code, 16)


def _cached(cache: dict[bytes, Insn], code: bytes, bits: int) -> Insn:
    known = cache.get(code)
    if known is not None:
        return known
    insn = _Decoder(code, 0, bits).run()
    # Emptying the whole cache keeps its contents a function of the calls made, cheaply.
    if len(cache) >= _CACHE_LIMIT:
        cache.clear()
    cache[code] = insn
    return insn


class _Decoder(FormReader):
    """The table entry that ``FormReader`` finds, with its sizes and operands."""

    def run(self) -> Insn:
        form = self.find_form()
        insn = self.insn
        self.size = self.operand_size(form)
        insn.asize = self.address_size()
        if self.modrm < 0xC0:
            for method in form.methods:
                if method in _ADDRESSED:
                    self.memory()
                    break
        insn.segment = self.segment()
        for place in range(len(form.methods)):
            method = form.methods[place]
            if method != op.METHOD_UNUSED:
                insn.operands.append(self.operand(method, self.resolve(form.sizes[place])))
        if self.lock:
            allowed = form.flags & op.LOCKABLE and insn.operands[0].kind == MEM
            if not allowed:
                raise undefined()
        insn.mnemonic = form.mnemonic
        insn.operation = form.operation
        insn.form = form.number
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

    def segment(self) -> int:
        """The segment of the memory operand (SDM vol. 1, table 3-5). 64-bit code has bases in FS and GS only."""
        if self.segment_prefix >= (FS if self.mode64 else 0):
            return self.segment_prefix
        # In 64-bit code a prefix of the others does not even change which exception a bad address raises.
        return SS if self.insn.base in (4, 5) else DS

    # Sizes.

    def operand_size(self, form: op.Form) -> int:
        """The operand size in bytes (SDM vol. 1, 3.6)."""
        if self.mode64:
            if form.flags & op.NEAR or self.rex & REX_W:
                return 8
            if self.operand_prefix:
                return 2
            return 8 if form.flags & op.STACK else 4
        return 2 if self.operand_prefix != (self.bits == 16) else 4

    def address_size(self) -> int:
        """The address size in bytes (SDM vol. 1, 3.6)."""
        if self.mode64:
            return 4 if self.address_prefix else 8
        return 2 if self.address_prefix != (self.bits == 16) else 4

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
        if size == op.SIZE_WIDE:
            return 8 if self.rex & REX_W else 4
        if size == op.SIZE_FAR:
            return self.size + 2
        if size == op.SIZE_TABLE:
            return 10 if self.mode64 else 6
        if size == op.SIZE_PAIR:
            return 2 * self.size
        if size == op.SIZE_SELECTOR:
            return 2 if self.modrm < 0xC0 else self.size
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
        if method == op.METHOD_DX:
            return Operand(REG, 2, 2)
        if method == op.METHOD_ONE:
            return Operand(IMM, 1, 0, 1)
        if method == op.METHOD_XMM:
            return Operand(XMM, size, reg)
        if method == op.METHOD_XMM_RM:
            return Operand(MEM, size) if self.modrm < 0xC0 else Operand(XMM, size, rm)
        if method == op.METHOD_RM_REG:
            return Operand(REG, size, rm)
        if method == op.METHOD_VEX_REG:
            return Operand(REG, size, self.vvvv if self.mode64 else self.vvvv & 7)
        return self.special_operand(method, size, reg)

    def special_operand(self, method: int, size: int, reg: int) -> Operand:
        """Operands that are neither general registers nor immediates. Outside 64-bit code VEX has 8 registers."""
        if method == op.METHOD_VEX_XMM:
            return Operand(XMM, size, self.vvvv if self.mode64 else self.vvvv & 7)
        if method == op.METHOD_MMX:
            return Operand(MMX, size, reg & 7)
        if method == op.METHOD_MMX_RM:
            return Operand(MEM, size) if self.modrm < 0xC0 else Operand(MMX, size, self.modrm & 7)
        if method == op.METHOD_STI:
            return Operand(STI, size, self.modrm & 7)
        if method == op.METHOD_SREG:
            # CS is loaded by far transfers only. Neither REX.R nor the two codes above GS name a register.
            index = reg & 7
            if index > 5 or (index == 1 and not self.insn.operands):
                raise undefined()
            return Operand(SREG, size, index)
        if method == op.METHOD_SREG_OPCODE:
            return Operand(SREG, size, self.opcode >> 3 & 7)
        if method == op.METHOD_FAR:
            offset = self.take(size - 2)
            return Operand(FAR, size, self.take(2), offset)
        if method == op.METHOD_DR:
            if reg > 7:
                raise undefined()
            return Operand(DR, size, reg)
        assert method == op.METHOD_CR
        if reg not in (0, 2, 3, 4, 8):
            raise undefined()
        return Operand(CR, size, reg)

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
