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
from mmufuzz.x86.asm_encode import Encoder, candidate_sizes
from mmufuzz.x86.asm_text import Argument, AsmError, parse_argument, signed
from mmufuzz.x86.decode import FEP
from mmufuzz.x86.insn import CR, DR, IMM, MEM

__all__ = ["AsmError", "assemble", "disassemble"]

_CONDITION_NAMES: Final = "o,no,b c nae,ae nb nc,e z,ne nz,be na,a nbe,s,ns,p pe,np po,l nge,ge nl,le ng,g nle"
_CONDITIONS: Final[dict[str, int]] = {
    name: number for number, names in enumerate(_CONDITION_NAMES.split(",")) for name in names.split()
}
_STRING_SUFFIXES: Final[dict[str, int]] = {"b": 1, "w": 2, "d": 4, "q": 8}
_STRINGS: Final = ("movs", "stos", "lods", "scas", "cmps", "ins", "outs")
# Mnemonics that say an operand size, as (mnemonic of the tables, bytes).
_SIZED: Final[dict[str, tuple[str, int]]] = {
    "cbw": ("cbw", 2),
    "cwde": ("cbw", 4),
    "cdqe": ("cbw", 8),
    "cwd": ("cwd", 2),
    "cdq": ("cwd", 4),
    "cqo": ("cwd", 8),
    "pushaw": ("pusha", 2),
    "popaw": ("popa", 2),
    "pushad": ("pusha", 4),
    "popad": ("popa", 4),
    "pushfw": ("pushf", 2),
    "popfw": ("popf", 2),
    "pushfd": ("pushf", 4),
    "popfd": ("popf", 4),
    "pushfq": ("pushf", 8),
    "popfq": ("popf", 8),
    "iretw": ("iret", 2),
    "iretd": ("iret", 4),
    "iretq": ("iret", 8),
    "retfw": ("retf", 2),
    "retfq": ("retf", 8),
    "sysretq": ("sysret", 8),
    "sysexitq": ("sysexit", 8),
    "fxsave64": ("fxsave", 8),
    "fxrstor64": ("fxrstor", 8),
    "xsave64": ("xsave", 8),
    "xrstor64": ("xrstor", 8),
    "xsaveopt64": ("xsaveopt", 8),
    "xsavec64": ("xsavec", 8),
}
_OPERAND_SIZES: Final[dict[str, int]] = {"o16": 2, "o32": 4, "o64": 8}
_COUNTERS: Final[dict[str, int]] = {"jcxz": 2, "jecxz": 4, "jrcxz": 8}
_REP: Final[dict[str, int]] = {"rep": 0xF3, "repe": 0xF3, "repz": 0xF3, "repne": 0xF2, "repnz": 0xF2}


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
    operand_size = 0
    while words and (words[0] in ("fep", "lock") or words[0] in _REP or words[0] in _OPERAND_SIZES):
        word = words.pop(0)
        if word == "fep":
            fep = True
        elif word == "lock":
            lock = True
        elif word in _OPERAND_SIZES:
            operand_size = _OPERAND_SIZES[word]
        else:
            rep = _REP[word]
    if not words:
        raise AsmError(f"no mnemonic in {text!r}")
    arguments: list[Argument] = []
    far = "far" in words
    if far:
        words.remove("far")
    if len(words) > 1:
        for part in " ".join(words[1:]).split(","):
            if not part.strip():
                raise AsmError(f"an operand of {text!r} is empty")
            arguments.append(parse_argument(part.strip(), mode64))
    prefix = FEP if fep else b""
    if words[0] == "pause" and not (arguments or lock or rep):
        return prefix + b"\xf3\x90"
    mnemonic, condition, wanted = _mnemonic(words[0], arguments)
    wanted = wanted or operand_size
    if far:
        mnemonic += "f"
        for argument in arguments:
            argument.size += 2
    if mnemonic == "fxch" and not arguments:
        arguments.append(parse_argument("st1", mode64))
    if mnemonic == "imul" and len(arguments) == 2 and arguments[1].kind == IMM:
        arguments.insert(1, arguments[0])
    if mnemonic in ("test", "xchg") and len(arguments) == 2 and arguments[1].kind == MEM:
        # The two are symmetric, and their only encoding names the memory operand first.
        arguments.reverse()
    if words[0] in _COUNTERS and _COUNTERS[words[0]] != (8 if mode64 else 4):
        if _COUNTERS[words[0]] != (4 if mode64 else 2):
            raise AsmError(f"{words[0]} does not exist in {64 if mode64 else 32}-bit code")
        prefix += b"\x67"
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
        for size in candidate_sizes(form, wanted, mode64):
            encoder = Encoder(form, size, mode64)
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
    """The tables' mnemonic, the condition, and the operand size that the word says (else 0)."""
    if word[:-1] in _STRINGS and not arguments and word[-1] in _STRING_SUFFIXES:
        return word[:-1], 0, _STRING_SUFFIXES[word[-1]]
    if word in _SIZED:
        mnemonic, size = _SIZED[word]
        return mnemonic, 0, size
    if word in _COUNTERS:
        return "jcxz", 0, 0
    if word == "xlatb":
        return "xlat", 0, 0
    for stem in ("j", "set", "cmov"):
        if word.startswith(stem) and word[len(stem) :] in _CONDITIONS:
            return stem + "cc", _CONDITIONS[word[len(stem) :]], 0
    if word == "sal":
        return "shl", 0, 0
    if word == "mov":
        for argument in arguments:
            if argument.kind in (CR, DR):
                return "movcr" if argument.kind == CR else "movdr", 0, 0
    # Names of table rows that are no mnemonics of their own.
    if word in ("jcc", "setcc", "cmovcc", "movcr", "movdr", "xlat") or word in _STRINGS:
        raise AsmError(f"unknown mnemonic {word!r}")
    return word, 0, 0
