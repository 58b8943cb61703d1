"""Prefixes, opcode and ModRM of an instruction: which entry of the opcode tables it is."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86 import opcodes as op
from mmufuzz.x86.insn import FS, REP_F2, REP_F3, REP_NONE, Insn
from mmufuzz.x86.state import VECTOR_GP, VECTOR_UD, Fault

MAX_LENGTH: Final = 15
"""Bytes of the longest instruction (SDM vol. 2, 2.3.11); the forced-emulation prefix comes on top."""

REX_B: Final = 1
REX_X: Final = 2
REX_R: Final = 4
REX_W: Final = 8

_Rows = list[op.Row | None]

# By opcode map: tables of 64-bit code, and of 32- and 16-bit code; the VEX maps once more with VEX.L.
_TABLES64: Final[list[_Rows]] = [op.rows(number, True) for number in range(7)]
_TABLES32: Final[list[_Rows]] = [op.rows(number, False) for number in range(7)]
_LONG64: Final[list[_Rows]] = [op.rows(number, True, True) for number in range(7)]
_LONG32: Final[list[_Rows]] = [op.rows(number, False, True) for number in range(7)]

_SEGMENT_PREFIXES: Final[dict[int, int]] = {0x26: 0, 0x2E: 1, 0x36: 2, 0x3E: 3, 0x64: 4, 0x65: 5}
_VEX_PREFIXES: Final = [op.PREFIX_NONE, op.PREFIX_66, op.PREFIX_F3, op.PREFIX_F2]


@mypyc_attr(native_class=False)
class Truncated(Exception):
    """The instruction needs more bytes than were given, and fewer than 15 were given."""


@mypyc_attr(native_class=False)
class Unsupported(Fault):
    """#UD for want of a model: a CPU executes the instruction. ``Fault`` itself says what a CPU says."""

    def __init__(self) -> None:
        super().__init__(VECTOR_UD)


def undefined() -> Fault:
    """What an encoding that means nothing raises."""
    return Fault(VECTOR_UD)


class FormReader:
    """State of one decoding: the position in the bytes and the prefixes seen. ``bits`` is 64, 32 or 16."""

    def __init__(self, code: bytes, start: int, bits: int) -> None:
        self.code = code
        self.start = start
        self.position = start
        self.bits = bits
        self.mode64 = bits == 64
        self.operand_prefix = False
        self.address_prefix = False
        self.segment_prefix = -1
        self.lock = False
        self.rep = REP_NONE
        self.rex = 0
        self.rex_present = False
        self.vector_size = 16
        self.vvvv = 0
        self.opcode_map = op.MAP_ONE_BYTE
        self.opcode = 0
        self.modrm = 0
        self.size = 0
        self.insn = Insn("", 0, 0, 0)

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
            elif byte in _SEGMENT_PREFIXES:
                segment = _SEGMENT_PREFIXES[byte]
                # 64-bit code does not see the other four, so that FS stays in force behind one of them.
                if segment >= FS or not self.mode64:
                    self.segment_prefix = segment
            else:
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
        tables = _TABLES64 if self.mode64 else _TABLES32
        place = byte
        if byte == 0x0F:
            self.opcode_map = op.MAP_0F
            place = self.take(1)
            if place in (0x38, 0x3A):
                self.opcode_map = op.MAP_0F38 if place == 0x38 else op.MAP_0F3A
                place = self.take(1)
        elif byte in (0xC4, 0xC5) and self.is_vex():
            selector = self.vex(byte)
            place = self.take(1)
            if self.vector_size == 32:
                tables = _LONG64 if self.mode64 else _LONG32
        self.opcode = place
        if byte == 0x90 and self.rex & REX_B and self.rep != REP_F3:
            # XCHG R8, rAX: only the exchange of rAX with itself is NOP. PAUSE ignores REX.B.
            place = 0x91
        row = tables[self.opcode_map][place]
        if row is None:
            raise self.missing()
        return self.select(row, selector)

    def select(self, row: op.Row, selector: int) -> op.Form:
        """The form of ``row`` for the mandatory prefix ``selector`` (a ``PREFIX_`` value); reads ModRM."""
        place = selector * 8
        if row.modrm:
            self.modrm = self.take(1)
            reg = self.modrm >> 3 & 7
            self.insn.modrm = self.modrm
            self.insn.reg_field = reg
            place += reg
            if self.modrm >= 0xC0:
                place += 32
                exact = row.exact.get(self.modrm)
                if exact is not None:
                    if exact.prefix not in (-1, selector):
                        raise self.missing()
                    return exact
        if self.rex & REX_W:
            place += 64
        form = row.forms[place]
        if form is None or (self.opcode_map >= op.MAP_VEX and self.vvvv != 0 and not form.has_vvvv):
            raise self.missing()
        return form

    def missing(self) -> Fault:
        """What an encoding without a form raises."""
        return Unsupported() if op.is_unmodelled(self.opcode_map, self.opcode) else undefined()

    def is_vex(self) -> bool:
        """False if C4 or C5 is LES or LDS, whose ModRM.mod is not 3, outside 64-bit code (SDM vol. 2, 2.3.5)."""
        if self.mode64:
            return True
        payload = self.take(1)
        self.position -= 1
        return payload >= 0xC0

    def vex(self, byte: int) -> int:
        """Reads the payload of a VEX prefix; answers its mandatory prefix as a ``PREFIX_`` value."""
        payload = self.take(1)
        if self.operand_prefix or self.lock or self.rep != REP_NONE or self.rex_present:
            raise undefined()
        self.opcode_map = op.MAP_VEX
        # R, X, B and vvvv are stored inverted.
        rex = (payload >> 5 ^ 7) & REX_R
        last = payload
        if byte == 0xC4:
            rex = payload >> 5 ^ 7
            last = self.take(1)
            number = payload & 0x1F
            if not 1 <= number <= 3:
                raise undefined()
            self.opcode_map = op.MAP_VEX + number - 1
            if last & 0x80:
                rex |= REX_W
        self.vvvv = last >> 3 & 15 ^ 15
        self.vector_size = 32 if last & 4 else 16
        # Outside 64-bit code there are 8 registers, and VEX.W does not select 64-bit operands.
        self.rex = rex if self.mode64 else 0
        return _VEX_PREFIXES[last & 3]
