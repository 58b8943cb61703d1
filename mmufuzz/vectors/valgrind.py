"""Valgrind's instruction tests: the files ``insn_*.def`` of its directories none/tests/x86 and none/tests/amd64.

A line is an instruction in AT&T's words, what is set before it and a colon, its operands with their values, and behind
``=>`` what it must leave: ``adcb rflags[0x1,0x1] : imm8[12] r8.ub[34] => 1.ub[47]``. Flags are pairs of mask and
value; a result is that of a register by name, or of an operand by number. An operand that names no register gets one,
and each memory operand a place of its own. The integer instructions are read; lines for others are ``unsupported``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from mmufuzz.vectors.vector import Vector, VectorError
from mmufuzz.x86.asm import AsmError, assemble

_CODE: Final = 0x1000
_DATA: Final = 0x2000
_WORD: Final = re.compile(r"(\w+?)(?:\.([us][bwdq]|p[sd]))?\[([^\]]*)\]")
_ANY: Final = re.compile(r"(imm|r|m)(8|16|32|64)")
_FLAGS: Final = ("rflags", "eflags")
_STATUS: Final = 0xCD5
"""Flags that the tests set, with POPF: reserved bits stay."""
_KEYWORDS: Final = {1: "byte", 2: "word", 4: "dword", 8: "qword"}
_WIDTHS: Final = {"b": 1, "w": 2, "d": 4, "q": 8}
_LETTERS: Final = "bdca"
"""Letters of the general registers, in the order in which operands without a name get them."""

_PLAIN: Final = frozenset(
    ("cbw", "cwde", "cdqe", "cwd", "cdq", "cqo", "clc", "stc", "cmc", "cld", "std", "lahf", "sahf"),
)
_SHIFTS: Final = frozenset(("rcl", "rcr", "rol", "ror", "sal", "sar", "shl", "shr"))
_SUFFIXED: Final = _SHIFTS | frozenset(
    (
        *("adc", "add", "and", "bsf", "bsr", "bswap", "bt", "btc", "btr", "bts", "cmp", "cmpxchg", "dec", "div"),
        *("idiv", "imul", "inc", "mov", "mul", "neg", "not", "or", "sbb", "shld", "shrd", "sub", "test", "xadd"),
        *("xchg", "xor"),
    )
)


def read_def(text: str, mode: int) -> Iterator[Vector]:
    """The tests of one file; ``mode`` is 64 or 32. Raises ``VectorError``."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield _Test(line, f"line {number}", mode).vector()


def _intel(name: str, operands: int) -> tuple[str, str]:
    """(mnemonic of the assembler, operands that AT&T leaves out); "" for an instruction that is not read."""
    if name in _PLAIN or name.startswith(("cmov", "set")):
        return name, ""
    if match := re.fullmatch(r"mov([sz])([bwl])([wlq])", name):
        return ("movsxd" if match[2] == "l" else f"mov{match[1]}x"), ""
    if name[:-1] not in _SUFFIXED or name[-1] not in "bwlq":
        return "", ""
    base = name[:-1]
    return ("shl" if base == "sal" else base), (", 1" if base in _SHIFTS and operands == 1 else "")


def _general(name: str) -> tuple[str, int, int]:
    """(letter, bytes, lowest bit) of AL to RDX; bytes are 0 for another name."""
    if match := re.fullmatch(r"([re]?)([abcd])([xlh])", name):
        size = 1 if match[3] != "x" else {"r": 8, "e": 4, "": 2}[match[1]]
        return match[2], size, 8 if match[3] == "h" else 0
    return "", 0, 0


def _is_integer(kind: str) -> bool:
    """Whether a word is about flags, an immediate, a general register or memory."""
    return kind in _FLAGS or _general(kind)[1] > 0 or _ANY.fullmatch(kind) is not None


