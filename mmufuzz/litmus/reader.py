"""Reads herd's ``.litmus`` files for X86 and X86_64.

    X86 SB
    { x=0; y=0; }
     P0          | P1          ;
     MOV [x],$1  | MOV [y],$1  ;
     MOV EAX,[y] | MOV EAX,[x] ;
    exists (0:EAX=0 /\\ 1:EAX=0)

The format is that of the tools of Alglave and Maranget (herd7, litmus7, diy7). What is read of it: an initial state of
registers and locations with a type or without, a table of instructions, ``locations``, and one condition. Everything
else is a ``CaseError`` that names file, line and what was expected.
"""

from __future__ import annotations

import re
from typing import Final

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import MAX_VCPUS
from mmufuzz.litmus.condition import ConditionParser, fits, number
from mmufuzz.litmus.instructions import InstructionParser, location_named
from mmufuzz.litmus.model import X86, X86_64, Item, LitmusTest, Shown, Thread, register
from mmufuzz.litmus.source import Source, quoted, uncommented

TYPES: Final = {
    "char": Shown(1, True), "short": Shown(2, True), "int": Shown(4, True), "long": Shown(8, True),
    "int8_t": Shown(1, True), "int16_t": Shown(2, True), "int32_t": Shown(4, True), "int64_t": Shown(8, True),
    "uint8_t": Shown(1, False), "uint16_t": Shown(2, False), "uint32_t": Shown(4, False), "uint64_t": Shown(8, False),
}  # fmt: skip

MAX_INSTRUCTIONS: Final = 64
"""Of one thread."""

_HEADER: Final = re.compile(r"\s*(\S+)[ \t]+(\S[^\n{]*)")
_TAIL: Final = re.compile(r"^[ \t]*(?:(?:locations|filter|exists|forall|final|observed|not)\b|~)", re.MULTILINE)
_ENTRY: Final = re.compile(
    r"(?:(?P<type>[A-Za-z_]\w*)\s+)?"
    r"(?:P?(?P<thread>\d{1,4})\s*:\s*%?(?P<register>\w+)|\[(?P<bracketed>[A-Za-z_]\w*)\]|(?P<plain>[A-Za-z_]\w*))"
    r"(?:\s*=\s*(?P<value>-?\w+))?",
    re.ASCII,
)


def read(name: str, text: str) -> LitmusTest:
    """The test in ``text``; ``name`` stands for the file in errors. Raises CaseError."""
    source = uncommented(name, text)
    test, opening = _header(source)
    closing = source.text.find("}", opening)
    if closing < 0:
        raise source.error(opening, "expected '}' at the end of the initial state that begins here")
    tail = _TAIL.search(source.text, closing)
    end = tail.start() if tail is not None else len(source.text)
    rows = _table(source, closing + 1, end)
    names = _threads(source, rows)
    test.threads = [Thread() for _ in names]
    _initial_state(source, opening + 1, closing, test)
    for thread in range(len(names)):
        parser = InstructionParser(test, thread)
        for row in rows[1:]:
            cell, offset = row[thread]
            if cell:
                test.threads[thread].program.append(parser.parse(cell, source.error(offset, "").place))
        parser.finish()
        if len(test.threads[thread].program) > MAX_INSTRUCTIONS:
            raise source.error(closing, f"expected at most {MAX_INSTRUCTIONS} instructions of P{thread}")
    for location in test.locations.values():
        location.size = location.size or 4
        if not fits(location.initial, location.size):
            raise CaseError(location.place, f"expected a value that fits the {location.size} bytes of {location.name}")
    ConditionParser(source, end, test).parse()
    return test


def _header(source: Source) -> tuple[LitmusTest, int]:
    """Architecture and name, and the offset of the initial state; the lines between are for people."""
    header = _HEADER.match(source.text)
    if header is None or header.group(1) not in (X86, X86_64):
        first = header.start(1) if header is not None else 0
        raise source.error(first, f"expected '{X86} NAME' or '{X86_64} NAME' on the first line")
    opening = source.text.find("{", header.end())
    if opening < 0:
        raise source.error(len(source.text.rstrip()), "expected '{' and the initial state")
    return LitmusTest(header.group(1), header.group(2).strip()), opening


