"""The bytes form of a ``Case``: a header and records of one width.

Any bytes are a Case, so that a byte fuzzer never wastes a run, and a changed byte changes one field of one record. All
numbers are little-endian.

    header      "MMUZ", version (2 bytes), 2 bytes 0, number of records (4 bytes)
    records     type (low 4 bits of byte 0; others are skipped), then by type:
    OPTIONS     1 kernel, by ``KERNELS`` · 2 memory model · 3 fep, and 2 added for decode_to_skip
                · 4..5 n_max_mmu_pages · 8..15 event_limit · 16..23 tsc
    SLOT        1 readonly · 4..5 base_gfn · 6..7 npages - 1
    WORD        4..5 gfn · 6..7 index · 8..15 value
    VCPU        1 mode · 2 cpl · 4..5 flags, a number of ``FLAGS`` from 1 in each 4 bits · 6..7 cr3 · 8..9 code_gfn
                · 16..23 code_gva
    REG         1 vCPU · 2 register · 8..15 value
    STEP        1 vCPU · 2 length - 1 · 8..22 instruction bytes
    HOST        a host thread
    HOST_OP     1 host thread · 2 operation: 0 zap_all_fast, 1 interrupt with 3 vCPU · 4 vector
    DEVIATION   1 kind · 2 actor · 4..9 at · 10..15 until · 16..23 address
    TRACK       4..5 gfn of ``write_track``
    EXPECT      1 verdict
    TEXT        1 field · 2 number of bytes, 128 added where the text ends · 3..23 UTF-8

vCPUs and host threads are counted where they are declared and referred to by number, modulo how many there are.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.error import CaseError
from mmufuzz.case.host_ops import interrupt_of, interrupt_op
from mmufuzz.case.model import (
    FINDING,
    FLAT32,
    HOST_OPS,
    LONG4,
    MAX_STEP_BYTES,
    MAX_VCPUS,
    NPT4,
    OK,
    SC,
    TSO,
    Case,
    Expect,
    HostThread,
    Options,
    Slot,
    Vcpu,
    Word,
)
from mmufuzz.case.repair import repair
from mmufuzz.case.validate import FLAGS
from mmufuzz.host.deviation import Deviation
from mmufuzz.x86.state import FIRST_INTERRUPT

MAGIC: Final = b"MMUZ"
VERSION: Final = 1
HEADER: Final = 12
RECORD: Final = 24
MAX_RECORDS: Final = 1 << 18
"""More than any valid Case needs."""

KERNELS: Final = ("v6.12", "v6.1", "v6.8", "v6.9", "latest")
"""Kernel profiles that have a number; append only. Others travel as text."""

_OPTIONS: Final = 1
_SLOT: Final = 2
_WORD: Final = 3
_VCPU: Final = 4
_REG: Final = 5
_STEP: Final = 6
_HOST: Final = 7
_HOST_OP: Final = 8
_DEVIATION: Final = 9
_TRACK: Final = 10
_EXPECT: Final = 11
_TEXT: Final = 12

_MODES: Final = (LONG4, FLAT32, NPT4)
"""Modes by number; append only."""

# Fields of a TEXT record.
_KERNEL: Final = 0
_REVERT: Final = 1
_APPLY: Final = 2
_KIND: Final = 3
_FINGERPRINT: Final = 4
_REACH: Final = 5
_COMMENT: Final = 6
_TEXT_FIELDS: Final = 7

_CHUNK: Final = RECORD - 3
_LAST: Final = 0x80


def _record(kind: int, a: int = 0, b: int = 0, c: int = 0, rest: bytes = b"") -> bytes:
    return bytes((kind, a, b, c)) + rest.ljust(RECORD - 4, b"\0")


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _text_records(field: int, text: str) -> list[bytes]:
    data = text.encode("utf-8")
    records: list[bytes] = []
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        last = _LAST if start + _CHUNK >= len(data) else 0
        records.append((bytes((_TEXT, field, len(chunk) | last)) + chunk).ljust(RECORD, b"\0"))
    return records


def _vcpu_records(index: int, vcpu: Vcpu) -> list[bytes]:
    flags = 0
    for position in range(len(vcpu.flags)):
        flags |= (FLAGS.index(vcpu.flags[position]) + 1) << (4 * position)
    rest = _u16(flags) + _u16(vcpu.cr3) + _u64(vcpu.code_gfn) + _u64(vcpu.code_gva)
    records = [_record(_VCPU, _MODES.index(vcpu.mode), 0 if vcpu.cpl == 0 else 1, 0, rest)]
    for number, value in vcpu.regs:
        records.append(_record(_REG, index, number, 0, bytes(4) + _u64(value)))
    for step in vcpu.program:
        records.append(_record(_STEP, index, len(step) - 1, 0, bytes(4) + step))
    return records


def _host_op(index: int, op: str) -> bytes:
    vcpu, vector = interrupt_of(op)
    if vcpu < 0:
        return _record(_HOST_OP, index)
    return _record(_HOST_OP, index, 1, vcpu, bytes((vector,)))


def encode(case: Case) -> bytes:
    """The bytes of a valid ``case``. ``decode`` gives it back."""
    options = case.options
    kernel = KERNELS.index(case.kernel) if case.kernel in KERNELS else 0
    sizes = _u16(options.n_max_mmu_pages) + bytes(2) + _u64(options.event_limit) + _u64(options.tsc)
    switches = options.fep | options.decode_to_skip << 1
    records = [_record(_OPTIONS, kernel, 0 if case.memory_model == TSO else 1, switches, sizes)]
    for slot in case.slots:
        records.append(_record(_SLOT, 1 if slot.readonly else 0, 0, 0, _u16(slot.base_gfn) + _u16(slot.npages - 1)))
    for gfn in options.write_track:
        records.append(_record(_TRACK, 0, 0, 0, _u16(gfn)))
    for index in range(len(case.vcpus)):
        records.extend(_vcpu_records(index, case.vcpus[index]))
    for word in case.memory:
        records.append(_record(_WORD, 0, 0, 0, _u16(word.gfn) + _u16(word.index) + _u64(word.value)))
    for index in range(len(case.host)):
        records.append(_record(_HOST))
        for op in case.host[index].ops:
            records.append(_host_op(index, op))
    for deviation in case.schedule:
        labels = deviation.at.to_bytes(6, "little") + deviation.until.to_bytes(6, "little")
        records.append(_record(_DEVIATION, deviation.kind, deviation.actor, 0, labels + _u64(deviation.address)))
    if case.expect.verdict != OK:
        records.append(_record(_EXPECT, 1))
    records.extend(_texts(case))
    header = MAGIC + _u16(VERSION) + bytes(2) + len(records).to_bytes(4, "little")
    return header + b"".join(records)


def _texts(case: Case) -> list[bytes]:
    records: list[bytes] = []
    if case.kernel not in KERNELS:
        records.extend(_text_records(_KERNEL, case.kernel))
    for fix in case.revert:
        records.extend(_text_records(_REVERT, fix))
    for fix in case.apply:
        records.extend(_text_records(_APPLY, fix))
    records.extend(_text_records(_KIND, case.expect.kind))
    records.extend(_text_records(_FINGERPRINT, case.expect.fingerprint))
    for mark in case.expect.reach:
        records.extend(_text_records(_REACH, mark))
    records.extend(_text_records(_COMMENT, case.comment))
    return records


def decode(data: bytes, max_records: int = MAX_RECORDS) -> Case:
    """The valid Case that ``data`` means, whatever it holds: total, and deterministic.

    The header is skipped unread, as are an incomplete last record and all records after ``max_records``.
    """
    reader = _Reader(data)
    end = min(len(data) - RECORD, HEADER + (max_records - 1) * RECORD)
    offset = HEADER
    while offset <= end:
        reader.record(offset)
        offset += RECORD
    return repair(reader.case())


def decode_strict(data: bytes, place: str) -> Case:
    """``decode`` for files: raises ``CaseError`` at ``place`` for a wrong magic or version and a truncated file."""
    if data[:4] != MAGIC:
        raise CaseError(place, f"expected a case in bytes form (it starts with {MAGIC.decode()})")
    if len(data) < HEADER:
        raise CaseError(place, f"truncated: expected a header of {HEADER} bytes, got {len(data)}")
    version = int.from_bytes(data[4:6], "little")
    if version != VERSION:
        raise CaseError(place, f"expected format version {VERSION}, got {version}")
    expected = int.from_bytes(data[8:12], "little")
    if len(data) < HEADER + expected * RECORD:
        raise CaseError(place, f"truncated: expected {expected} records, got {(len(data) - HEADER) // RECORD}")
    return decode(data, expected)


class _Reader:
    """What the records said, before it is put together."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.kernel = KERNELS[0]
        self.memory_model = TSO
        self.fep = False
        self.decode_to_skip = False
        self.tsc = 0
        self.pages = Options().n_max_mmu_pages
        self.limit = Options().event_limit
        self.slots: list[Slot] = []
        self.words: list[Word] = []
        self.vcpus: list[Vcpu] = []
        self.regs: list[tuple[int, int, int]] = []
        self.steps: list[tuple[int, bytes]] = []
        self.host_threads = 0
        self.host_ops: list[tuple[int, str]] = []
        self.schedule: list[Deviation] = []
        self.tracked: list[int] = []
        self.verdict = OK
        self.texts: list[list[bytes]] = [[] for _ in range(_TEXT_FIELDS)]
        self.open: list[bytes] = [b""] * _TEXT_FIELDS

    def u16(self, offset: int) -> int:
        return self.data[offset] | self.data[offset + 1] << 8

    def u64(self, offset: int) -> int:
        return int.from_bytes(self.data[offset : offset + 8], "little")

    def record(self, at: int) -> None:
        """Read the record at that offset."""
        data = self.data
        kind = data[at] & 15
        if kind == _WORD:
            self.words.append(Word(self.u16(at + 4), self.u16(at + 6) & 511, self.u64(at + 8)))
        elif kind == _STEP:
            length = data[at + 2] % MAX_STEP_BYTES + 1
            self.steps.append((data[at + 1], data[at + 8 : at + 8 + length]))
        elif kind == _REG:
            self.regs.append((data[at + 1], data[at + 2] & 15, self.u64(at + 8)))
        elif kind == _DEVIATION:
            label = int.from_bytes(data[at + 4 : at + 10], "little")
            until = int.from_bytes(data[at + 10 : at + 16], "little")
            self.schedule.append(Deviation(data[at + 1] & 3, label, data[at + 2], until, self.u64(at + 16)))
        elif kind == _VCPU:
            self.vcpu(at)
        elif kind == _SLOT:
            self.slots.append(Slot(self.u16(at + 4), self.u16(at + 6) + 1, data[at + 1] & 1 != 0))
        elif kind == _TEXT:
            self.text(at)
        else:
            self.rare(kind, at)

    def rare(self, kind: int, at: int) -> None:
        """The records that a case has few of."""
        data = self.data
        if kind == _OPTIONS:
            self.kernel = KERNELS[data[at + 1] % len(KERNELS)]
            self.memory_model = SC if data[at + 2] & 1 else TSO
            self.fep = data[at + 3] & 1 != 0
            self.decode_to_skip = data[at + 3] & 2 != 0
            self.tsc = self.u64(at + 16)
            self.pages = self.u16(at + 4)
            self.limit = self.u64(at + 8)
        elif kind == _HOST:
            self.host_threads += 1
        elif kind == _HOST_OP:
            op = HOST_OPS[0]
            if data[at + 2] & 1:
                vector = data[at + 4]
                if vector < FIRST_INTERRUPT:
                    vector += FIRST_INTERRUPT
                op = interrupt_op(data[at + 3] % MAX_VCPUS, vector)
            self.host_ops.append((data[at + 1], op))
        elif kind == _TRACK:
            self.tracked.append(self.u16(at + 4))
        elif kind == _EXPECT:
            self.verdict = FINDING if data[at + 1] & 1 else OK

    def vcpu(self, at: int) -> None:
        """A vCPU without registers and program."""
        numbers = self.u16(at + 4)
        flags: list[str] = []
        while numbers:
            number = numbers & 15
            if 1 <= number <= len(FLAGS):
                flags.append(FLAGS[number - 1])
            numbers >>= 4
        mode = _MODES[self.data[at + 1] % len(_MODES)]
        cpl = 3 if self.data[at + 2] & 1 else 0
        self.vcpus.append(Vcpu(mode, cpl, self.u16(at + 6), tuple(flags), self.u64(at + 16), self.u16(at + 8)))

    def text(self, at: int) -> None:
        """A piece of text."""
        field = self.data[at + 1] % _TEXT_FIELDS
        length = min(self.data[at + 2] & ~_LAST, _CHUNK)
        self.open[field] += self.data[at + 3 : at + 3 + length]
        if self.data[at + 2] & _LAST:
            self.texts[field].append(self.open[field])
            self.open[field] = b""

    def strings(self, field: int) -> tuple[str, ...]:
        """The finished texts of a field."""
        return tuple([text.decode("utf-8", "replace") for text in self.texts[field]])

    def string(self, field: int) -> str:
        """The last finished text of a field."""
        texts = self.texts[field]
        return texts[-1].decode("utf-8", "replace") if texts else ""

    def case(self) -> Case:
        """The Case as the records have it, not yet repaired."""
        return Case(
            kernel=self.string(_KERNEL) or self.kernel,
            revert=self.strings(_REVERT),
            apply=self.strings(_APPLY),
            memory_model=self.memory_model,
            options=Options(self.fep, self.pages, tuple(self.tracked), self.limit, self.decode_to_skip, self.tsc),
            slots=tuple(self.slots),
            memory=tuple(self.words),
            vcpus=self.programs(),
            host=self.operations(),
            schedule=tuple(self.schedule),
            expect=Expect(self.verdict, self.string(_KIND), self.string(_FINGERPRINT), self.strings(_REACH)),
            comment=self.string(_COMMENT),
        )

    def programs(self) -> tuple[Vcpu, ...]:
        """The vCPUs with their registers and programs."""
        vcpus = self.vcpus if self.vcpus else [Vcpu(FLAT32)]
        count = len(vcpus)
        regs: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        steps: list[list[bytes]] = [[] for _ in range(count)]
        for owner, number, value in self.regs:
            regs[owner % count].append((number, value))
        for owner, step in self.steps:
            steps[owner % count].append(step)
        full: list[Vcpu] = []
        for index in range(count):
            one = vcpus[index]
            program = tuple(steps[index])
            full.append(
                Vcpu(one.mode, one.cpl, one.cr3, one.flags, one.code_gva, one.code_gfn, tuple(regs[index]), program)
            )
        return tuple(full)

    def operations(self) -> tuple[HostThread, ...]:
        """The host threads with their operations; none without a HOST record."""
        count = self.host_threads
        ops: list[list[str]] = [[] for _ in range(count)]
        if count:
            for owner, op in self.host_ops:
                ops[owner % count].append(op)
        return tuple([HostThread(tuple(each)) for each in ops])
