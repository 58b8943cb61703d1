"""Test vectors that others recorded on real CPUs: SingleStepTests JSON, MOO files (1 and 1.1), and Valgrind's tests of
instructions (``valgrind``), plain or gzipped.

A JSON file is a list of objects with "name", "initial" and "final", each of those with "regs" by name and "ram" as
[address, byte] pairs; "final" names only what changed. "mode" (64, 32 or 16, by default 16) is an extension, for which
"regs" has the names of ``mmufuzz.x86.execute``. MOO is a file of chunks: a four-letter type, a length, a payload.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mmufuzz.vectors.valgrind import read_def
from mmufuzz.vectors.vector import State, Vector, VectorError

_REGS16: Final = "ax bx cx dx cs ss ds es sp bp si di ip flags"
_REGS32: Final = "cr0 cr3 eax ebx ecx edx esi edi ebp esp cs ds es fs gs ss eip eflags dr6 dr7"
_NAMES: Final = {"REGS": (_REGS16.split(), "H"), "RG32": (_REGS32.split(), "I")}
_NAMES["RMSK"] = _NAMES["REGS"]
_NAMES["RM32"] = _NAMES["RG32"]


def read(path: Path) -> Iterator[Vector]:
    """The tests of one file. Raises ``VectorError`` and ``OSError``."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise VectorError(f"expected a gzip file: {error}") from None
    if path.name.endswith((".def", ".def.gz")):
        # Nothing in the file says so, but Valgrind keeps the two kinds apart, and only one names RFLAGS.
        wide = path.parent.name == "amd64" or b"rflags[" in data
        yield from read_def(data.decode("latin-1"), 64 if wide else 32)
    elif data[:4] == b"MOO ":
        yield from _read_moo(data)
    else:
        yield from _read_json(data)


# JSON.


def _read_json(data: bytes) -> Iterator[Vector]:
    try:
        tests = json.loads(data)
    except ValueError as error:
        raise VectorError(f"expected JSON or a MOO file: {error}") from None
    if not isinstance(tests, list):
        raise VectorError("expected a list of tests")
    for number, test in enumerate(tests):
        place = f"test {number}"
        if not isinstance(test, dict) or "initial" not in test or "final" not in test:
            raise VectorError(f'{place}: expected an object with "initial" and "final"')
        mode = test.get("mode", 16)
        if mode not in (16, 32, 64):
            raise VectorError(f"{place}: mode: expected 16, 32 or 64")
        vector = Vector(str(test.get("name", place)), mode)
        vector.initial = _json_state(test["initial"], f"{place}: initial")
        vector.final = _json_state(test["final"], f"{place}: final")
        exception = test.get("exception")
        if isinstance(exception, dict) and isinstance(exception.get("flag_addr"), int):
            vector.flags_address = exception["flag_addr"]
        yield vector


def _json_state(value: object, place: str) -> State:
    state = State()
    if not isinstance(value, dict):
        raise VectorError(f"{place}: expected an object")
    regs = value.get("regs", {})
    ram = value.get("ram", [])
    if not isinstance(regs, dict) or not all(isinstance(number, int) for number in regs.values()):
        raise VectorError(f"{place}.regs: expected numbers by register")
    if not isinstance(ram, list):
        raise VectorError(f"{place}.ram: expected a list")
    for entry in ram:
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(number, int) for number in entry):
            raise VectorError(f"{place}.ram: expected [address, byte], got {entry!r}")
        state.ram[entry[0]] = entry[1] & 0xFF
    for name, number in regs.items():
        state.regs[str(name).lower()] = number
    return state


# MOO.


def _chunks(data: bytes, start: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(type, start, end) of the chunks in a part of the file."""
    while start < end:
        if start + 8 > end:
            raise VectorError(f"byte {start:#x}: expected a chunk of a MOO file")
        kind = data[start : start + 4].decode("latin-1")
        length = struct.unpack_from("<I", data, start + 4)[0]
        if start + 8 + length > end:
            raise VectorError(f"byte {start:#x}: chunk {kind!r} is longer than what is left")
        yield kind, start + 8, start + 8 + length
        start += 8 + length


def _read_moo(data: bytes) -> Iterator[Vector]:
    masks: dict[str, int] = {}
    for kind, start, end in _chunks(data, 0, len(data)):
        if kind in ("RMSK", "RM32"):
            masks = _registers(data, kind, start, end)
        elif kind == "TEST":
            vector = _moo_test(data, start, end)
            vector.final.masks = masks | vector.final.masks
            yield vector


def _moo_test(data: bytes, start: int, end: int) -> Vector:
    if end - start < 4:
        raise VectorError(f"byte {start:#x}: expected the number of a test")
    vector = Vector(f"test {struct.unpack_from('<I', data, start)[0]}")
    for kind, at, stop in _chunks(data, start + 4, end):
        if kind == "NAME":
            vector.name += ": " + data[at + 4 : stop].decode("latin-1")
        elif kind in ("INIT", "FINA"):
            state = vector.initial if kind == "INIT" else vector.final
            for part, first, last in _chunks(data, at, stop):
                if part in ("REGS", "RG32"):
                    state.regs = _registers(data, part, first, last)
                elif part in ("RMSK", "RM32"):
                    state.masks = _registers(data, part, first, last)
                elif part == "RAM ":
                    state.ram = _memory(data, first, last)
        elif kind == "EXCP" and stop - at >= 5:
            vector.flags_address = struct.unpack_from("<I", data, at + 1)[0]
    return vector


def _registers(data: bytes, kind: str, start: int, end: int) -> dict[str, int]:
    names, form = _NAMES[kind]
    size = struct.calcsize("<" + form)
    if end - start < size:
        raise VectorError(f"byte {start:#x}: expected the bit mask of {kind}")
    mask = struct.unpack_from("<" + form, data, start)[0]
    found: dict[str, int] = {}
    at = start + size
    for bit, name in enumerate(names):
        if mask >> bit & 1:
            if at + size > end:
                raise VectorError(f"byte {at:#x}: expected the value of {name}")
            found[name] = struct.unpack_from("<" + form, data, at)[0]
            at += size
    return found


def _memory(data: bytes, start: int, end: int) -> dict[int, int]:
    if end - start < 4:
        raise VectorError(f"byte {start:#x}: expected the number of memory entries")
    count = struct.unpack_from("<I", data, start)[0]
    if start + 4 + 5 * count > end:
        raise VectorError(f"byte {start:#x}: expected {count} memory entries")
    return dict(struct.iter_unpack("<IB", data[start + 4 : start + 4 + 5 * count]))
