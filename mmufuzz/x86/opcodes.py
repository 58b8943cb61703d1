"""Opcode tables: one description of the supported encodings, read by the decoder and the assembler.

The encodings themselves are in ``opcode_map``. One that is absent there is either undefined or belongs to an extension
this CPU lacks, and raises #UD as hardware does; or it is arithmetic of the x87, MMX or SSE, which every 64-bit CPU has
and the model does not (``is_unmodelled``).
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import opcode_map as text

# Addressing methods.
METHOD_RM: Final = 0  # E: general register or memory, by ModRM.rm
METHOD_MEM: Final = 1  # M: memory only
METHOD_REG: Final = 2  # G: general register, by ModRM.reg
METHOD_OPCODE: Final = 3  # Z: general register, by the opcode's low bits
METHOD_ACC: Final = 4  # A: accumulator
METHOD_CL: Final = 5
METHOD_ONE: Final = 6  # the constant 1 of a shift
METHOD_IMM: Final = 7  # I: immediate of the operand's size
METHOD_IMM8: Final = 8  # Is: 8-bit immediate, sign-extended
METHOD_IMM32: Final = 9  # Iz: 16- or 32-bit immediate, sign-extended
METHOD_MOFFS: Final = 10  # O: memory at an absolute address of address size
METHOD_REL8: Final = 11  # Jb
METHOD_REL32: Final = 12  # Jz: 16- or 32-bit displacement
METHOD_CR: Final = 13  # C: control register, by ModRM.reg
METHOD_RM_REG: Final = 14  # R: general register by ModRM.rm, whatever ModRM.mod says
METHOD_XMM: Final = 15  # V: vector register, by ModRM.reg
METHOD_XMM_RM: Final = 16  # W: vector register or memory, by ModRM.rm
METHOD_STI: Final = 17  # STi: x87 register, by ModRM.rm
METHOD_UNUSED: Final = 18  # N: encoded like E, but neither read nor written, so no operand of the Insn
METHOD_SREG: Final = 19  # Sw: segment register, by ModRM.reg
METHOD_SREG_OPCODE: Final = 20  # Sp: segment register, by bits 5..3 of the opcode
METHOD_DR: Final = 21  # D: debug register, by ModRM.reg
METHOD_DX: Final = 22
METHOD_FAR: Final = 23  # Ap: far pointer in the instruction
METHOD_MMX: Final = 24  # P: MMX register, by ModRM.reg
METHOD_MMX_RM: Final = 25  # Q: MMX register or memory, by ModRM.rm
METHOD_VEX_REG: Final = 26  # B: general register, by VEX.vvvv
METHOD_VEX_XMM: Final = 27  # H: vector register, by VEX.vvvv

# Sizes that depend on the prefixes; positive values are bytes.
SIZE_OPERAND: Final = 0  # v: the operand size, 2, 4 or 8
SIZE_NATIVE: Final = -1  # n: 8 in 64-bit mode, else 4
SIZE_VECTOR: Final = -2  # x: 32 if VEX.L, else 16
SIZE_DWORD: Final = -3  # d, z: 4, or 2 with a 16-bit operand size
SIZE_ADDRESS: Final = -4  # M alone: the address is used and memory is not; an Operand of size 0
SIZE_WIDE: Final = -5  # y: 8 with REX.W or VEX.W, else 4
SIZE_FAR: Final = -6  # p: a selector behind an offset of the operand size
SIZE_TABLE: Final = -7  # t: limit and base of a descriptor table, 10 bytes in 64-bit mode, else 6
SIZE_PAIR: Final = -8  # a: two operands of the operand size
SIZE_SELECTOR: Final = -9  # s: 2 in memory, the operand size in a register

OPERANDS: Final[dict[str, tuple[int, int]]] = {
    "Eb": (METHOD_RM, 1),
    "Ew": (METHOD_RM, 2),
    "Ed": (METHOD_RM, SIZE_DWORD),
    "Ev": (METHOD_RM, SIZE_OPERAND),
    "Ey": (METHOD_RM, SIZE_WIDE),
    "Es": (METHOD_RM, SIZE_SELECTOR),
    "M": (METHOD_MEM, SIZE_ADDRESS),
    "M1": (METHOD_MEM, SIZE_ADDRESS),
    "M2": (METHOD_MEM, 2),
    "M4": (METHOD_MEM, 4),
    "M8": (METHOD_MEM, 8),
    "M10": (METHOD_MEM, 10),
    "M16": (METHOD_MEM, 16),
    "M512": (METHOD_MEM, SIZE_ADDRESS),
    "Ma": (METHOD_MEM, SIZE_PAIR),
    "Mp": (METHOD_MEM, SIZE_FAR),
    "Mt": (METHOD_MEM, SIZE_TABLE),
    "Mv": (METHOD_MEM, SIZE_OPERAND),
    "Mx": (METHOD_MEM, SIZE_VECTOR),
    "My": (METHOD_MEM, SIZE_WIDE),
    "Gb": (METHOD_REG, 1),
    "Gw": (METHOD_REG, 2),
    "Gv": (METHOD_REG, SIZE_OPERAND),
    "Gn": (METHOD_REG, SIZE_NATIVE),
    "Gy": (METHOD_REG, SIZE_WIDE),
    "By": (METHOD_VEX_REG, SIZE_WIDE),
    "Zb": (METHOD_OPCODE, 1),
    "Zv": (METHOD_OPCODE, SIZE_OPERAND),
    "Ab": (METHOD_ACC, 1),
    "Aw": (METHOD_ACC, 2),
    "Av": (METHOD_ACC, SIZE_OPERAND),
    "Az": (METHOD_ACC, SIZE_DWORD),
    "CL": (METHOD_CL, 1),
    "DX": (METHOD_DX, 2),
    "1": (METHOD_ONE, 1),
    "Ib": (METHOD_IMM, 1),
    "Iw": (METHOD_IMM, 2),
    "Iv": (METHOD_IMM, SIZE_OPERAND),
    "Is": (METHOD_IMM8, SIZE_OPERAND),
    "Iz": (METHOD_IMM32, SIZE_OPERAND),
    "Ob": (METHOD_MOFFS, 1),
    "Ov": (METHOD_MOFFS, SIZE_OPERAND),
    "Jb": (METHOD_REL8, SIZE_OPERAND),
    "Jz": (METHOD_REL32, SIZE_OPERAND),
    "Ap": (METHOD_FAR, SIZE_FAR),
    "Cn": (METHOD_CR, SIZE_NATIVE),
    "Dn": (METHOD_DR, SIZE_NATIVE),
    "Rn": (METHOD_RM_REG, SIZE_NATIVE),
    "Sw": (METHOD_SREG, 2),
    "Sp": (METHOD_SREG_OPCODE, 2),
    "P4": (METHOD_MMX, 4),
    "P8": (METHOD_MMX, 8),
    "Q8": (METHOD_MMX_RM, 8),
    "V4": (METHOD_XMM, 4),
    "V8": (METHOD_XMM, 8),
    "V16": (METHOD_XMM, 16),
    "V32": (METHOD_XMM, 32),
    "Vx": (METHOD_XMM, SIZE_VECTOR),
    "H16": (METHOD_VEX_XMM, 16),
    "W4": (METHOD_XMM_RM, 4),
    "W8": (METHOD_XMM_RM, 8),
    "W16": (METHOD_XMM_RM, 16),
    "W32": (METHOD_XMM_RM, 32),
    "Wx": (METHOD_XMM_RM, SIZE_VECTOR),
    "STi": (METHOD_STI, 10),
    "Nv": (METHOD_UNUSED, SIZE_OPERAND),
}

# Flags.
LOCKABLE: Final = 1 << 0  # LOCK is allowed if the destination is memory
STACK: Final = 1 << 1  # operand size is 8 in 64-bit mode unless 66 makes it 2
NEAR: Final = 1 << 2  # operand size is 8 in 64-bit mode, 66 is ignored (Intel; AMD honours it)
REG_ONLY: Final = 1 << 3  # ModRM.mod must be 3
ONLY32: Final = 1 << 4  # undefined in 64-bit mode
ONLY64: Final = 1 << 5  # another instruction, or none, outside 64-bit mode
WIDE: Final = 1 << 6  # needs REX.W or VEX.W
NARROW: Final = 1 << 7  # needs REX.W or VEX.W clear
BYTE: Final = 1 << 8  # size 1 without an operand that says so
STRING: Final = 1 << 9  # takes REP
MEM_ONLY: Final = 1 << 10  # ModRM.mod must not be 3
VEX_L0: Final = 1 << 11  # VEX.L must be 0
VEX_L1: Final = 1 << 12  # VEX.L must be 1

FLAGS: Final[dict[str, int]] = {
    "lock": LOCKABLE,
    "stack": STACK,
    "near": NEAR,
    "reg": REG_ONLY,
    "only32": ONLY32,
    "only64": ONLY64,
    "wide": WIDE,
    "narrow": NARROW,
    "byte": BYTE,
    "string": STRING,
    "mem": MEM_ONLY,
    "l0": VEX_L0,
    "l1": VEX_L1,
}

MAP_ONE_BYTE: Final = 0
MAP_0F: Final = 1
MAP_0F38: Final = 2
MAP_0F3A: Final = 3
MAP_VEX: Final = 4
MAP_VEX38: Final = 5
MAP_VEX3A: Final = 6

PREFIX_NONE: Final = 0
PREFIX_66: Final = 1
PREFIX_F3: Final = 2
PREFIX_F2: Final = 3
PREFIX_BYTES: Final = [0, 0x66, 0xF3, 0xF2]

_WITH_MODRM: Final = (
    METHOD_RM,
    METHOD_MEM,
    METHOD_REG,
    METHOD_CR,
    METHOD_DR,
    METHOD_SREG,
    METHOD_XMM_RM,
    METHOD_MMX_RM,
    METHOD_UNUSED,
)


class Form:
    """One encoding of one instruction.

    ``methods`` and ``sizes`` describe the operands in Intel order. ``size`` is the Insn's size: bytes, or
    ``SIZE_OPERAND``. ``reg`` is the opcode extension or -1, ``modrm`` the whole ModRM byte or -1, ``prefix`` a
    ``PREFIX_`` value or -1 for "any". ``low_bits`` counts the opcodes, or ModRM bytes, of the form (1, 8 or 16).
    ``operation`` numbers the mnemonic: see ``MNEMONICS``. ``number`` is the place in ``FORMS``.
    """

    def __init__(self, opcode_map: int, prefix: int, opcode: int, mnemonic: str) -> None:
        self.opcode_map = opcode_map
        self.prefix = prefix
        self.opcode = opcode
        self.low_bits = 1
        self.reg = -1
        self.modrm = -1
        self.mnemonic = mnemonic
        self.operation = 0
        self.number = 0
        self.methods: list[int] = []
        self.sizes: list[int] = []
        self.flags = 0
        self.size = SIZE_OPERAND
        self.has_vvvv = False

    @property
    def needs_modrm(self) -> bool:
        """True if a ModRM byte follows the opcode."""
        if self.reg >= 0 or self.modrm >= 0:
            return True
        for method in self.methods:
            if method in _WITH_MODRM:
                return True
        return False


class Row:
    """The forms of one opcode byte: ``forms[wide * 64 + mod3 * 32 + prefix * 8 + ModRM.reg]``.

    ``exact`` holds those told apart by the whole ModRM byte; they come first.
    """

    def __init__(self) -> None:
        self.modrm = False
        self.forms: list[Form | None] = [None] * 128
        self.exact: dict[int, Form] = {}


def _parse_line(opcode_map: int, line: str) -> Form:
    words = line.split()
    place = words[0]
    prefix = -1
    if ":" in place:
        name, place = place.split(":")
        prefix = PREFIX_NONE if name == "NP" else PREFIX_BYTES.index(int(name, 16))
    low_bits = 1
    if "+" in place:
        place, count = place.split("+")
        low_bits = int(count)
    extension = ""
    if "/" in place:
        place, extension = place.split("/")
    form = Form(opcode_map, prefix, int(place, 16), words[1])
    form.low_bits = low_bits
    if len(extension) == 1:
        form.reg = int(extension)
    elif extension:
        form.modrm = int(extension, 16)
    for word in words[2:]:
        if word in OPERANDS:
            method, size = OPERANDS[word]
            form.methods.append(method)
            form.sizes.append(size)
            if method in (METHOD_VEX_REG, METHOD_VEX_XMM):
                form.has_vvvv = True
        else:
            form.flags |= FLAGS[word]
    if form.flags & BYTE:
        form.size = 1
    elif form.sizes and form.flags & (NEAR | STACK) == 0 and form.sizes[0] >= SIZE_DWORD:
        # A count, vector or port says nothing about what is moved: the operand size decides.
        if form.methods[0] != METHOD_IMM:
            form.size = form.sizes[0]
    elif form.sizes and form.sizes[0] == SIZE_WIDE:
        form.size = SIZE_WIDE
    return form


_TEXTS: Final = [
    (MAP_ONE_BYTE, text.ONE_BYTE),
    (MAP_ONE_BYTE, text.X87),
    (MAP_0F, text.TWO_BYTE),
    (MAP_0F, text.SSE),
    (MAP_0F38, text.MAP_38),
    (MAP_VEX, text.VEX_0F),
    (MAP_VEX38, text.VEX_38),
    (MAP_VEX3A, text.VEX_3A),
]


def _parse_forms() -> list[Form]:
    forms = [_parse_line(MAP_ONE_BYTE, line) for line in text.regular_lines()]
    for opcode_map, lines in _TEXTS:
        for line in lines.strip().splitlines():
            forms.append(_parse_line(opcode_map, line))
    for number in range(len(forms)):
        forms[number].number = number
    return forms


FORMS: Final[list[Form]] = _parse_forms()
"""Every supported form; where two share an encoding (90: XCHG and NOP) the later one is meant."""


def _number_mnemonics() -> list[str]:
    names: list[str] = []
    numbers: dict[str, int] = {}
    for form in FORMS:
        if form.mnemonic not in numbers:
            numbers[form.mnemonic] = len(names)
            names.append(form.mnemonic)
        form.operation = numbers[form.mnemonic]
    return names


MNEMONICS: Final[list[str]] = _number_mnemonics()
"""Every mnemonic once; the place is the number by which the executor dispatches."""


def rows(opcode_map: int, mode64: bool, vex_l: bool = False) -> list[Row | None]:
    """The 256 rows of one opcode map for 64-bit code, or for 32- and 16-bit code; None where no form is supported.

    ``vex_l`` is VEX.L, which no other map has.
    """
    absent = (ONLY32 if mode64 else ONLY64) | (VEX_L0 if vex_l else VEX_L1)
    table: list[Row | None] = [None] * 256
    for form in FORMS:
        if form.opcode_map != opcode_map or form.flags & absent:
            continue
        opcodes = form.low_bits if form.modrm < 0 else 1
        for opcode in range(form.opcode, form.opcode + opcodes):
            row = table[opcode]
            if row is None:
                row = Row()
                table[opcode] = row
            row.modrm = form.needs_modrm
            _fill(row, form)
    return table


def _fill(row: Row, form: Form) -> None:
    if form.modrm >= 0:
        for modrm in range(form.modrm, form.modrm + form.low_bits):
            row.exact[modrm] = form
        return
    memory = form.flags & REG_ONLY == 0
    register = form.flags & MEM_ONLY == 0 and METHOD_MEM not in form.methods
    for place in range(128):
        if form.reg not in (-1, place & 7) or form.prefix not in (-1, place >> 3 & 3):
            continue
        if not (register if place & 32 else memory):
            continue
        if form.flags & (NARROW if place & 64 else WIDE):
            continue
        row.forms[place] = form


def entries(bits: int) -> list[Form]:
    """The forms that code of ``bits`` (64, 32 or 16) can encode, in the order of ``FORMS``."""
    found = [False] * len(FORMS)
    # Outside 64-bit code no prefix selects 64-bit operands.
    selectors = 128 if bits == 64 else 64
    for opcode_map in range(MAP_VEX3A + 1):
        for vex_l in (False, True):
            for row in rows(opcode_map, bits == 64, vex_l):
                if row is not None:
                    _mark(row, selectors, found)
    return [form for form in FORMS if found[form.number]]


def _mark(row: Row, selectors: int, found: list[bool]) -> None:
    for place in range(selectors):
        form = row.forms[place]
        if form is not None:
            found[form.number] = True
    for form in row.exact.values():
        found[form.number] = True


def is_unmodelled(opcode_map: int, opcode: int) -> bool:
    """True if an encoding of x87, MMX or SSE arithmetic may begin so: it exists on every CPU with these extensions."""
    if opcode_map == MAP_ONE_BYTE:
        return 0xD8 <= opcode <= 0xDF
    if opcode_map == MAP_0F:
        if 0x10 <= opcode <= 0x17 or 0x2A <= opcode <= 0x2F or 0x50 <= opcode <= 0x7F:
            return opcode not in (0x78, 0x79)
        return opcode in (0xC2, 0xC4, 0xC5, 0xC6) or opcode >= 0xD0
    return opcode_map in (MAP_0F38, MAP_0F3A)