class _Test:
    """One line on its way to a ``Vector``."""

    def __init__(self, line: str, place: str, mode: int) -> None:
        self.place = place
        left, _, right = line.partition("=>")
        name, _, rest = left.strip().partition(" ")
        before, colon, behind = rest.partition(":")
        self.name = name
        self.presets = before.split() if colon else []
        self.operands = (behind if colon else before).split()
        self.results = right.split()
        self.made = Vector(f"{place}: {line.strip()}", mode)
        self.values = {letter: 0 for letter in _LETTERS}
        """What the general registers hold: at first before the instruction, then behind it."""
        self.places: list[tuple[str, int, int]] = []
        """Of each operand a letter and the lowest bit, or "m" and the address, or "i" and 0; and its bytes."""

    def vector(self) -> Vector:
        """The test, or one that is ``unsupported``."""
        made = self.made
        mnemonic, more = _intel(self.name, len(self.operands))
        words = [self.parse(word) for word in self.presets + self.operands]
        if not mnemonic or not all(_is_integer(kind) for kind, *_ in words):
            made.unsupported = True
            return made
        texts = [self.put(*word) for word in words][len(self.presets) :]
        code = self.encode(mnemonic, ", ".join(reversed(texts)) + more)
        self.commit(made.initial.regs)
        made.initial.ram.update({_CODE + at: byte for at, byte in enumerate(code + b"\xf4")})
        made.initial.regs[self.pointer] = _CODE
        made.final.ram.update({at: byte for at, byte in made.initial.ram.items() if at >= _DATA})
        made.final.masks[self.flags] = 0
        for word in self.results:
            self.expect(*self.parse(word))
        self.commit(made.final.regs)
        made.final.regs[self.pointer] = _CODE + len(code) + 1
        return made

    @property
    def flags(self) -> str:
        """The name that the mode has for the flags."""
        return _FLAGS[0] if self.made.mode == 64 else _FLAGS[1]

    @property
    def pointer(self) -> str:
        """The name that the mode has for the instruction pointer."""
        return "rip" if self.made.mode == 64 else "eip"

    def parse(self, word: str) -> tuple[str, int, list[str]]:
        """(what, bytes of the values' type or 0, the values)."""
        match = _WORD.fullmatch(word)
        if match is None:
            raise VectorError(f"{self.place}: expected name.type[value], got {word!r}")
        return match[1], _WIDTHS[match[2][1]] if match[2] and match[2][0] != "p" else 0, match[3].split(",")

    def number(self, text: str, size: int) -> int:
        """A value as ``size`` bytes."""
        try:
            return int(text, 0) & (1 << 8 * size) - 1
        except ValueError:
            raise VectorError(f"{self.place}: expected a number, got {text!r}") from None

    def put(self, kind: str, width: int, values: list[str]) -> str:
        """Give a preset or an operand its value; the answer is the operand's text."""
        if kind in _FLAGS:
            self.made.initial.regs[self.flags] = self.number(values[1], 4) & _STATUS | 2
            return ""
        letter, size, low = _general(kind)
        if match := _ANY.fullmatch(kind):
            size = int(match[2]) // 8
            letter = {"imm": "i", "m": "m", "r": ""}[match[1]] or self.free_letter()
        if letter == "i":
            self.places.append(("i", 0, size))
            return str(int(values[0], 0))
        value = self.number(values[0], size)
        if letter == "m":
            address = _DATA + 64 * len(self.places)
            self.places.append(("m", address, size))
            self.made.initial.ram.update(enumerate(value.to_bytes(size, "little"), address))
            return f"{_KEYWORDS[size]} [{address}]"
        self.places.append((letter, low, size))
        self.merge(letter, low, size, value)
        return kind if _general(kind)[1] else _register(letter, size)

    def free_letter(self) -> str:
        """A register that no other word of the line names."""
        named = {_general(self.parse(word)[0])[0] for word in self.presets + self.operands}
        used = {place[0] for place in self.places} | named
        return next(letter for letter in _LETTERS if letter not in used)

    def merge(self, letter: str, low: int, size: int, value: int) -> None:
        """Write a part of a register as instructions do: 32 bits clear what is above them."""
        mask = (1 << 64) - 1 if size >= 4 else (1 << 8 * size) - 1 << low
        self.values[letter] = self.values[letter] & ~mask | value << low

    def encode(self, mnemonic: str, operands: str) -> bytes:
        """The machine code."""
        try:
            return assemble(f"{mnemonic} {operands}".strip(), self.made.mode == 64)
        except AsmError as error:
            raise VectorError(f"{self.place}: {mnemonic} {operands}: {error}") from None

    def commit(self, regs: dict[str, int]) -> None:
        """Registers by the names that the mode has for them."""
        for letter in _LETTERS:
            regs[_register(letter, self.made.mode // 8)] = self.values[letter]

    def expect(self, kind: str, width: int, values: list[str]) -> None:
        """A result."""
        final = self.made.final
        if kind in _FLAGS:
            final.masks[self.flags] = self.number(values[0], 4)
            final.regs[self.flags] = self.number(values[1], 4)
            return
        letter, size, low = _general(kind)
        arguments = self.places[len(self.places) - len(self.operands) :]
        if kind.isdigit() and int(kind) < len(arguments):
            letter, low, size = arguments[int(kind)]
        value = self.number(values[0], size)
        if letter == "m":
            final.ram.update(enumerate(value.to_bytes(size, "little"), low))
        elif letter and letter != "i":
            self.merge(letter, low, size, value)
        else:
            raise VectorError(f"{self.place}: expected a result of an operand or a register, got {kind!r}")


def _register(letter: str, size: int) -> str:
    """The name of ``size`` low bytes of a register."""
    return {1: f"{letter}l", 2: f"{letter}x", 4: f"e{letter}x", 8: f"r{letter}x"}[size]
