"""Opcode tables: one description of the supported encodings, read by the decoder and the assembler.

The tables follow SDM vol. 2, appendix A. A line is ``[prefix:]opcode[+count][/reg] mnemonic operands flags``:

* ``prefix`` (66, F2, F3, or NP for none of them) is a mandatory prefix; without it the three are modifiers.
* ``+8`` puts a register, ``+16`` a condition into the low bits of the opcode.
* ``/reg`` is an opcode extension in ModRM.reg.

The first letter of an operand is its addressing method, the rest its size (see ``OPERANDS``).
Encodings that are absent here raise #UD, whatever real hardware does with them.
"""

from __future__ import annotations

from typing import Final

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
METHOD_CR_GPR: Final = 14  # R: general register by ModRM.rm, whatever ModRM.mod says
METHOD_XMM: Final = 15  # V: vector register, by ModRM.reg
METHOD_XMM_RM: Final = 16  # W: vector register or memory, by ModRM.rm
METHOD_ST0: Final = 17
METHOD_UNUSED: Final = 18  # N: encoded like E, but neither read nor written, so no operand of the Insn

# Sizes that depend on the prefixes; positive values are bytes.
SIZE_OPERAND: Final = 0  # v: the operand size, 2, 4 or 8
SIZE_NATIVE: Final = -1  # n: 8 in 64-bit mode, else 4
SIZE_VECTOR: Final = -2  # x: 32 if VEX.L, else 16
SIZE_DWORD: Final = -3  # d: 4, or 2 with a 16-bit operand size
SIZE_ADDRESS: Final = -4  # M alone: the address is used and memory is not; an Operand of size 0

OPERANDS: Final[dict[str, tuple[int, int]]] = {
    "Eb": (METHOD_RM, 1),
    "Ew": (METHOD_RM, 2),
    "Ed": (METHOD_RM, SIZE_DWORD),
    "Ev": (METHOD_RM, SIZE_OPERAND),
    "M": (METHOD_MEM, SIZE_ADDRESS),
    "M4": (METHOD_MEM, 4),
    "M8": (METHOD_MEM, 8),
    "M10": (METHOD_MEM, 10),
    "M16": (METHOD_MEM, 16),
    "Gb": (METHOD_REG, 1),
    "Gv": (METHOD_REG, SIZE_OPERAND),
    "Zb": (METHOD_OPCODE, 1),
    "Zv": (METHOD_OPCODE, SIZE_OPERAND),
    "Ab": (METHOD_ACC, 1),
    "Av": (METHOD_ACC, SIZE_OPERAND),
    "CL": (METHOD_CL, 1),
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
    "Cn": (METHOD_CR, SIZE_NATIVE),
    "Rn": (METHOD_CR_GPR, SIZE_NATIVE),
    "V4": (METHOD_XMM, 4),
    "V16": (METHOD_XMM, 16),
    "Vx": (METHOD_XMM, SIZE_VECTOR),
    "W4": (METHOD_XMM_RM, 4),
    "W16": (METHOD_XMM_RM, 16),
    "Wx": (METHOD_XMM_RM, SIZE_VECTOR),
    "ST0": (METHOD_ST0, 10),
    "Nv": (METHOD_UNUSED, SIZE_OPERAND),
}

# Flags.
LOCKABLE: Final = 1 << 0  # LOCK is allowed if the destination is memory
STACK: Final = 1 << 1  # operand size is 8 in 64-bit mode unless 66 makes it 2
NEAR: Final = 1 << 2  # operand size is 8 in 64-bit mode, 66 is ignored (Intel; AMD honours it)
REG_ONLY: Final = 1 << 3  # ModRM.mod must be 3
ONLY32: Final = 1 << 4  # undefined in 64-bit mode
ONLY64: Final = 1 << 5  # another instruction in 32-bit mode
WIDE: Final = 1 << 6  # needs REX.W
NARROW: Final = 1 << 7  # needs REX.W clear
BYTE: Final = 1 << 8  # size 1 without an operand that says so
STRING: Final = 1 << 9  # takes REP

_FLAGS: Final[dict[str, int]] = {
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
}

MAP_ONE_BYTE: Final = 0
MAP_0F: Final = 1
MAP_VEX: Final = 4

PREFIX_NONE: Final = 0
PREFIX_66: Final = 1
PREFIX_F3: Final = 2
PREFIX_F2: Final = 3
PREFIX_BYTES: Final = [0, 0x66, 0xF3, 0xF2]

_ALU: Final = ["add", "or", "adc", "sbb", "and", "sub", "xor", "cmp"]
_SHIFTS: Final = ["rol", "ror", "rcl", "rcr", "shl", "shr", "shl", "sar"]

