"""Flat code that runs with a GDT, an IDT, a TSS and a stack in memory."""

from __future__ import annotations

from mmufuzz.x86 import Execution, execute
from mmufuzz.x86.asm import assemble

GDT, IDT, TSS, STACK, HANDLER = 0x10000, 0x11000, 0x13000, 0x14000, 0x15000

CODE0, DATA0, CODE3, DATA3, SMALL, READ_ONLY, ABSENT, TSS_SELECTOR, CODE0_32 = range(8, 80, 8)


def descriptor(kind: int, dpl: int = 0, base: int = 0, limit: int = 0xFFFFF, flags: int = 0xC, present: int = 1) -> int:
    """A descriptor; ``kind`` is S and type, ``flags`` are G, D, L and AVL."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    return low | (kind | dpl << 5 | present << 7) << 40 | (limit >> 16) << 48 | flags << 52 | (base >> 24) << 56


def gate(offset: int, selector: int, kind: int = 14, dpl: int = 0, ist: int = 0, present: int = 1) -> int:
    """An interrupt gate (type 14) or trap gate (15); in 64-bit code the rest of the offset is zero."""
    return offset & 0xFFFF | selector << 16 | ist << 32 | (kind | dpl << 5 | present << 7) << 40 | offset >> 16 << 48


def tables(mode: int, gates: dict[int, int], more: dict[int, int]) -> dict[int, bytes]:
    """GDT, IDT, TSS, a stack and a handler that halts. ``more`` are descriptors by selector."""
    long_flags = 0xA if mode == 64 else 0xC
    entries = [
        0,
        descriptor(0x1B, 0, flags=long_flags),
        descriptor(0x13),
        descriptor(0x1B, 3, flags=long_flags),
        descriptor(0x13, 3),
        descriptor(0x13, limit=0xFF, flags=4),
        descriptor(0x11),
        descriptor(0x13, present=0),
        descriptor(0x9, base=TSS, limit=0x67, flags=0),
        0 if mode == 64 else descriptor(0x1B),
    ]
    entries += [0] * 22
    for selector, entry in more.items():
        entries[selector // 8] = entry
    idt = bytearray(0x1000)
    width = 16 if mode == 64 else 8
    for vector, entry in gates.items():
        idt[vector * width : vector * width + 8] = entry.to_bytes(8, "little")
    tss = bytearray(0x68)
    # The I/O bitmap would begin behind the limit.
    tss[0x66] = 0x68
    if mode == 64:
        tss[4:12] = (STACK + 0x800).to_bytes(8, "little")
        tss[0x24:0x2C] = (STACK + 0x400).to_bytes(8, "little")
    else:
        tss[4:8] = (STACK + 0x800).to_bytes(4, "little")
        tss[8:10] = DATA0.to_bytes(2, "little")
    gdt = b"".join(entry.to_bytes(8, "little") for entry in entries)
    memory = {GDT: gdt.ljust(0x1000, b"\0"), IDT: bytes(idt), TSS: bytes(tss), STACK: bytes(0x1000)}
    memory[HANDLER] = b"\xf4" * 16
    return memory


def run(
    mode: int,
    code: bytes,
    gates: dict[int, int] | None = None,
    registers: dict[str, int] | None = None,
    descriptors: dict[int, int] | None = None,
    **more: object,
) -> Execution:
    """Run with the tables loaded, LTR and selectors set by the code where the test wants it.

    ``gates`` are those of the IDT by vector, ``descriptors`` more entries of the GDT by selector; with them its limit
    is 0xFF.
    """
    stack = "rsp" if mode == 64 else "esp"
    start = {"gdt_base": GDT, "gdt_limit": 0xFF if descriptors else 0x4F, "idt_base": IDT, stack: STACK + 0x200}
    start["idt_limit"] = 0xFFF if gates else 0
    start |= registers or {}
    memory = tables(mode, gates or {}, descriptors or {}) | more.pop("memory", {})  # type: ignore[operator]  # a dict where given
    return execute(code, mode=mode, registers=start, memory=memory, **more)  # type: ignore[arg-type]  # as given


def asm(*lines: str, mode: int = 64) -> bytes:
    return b"".join(assemble(line, mode == 64) for line in lines)


def stack_words(made: Execution, size: int, count: int) -> list[int]:
    """What lies at the top of the stack."""
    top = made.registers["rsp" if size == 8 else "esp"] - STACK
    memory = made.memory[STACK]
    return [int.from_bytes(memory[at : at + size], "little") for at in range(top, top + count * size, size)]


LOAD_CS = {64: asm("push 8", "push 0x1020") + b"\x48\xcb", 32: asm("push 8", "push 0x1020", mode=32) + b"\xcb"}


def in_code0(mode: int, body: bytes) -> bytes:
    """Reload CS from the GDT by a far return, then ``body``."""
    return LOAD_CS[mode].ljust(0x20, b"\x90") + body


def enter_user(mode: int, at: int) -> bytes:
    """LTR, then IRET to CPL 3 at ``at``, which is the address of what follows: the code has 0x80 bytes.

    DS and ES are loaded before: the return would make those of CPL 0 null.
    """
    far = b"\x48\xcf" if mode == 64 else b"\xcf"
    down = [DATA3 | 3, STACK + 0x200, 2, CODE3 | 3, at]
    code = asm(f"mov eax, {TSS_SELECTOR}", "ltr ax", f"mov eax, {DATA3}", "mov ds, eax", "mov es, eax", mode=mode)
    return (code + b"".join(asm(f"push {value}", mode=mode) for value in down) + far).ljust(0x80, b"\x90")
