"""Page walks by implementations that are not ours: Unicorn (QEMU's) and bochscpu (Bochs').

Each runs one instruction that makes the access of a case: ``mov al, [rbx]``, ``mov [rbx], al``, whatever is at the
address, or ``mov ds, ax`` with the descriptor at the address.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walk_cases import CODE_FRAME, FETCH, IMPLICIT, MODES, RAM, READ, WRITE, WalkCase

from mmufuzz.x86.state import CR0_PE, CR0_PG, VECTOR_GP, VECTOR_PF

PAGE = 4096
CODE = {READ: (0x00, b"\x8a\x03"), WRITE: (0x20, b"\x88\x03"), IMPLICIT: (0x40, b"\x8e\xd8")}
SELECTOR = 8
MSR_EFER = 0xC0000080


class Unavailable(Exception):
    """The engine does not run here; the message says why."""


@dataclass
class Seen:
    """What an engine did. ``gpa``: of the access, -1 if none was made; ``words``: the case's words afterwards."""

    vector: int
    error_code: int
    address: int
    gpa: int
    words: dict[int, int]


def landing(gpa: int) -> bytes:
    """Code that tells where it is, by the frame's number, and then goes nowhere: ``mov eax, imm32; jmp $``."""
    return b"\xb8" + (gpa >> 12 & 0xFFFFFFFF).to_bytes(4, "little") + b"\xeb\xfe"


class UnicornEngine:
    """Unicorn with QEMU's own TLB. What it was found to do differently from the SDM is in ``walk_divergences``."""

    linear_bits = {"32-bit": 32, "pae": 32, "4-level": 48, "5-level": 57}
    pke = True

    def __init__(self, mode: str) -> None:
        try:
            unicorn: Any = importlib.import_module("unicorn")
            self.x86: Any = importlib.import_module("unicorn.x86_const")
        except ImportError as error:
            raise Unavailable(str(error)) from error
        self.stopped: type[Exception] = unicorn.UcError
        self.rbx: int = self.x86.UC_X86_REG_RBX if MODES[mode] >= 4 else self.x86.UC_X86_REG_EBX
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64 if MODES[mode] >= 4 else unicorn.UC_MODE_32)
        # The one model that has SMAP, protection keys and 5-level paging.
        uc.ctl_set_cpu_model(self.x86.UC_CPU_X86_ICELAKE_SERVER)
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
        uc.mem_map(0, RAM)
        uc.hook_add(unicorn.UC_HOOK_INTR, self.on_interrupt)
        uc.hook_add(unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE, self.on_access)
        uc.hook_add(unicorn.UC_HOOK_MEM_INVALID, self.on_unmapped)
        self.uc = uc
        self.vector = 0
        self.error_code = 0
        self.gpa = -1
        self.during_fault = uc.context_save()
        self.error_code_at = 0
        self.calibrate()
        for offset, code in CODE.values():
            uc.mem_write((CODE_FRAME << 12) + offset, code)

    def calibrate(self) -> None:
        """Find the fields of Unicorn's saved context for which it has no interface, by values that only they have."""
        uc = self.uc
        self.write_registers(EAX=0x1234_5678, CR4=1 << 22, ECX=0, EDX=0)
        self.pristine = uc.context_save()
        registers = raw(self.pristine).index((0x1234_5678).to_bytes(4, "little"))
        # CPUX86State: 16 registers, RIP, RFLAGS, three words of lazy flags, cc_op, df, hflags.
        self.hflags_at = registers + 16 * 8 + 5 * 8 + 8
        uc.mem_write(0, b"\x0f\x01\xef" + CODE[IMPLICIT][1])
        self.write_registers(EAX=0x5A5A_A5A4)
        uc.emu_start(0, 3, count=1)
        self.write_registers(EAX=0)
        self.pkru_at = raw(uc.context_save()).index((0x5A5A_A5A4).to_bytes(4, "little"))
        # A selector beyond the GDT's limit is its own error code.
        self.write_registers(EAX=0xDEAD_5A58)
        uc.emu_start(3, 5, count=1)
        if self.vector != VECTOR_GP:
            raise Unavailable(f"Unicorn raised {self.vector} instead of #GP for a bad selector")
        self.error_code_at = raw(self.during_fault).index((0x5A58).to_bytes(4, "little"))
        uc.mem_write(0, bytes(8))

    def write_registers(self, **values: int) -> None:
        for name, value in values.items():
            self.uc.reg_write(getattr(self.x86, f"UC_X86_REG_{name}"), value)

    def on_interrupt(self, uc: Any, vector: int, _data: object) -> None:
        self.vector = vector
        uc.context_update(self.during_fault)
        self.error_code = word_32(self.during_fault, self.error_code_at).value
        uc.emu_stop()

    def on_access(self, _uc: Any, _kind: int, address: int, _size: int, _value: int, _data: object) -> None:
        if self.gpa < 0:
            self.gpa = address

    def on_unmapped(self, _uc: Any, _kind: int, address: int, _size: int, _value: int, _data: object) -> bool:
        if self.gpa < 0:
            self.gpa = address
        return False

    def run(self, case: WalkCase, landings: list[int]) -> Seen:
        """Make the access. ``landings``: where a fetch might land; negative ones are none."""
        uc = self.uc
        for address, word in case.words.items():
            uc.mem_write(address, word.to_bytes(8, "little"))
        word_32(self.pristine, self.pkru_at).value = case.pkru
        hflags = word_32(self.pristine, self.hflags_at)
        hflags.value = hflags.value & ~3 | case.cpl
        uc.context_restore(self.pristine)
        uc.reg_write(self.x86.UC_X86_REG_MSR, (MSR_EFER, case.efer))
        self.write_registers(CR4=case.cr4, CR3=case.cr3, CR0=case.cr0, EFLAGS=case.rflags, CR2=0)
        start = case.gva
        fetched = {gpa for gpa in landings if 0 <= gpa < RAM} if case.kind == FETCH else set()
        for gpa in fetched:
            uc.mem_write(gpa, landing(gpa))
        if case.kind != FETCH:
            start = case.code + CODE[case.kind][0]
            uc.reg_write(self.rbx, case.gva)
            self.write_registers(EAX=SELECTOR if case.kind == IMPLICIT else 0)
            uc.reg_write(self.x86.UC_X86_REG_GDTR, (0, case.gva - SELECTOR & (1 << 64) - 1, 15, 0))
        self.vector = self.error_code = 0
        self.gpa = -1
        try:
            uc.emu_start(start, 0, count=1)
        except self.stopped:
            if self.gpa < 0:
                raise
        if case.kind == FETCH and not self.vector and self.gpa < 0:
            self.gpa = uc.reg_read(self.x86.UC_X86_REG_EAX) << 12 | case.gva & PAGE - 1
        words = {address: int.from_bytes(uc.mem_read(address, 8), "little") for address in case.words}
        for address in case.words:
            uc.mem_write(address, bytes(8))
        for gpa in fetched:
            uc.mem_write(gpa, bytes(8))
        address = uc.reg_read(self.x86.UC_X86_REG_CR2)
        return seen(case, self.vector, self.error_code, address, self.gpa, words)


