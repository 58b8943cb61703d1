"""Writes the TOML form of a ``Case``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mmufuzz.case.model import FLAT32, LONG4, Case, Expect, Options, Slot, Vcpu, Word
from mmufuzz.case.text import deviation_line, thread_names

FORMAT: Final = 1
"""Version of the TOML form."""

REGISTERS: Final = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip

ENTRY_BITS: Final = (
    ("P", 1 << 0),
    ("W", 1 << 1),
    ("U", 1 << 2),
    ("PWT", 1 << 3),
    ("PCD", 1 << 4),
    ("A", 1 << 5),
    ("D", 1 << 6),
    ("PS", 1 << 7),
    ("G", 1 << 8),
    ("NX", 1 << 63),
)
"""Names of the bits of a page-table entry, in the order they are written (SDM vol. 3, tables 4-15 to 4-20)."""

_PRESENT: Final = 1
_LARGE: Final = 1 << 7
_FRAME_MASK: Final = (1 << 40) - 1
_SIGNED_LIMIT: Final = 1 << 63
_MAX_WALKS: Final = 2000
_MAX_NOTES: Final = 3


def quote(text: str) -> str:
    """A TOML basic string."""
    quoted = ""
    for character in text:
        if character in ('"', "\\"):
            quoted += "\\" + character
        elif character < " " or character == "\x7f":
            quoted += f"\\u{ord(character):04x}"
        else:
            quoted += character
    return f'"{quoted}"'


def number(value: int) -> str:
    """A 64-bit value. TOML integers are signed, so the upper half travels as strings."""
    return f"{value:#x}" if value < _SIGNED_LIMIT else f'"{value:#x}"'


def entry_text(value: int) -> str:
    """A present page-table entry as frame and flags, e.g. "0x11 P W U A D"; "" if that would lose bits."""
    frame = value >> 12 & _FRAME_MASK
    rest = value ^ frame << 12
    if not value & _PRESENT:
        return ""
    words = [f"{frame:#x}"]
    for name, bit in ENTRY_BITS:
        if rest & bit:
            words.append(name)
            rest ^= bit
    return "" if rest else " ".join(words)


def dumps(case: Case) -> str:
    """The TOML form of a valid ``case``. ``loads`` gives it back; comments say what the code and the tables are."""
    lines = [f"format = {FORMAT}"]
    if case.comment:
        lines.append(f"comment = {_prose(case.comment)}")
    lines.append(f"kernel = {quote(case.kernel)}")
    if case.revert:
        lines.append(f"revert = {_strings(case.revert)}")
    if case.apply:
        lines.append(f"apply = {_strings(case.apply)}")
    lines.append(f"memory_model = {quote(case.memory_model)}")
    lines.append("slots = [")
    for slot in case.slots:
        lines.append(f"  {_slot(slot)},")
    lines.append("]")
    if case.schedule:
        lines.append("schedule = [")
        names = thread_names(case)
        for deviation in case.schedule:
            lines.append(f"  {quote(deviation_line(deviation, names))},")
        lines.append("]")
    if case.memory:
        lines.append("memory = [")
        notes = _mapped(case)
        for word in case.memory:
            note = notes.get(word.gfn << 9 | word.index, "")
            lines.append(f"  {_word(word)},{'  # ' + note if note else ''}")
        lines.append("]")
    lines.extend(_options(case.options))
    for vcpu in case.vcpus:
        lines.extend(_vcpu(vcpu))
    for thread in case.host:
        lines.extend(["", "[[host]]", f"ops = {_strings(thread.ops)}"])
    lines.extend(_expect(case.expect))
    return "\n".join(lines) + "\n"


def _prose(text: str) -> str:
    """A TOML string; over several lines if ``text`` has several."""
    if "\n" not in text:
        return quote(text)
    lines = [quote(line)[1:-1] for line in text.split("\n")]
    return '"""\n' + "\n".join(lines) + '"""'


def _strings(texts: Sequence[str]) -> str:
    return "[" + ", ".join([quote(text) for text in texts]) + "]"


def _slot(slot: Slot) -> str:
    readonly = ", readonly = true" if slot.readonly else ""
    return f"{{ base_gfn = {slot.base_gfn:#x}, npages = {slot.npages}{readonly} }}"


def _word(word: Word) -> str:
    entry = entry_text(word.value)
    content = f"entry = {quote(entry)}" if entry else f"value = {number(word.value)}"
    return f"{{ gfn = {word.gfn:#x}, index = {word.index}, {content} }}"


def _options(options: Options) -> list[str]:
    default = Options()
    lines = ["", "[options]"]
    if options.fep != default.fep:
        lines.append(f"fep = {'true' if options.fep else 'false'}")
    if options.n_max_mmu_pages != default.n_max_mmu_pages:
        lines.append(f"n_max_mmu_pages = {options.n_max_mmu_pages}")
    if options.write_track:
        lines.append(f"write_track = [{', '.join([f'{gfn:#x}' for gfn in options.write_track])}]")
    if options.event_limit != default.event_limit:
        lines.append(f"event_limit = {options.event_limit}")
    if options.decode_to_skip != default.decode_to_skip:
        lines.append(f"decode_to_skip = {'true' if options.decode_to_skip else 'false'}")
    if options.tsc != default.tsc:
        lines.append(f"tsc = {number(options.tsc)}")
    return lines if len(lines) > 2 else []


def _vcpu(vcpu: Vcpu) -> list[str]:
    # The disassembler pulls in iced-x86, which nothing else of a run needs.
    from mmufuzz.x86.asm import disassemble  # noqa: PLC0415

    default = Vcpu(vcpu.mode)
    lines = ["", "[[vcpu]]", f"mode = {quote(vcpu.mode)}"]
    if vcpu.cpl != default.cpl:
        lines.append(f"cpl = {vcpu.cpl}")
    if vcpu.cr3 != default.cr3:
        lines.append(f"cr3 = {vcpu.cr3:#x}")
    if vcpu.flags != default.flags:
        lines.append(f"flags = {_strings(vcpu.flags)}")
    lines.append(f"code_gva = {number(vcpu.code_gva)}")
    lines.append(f"code_gfn = {vcpu.code_gfn:#x}")
    if vcpu.regs:
        pairs = [f"{REGISTERS[index]} = {number(value)}" for index, value in vcpu.regs]
        lines.append(f"regs = {{ {', '.join(pairs)} }}")
    lines.append("program = [")
    for step in vcpu.program:
        lines.append(f'  "{step.hex(" ")}",  # {disassemble(step, vcpu.mode == LONG4)}')
    lines.append("]")
    return lines


def _expect(expect: Expect) -> list[str]:
    lines = ["", "[expect]", f"verdict = {quote(expect.verdict)}"]
    if expect.kind:
        lines.append(f"kind = {quote(expect.kind)}")
    if expect.fingerprint:
        lines.append(f"fingerprint = {quote(expect.fingerprint)}")
    if expect.reach:
        lines.append(f"reach = {_strings(expect.reach)}")
    return lines


def _mapped(case: Case) -> dict[int, str]:
    """What each word (key: gfn << 9 | index) maps when a vCPU walks the initial tables: "vcpu0 L1 0x3000-0x3fff"."""
    tables: dict[int, list[Word]] = {}
    for word in case.memory:
        tables.setdefault(word.gfn, []).append(word)
    notes: dict[int, list[str]] = {}
    for index in range(len(case.vcpus)):
        vcpu = case.vcpus[index]
        if vcpu.mode != FLAT32:
            _map_tables(tables, vcpu.cr3, f"vcpu{index}", notes)
    shown: dict[int, str] = {}
    for key, found in notes.items():
        more = ", …" if len(found) > _MAX_NOTES else ""
        shown[key] = ", ".join(found[:_MAX_NOTES]) + more
    return shown


def _map_tables(tables: dict[int, list[Word]], root: int, name: str, notes: dict[int, list[str]]) -> None:
    """Breadth first, so that a self-mapped table is first described at the level it was meant for."""
    queue: list[tuple[int, int, int]] = [(root, 4, 0)]
    position = 0
    while position < len(queue) and position < _MAX_WALKS:
        table, level, base = queue[position]
        position += 1
        shift = 12 + 9 * (level - 1)
        for word in tables.get(table, []):
            start = base | word.index << shift
            if level == 4 and word.index >= 256:
                start |= 0xFFFF << 48
            last = start + (1 << shift) - 1
            found = notes.setdefault(word.gfn << 9 | word.index, [])
            if len(found) <= _MAX_NOTES:
                found.append(f"{name} L{level} {start:#x}-{last:#x}")
            if level > 1 and word.value & _PRESENT and not (level < 4 and word.value & _LARGE):
                queue.append((word.value >> 12 & _FRAME_MASK, level - 1, start))
