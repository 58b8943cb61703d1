"""A small assembler for the instructions of ``mmufuzz.x86.opcodes``, and a disassembler on iced-x86.

The text is Intel syntax as NASM writes it: ``lock xadd dword [rcx], edx``. Differences from NASM:

* A branch takes the displacement from the next instruction: ``jmp -2`` jumps to itself.
* ``fep`` in front is KVM's forced-emulation prefix.
* Of several encodings the shortest is chosen, and among equals the first of the opcode tables.
"""

from __future__ import annotations

from typing import Final

import iced_x86

from mmufuzz.x86 import opcodes as op
from mmufuzz.x86.asm_text import Argument, AsmError, parse_argument, signed
from mmufuzz.x86.decode import FEP, REX_B, REX_R, REX_W, REX_X
from mmufuzz.x86.insn import CR, HIGH8, IMM, MEM, NO_REG, REG, RIP, XMM

__all__ = ["AsmError", "assemble", "disassemble"]

_CONDITION_NAMES: Final = "o,no,b c nae,ae nb nc,e z,ne nz,be na,a nbe,s,ns,p pe,np po,l nge,ge nl,le ng,g nle"
_CONDITIONS: Final[dict[str, int]] = {
    name: number for number, names in enumerate(_CONDITION_NAMES.split(",")) for name in names.split()
}
_STRING_SUFFIXES: Final[dict[str, int]] = {"b": 1, "w": 2, "d": 4, "q": 8}
_REP: Final[dict[str, int]] = {"rep": 0xF3, "repe": 0xF3, "repz": 0xF3, "repne": 0xF2, "repnz": 0xF2}
_IMMEDIATES: Final = (op.METHOD_IMM, op.METHOD_IMM8, op.METHOD_IMM32)


def _forms() -> dict[str, list[op.Form]]:
    table: dict[str, list[op.Form]] = {}
    for form in op.FORMS:
        table.setdefault(form.mnemonic, []).append(form)
    return table


_FORMS: Final[dict[str, list[op.Form]]] = _forms()


def assemble(text: str, mode64: bool = True) -> bytes:
    """The bytes of one instruction, for 64-bit or flat 32-bit code. Raises ``AsmError``."""
    words = text.lower().split()
    fep = lock = False
    rep = 0
    while words and (words[0] in ("fep", "lock") or words[0] in _REP):
        word = words.pop(0)
        if word == "fep":
            fep = True
        elif word == "lock":
            lock = True
        else:
            rep = _REP[word]
    if not words:
        raise AsmError(f"no mnemonic in {text!r}")
    arguments: list[Argument] = []
    if len(words) > 1:
        for part in " ".join(words[1:]).split(","):
            if not part.strip():
                raise AsmError(f"an operand of {text!r} is empty")
            arguments.append(parse_argument(part.strip(), mode64))
    prefix = FEP if fep else b""
    if words[0] == "pause" and not (arguments or lock or rep):
        return prefix + b"\xf3\x90"
    mnemonic, condition, string_size = _mnemonic(words[0], arguments)
    if mnemonic in ("test", "xchg") and len(arguments) == 2 and arguments[1].kind == MEM:
        # The two are symmetric, and their only encoding names the memory operand first.
        arguments.reverse()
    if lock:
        prefix += b"\xf0"
    if rep:
        prefix += bytes([rep])
    best: bytes | None = None
    memory_size = -1
    for form in _FORMS.get(mnemonic, []):
        if form.flags & (op.ONLY32 if mode64 else op.ONLY64):
            continue
        if lock and not (form.flags & op.LOCKABLE and arguments and arguments[0].kind == MEM):
            continue
        if rep and form.flags & op.STRING == 0:
            continue
        for size in _candidate_sizes(form, string_size, mode64):
            encoder = _Encoder(form, size, mode64)
            if not encoder.match(arguments):
                continue
            code = encoder.encode(condition)
            if encoder.memory is not None and encoder.memory.size == 0:
                if memory_size not in (-1, encoder.memory_size):
                    raise AsmError(f"the memory operand of {text!r} needs a size")
                memory_size = encoder.memory_size
            if best is None or len(code) < len(best):
                best = code
    if best is None:
        raise AsmError(f"no encoding for {text!r} in {64 if mode64 else 32}-bit code")
    return prefix + best


def _nasm() -> iced_x86.Formatter:
    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.NASM)
    formatter.hex_prefix = "0x"
    formatter.hex_suffix = ""
    formatter.uppercase_hex = False
    formatter.space_after_operand_separator = True
    formatter.memory_size_options = iced_x86.MemorySizeOptions.ALWAYS
    formatter.rip_relative_addresses = True
    return formatter


_FORMATTER: Final[iced_x86.Formatter] = _nasm()
_BRANCHES: Final[dict[int, int]] = {
    iced_x86.OpKind.NEAR_BRANCH16: 2,
    iced_x86.OpKind.NEAR_BRANCH32: 4,
    iced_x86.OpKind.NEAR_BRANCH64: 8,
}


def disassemble(code: bytes, mode64: bool) -> str:
    """The first instruction of ``code`` in the syntax of ``assemble``, or "(bad)".

    Any valid instruction is shown, also one that ``decode`` does not support.
    """
    prefix = ""
    if code.startswith(FEP):
        prefix = "fep "
        code = code[len(FEP) :]
    instruction = iced_x86.Decoder(64 if mode64 else 32, code, ip=0).decode()
    if instruction.is_invalid:
        return prefix + "(bad)"
    if instruction.op_count and instruction.op0_kind in _BRANCHES:
        size = _BRANCHES[instruction.op0_kind]
        displacement = signed(instruction.near_branch_target - instruction.len, size)
        return f"{prefix}{_FORMATTER.format_mnemonic(instruction)} {displacement}"
    # NASM marks an absolute address of 8 bytes; its length shows that already.
    return prefix + _FORMATTER.format(instruction).replace("[qword ", "[")


