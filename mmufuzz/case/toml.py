"""The TOML form of a ``Case``, which people read, edit and commit; and files in either form.

Every error is a ``CaseError`` that names file, line, key and what was expected there.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Final

from mmufuzz.case import bytes as bytes_form
from mmufuzz.case.error import CaseError
from mmufuzz.case.model import LONG4, Case, Expect, HostThread, Options, Slot, Vcpu, Word
from mmufuzz.case.text import parse_deviation
from mmufuzz.case.toml_dump import ENTRY_BITS, FORMAT, REGISTERS, dumps
from mmufuzz.case.toml_place import line_of
from mmufuzz.case.validate import U64, validate
from mmufuzz.host.deviation import Deviation

__all__ = ["dumps", "load", "loads", "save"]

_ASM: Final = "asm:"
_MAX_FRAME: Final = (1 << 40) - 1


def loads(text: str, place: str) -> Case:
    """The Case that ``text`` describes. ``place`` (a file name) goes into the errors."""
    source = _Source(text, place)
    try:
        data: dict[str, object] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CaseError(place, f"expected TOML: {error}") from None
    except RecursionError:
        raise CaseError(place, "expected TOML without deep nesting") from None
    try:
        case = _case(_Table(source, "", data))
        validate(case)
    except CaseError as error:
        raise source.error(error.place, error.expected) from None
    return case


def load(path: str | Path) -> Case:
    """The Case in a file of either form; the first bytes tell which. Raises ``CaseError``, also for I/O errors."""
    place = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CaseError(place, f"cannot be read: {error.strerror or error}") from None
    if data.startswith(bytes_form.MAGIC) or place.endswith(".case"):
        return bytes_form.decode_strict(data, place)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CaseError(place, f"expected UTF-8 text, got byte {data[error.start]:#04x} at {error.start}") from None
    return loads(text, place)


def save(case: Case, path: str | Path) -> None:
    """Write a valid ``case``: ``.toml`` as text, ``.case`` as bytes. The file is replaced whole or not at all.

    Raises ``CaseError`` for another suffix and for I/O errors.
    """
    target = Path(path)
    if target.suffix == ".toml":
        data = dumps(case).encode("utf-8")
    elif target.suffix == ".case":
        data = bytes_form.encode(case)
    else:
        raise CaseError(str(path), f"expected a file name ending in .toml or .case, got '{target.suffix}'")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(data)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CaseError(str(path), f"cannot be written: {error.strerror or error}") from None


class _Source:
    """The text and its name."""

    def __init__(self, text: str, place: str) -> None:
        self.text = text
        self.place = place

    def error(self, path: str, expected: str) -> CaseError:
        """The error with file and line in front of the key."""
        line = line_of(self.text, path)
        where = f"{self.place}:{line}" if line else self.place
        return CaseError(f"{where}: {path}", expected)


class _Table:
    """A TOML table whose keys are taken one by one, so that what is left over is unknown."""

    def __init__(self, source: _Source, path: str, data: dict[str, object]) -> None:
        self.source = source
        self.path = path
        self.data = data
        self.taken: list[str] = []

    def at(self, key: str) -> str:
        """The path of a key."""
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str) -> object:
        """The value of a key; None if it is absent."""
        self.taken.append(key)
        return self.data.get(key)

    def integer(self, key: str, default: int | None) -> int:
        """A number; without a default the key must be there."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise CaseError(self.at(key), f"expected a number, got {_describe(value)}")
        return value

    def wide(self, key: str, default: int | None) -> int:
        """A 64-bit number, or a string that holds one."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        return _wide(value, self.at(key))

    def boolean(self, key: str) -> bool:
        """True or false, false if absent."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise CaseError(self.at(key), f"expected true or false, got {_describe(value)}")
        return value

    def string(self, key: str, default: str | None) -> str:
        """A string; without a default the key must be there."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise CaseError(self.at(key), f"expected a string, got {_describe(value)}")
        return value

    def array(self, key: str) -> list[object]:
        """An array, empty if absent."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise CaseError(self.at(key), f"expected an array, got {_describe(value)}")
        items: list[object] = value
        return items

    def strings(self, key: str) -> tuple[str, ...]:
        """An array of strings, empty if absent."""
        strings: list[str] = []
        for value in self.array(key):
            if not isinstance(value, str):
                raise CaseError(f"{self.at(key)}[{len(strings)}]", f"expected a string, got {_describe(value)}")
            strings.append(value)
        return tuple(strings)

    def table(self, key: str) -> _Table:
        """A table, empty if absent."""
        value = self.get(key)
        return _table(self.source, self.at(key), {} if value is None else value)

    def tables(self, key: str) -> list[_Table]:
        """An array of tables."""
        values = self.array(key)
        return [_table(self.source, f"{self.at(key)}[{index}]", values[index]) for index in range(len(values))]

    def finish(self) -> None:
        """Refuse keys that nobody took."""
        for key in self.data:
            if key not in self.taken:
                raise CaseError(self.at(key), f"unknown key; expected one of {', '.join(self.taken)}")


def _table(source: _Source, path: str, value: object) -> _Table:
    if not isinstance(value, dict):
        raise CaseError(path, f"expected a table, got {_describe(value)}")
    data: dict[str, object] = value
    return _Table(source, path, data)


def _describe(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, list):
        return "an array"
    return "a table" if isinstance(value, dict) else "a date or time"


def _wide(value: object, path: str) -> int:
    number = -1
    if isinstance(value, str):
        try:
            number = int(value, 16 if value[:2] in ("0x", "0X") else 10)
        except ValueError:
            number = -1
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    if not 0 <= number <= U64:
        raise CaseError(path, f"expected a 64-bit value (from 2^63 on as a string), got {_describe(value)}")
    return number


