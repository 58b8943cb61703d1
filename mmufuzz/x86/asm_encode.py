"""Encoding of operands in the forms of the opcode tables: the part of the assembler below the text."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import opcodes as op
from mmufuzz.x86.asm_text import Argument, signed
from mmufuzz.x86.decode_form import REX_B, REX_R, REX_W, REX_X
from mmufuzz.x86.insn import CR, DR, HIGH8, IMM, MEM, MMX, NO_REG, REG, RIP, SREG, STI, XMM

_IMMEDIATES: Final = (op.METHOD_IMM, op.METHOD_IMM8, op.METHOD_IMM32)
_KINDS: Final[dict[int, int]] = {
    op.METHOD_CR: CR,
    op.METHOD_DR: DR,
    op.METHOD_SREG: SREG,
    op.METHOD_SREG_OPCODE: SREG,
    op.METHOD_MMX: MMX,
    op.METHOD_MMX_RM: MMX,
    op.METHOD_STI: STI,
}
"""The kind of register behind the addressing methods that neither take general nor vector registers."""
_ADDRESSED: Final = (op.METHOD_RM, op.METHOD_MEM, op.METHOD_XMM_RM, op.METHOD_MMX_RM, op.METHOD_UNUSED)


def candidate_sizes(form: op.Form, wanted: int, mode64: bool) -> list[int]:
    """Operand sizes to try, the default first; only ``wanted`` if the mnemonic says it (else 0)."""
    native = 8 if mode64 else 4
    if form.opcode_map >= op.MAP_VEX:
        if op.SIZE_VECTOR in form.sizes:
            return [16, 32]
        return [8] if form.flags & op.WIDE and mode64 else [4, 8] if mode64 else [4]
    if wanted:
        if wanted > native or (form.flags & op.STRING and (wanted == 1) != (form.size == 1)):
            return []
        return [4] if wanted == 1 else [wanted]
    if form.flags & op.WIDE:
        return [8] if mode64 else []
    if form.flags & op.NEAR:
        return [native]
    if op.SIZE_FAR in form.sizes or op.SIZE_SELECTOR in form.sizes or op.SIZE_WIDE in form.sizes:
        return [4, 2, 8] if mode64 else [4, 2]
    if op.SIZE_OPERAND not in form.sizes and op.SIZE_DWORD not in form.sizes:
        return [native] if form.flags & op.STACK else [4]
    if form.flags & op.STACK:
        return [native, 2]
    return [4, 2, 8] if mode64 else [4, 2]


_ESCAPES: Final = [b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"]


def _little_endian(value: int, size: int) -> bytes:
    return (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


class Encoder:
    """One attempt to encode operands in one form with one operand size."""

    def __init__(self, form: op.Form, size: int, mode64: bool) -> None:
        self.form = form
        self.size = size
        self.mode64 = mode64
        self.rex = 0
        self.needs_rex = False
        self.refuses_rex = False
        self.low_bits = 0
        self.vvvv = 0
        self.reg = max(form.reg, 0)
        self.rm: Argument | None = None
        self.memory: Argument | None = None
        self.memory_size = 0
        self.immediate = b""

    def resolve(self, size: int) -> int:
        if size > 0:
            return size
        if size == op.SIZE_NATIVE:
            return 8 if self.mode64 else 4
        if size == op.SIZE_DWORD:
            return 2 if self.size == 2 else 4
        if size == op.SIZE_ADDRESS:
            return 0
        if size == op.SIZE_WIDE:
            return 8 if self.size == 8 else 4
        if size == op.SIZE_FAR:
            return self.size + 2
        if size == op.SIZE_TABLE:
            return 10 if self.mode64 else 6
        if size == op.SIZE_PAIR:
            return 2 * self.size
        assert size in (op.SIZE_OPERAND, op.SIZE_VECTOR, op.SIZE_SELECTOR)
        return self.size

    def match(self, arguments: list[Argument]) -> bool:
        """True if the form can express the operands; the fields then hold the parts of the encoding."""
        methods = [method for method in self.form.methods if method != op.METHOD_FAR]
        if len(methods) != len(self.form.methods) or len(methods) != len(arguments):
            # Direct far pointers have no text here.
            return False
        for place in range(len(methods)):
            size = self.form.sizes[place]
            given = arguments[place]
            if size == op.SIZE_SELECTOR and given.kind == MEM:
                resolved = 2
            else:
                resolved = self.resolve(size)
            if not self.match_one(methods[place], resolved, given):
                return False
        if self.size == 8 and self.form.flags & (op.NEAR | op.STACK) == 0:
            self.rex |= REX_W
        return not (self.refuses_rex and (self.rex or self.needs_rex))

    def match_one(self, method: int, size: int, argument: Argument) -> bool:
        kind = argument.kind
        if method in _IMMEDIATES:
            return kind == IMM and self.match_immediate(method, size, argument.value)
        if method == op.METHOD_ONE:
            return kind == IMM and argument.value == 1
        if method in (op.METHOD_REL8, op.METHOD_REL32):
            count = 1 if method == op.METHOD_REL8 else 4
            self.immediate = _little_endian(argument.value, count)
            return kind == IMM and signed(argument.value, count) == argument.value
        if kind == MEM:
            return self.match_memory(method, size, argument)
        if kind == IMM:
            return False
        if method in _KINDS:
            return kind == _KINDS[method] and self.place_special(method, argument)
        if method in (op.METHOD_XMM, op.METHOD_XMM_RM, op.METHOD_VEX_XMM):
            if kind != XMM or argument.size != max(size, 16):
                return False
        elif kind not in (REG, HIGH8) or argument.size != size:
            return False
        return self.place_register(method, argument)

    def place_special(self, method: int, argument: Argument) -> bool:
        """Puts a control, debug, segment, MMX or x87 register where ``method`` encodes it."""
        index = argument.index
        if method == op.METHOD_SREG_OPCODE:
            return self.form.opcode >> 3 & 7 == index
        if method == op.METHOD_STI:
            self.low_bits = index
        elif method == op.METHOD_MMX_RM:
            self.rm = argument
        else:
            # POP CS and MOV CS, … are no instructions.
            if method == op.METHOD_SREG and index == 1 and self.form.opcode == 0x8E:
                return False
            self.reg = index & 7
            self.rex |= REX_R if index >= 8 else 0
        return True

    def place_register(self, method: int, argument: Argument) -> bool:
        """Puts a register of the right kind and size where ``method`` encodes it."""
        index = argument.index
        if method == op.METHOD_ACC:
            return argument.kind == REG and index == 0
        if method == op.METHOD_CL:
            return argument.kind == REG and index == 1
        if method == op.METHOD_DX:
            return argument.kind == REG and index == 2
        if method in (op.METHOD_VEX_REG, op.METHOD_VEX_XMM):
            self.vvvv = index
            return True
        if method in (op.METHOD_MEM, op.METHOD_MOFFS):
            return False
        if argument.kind == HIGH8:
            self.refuses_rex = True
            index += 4
        elif argument.needs_rex:
            self.needs_rex = True
        if method == op.METHOD_OPCODE:
            # 90 without REX.B is NOP, which does not clear the upper half of RAX.
            if self.form.opcode == 0x90 and index == 0:
                return False
            self.low_bits = index & 7
            self.rex |= REX_B if index >= 8 else 0
        elif method in (op.METHOD_REG, op.METHOD_XMM):
            self.reg = index & 7
            self.rex |= REX_R if index >= 8 else 0
        else:
            assert method in (op.METHOD_RM, op.METHOD_RM_REG, op.METHOD_XMM_RM, op.METHOD_UNUSED)
            self.rm = argument
            self.rex |= REX_B if index >= 8 else 0
        return True

    def match_immediate(self, method: int, size: int, value: int) -> bool:
        """True if ``value``, signed or unsigned in ``size`` bytes, survives its encoding."""
        if self.form.flags & op.STACK and self.size == 2:
            # The size of what PUSH pushes must not depend on the value.
            return False
        bits = 8 * size
        count = size
        if method == op.METHOD_IMM8:
            count = 1
        elif method == op.METHOD_IMM32:
            count = min(size, 4)
        self.immediate += _little_endian(value, count)
        return -(1 << (bits - 1)) <= value < 1 << bits and signed(signed(value, count), size) == signed(value, size)

    def match_memory(self, method: int, size: int, argument: Argument) -> bool:
        if argument.size not in (0, size) and size:
            return False
        self.memory = argument
        self.memory_size = size
        if method == op.METHOD_MOFFS:
            self.immediate = _little_endian(argument.value, argument.address_size)
            return argument.base == NO_REG and argument.index_register == NO_REG
        if method not in _ADDRESSED:
            return False
        if signed(argument.value, 4) != argument.value:
            return False
        self.rm = argument
        self.rex |= REX_B if 8 <= argument.base < 16 else 0
        self.rex |= REX_X if argument.index_register >= 8 else 0
        return True

    def encode(self, condition: int) -> bytes:
        """The bytes, after ``match``."""
        form = self.form
        code = b""
        native = 8 if self.mode64 else 4
        if self.memory is not None and self.memory.address_size != native:
            code += b"\x67"
        opcode = form.opcode
        if form.modrm < 0:
            opcode += condition if form.low_bits == 16 else self.low_bits
        if form.opcode_map >= op.MAP_VEX:
            code += self.vex()
        else:
            if self.size == 2:
                code += b"\x66"
            if form.prefix > op.PREFIX_NONE:
                code += bytes([op.PREFIX_BYTES[form.prefix]])
            if self.rex or self.needs_rex:
                code += bytes([0x40 | self.rex])
            code += _ESCAPES[form.opcode_map]
        code += bytes([opcode])
        if form.modrm >= 0:
            code += bytes([form.modrm + self.low_bits])
        elif form.needs_modrm:
            code += self.modrm()
        return code + self.immediate

    def vex(self) -> bytes:
        """The VEX prefix, of two bytes if that suffices."""
        form = self.form
        wide = self.rex & REX_W != 0 and op.SIZE_VECTOR not in form.sizes
        # VEX.pp counts F3 and F2 the way PREFIX_ does.
        last = (self.vvvv ^ 15) << 3 | form.prefix
        if self.size == 32 or form.flags & op.VEX_L1:
            last |= 4
        high = (self.rex & 7 ^ 7) << 5
        if self.rex & (REX_B | REX_X) or wide or form.opcode_map != op.MAP_VEX:
            return bytes([0xC4, high | form.opcode_map - op.MAP_VEX + 1, last | (0x80 if wide else 0)])
        return bytes([0xC5, high & 0x80 | last])

    def modrm(self) -> bytes:
        """ModRM, SIB and displacement (SDM vol. 2, tables 2-2 and 2-3)."""
        reg = self.reg << 3
        rm = self.rm
        if rm is None:
            # The fences: the form has no operand but is told apart by ModRM.
            return bytes([0xC0 | reg])
        if rm.kind != MEM:
            return bytes([0xC0 | reg | (rm.index + 4 if rm.kind == HIGH8 else rm.index & 7)])
        disp32 = _little_endian(rm.value, 4)
        if rm.base == RIP:
            return bytes([reg | 5]) + disp32
        # 4 in SIB.index means no index; with REX.X it is R12.
        indexed = rm.index_register != NO_REG
        index = rm.index_register & 7 if indexed else 4
        sib = (rm.scale.bit_length() - 1) << 6 | index << 3
        if rm.base == NO_REG:
            if not indexed and not self.mode64:
                return bytes([reg | 5]) + disp32
            return bytes([reg | 4, sib | 5]) + disp32
        base = rm.base & 7
        if rm.value == 0 and base != 5:
            mod, displacement = 0, b""
        elif signed(rm.value, 1) == rm.value:
            mod, displacement = 1, _little_endian(rm.value, 1)
        else:
            mod, displacement = 2, disp32
        if not indexed and base != 4:
            return bytes([mod << 6 | reg | base]) + displacement
        return bytes([mod << 6 | reg | 4, sib | base]) + displacement