def _table(source: Source, start: int, end: int) -> list[list[tuple[str, int]]]:
    """Rows of cells; each cell is a text and its offset."""
    rows: list[list[tuple[str, int]]] = []
    row: list[tuple[str, int]] = []
    begun = start
    for offset in range(start, end):
        character = source.text[offset]
        if character in "|;":
            cell = source.text[begun:offset]
            row.append((cell.strip(), begun + len(cell) - len(cell.lstrip())))
            begun = offset + 1
            if character == ";":
                rows.append(row)
                row = []
    rest = source.text[begun:end]
    if row or rest.strip():
        where = begun + len(rest) - len(rest.lstrip())
        raise source.error(where, "expected ';' at the end of each row, and then 'exists', '~exists' or 'forall'")
    return rows


def _threads(source: Source, rows: list[list[tuple[str, int]]]) -> list[str]:
    """The names in the first row, which must be P0, P1, ... Every row has as many cells."""
    names = [cell for cell, _ in rows[0]] if rows else []
    if not names or names != [f"P{index}" for index in range(len(names))]:
        where = rows[0][0][1] if rows else len(source.text.rstrip())
        raise source.error(where, "expected the row of threads, 'P0 | P1 ;' and so on")
    if len(names) > MAX_VCPUS:
        raise source.error(rows[0][0][1], f"expected at most {MAX_VCPUS} threads")
    for row in rows:
        if len(row) != len(names):
            raise source.error(row[0][1], f"expected {len(names)} cells in this row, got {len(row)}")
    return names


def _initial_state(source: Source, start: int, end: int, test: LitmusTest) -> None:
    """Types and values."""
    begun = start
    for text in source.text[start:end].split(";"):
        offset = begun + len(text) - len(text.lstrip())
        begun += len(text) + 1
        if text.strip():
            _entry(source, offset, text.strip(), test)


def _entry(source: Source, offset: int, text: str, test: LitmusTest) -> None:
    match = _ENTRY.fullmatch(text)
    if match is None:
        expected = "'LOCATION = VALUE' or 'THREAD:REGISTER = VALUE', a type before it or not"
        raise source.error(offset, f"expected {expected}, got {quoted(text)}")
    kind = match.group("type")
    if kind is not None and kind not in TYPES:
        raise source.error(offset, f"expected a type among {', '.join(TYPES)}, got {quoted(kind)}")
    place = source.error(offset, "").place
    written = match.group("value") or "0"
    value = number(written)
    if value is None:
        if not re.fullmatch(r"[A-Za-z_]\w*", written, re.ASCII):
            raise source.error(offset, f"expected a number or a location behind '=', got {quoted(written)}")
        value = location_named(test, written, place).address
    if match.group("thread") is None:
        location = location_named(test, match.group("bracketed") or match.group("plain"), place)
        if kind is not None:
            location.size, location.signed = TYPES[kind].size, TYPES[kind].signed
        location.initial, location.place = value, place
        return
    thread = int(match.group("thread"))
    found = register(match.group("register"), test.arch)
    if thread >= len(test.threads):
        raise source.error(offset, f"expected a thread in 0..{len(test.threads) - 1}, got {thread}")
    if found is None:
        raise source.error(offset, f"expected a register of {test.arch}, got '{match.group('register')}'")
    if kind is not None:
        test.shown[Item(thread, match.group("register"))] = Shown(min(found.size, TYPES[kind].size), TYPES[kind].signed)
    if not fits(value, found.size):
        raise source.error(offset, f"expected a value that fits the {found.size} bytes of {match.group('register')}")
    test.threads[thread].registers[found.number] = value & (1 << 8 * found.size) - 1