def raw(context: Any) -> bytes:
    """The bytes of a context that Unicorn saved."""
    return ctypes.string_at(context.context, context.size)


def word_32(context: Any, offset: int) -> ctypes.c_uint32:
    """A field of a context that Unicorn saved."""
    return ctypes.c_uint32.from_address(ctypes.cast(context.context, ctypes.c_void_p).value + offset)


def seen(case: WalkCase, vector: int, error_code: int, address: int, gpa: int, words: dict[int, int]) -> Seen:
    """An access that reached memory has no vector; what the descriptor there then led to does not matter."""
    if case.kind == IMPLICIT and vector == VECTOR_GP and gpa >= 0:
        vector = error_code = 0
    if vector:
        gpa = -1
    else:
        error_code = 0
    return Seen(vector, error_code, address if vector == VECTOR_PF else 0, gpa, words)


# Symbols of glibc 2.38 that bochscpu's wheels use without saying so.
SHIM = """
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
unsigned long long __isoc23_strtoull(const char *text, char **end, int base) { return strtoull(text, end, base); }
int __isoc23_sscanf(const char *text, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    int count = vsscanf(text, format, list);
    va_end(list);
    return count;
}
"""


def load_bochscpu() -> Any:
    """The module. On a glibc older than 2.38 it loads only beside two functions, which a C compiler has to make."""
    try:
        return importlib.import_module("bochscpu._bochscpu")
    except ImportError as error:
        if "__isoc23_" not in str(error):
            raise Unavailable(f"bochscpu does not load here: {error}") from error
    for name in [name for name in sys.modules if name.partition(".")[0] == "bochscpu"]:
        del sys.modules[name]
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "shim.c"
        library = Path(directory) / "shim.so"
        source.write_text(SHIM)
        try:
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable("bochscpu needs glibc 2.38, or a C compiler for what older ones lack") from error
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        return importlib.import_module("bochscpu._bochscpu")


