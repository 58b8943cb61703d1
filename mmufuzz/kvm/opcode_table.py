"""The emulator's opcode tables: what ``opcode_text`` says, by opcode byte (emulate.c:struct opcode, opcode_table)."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm import opcode_text as text

# Operands (emulate.c:OpReg and the like).
OP_NONE: Final = 0
OP_REG: Final = 1  # by ModRM.reg, or by the opcode's low bits
OP_MEM: Final = 2  # by ModRM.rm, memory or register, of the operand size
OP_MEM8: Final = 3
OP_MEM16: Final = 4
OP_MEM32: Final = 5
OP_MEM64: Final = 6  # 8 bytes, 16 with REX.W
OP_MEM_FAR: Final = 7
OP_ACC: Final = 8
OP_ACC_LO: Final = 9
OP_ACC_HI: Final = 10
OP_DI: Final = 11
OP_SI: Final = 12
OP_DX: Final = 13
OP_CL: Final = 14
OP_ONE: Final = 15
OP_IMM: Final = 16  # of the operand size, at most 4 bytes, sign-extended
OP_IMM_BYTE: Final = 17  # sign-extended
OP_IMM_UBYTE: Final = 18
OP_IMM_U16: Final = 19
OP_IMM64: Final = 20
OP_IMM_FAR: Final = 21
OP_XLAT: Final = 22
OP_ES: Final = 23
OP_GS: Final = 28

OPERANDS: Final[dict[str, int]] = {
    "-": OP_NONE,
    "Reg": OP_REG,
    "Mem": OP_MEM,
    "Mem8": OP_MEM8,
    "Mem16": OP_MEM16,
    "Mem32": OP_MEM32,
    "Mem64": OP_MEM64,
    "MemF": OP_MEM_FAR,
    "Acc": OP_ACC,
    "AccLo": OP_ACC_LO,
    "AccHi": OP_ACC_HI,
    "DI": OP_DI,
    "SI": OP_SI,
    "DX": OP_DX,
    "CL": OP_CL,
    "One": OP_ONE,
    "Imm": OP_IMM,
    "ImmB": OP_IMM_BYTE,
    "ImmU": OP_IMM_UBYTE,
    "ImmU16": OP_IMM_U16,
    "Imm64": OP_IMM64,
    "ImmF": OP_IMM_FAR,
    "XLat": OP_XLAT,
    "ES": OP_ES,
    "CS": OP_ES + 1,
    "SS": OP_ES + 2,
    "DS": OP_ES + 3,
    "FS": OP_ES + 4,
    "GS": OP_GS,
}

# Flags.
BYTE_OP: Final = 1 << 0
MODRM: Final = 1 << 1
MOV: Final = 1 << 2  # the destination is not read
LOCK: Final = 1 << 3
PAGE_TABLE: Final = 1 << 4
STACK: Final = 1 << 5
NO64: Final = 1 << 6
UNDEFINED: Final = 1 << 7
NEAR_BRANCH: Final = 1 << 8
NO16: Final = 1 << 9
SSE: Final = 1 << 10
MMX: Final = 1 << 11
UNALIGNED: Final = 1 << 12  # of 16 bytes or more; the others must be aligned
ALIGNED16: Final = 1 << 13
SRC_WRITE: Final = 1 << 14
NO_WRITE: Final = 1 << 15
NO_ACCESS: Final = 1 << 16
STRING: Final = 1 << 17
PRIV: Final = 1 << 18
PROT: Final = 1 << 19
OP3264: Final = 1 << 20
NO_MOD: Final = 1 << 21
BIT_OP: Final = 1 << 22
INC_SP: Final = 1 << 23
TWO_MEM_OP: Final = 1 << 24
MEM_ABS: Final = 1 << 25
EMULATE_ON_UD: Final = 1 << 26
CHECK_PERM: Final = 1 << 27
CHECK_CR: Final = 1 << 28
CHECK_DR: Final = 1 << 29
CHECK_SVM: Final = 1 << 30
CHECK_SVM_ADDRESS: Final = 1 << 31
CHECK_TSC: Final = 1 << 32
ONLY64: Final = 1 << 33
BY_PREFIX: Final = 1 << 34  # found by a table of mandatory prefixes
MOVBE66: Final = 1 << 35

UNUSUAL: Final = NO64 | UNDEFINED | SSE | MMX | CHECK_PERM | PRIV | PROT | STRING
"""What x86_emulate_insn looks at in one go: the other entries have no checks."""

FLAGS: Final[dict[str, int]] = {
    "byte": BYTE_OP,
    "modrm": MODRM,
    "mov": MOV,
    "lock": LOCK,
    "pt": PAGE_TABLE,
    "stack": STACK,
    "no64": NO64,
    "undef": UNDEFINED,
    "near": NEAR_BRANCH,
    "no16": NO16,
    "sse": SSE,
    "mmx": MMX,
    "unaligned": UNALIGNED,
    "aligned16": ALIGNED16,
    "srcwrite": SRC_WRITE,
    "nowrite": NO_WRITE,
    "noaccess": NO_ACCESS,
    "string": STRING,
    "priv": PRIV,
    "prot": PROT,
    "op3264": OP3264,
    "nomod": NO_MOD,
    "bit": BIT_OP,
    "incsp": INC_SP,
    "twomem": TWO_MEM_OP,
    "memabs": MEM_ABS,
    "ud": EMULATE_ON_UD,
    "perm": CHECK_PERM,
    "cr": CHECK_CR,
    "dr": CHECK_DR,
    "svm": CHECK_SVM,
    "svmpa": CHECK_SVM | CHECK_SVM_ADDRESS,
    "tsc": CHECK_TSC,
    "only64": ONLY64,
    "movbe66": MOVBE66,
}

PREFIXES: Final = ("NP", "66", "F2", "F3")


NAMES: Final[list[str]] = []
"""Every name once; the place is the number by which the emulator dispatches."""


def _number(name: str) -> int:
    if name not in NAMES:
        NAMES.append(name)
    return NAMES.index(name)


class Opcode:
    """struct opcode: an entry. ``map`` is 1 to 3, the length of the opcode; ``line`` the text it was made from."""

    def __init__(self, opcode_map: int, opcode: int, line: str) -> None:
        words = line.split()
        self.map = opcode_map
        self.opcode = opcode
        self.line = line
        self.name = words[1]
        self.mnemonic = self.name.split(".")[0]
        self.operation = _number(self.name)
        self.dst = OPERANDS[words[2]]
        self.src = OPERANDS[words[3]]
        self.src2 = OPERANDS[words[4]]
        self.flags = 0
        for word in words[5:]:
            self.flags |= FLAGS[word]


class Row:
    """The entries of one opcode byte: ``entries[prefix * 16 + register form * 8 + ModRM.reg]``.

    ``exact`` holds those told apart by the whole ModRM byte.
    """

    def __init__(self) -> None:
        self.modrm = False
        self.entries: list[Opcode | None] = [None] * 64
        self.exact: dict[int, Opcode] = {}


def _add(table: list[Row | None], opcode_map: int, line: str) -> None:
    place = line.split(maxsplit=1)[0]
    prefix = -1
    if ":" in place:
        name, place = place.split(":")
        prefix = PREFIXES.index(name)
    exact = -1
    if "=" in place:
        place, digits = place.split("=")
        exact = int(digits, 16)
    form = place[-1] if place[-1] in "mr" else ""
    place = place.rstrip("mr")
    reg = -1
    if "/" in place:
        place, digits = place.split("/")
        reg = int(digits)
    count = 1
    if "+" in place:
        place, digits = place.split("+")
        count = int(digits)
    for opcode in range(int(place, 16), int(place, 16) + count):
        entry = Opcode(opcode_map, opcode, line)
        if prefix >= 0:
            entry.flags |= BY_PREFIX
        if reg >= 0 or form or exact >= 0 or prefix >= 0:
            entry.flags |= MODRM
        row = table[opcode]
        if row is None:
            row = Row()
            table[opcode] = row
        row.modrm = row.modrm or entry.flags & MODRM != 0
        if exact >= 0:
            row.exact[exact] = entry
            continue
        for index in range(64):
            if prefix in (-1, index >> 4) and reg in (-1, index & 7) and form != ("m" if index & 8 else "r"):
                row.entries[index] = entry


def _tables() -> list[list[Row | None]]:
    tables: list[list[Row | None]] = []
    texts = (
        text.regular_lines() + text.ONE_BYTE.strip().splitlines(),
        text.TWO_BYTE.strip().splitlines(),
        text.MAP_38.strip().splitlines(),
    )
    for number in range(3):
        table: list[Row | None] = [None] * 256
        for line in texts[number]:
            _add(table, number + 1, line)
        tables.append(table)
    return tables


TABLES: Final[list[list[Row | None]]] = _tables()
"""By length of the opcode, less one: opcode_table, twobyte_table, opcode_map_0f_38."""