_ONE_BYTE_TEXT: Final = """
40+8    inc     Zv          only32
48+8    dec     Zv          only32
50+8    push    Zv          stack
58+8    pop     Zv          stack
63      movsxd  Gv Ed       only64
68      push    Iz          stack
6A      push    Is          stack
70+16   jcc     Jb          near
84      test    Eb Gb
85      test    Ev Gv
86      xchg    Eb Gb       lock
87      xchg    Ev Gv       lock
88      mov     Eb Gb
89      mov     Ev Gv
8A      mov     Gb Eb
8B      mov     Gv Ev
8D      lea     Gv M
8F/0    pop     Ev          stack
90+8    xchg    Zv Av
90      nop
A0      mov     Ab Ob
A1      mov     Av Ov
A2      mov     Ob Ab
A3      mov     Ov Av
A4      movs                string byte
A5      movs                string
A8      test    Ab Ib
A9      test    Av Iz
AA      stos                string byte
AB      stos                string
B0+8    mov     Zb Ib
B8+8    mov     Zv Iv
C2      ret     Iw          near
C3      ret                 near
C6/0    mov     Eb Ib
C7/0    mov     Ev Iz
D9/3    fstp    M4 ST0
DB/7    fstp    M10 ST0
DD/3    fstp    M8 ST0
E8      call    Jz          near
E9      jmp     Jz          near
EB      jmp     Jb          near
F4      hlt
F5      cmc
F6/0    test    Eb Ib
F6/1    test    Eb Ib
F6/2    not     Eb          lock
F6/3    neg     Eb          lock
F7/0    test    Ev Iz
F7/1    test    Ev Iz
F7/2    not     Ev          lock
F7/3    neg     Ev          lock
F8      clc
F9      stc
FC      cld
FD      std
FE/0    inc     Eb          lock
FE/1    dec     Eb          lock
FF/0    inc     Ev          lock
FF/1    dec     Ev          lock
FF/2    call    Ev          near
FF/4    jmp     Ev          near
FF/6    push    Ev          stack
"""

_0F_TEXT: Final = """
01/7    invlpg  M
0B      ud2
NP:10   movups  V16 W16
F3:10   movss   V4 W4
NP:11   movups  W16 V16
F3:11   movss   W4 V4
1F      nop     Nv
20      movcr   Rn Cn
22      movcr   Cn Rn
NP:28   movaps  V16 W16
NP:29   movaps  W16 V16
40+16   cmovcc  Gv Ev
66:6F   movdqa  V16 W16
F3:6F   movdqu  V16 W16
66:7F   movdqa  W16 V16
F3:7F   movdqu  W16 V16
80+16   jcc     Jz          near
90+16   setcc   Eb
A3      bt      Ev Gv
AB      bts     Ev Gv       lock
NP:AE/5 lfence              reg
NP:AE/6 mfence              reg
NP:AE/7 sfence              reg
B0      cmpxchg Eb Gb       lock
B1      cmpxchg Ev Gv       lock
B3      btr     Ev Gv       lock
B6      movzx   Gv Eb
B7      movzx   Gv Ew
BA/4    bt      Ev Ib
BA/5    bts     Ev Ib       lock
BA/6    btr     Ev Ib       lock
BA/7    btc     Ev Ib       lock
BB      btc     Ev Gv       lock
BE      movsx   Gv Eb
BF      movsx   Gv Ew
C0      xadd    Eb Gb       lock
C1      xadd    Ev Gv       lock
C7/1    cmpxchg8b  M8       lock narrow
C7/1    cmpxchg16b M16      lock wide
"""

_VEX_TEXT: Final = """
F3:6F   vmovdqu Vx Wx
F3:7F   vmovdqu Wx Vx
"""


class Form:
    """One encoding of one instruction.

    ``methods`` and ``sizes`` describe the operands in Intel order. ``size`` is the Insn's size: bytes, or
    ``SIZE_OPERAND``. ``reg`` is the opcode extension or -1, ``prefix`` a ``PREFIX_`` value or -1 for "any".
    ``low_bits`` counts the opcodes that share the form (1, 8 or 16).
    """

    def __init__(self, opcode_map: int, prefix: int, opcode: int, low_bits: int, reg: int, mnemonic: str) -> None:
        self.opcode_map = opcode_map
        self.prefix = prefix
        self.opcode = opcode
        self.low_bits = low_bits
        self.reg = reg
        self.mnemonic = mnemonic
        self.methods: list[int] = []
        self.sizes: list[int] = []
        self.flags = 0
        self.size = SIZE_OPERAND

    @property
    def needs_modrm(self) -> bool:
        """True if a ModRM byte follows the opcode."""
        if self.reg >= 0:
            return True
        for method in self.methods:
            if method in (METHOD_RM, METHOD_REG, METHOD_CR, METHOD_XMM_RM, METHOD_UNUSED):
                return True
        return False


