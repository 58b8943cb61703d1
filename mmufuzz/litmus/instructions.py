"""Instructions of litmus tests: herd's X86 (Intel order) and X86_64 (AT&T order), as text for ``x86.asm``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from mmufuzz.case.error import CaseError
from mmufuzz.litmus.condition import number
from mmufuzz.litmus.model import MAX_LOCATIONS, X86, X86_64, Insn, LitmusTest, Location, Register, register
from mmufuzz.litmus.source import quoted
from mmufuzz.search.order_strategy import ATOMIC, FENCE, LOAD, NONE, STORE
from mmufuzz.x86.asm import AsmError, assemble

_FENCES: Final = ("mfence", "lfence", "sfence")
_TWO: Final = ("add", "sub", "and", "or", "xor")
"""Destination and source; the destination is read and written."""
_ONE: Final = ("inc", "dec", "not", "neg")
_SWAPS: Final = ("xchg", "xadd", "cmpxchg")
"""Both operands may be written; their order does not matter where one of them is memory."""
_SUFFIXES: Final = {"b": 1, "w": 2, "l": 4, "q": 8}
_KEYWORDS: Final = {1: "byte", 2: "word", 4: "dword", 8: "qword"}

_EXPECTED: Final = (
    "expected MOV, XCHG, MFENCE, LFENCE, SFENCE, LOCK and ADD, SUB, AND, OR, XOR, INC, DEC, NOT, NEG, XADD or CMPXCHG, "
    "or arithmetic on registers"
)


@dataclass(frozen=True)
class Memory:
    """``location``, named by itself or by the ``base`` register that holds its address (-1 for none)."""

    location: Location
    base: int = -1


@dataclass(frozen=True)
class Immediate:
    """A constant."""

    value: int


Operand = Register | Memory | Immediate


class InstructionParser:
    """The instructions of thread ``thread``; ``place`` is the file and line of the one being read."""

    def __init__(self, test: LitmusTest, thread: int) -> None:
        self.test = test
        self.thread = thread
        self.place = ""
        self.written: set[int] = set()
        self.bases: list[tuple[str, int]] = []
        """Registers that addressed memory, each with the place."""

    def parse(self, text: str, place: str) -> Insn:
        """One instruction. Raises CaseError."""
        self.place = place
        words = text.split(None, 1)
        lock = words[0].lower() == "lock"
        if lock:
            if len(words) == 1:
                raise CaseError(place, "expected an instruction behind LOCK")
            words = words[1].split(None, 1)
        mnemonic, size = self._mnemonic(words[0], text)
        parts = [part.strip() for part in words[1].split(",")] if len(words) > 1 else []
        operands = [self._operand(part) for part in parts]
        count = 0 if mnemonic in _FENCES else 1 if mnemonic in _ONE else 2
        if len(operands) != count:
            raise CaseError(place, f"expected {count} operands of {mnemonic.upper()}, got {len(operands)}")
        if mnemonic in _SWAPS:
            operands.sort(key=lambda operand: not isinstance(operand, Memory))
        elif self.test.arch == X86_64:
            operands.reverse()
        if mnemonic in _FENCES:
            if lock:
                raise CaseError(place, f"expected no LOCK before {mnemonic.upper()}")
            return Insn(mnemonic, FENCE)
        return self._insn(mnemonic, size, operands, lock, text)

    def finish(self) -> None:
        """After the last instruction. Raises CaseError if a register that addresses memory is written."""
        for place, base in self.bases:
            if base in self.written:
                raise CaseError(place, "expected an address in a register that the program does not write")

    def _mnemonic(self, word: str, text: str) -> tuple[str, int]:
        """The mnemonic without its size suffix, and the size, 0 without one."""
        name = word.lower()
        known = ("mov", *_FENCES, *_TWO, *_ONE, *_SWAPS)
        if name in known:
            return name, 0
        if name[:-1] in known and name[-1] in _SUFFIXES and name[:-1] not in _FENCES:
            return name[:-1], _SUFFIXES[name[-1]]
        raise CaseError(self.place, f"{_EXPECTED}, got {quoted(text)}")

    def _operand(self, text: str) -> Operand:
        value = number(text.removeprefix("$"))
        if value is not None:
            return Immediate(value)
        found = register(text.removeprefix("%"), self.test.arch)
        if found is not None:
            return found
        match = re.fullmatch(r"\[\s*(%?[A-Za-z_]\w*)\s*\]|\(\s*(%?[A-Za-z_]\w*)\s*\)", text, re.ASCII)
        if match is None:
            expected = f"a register of {self.test.arch}, a constant, [LOCATION] or [REGISTER]"
            raise CaseError(self.place, f"expected {expected}, got {quoted(text)}")
        return self._memory(match.group(1) or match.group(2))

    def _memory(self, name: str) -> Memory:
        base = register(name.removeprefix("%"), self.test.arch)
        if base is None:
            return Memory(location_named(self.test, name, self.place))
        address = self.test.threads[self.thread].registers.get(base.number, 0)
        for location in self.test.locations.values():
            if location.address == address and base.size == (8 if self.test.arch == X86_64 else 4):
                self.bases.append((self.place, base.number))
                return Memory(location, base.number)
        raise CaseError(self.place, f"expected the initial state to set {self.thread}:{name} to a location")

    def _insn(self, mnemonic: str, size: int, operands: list[Operand], lock: bool, text: str) -> Insn:
        memory = [operand for operand in operands if isinstance(operand, Memory)]
        if len(memory) > 1:
            raise CaseError(self.place, f"expected at most one operand in memory, got {quoted(text)}")
        size = self._size(size, operands, text)
        kind = NONE
        if memory:
            if mnemonic == "xchg" or lock:
                kind = ATOMIC
            elif mnemonic == "mov":
                kind = STORE if operands[0] is memory[0] else LOAD
            elif operands[0] is memory[0]:
                raise CaseError(self.place, f"expected LOCK before {mnemonic.upper()} of memory, got {quoted(text)}")
            else:
                kind = LOAD
        self._note_written(mnemonic, operands)
        listed = ", ".join(self._asm(operand, size) for operand in operands)
        code = f"{'lock ' if lock else ''}{mnemonic} {listed}"
        try:
            assemble(code, self.test.arch == X86_64)
        except AsmError:
            raise CaseError(self.place, f"expected an instruction that exists, got {quoted(text)}") from None
        return Insn(code, kind, memory[0].location.bit if memory else 0)

    def _size(self, suffix: int, operands: list[Operand], text: str) -> int:
        """The operand size, which all operands must share. A location without a declaration takes it on."""
        sizes = [suffix] if suffix else []
        sizes.extend(operand.size for operand in operands if isinstance(operand, Register))
        locations = [operand.location for operand in operands if isinstance(operand, Memory)]
        sizes.extend(location.size for location in locations if location.size)
        size = sizes[0] if sizes else 4
        for other in sizes:
            if other != size:
                found = f"{size} and {other} bytes in {quoted(text)}"
                raise CaseError(self.place, f"expected operands of one size, got {found}")
        for location in locations:
            location.size = size
        return size

    def _note_written(self, mnemonic: str, operands: list[Operand]) -> None:
        written = operands if mnemonic in ("xchg", "xadd") else operands[:1]
        self.written.update(operand.number for operand in written if isinstance(operand, Register))
        if mnemonic == "cmpxchg":
            self.written.add(0)

    def _asm(self, operand: Operand, size: int) -> str:
        match operand:
            case Immediate(value):
                return str(value)
            case Register(index, width):
                return _name(index, width)
            case Memory(location, base):
                width = 8 if self.test.arch == X86_64 else 4
                address = _name(base, width) if base >= 0 else f"{location.address:#x}"
                return f"{_KEYWORDS[size]} [{address}]"


def _name(index: int, size: int) -> str:
    """The assembler's name of a register."""
    if index >= 8:
        return f"r{index}" + {1: "b", 2: "w", 4: "d", 8: ""}[size]
    name = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")[index]
    if size == 1:
        return name[0] + "l" if index < 4 else name + "l"
    return {2: "", 4: "e", 8: "r"}[size] + name


def location_named(test: LitmusTest, name: str, place: str) -> Location:
    """The location ``name`` of ``test``, made if it is not there. Raises CaseError if that is one too many."""
    if register(name, test.arch) is not None or register(name, X86) is not None:
        raise CaseError(place, f"expected a location, got the register '{name}'")
    if name not in test.locations:
        if len(test.locations) == MAX_LOCATIONS:
            raise CaseError(place, f"expected at most {MAX_LOCATIONS} locations, '{name}' is one more")
        test.locations[name] = Location(name, len(test.locations))
    return test.locations[name]