class BochsEngine:
    """Bochs' CPU as bochscpu builds it: a Core i3-8121U, without protection keys.

    CR4.LA57 can be set, but addresses go on being checked for 48 bits.
    """

    linear_bits = {"32-bit": 32, "pae": 32, "4-level": 48, "5-level": 48}
    pke = False

    def __init__(self, mode: str) -> None:
        self.bochscpu = load_bochscpu()
        self.long_mode = MODES[mode] >= 4
        self.memory = self.bochscpu.memory
        self.pages: dict[int, int] = {}
        for page in range(0, RAM, PAGE):
            self.pages[page] = self.memory.allocate_host_page()
            self.memory.page_insert(page, self.pages[page])
        self.scratch: int = self.memory.allocate_host_page()
        self.missing: list[int] = []
        self.session = self.bochscpu.Session()
        self.session.missing_page_handler = self.on_missing
        self.hook = self.bochscpu.Hook()
        self.hook.exception = self.on_exception
        self.hook.lin_access = self.on_access
        self.hook.after_execution = self.on_executed
        self.state = self.bochscpu.State()
        self.vector = 0
        self.error_code = 0
        self.gpa = -1
        for offset, code in [*CODE.values(), (0x60, b"\x0f\x22\xc1")]:
            self.poke((CODE_FRAME << 12) + offset, code)

    def poke(self, gpa: int, data: bytes) -> None:
        page = self.pages.get(gpa & -PAGE, self.scratch)
        ctypes.memmove(page + gpa % PAGE, data, len(data))

    def peek(self, gpa: int) -> int:
        return ctypes.c_uint64.from_address(self.pages[gpa & -PAGE] + gpa % PAGE).value

    def on_missing(self, gpa: int) -> None:
        self.missing.append(gpa & -PAGE)
        self.memory.page_insert(gpa & -PAGE, self.scratch)

    def on_exception(self, session: Any, _cpu: int, vector: int, error_code: int) -> None:
        if not self.vector:
            self.vector = vector
            self.error_code = error_code
        session.stop()

    def on_access(self, _session: Any, _cpu: int, _gva: int, gpa: int, _size: int, _kind: int, _write: int) -> None:
        if self.gpa < 0:
            self.gpa = gpa

    def on_executed(self, session: Any, _cpu: int, _instruction: int) -> None:
        session.stop()

    def segment(self, selector: int, attributes: int) -> Any:
        segment = self.bochscpu.Segment()
        segment.present = True
        segment.selector = selector
        segment.base = 0
        segment.limit = 0xFFFFFFFF
        segment.attr = attributes
        return segment

    def start(self, case: WalkCase, rip: int, cr0: int, cpl: int) -> None:
        """Run one instruction."""
        state = self.state
        state.rip = rip
        state.rax = SELECTOR if case.kind == IMPLICIT else 0
        state.rbx = case.gva
        state.rcx = case.cr0
        state.rflags = case.rflags
        state.cr0 = cr0
        state.cr2 = 0
        state.cr3 = case.cr3
        state.cr4 = case.cr4
        state.efer = case.efer
        state.xcr0 = 1
        state.cs = self.segment(SELECTOR | cpl, (0xA09B if self.long_mode else 0xC09B) | cpl << 5)
        for name in ("ds", "es", "ss", "fs", "gs"):
            setattr(state, name, self.segment(2 * SELECTOR | cpl, 0xC093 | cpl << 5))
        gdtr = self.bochscpu.GlobalSegment()
        gdtr.base = case.gva - SELECTOR & (1 << 64 if self.long_mode else 1 << 32) - 1
        gdtr.limit = 15
        state.gdtr = gdtr
        self.session.cpu.state = state
        self.vector = self.error_code = 0
        self.gpa = -1
        self.session.run([self.hook])

    def run(self, case: WalkCase, landings: list[int]) -> Seen:
        """Make the access. ``landings``: where a fetch might land; negative ones are none."""
        for address, word in case.words.items():
            self.poke(address, word.to_bytes(8, "little"))
        fetched = {gpa for gpa in landings if gpa >= 0} if case.kind == FETCH else set()
        for gpa in fetched:
            self.poke(gpa, landing(gpa))
        if case.mode == "pae":
            # The PDPTE registers are loaded by a MOV to CR0, from where linear addresses are physical.
            self.start(case, (CODE_FRAME << 12) + 0x60, case.cr0 & ~CR0_PG | CR0_PE, 0)
        if case.mode != "pae" or not self.vector:
            rip = case.gva if case.kind == FETCH else case.code + CODE[case.kind][0]
            self.start(case, rip, case.cr0, case.cpl)
        if case.kind == FETCH and not self.vector:
            self.gpa = self.session.cpu.rax << 12 | case.gva & PAGE - 1
        words = {address: self.peek(address) for address in case.words}
        for address in case.words:
            self.poke(address, bytes(8))
        for gpa in fetched:
            self.poke(gpa, bytes(8))
        for page in self.missing:
            self.memory.page_remove(page)
        self.missing.clear()
        return seen(case, self.vector, self.error_code, self.session.cpu.cr2, self.gpa, words)


ENGINES: dict[str, type[UnicornEngine] | type[BochsEngine]] = {"unicorn": UnicornEngine, "bochscpu": BochsEngine}