class Row:
    """The forms of one opcode byte: ``forms[prefix * 8 + ModRM.reg]``, and ``wide`` in their place under REX.W."""

    def __init__(self) -> None:
        self.modrm = False
        self.forms: list[Form | None] = [None] * 32
        self.wide: list[Form | None] = [None] * 32


def _parse_line(opcode_map: int, line: str) -> Form:
    words = line.split()
    place = words[0]
    prefix = -1
    if ":" in place:
        name, place = place.split(":")
        prefix = PREFIX_NONE if name == "NP" else PREFIX_BYTES.index(int(name, 16))
    reg = -1
    if "/" in place:
        place, digit = place.split("/")
        reg = int(digit)
    low_bits = 1
    if "+" in place:
        place, count = place.split("+")
        low_bits = int(count)
    form = Form(opcode_map, prefix, int(place, 16), low_bits, reg, words[1])
    for word in words[2:]:
        if word in OPERANDS:
            method, size = OPERANDS[word]
            form.methods.append(method)
            form.sizes.append(size)
        else:
            form.flags |= _FLAGS[word]
    if form.flags & BYTE:
        form.size = 1
    elif form.sizes and form.flags & (NEAR | STACK) == 0:
        # SIZE_ADDRESS says nothing about the instruction.
        form.size = SIZE_OPERAND if form.sizes[0] == SIZE_ADDRESS else form.sizes[0]
    return form


def _regular_lines() -> list[str]:
    """The lines of the one-byte map that follow a pattern: the ALU and the shift groups."""
    lines: list[str] = []
    for number in range(8):
        name = _ALU[number]
        lock = "" if name == "cmp" else "lock"
        base = number * 8
        lines.append(f"{base:02X} {name} Eb Gb {lock}")
        lines.append(f"{base + 1:02X} {name} Ev Gv {lock}")
        lines.append(f"{base + 2:02X} {name} Gb Eb")
        lines.append(f"{base + 3:02X} {name} Gv Ev")
        lines.append(f"{base + 4:02X} {name} Ab Ib")
        lines.append(f"{base + 5:02X} {name} Av Iz")
        lines.append(f"80/{number} {name} Eb Ib {lock}")
        lines.append(f"81/{number} {name} Ev Iz {lock}")
        lines.append(f"82/{number} {name} Eb Ib {lock} only32")
        lines.append(f"83/{number} {name} Ev Is {lock}")
        shift = _SHIFTS[number]
        lines.append(f"C0/{number} {shift} Eb Ib")
        lines.append(f"C1/{number} {shift} Ev Ib")
        lines.append(f"D0/{number} {shift} Eb 1")
        lines.append(f"D1/{number} {shift} Ev 1")
        lines.append(f"D2/{number} {shift} Eb CL")
        lines.append(f"D3/{number} {shift} Ev CL")
    return lines


def _parse_forms() -> list[Form]:
    forms = [_parse_line(MAP_ONE_BYTE, line) for line in _regular_lines()]
    for opcode_map, text in ((MAP_ONE_BYTE, _ONE_BYTE_TEXT), (MAP_0F, _0F_TEXT), (MAP_VEX, _VEX_TEXT)):
        for line in text.strip().splitlines():
            forms.append(_parse_line(opcode_map, line))
    return forms


FORMS: Final[list[Form]] = _parse_forms()
"""Every supported form; where two share an encoding (90: XCHG and NOP) the later one is meant."""


def rows(opcode_map: int) -> list[Row | None]:
    """The 256 rows of one opcode map; None where no form is supported."""
    table: list[Row | None] = [None] * 256
    for form in FORMS:
        if form.opcode_map != opcode_map:
            continue
        for opcode in range(form.opcode, form.opcode + form.low_bits):
            row = table[opcode]
            if row is None:
                row = Row()
                table[opcode] = row
            row.modrm = form.needs_modrm
            _fill(row, form)
    return table


def _fill(row: Row, form: Form) -> None:
    for prefix in range(4):
        if form.prefix not in (-1, prefix):
            continue
        for reg in range(8):
            if form.reg not in (-1, reg):
                continue
            if form.flags & WIDE == 0:
                row.forms[prefix * 8 + reg] = form
            if form.flags & NARROW == 0:
                row.wide[prefix * 8 + reg] = form