def _mnemonic(word: str, arguments: list[Argument]) -> tuple[str, int, int]:
    """The tables' mnemonic, the condition, and the size of a string instruction (else 0)."""
    if word[:-1] in ("movs", "stos") and not arguments and word[-1] in _STRING_SUFFIXES:
        return word[:-1], 0, _STRING_SUFFIXES[word[-1]]
    for stem in ("j", "set", "cmov"):
        if word.startswith(stem) and word[len(stem) :] in _CONDITIONS:
            return stem + "cc", _CONDITIONS[word[len(stem) :]], 0
    if word == "sal":
        return "shl", 0, 0
    if word == "mov":
        for argument in arguments:
            if argument.kind == CR:
                return "movcr", 0, 0
    # Names of table rows that are no mnemonics of their own.
    if word in ("jcc", "setcc", "cmovcc", "movcr", "movs", "stos"):
        raise AsmError(f"unknown mnemonic {word!r}")
    return word, 0, 0


def _candidate_sizes(form: op.Form, string_size: int, mode64: bool) -> list[int]:
    """Operand sizes to try, the default first."""
    native = 8 if mode64 else 4
    if form.opcode_map == op.MAP_VEX:
        return [16, 32]
    if string_size:
        if string_size > native or (string_size == 1) != (form.size == 1):
            return []
        return [4] if string_size == 1 else [string_size]
    if form.flags & op.WIDE:
        return [8] if mode64 else []
    if form.flags & op.NEAR:
        return [native]
    if op.SIZE_OPERAND not in form.sizes and op.SIZE_DWORD not in form.sizes:
        return [4]
    if form.flags & op.STACK:
        return [native, 2]
    return [4, 2, 8] if mode64 else [4, 2]


def _little_endian(value: int, size: int) -> bytes:
    return (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


class _Encoder:
    """One attempt to encode operands in one form with one operand size."""

    def __init__(self, form: op.Form, size: int, mode64: bool) -> None:
        self.form = form
        self.size = size
        self.mode64 = mode64
        self.rex = 0
        self.needs_rex = False
        self.refuses_rex = False
        self.low_bits = 0
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
        assert size in (op.SIZE_OPERAND, op.SIZE_VECTOR)
        return self.size

    def match(self, arguments: list[Argument]) -> bool:
        """True if the form can express the operands; the fields then hold the parts of the encoding."""
        place = 0
        for number in range(len(self.form.methods)):
            method = self.form.methods[number]
            if method == op.METHOD_ST0:
                continue
            if place == len(arguments):
                return False
            if not self.match_one(method, self.resolve(self.form.sizes[number]), arguments[place]):
                return False
            place += 1
        if self.size == 8 and self.form.flags & (op.NEAR | op.STACK) == 0:
            self.rex |= REX_W
        if self.refuses_rex and (self.rex or self.needs_rex):
            return False
        return place == len(arguments)

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
        if method == op.METHOD_CR:
            self.reg = argument.index
            return kind == CR
        if method in (op.METHOD_XMM, op.METHOD_XMM_RM):
            if kind != XMM or argument.size != max(size, 16):
                return False
        elif kind not in (REG, HIGH8) or argument.size != size:
            return False
        return self.place_register(method, argument)

    def place_register(self, method: int, argument: Argument) -> bool:
        """Puts a register of the right kind and size where ``method`` encodes it."""
        index = argument.index
        if method == op.METHOD_ACC:
            return argument.kind == REG and index == 0
        if method == op.METHOD_CL:
            return argument.kind == REG and index == 1
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
            assert method in (op.METHOD_RM, op.METHOD_CR_GPR, op.METHOD_XMM_RM, op.METHOD_UNUSED)
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
        self.immediate = _little_endian(value, count)
        return -(1 << (bits - 1)) <= value < 1 << bits and signed(signed(value, count), size) == signed(value, size)

    def match_memory(self, method: int, size: int, argument: Argument) -> bool:
        if argument.size not in (0, size) and size:
            return False
        self.memory = argument
        self.memory_size = size
        if method == op.METHOD_MOFFS:
            self.immediate = _little_endian(argument.value, argument.address_size)
            return argument.base == NO_REG and argument.index_register == NO_REG
        if method not in (op.METHOD_RM, op.METHOD_MEM, op.METHOD_XMM_RM, op.METHOD_UNUSED):
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
        opcode = form.opcode + (condition if form.low_bits == 16 else self.low_bits)
        if form.opcode_map == op.MAP_VEX:
            code += self.vex()
        else:
            if self.size == 2:
                code += b"\x66"
            if form.prefix > op.PREFIX_NONE:
                code += bytes([op.PREFIX_BYTES[form.prefix]])
            if self.rex or self.needs_rex:
                code += bytes([0x40 | self.rex])
            if form.opcode_map == op.MAP_0F:
                code += b"\x0f"
        code += bytes([opcode])
        if form.needs_modrm:
            code += self.modrm()
        return code + self.immediate

    def vex(self) -> bytes:
        last = 15 << 3 | (4 if self.size == 32 else 0) | self.form.prefix
        high = (self.rex & 7 ^ 7) << 5
        if self.rex & (REX_B | REX_X):
            return bytes([0xC4, high | 1, last])
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