def _case(top: _Table) -> Case:
    version = top.integer("format", None)
    if version > FORMAT:
        raise CaseError("format", f"expected at most {FORMAT}, got {version}: written by a later mmufuzz")
    if version < 1:
        raise CaseError("format", f"expected {FORMAT}, got {version}")
    default = Case()
    comment = top.string("comment", "")
    kernel = top.string("kernel", default.kernel)
    revert = top.strings("revert")
    apply = top.strings("apply")
    memory_model = top.string("memory_model", default.memory_model)
    slots = tuple([_slot(table) for table in top.tables("slots")])
    lines = top.strings("schedule")
    memory = tuple([_word(table) for table in top.tables("memory")])
    options = _options(top.table("options"))
    vcpus = tuple([_vcpu(table) for table in top.tables("vcpu")])
    host = tuple([_host(table) for table in top.tables("host")])
    expect = _expect(top.table("expect"))
    top.finish()
    names = [f"vcpu{index}" for index in range(len(vcpus))] + [f"host{index}" for index in range(len(host))]
    schedule: list[Deviation] = []
    for line in lines:
        schedule.append(parse_deviation(line, names, f"schedule[{len(schedule)}]"))
    return Case(
        kernel, revert, apply, memory_model, options, slots, memory, vcpus, host, tuple(schedule), expect, comment
    )


def _slot(table: _Table) -> Slot:
    slot = Slot(table.integer("base_gfn", None), table.integer("npages", None), table.boolean("readonly"))
    table.finish()
    return slot


def _word(table: _Table) -> Word:
    gfn = table.integer("gfn", None)
    index = table.integer("index", None)
    entry = table.string("entry", "")
    value = table.wide("value", -1)
    table.finish()
    if (entry == "") == (value == -1):
        raise CaseError(table.path, 'expected either entry = "GFN FLAGS" or value = NUMBER')
    if entry:
        value = parse_entry(entry, f"{table.path}.entry")
    return Word(gfn, index, value)


def parse_entry(text: str, place: str) -> int:
    """The page-table entry that ``text`` ("0x11 P W U A D") describes. Raises ``CaseError`` at ``place``."""
    words = text.split()
    value = _wide(words[0], place) if words else _MAX_FRAME + 1
    if value > _MAX_FRAME:
        raise CaseError(place, f"expected the gfn of a frame and flags, got '{text}'")
    value <<= 12
    for word in words[1:]:
        found = 0
        for name, bit in ENTRY_BITS:
            if name == word:
                found = bit
        if not found:
            names = " ".join([name for name, _ in ENTRY_BITS])
            raise CaseError(place, f"expected flags among {names}, got '{word}'")
        value |= found
    return value


def _options(table: _Table) -> Options:
    default = Options()
    fep = table.boolean("fep")
    decode_to_skip = table.boolean("decode_to_skip")
    tsc = table.wide("tsc", default.tsc)
    pages = table.integer("n_max_mmu_pages", default.n_max_mmu_pages)
    limit = table.integer("event_limit", default.event_limit)
    tracked: list[int] = []
    for value in table.array("write_track"):
        if isinstance(value, bool) or not isinstance(value, int):
            raise CaseError(f"options.write_track[{len(tracked)}]", f"expected a gfn, got {_describe(value)}")
        tracked.append(value)
    table.finish()
    return Options(fep, pages, tuple(tracked), limit, decode_to_skip, tsc)


def _vcpu(table: _Table) -> Vcpu:
    mode = table.string("mode", None)
    default = Vcpu(mode)
    cpl = table.integer("cpl", default.cpl)
    cr3 = table.integer("cr3", default.cr3)
    given = table.strings("flags")
    flags = given if "flags" in table.data else default.flags
    code_gfn = table.integer("code_gfn", None)
    code_gva = table.wide("code_gva", code_gfn << 12)
    regs = _regs(table.table("regs"))
    program: list[bytes] = []
    for text in table.strings("program"):
        program.append(parse_step(text, mode == LONG4, f"{table.path}.program[{len(program)}]"))
    table.finish()
    return Vcpu(mode, cpl, cr3, flags, code_gva, code_gfn, regs, tuple(program))


def _regs(table: _Table) -> tuple[tuple[int, int], ...]:
    regs: list[tuple[int, int]] = []
    for name in table.data:
        if name not in REGISTERS:
            raise CaseError(table.at(name), f"expected the name of a register ({', '.join(REGISTERS)})")
        regs.append((REGISTERS.index(name), table.wide(name, None)))
    return tuple(regs)


def parse_step(text: str, mode64: bool, place: str) -> bytes:
    """A program step: hex bytes, or one instruction after "asm:". Raises ``CaseError`` at ``place``."""
    if text.startswith(_ASM):
        # The assembler pulls in iced-x86, which most files do not need.
        from mmufuzz.x86.asm import AsmError, assemble  # noqa: PLC0415

        try:
            return assemble(text[len(_ASM) :], mode64)
        except AsmError as error:
            raise CaseError(place, f"expected an instruction: {error}") from None
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise CaseError(place, f"expected hex bytes ('48 89 03') or 'asm:mov [rbx], rax', got '{text}'") from None


def _host(table: _Table) -> HostThread:
    thread = HostThread(table.strings("ops"))
    table.finish()
    return thread


def _expect(table: _Table) -> Expect:
    expect = Expect(
        table.string("verdict", Expect().verdict),
        table.string("kind", ""),
        table.string("fingerprint", ""),
        table.strings("reach"),
    )
    table.finish()
    return expect
