"""System instructions: MSRs, CPUID, control and debug registers, descriptor tables, ports, extended state."""

from __future__ import annotations

import pytest
from descriptor_tables import (
    CODE0,
    DATA0,
    DATA3,
    GDT,
    HANDLER,
    READ_ONLY,
    SMALL,
    STACK,
    TSS,
    TSS_SELECTOR,
    asm,
    descriptor,
    enter_user,
    gate,
    run,
)
from flatbus import FlatBus, machine
from flatbus import run as step

from mmufuzz.x86 import Execution, execute
from mmufuzz.x86.decode import decode
from mmufuzz.x86.executor import execute as execute_insn
from mmufuzz.x86.flat_registers import initial_registers
from mmufuzz.x86.state import Fault

MODES = pytest.mark.parametrize("mode", [64, 32])
DATA = STACK + 0x800
HOLE = 0x800000000000
ZF = 0x40


def faults(made: Execution) -> tuple[int, int]:
    return made.vector, made.error_code


# Model-specific registers.

TSC, SYSENTER_CS, SYSENTER_ESP, PAT = 0x10, 0x174, 0x175, 0x277
EFER, STAR, LSTAR, FMASK = 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX = range(0xC0000100, 0xC0000104)


def msr(number: int, value: int) -> Execution:
    """WRMSR, then RDMSR."""
    lines = (f"mov ecx, {number}", f"mov eax, {value & 0xFFFFFFFF}", f"mov edx, {value >> 32}", "wrmsr")
    return run(64, asm(*lines, "xor eax, eax", "xor edx, edx", "rdmsr"))


def value(made: Execution) -> int:
    return made.registers["rdx"] << 32 | made.registers["rax"]


@pytest.mark.parametrize(
    ("number", "written"),
    [(SYSENTER_CS, 8), (SYSENTER_ESP, HOLE - 1), (PAT, 0x0706050401000706), (STAR, 1 << 63), (LSTAR, -HOLE & 2**64 - 1),
     (FMASK, 0xFFFFFFFF), (FS_BASE, 0x1234), (GS_BASE, 0x5678), (KERNEL_GS_BASE, 1), (TSC_AUX, 7), (TSC, 99)],
)  # fmt: skip
def test_an_msr_reads_back(number: int, written: int) -> None:
    assert value(msr(number, written)) == written


@pytest.mark.parametrize(
    ("number", "written"),
    [(SYSENTER_ESP, HOLE), (LSTAR, HOLE), (FS_BASE, 1 << 63), (GS_BASE, HOLE), (PAT, 2), (PAT, 3 << 56), (PAT, 8),
     (FMASK, 1 << 32), (TSC_AUX, 1 << 32), (EFER, 2), (0x1234, 0)],
)  # fmt: skip
def test_an_msr_refuses_what_it_cannot_hold(number: int, written: int) -> None:
    assert faults(msr(number, written)) == (13, 0)


def test_an_unknown_msr_cannot_be_read() -> None:
    assert faults(run(64, asm("mov ecx, 0x1234", "rdmsr"))) == (13, 0)


def test_the_pat_has_its_value_of_reset() -> None:
    assert value(run(64, asm(f"mov ecx, {PAT}", "rdmsr"))) == 0x0007040600070406


def test_a_write_to_efer_leaves_lma_alone() -> None:
    assert value(msr(EFER, 0x901)) == 0xD01


# What a CPU says of itself.


def cpuid(leaf: int, subleaf: int = 0, **registers: int) -> dict[str, int]:
    made = run(64, asm(f"mov eax, {leaf}", f"mov ecx, {subleaf}", "cpuid"), registers=registers)
    return {name: made.registers["r" + name] for name in ("ax", "bx", "cx", "dx")}


def test_cpuid_names_its_leaves() -> None:
    assert cpuid(0)["ax"] == 0xD
    name = cpuid(0)
    assert b"".join(name[place].to_bytes(4, "little") for place in ("bx", "dx", "cx")) == b"GenuineIntel"
    assert cpuid(0x80000000)["ax"] == 0x80000008
    assert cpuid(0x80000008)["ax"] == 57 << 8 | 52
    assert set(cpuid(0x1000).values()) == {0}


@pytest.mark.parametrize(
    ("leaf", "register", "bit", "line"),
    [
        (1, "cx", 13, "cmpxchg16b [rbx]"),
        (1, "cx", 22, "movbe eax, [rbx]"),
        (1, "cx", 23, "popcnt eax, ebx"),
        (1, "cx", 20, "crc32 eax, ebx"),
        (1, "cx", 26, "xgetbv"),
        (1, "cx", 28, "vmovdqu ymm0, [rbx]"),
        (1, "dx", 15, "cmovz eax, ebx"),
        (1, "dx", 23, "movq mm0, [rbx]"),
        (1, "dx", 24, "fxsave [rbx]"),
        (7, "bx", 3, "andn eax, ebx, ecx"),
        (7, "bx", 8, "rorx eax, ebx, 3"),
        (7, "bx", 10, "invpcid rax, [rbx]"),
        (7, "bx", 19, "adcx eax, ebx"),
        (7, "bx", 20, "clac"),
        (7, "bx", 23, "clflushopt [rbx]"),
        (7, "bx", 24, "clwb [rbx]"),
        (7, "cx", 22, "rdpid rax"),
        (7, "cx", 27, "movdiri [rbx], eax"),
        (0x80000001, "cx", 5, "lzcnt eax, ebx"),
        (0x80000001, "dx", 27, "rdtscp"),
    ],
)
def test_what_cpuid_reports_executes(leaf: int, register: str, bit: int, line: str) -> None:
    assert cpuid(leaf)[register] >> bit & 1
    made = run(64, asm("xor ecx, ecx", "xor eax, eax", line), registers={"rbx": DATA})
    assert made.stop == "end"


def test_cpuid_says_how_large_the_save_area_is() -> None:
    assert cpuid(0xD) == {"ax": 7, "bx": 832, "cx": 832, "dx": 0}
    assert cpuid(0xD, 1)["ax"] == 3
    assert cpuid(0xD, 2) == {"ax": 256, "bx": 576, "cx": 0, "dx": 0}
    assert set(cpuid(0xD, 3).values()) == {0}
    without_avx = run(64, asm("mov eax, 3", "xor edx, edx", "xor ecx, ecx", "xsetbv", "mov eax, 0xd", "cpuid"))
    assert without_avx.registers["rbx"] == 576


def test_the_time_stamp_counter_may_be_reserved_for_cpl_0() -> None:
    made = run(64, asm("rdtscp"), tsc=5 << 32 | 7)
    assert (value(made), made.registers["rcx"]) == (5 << 32 | 7, 0)
    for cpl, vector in ((0, -1), (3, 13)):
        assert run(64, asm("rdtsc"), registers={"cr4": 4, "cpl": cpl}).vector == vector


def test_there_are_no_performance_counters() -> None:
    assert faults(run(64, asm("rdpmc"))) == (13, 0)


# XCR0 and PKRU.


def xsetbv(low: int, index: int = 0, cpl: int = 0) -> Execution:
    lines = (f"mov ecx, {index}", f"mov eax, {low}", "xor edx, edx", "xsetbv", "xor eax, eax", "xgetbv")
    return run(64, asm(*lines), registers={"cpl": cpl})


@pytest.mark.parametrize("low", [1, 3, 7])
def test_xcr0_reads_back(low: int) -> None:
    assert value(xsetbv(low)) == low


@pytest.mark.parametrize(("low", "index", "cpl"), [(0, 0, 0), (5, 0, 0), (15, 0, 0), (7, 1, 0), (7, 0, 3)])
def test_xsetbv_checks(low: int, index: int, cpl: int) -> None:
    assert faults(xsetbv(low, index, cpl)) == (13, 0)


def test_pkru_needs_cr4_pke_and_zeros() -> None:
    write = ("xor ecx, ecx", "xor edx, edx", "mov eax, 0x55", "wrpkru", "xor eax, eax", "rdpkru")
    assert run(64, asm(*write)).vector == 6
    enabled = {"cr4": 1 << 22}
    assert value(run(64, asm(*write), registers=enabled)) == 0x55
    assert faults(run(64, asm("mov ecx, 1", "rdpkru"), registers=enabled)) == (13, 0)
    assert faults(run(64, asm("xor ecx, ecx", "mov edx, 1", "wrpkru"), registers=enabled)) == (13, 0)


# Control and debug registers.


@pytest.mark.parametrize(("number", "written"), [(2, 0x1234), (3, 0x5000), (4, 0x20), (8, 15)])
def test_a_control_register_reads_back(number: int, written: int) -> None:
    lines = (f"mov rax, {written}", f"mov cr{number}, rax", f"mov rbx, cr{number}")
    assert run(64, asm(*lines)).registers["rbx"] == written


def test_cr8_has_four_bits() -> None:
    assert faults(run(64, asm("mov eax, 16", "mov cr8, rax"))) == (13, 0)


@pytest.mark.parametrize("written", [1 << 32 | 1, 1 << 29 | 1, 0])
def test_cr0_refuses_reserved_bits_nw_without_cd_and_long_mode_without_protection(written: int) -> None:
    assert faults(run(64, asm(f"mov rax, {written}", "mov cr0, rax"))) == (13, 0)


def test_paging_is_not_modelled_in_flat_code() -> None:
    assert run(32, asm("mov eax, 0x80000001", "mov cr0, eax", mode=32)).stop == "unsupported"


def test_protection_may_be_turned_off() -> None:
    assert run(32, asm("mov eax, 0x10", "mov cr0, eax", mode=32)).registers["cr0"] == 0x10


def test_lmsw_sets_four_bits_but_cannot_clear_pe() -> None:
    made = run(64, asm("mov eax, 0xfff8", "lmsw ax", "smsw rbx"))
    assert made.registers["rbx"] == 9
    assert run(64, asm("mov eax, 8", "lmsw ax", "clts", "smsw eax")).registers["rax"] == 1


def debug(lines: tuple[str, ...], cr4: int = 0) -> Execution:
    return run(64, asm(*lines), registers={"cr4": cr4})


@pytest.mark.parametrize(
    ("number", "written", "read"),
    [(0, 0x123456789ABC, 0x123456789ABC), (3, 5, 5), (6, 0, 0xFFFE0FF0), (6, 0xFFFFFFFF, 0xFFFFEFFF), (7, 0, 0x400),
     (7, 0xFFFFDFFF, 0xFFFF0FFF)],
)  # fmt: skip
def test_debug_registers_read_back_with_their_fixed_bits(number: int, written: int, read: int) -> None:
    made = debug((f"mov rax, {written}", f"mov dr{number}, rax", f"mov rbx, dr{number}"))
    assert made.registers["rbx"] == read


def test_dr4_and_dr5_are_dr6_and_dr7_unless_cr4_de_is_set() -> None:
    assert debug(("mov rax, dr4", "mov rbx, dr6")).registers["rax"] == 0xFFFF0FF0
    assert debug(("mov rax, dr5",), cr4=8).vector == 6


def test_dr6_and_dr7_have_32_bits() -> None:
    assert faults(debug(("mov rax, 0x100000000", "mov dr7, rax"))) == (13, 0)


def test_general_detect_traps_accesses_to_debug_registers() -> None:
    made = debug(("mov eax, 0x2400", "mov dr7, rax", "mov rbx, dr0"))
    assert made.vector == 1
    assert made.regs.dr[6] & 1 << 13 and not made.regs.dr[7] & 1 << 13


# Descriptor tables.


@MODES
def test_table_registers_are_stored_and_loaded(mode: int) -> None:
    lines = (f"sgdt [{DATA}]", f"lidt [{DATA}]", f"sidt [{DATA + 16}]")
    made = run(mode, asm(*lines, mode=mode))
    assert (made.registers["idt_base"], made.registers["idt_limit"]) == (GDT, 0x4F)
    start, size = DATA - STACK, mode // 8 + 2
    image = made.memory[STACK]
    assert image[start : start + size] == image[start + 16 : start + 16 + size]


def test_lgdt_takes_24_bits_of_base_with_16_bit_operands() -> None:
    code = asm(f"mov dword [{DATA + 2}], 0x12345678", mode=32) + b"\x66" + asm(f"lgdt [{DATA}]", mode=32)
    assert run(32, code).registers["gdt_base"] == 0x345678


def test_lgdt_of_a_base_that_is_not_canonical_is_gp() -> None:
    assert faults(run(64, asm(f"mov rax, {HOLE}", f"mov [{DATA + 2}], rax", f"lgdt [{DATA}]"))) == (13, 0)


@MODES
def test_ltr_makes_the_tss_busy(mode: int) -> None:
    made = run(mode, asm(f"mov eax, {TSS_SELECTOR}", "ltr ax", "str ebx", mode=mode))
    assert (made.registers["rbx" if mode == 64 else "ebx"], made.memory[GDT][TSS_SELECTOR + 5]) == (TSS_SELECTOR, 0x8B)
    again = run(mode, asm(f"mov eax, {TSS_SELECTOR}", "ltr ax", "ltr ax", mode=mode))
    assert faults(again) == (13, TSS_SELECTOR)


LDT = 0x50


@MODES
@pytest.mark.parametrize(
    ("line", "selector", "word", "vector", "error"),
    [
        ("ltr", 0, 0, 13, 0),
        ("ltr", DATA0, 0, 13, DATA0),
        ("ltr", LDT, descriptor(0x9, present=0), 11, LDT),
        ("ltr", 0xF8, 0, 13, 0xF8),
        ("ltr", TSS_SELECTOR | 4, 0, 13, TSS_SELECTOR | 4),
        ("lldt", 0, 0, -1, -1),
        ("lldt", LDT, descriptor(0x2), -1, -1),
        ("lldt", LDT, descriptor(0x2, present=0), 11, LDT),
        ("lldt", LDT, descriptor(0x9), 13, LDT),
    ],
)
def test_system_segments_are_checked(mode: int, line: str, selector: int, word: int, vector: int, error: int) -> None:
    made = run(mode, asm(f"mov eax, {selector}", f"{line} ax", mode=mode), descriptors={LDT: word, LDT + 8: 0})
    assert faults(made) == (vector, error)


@pytest.mark.parametrize(("limit", "vector"), [(LDT + 8 + 15, -1), (LDT + 8 + 14, 13), (LDT + 8 + 7, 13)])
def test_all_16_bytes_of_a_system_descriptor_are_within_the_limit(limit: int, vector: int) -> None:
    """Wherever it begins: the table has entries of 8 bytes."""
    selector = LDT + 8
    code = asm(f"mov eax, {selector}", "lldt ax")
    table = {selector: descriptor(0x2), selector + 8: 0}
    assert run(64, code, registers={"gdt_limit": limit}, descriptors=table).vector == vector


def test_the_base_of_a_system_segment_is_canonical_in_long_mode() -> None:
    code = asm(f"mov eax, {LDT}", "lldt ax")
    assert faults(run(64, code, descriptors={LDT: descriptor(0x2), LDT + 8: 1 << 31})) == (13, LDT)


@MODES
def test_descriptors_are_found_in_the_ldt(mode: int) -> None:
    ldt = {LDT: descriptor(0x2, base=GDT, limit=0x2F, flags=0), LDT + 8: 0}
    code = asm(f"mov eax, {LDT}", "lldt ax", f"mov eax, {DATA0 | 4}", "mov es, eax", "sldt ebx", mode=mode)
    made = run(mode, code, descriptors=ldt)
    assert (made.registers["es"], made.registers["rbx" if mode == 64 else "ebx"]) == (DATA0 | 4, LDT)
    code = asm(f"mov eax, {LDT}", "lldt ax", f"mov eax, {READ_ONLY | 4}", "mov es, eax", mode=mode)
    beyond = run(mode, code, descriptors=ldt)
    assert faults(beyond) == (13, READ_ONLY | 4)


CALL_GATE, CODE_ONLY, CONFORMING = 0x60, 0x70, 0x78


@MODES
@pytest.mark.parametrize(
    ("line", "selector", "readable"),
    [
        ("verr ax", DATA0, True),
        ("verr ax", CODE0, True),
        ("verr ax", CODE_ONLY, False),
        ("verr ax", 0, False),
        ("verr ax", 0xF0, False),
        ("verr ax", 0x1000, False),
        ("verr ax", DATA0 | 3, False),
        ("verr ax", CONFORMING | 3, True),
        ("verr ax", TSS_SELECTOR, False),
        ("verw ax", DATA0, True),
        ("verw ax", READ_ONLY, False),
        ("verw ax", CODE0, False),
        ("lar ebx, eax", DATA3, True),
        ("lar ebx, eax", TSS_SELECTOR, True),
        ("lar ebx, eax", CALL_GATE, True),
        ("lar ebx, eax", CALL_GATE + 8, False),
        ("lsl ebx, eax", SMALL, True),
        ("lsl ebx, eax", TSS_SELECTOR, True),
        ("lsl ebx, eax", CALL_GATE, False),
        ("lsl ebx, eax", DATA3, True),
    ],
)
def test_zf_tells_whether_a_selector_may_be_used(mode: int, line: str, selector: int, readable: bool) -> None:
    more = {
        CALL_GATE: gate(0, CODE0, 12),
        CALL_GATE + 8: gate(0, CODE0, 14),
        CODE_ONLY: descriptor(0x19),
        CONFORMING: descriptor(0x1E),
    }
    made = run(mode, asm(f"mov eax, {selector}", "mov ebx, 0x5555", line, mode=mode), descriptors=more)
    flags = made.registers["rflags" if mode == 64 else "eflags"]
    assert (made.stop, flags & ZF != 0) == ("end", readable)
    if not readable and line.startswith("l"):
        assert made.registers["rbx" if mode == 64 else "ebx"] == 0x5555


@pytest.mark.parametrize("line", ["lar eax, eax", "lsl eax, eax", "verr ax", "verw ax"])
def test_a_table_that_cannot_be_read_is_a_page_fault_all_the_same(line: str) -> None:
    regs = machine(mode64=False)
    regs.gdt_base, regs.gdt_limit, regs.gpr[0] = 0x800, 0xFF, DATA0
    bus = FlatBus(0x4000)
    bus.deny(0x800, 0x900)
    before = regs.words()
    with pytest.raises(Fault) as raised:
        step(line, regs, bus, False)
    assert (raised.value.vector, raised.value.address) == (14, 0x800 + DATA0)
    assert regs.words() == before


@pytest.mark.parametrize(
    ("cpl", "iopl", "before", "loaded", "after"),
    [(3, 3, 0, 0x200, 0x200), (3, 3, 0x200, 0, 0), (3, 2, 0, 0x200, 0), (3, 2, 0x200, 0, 0x200),
     (1, 1, 0, 0x200, 0x200), (0, 0, 0, 0x200, 0x200)],
)  # fmt: skip
def test_popf_changes_if_up_to_iopl_and_iopl_at_cpl_0(
    cpl: int, iopl: int, before: int, loaded: int, after: int
) -> None:
    flags = {"cpl": cpl, "rflags": 2 | iopl << 12 | before}
    made = run(64, asm(f"push {loaded | 1 << 12}", "popf"), registers=flags)
    assert made.registers["rflags"] & 0x3200 == after | (1 if cpl == 0 else iopl) << 12


def test_data_that_cannot_be_written_and_data_that_expands_down() -> None:
    down = {0x50: descriptor(0x17, limit=STACK // 0x1000), 0x58: descriptor(0x15, limit=0, flags=0)}
    for selector, line, offset, vector in (
        (READ_ONLY, "mov ecx, [ebx]", STACK, -1),
        (READ_ONLY, "mov [ebx], ecx", STACK, 13),
        (0x50, "mov [ebx], ecx", STACK + 0xFFF, 13),
        (0x50, "mov [ebx], ecx", HANDLER, -1),
        (0x58, "mov ecx, [ebx]", 0xFFFD, 13),
        (0x58, "mov [ebx], ecx", 0x10, 13),
    ):
        made = run(32, asm(f"mov eax, {selector}", "mov ds, eax", line, mode=32), None, {"ebx": offset}, down)
        assert (made.vector, made.instructions) == (vector, 3 if vector < 0 else 2)


def test_lar_and_lsl_show_rights_and_limit() -> None:
    lines = (f"mov eax, {DATA3}", "lar ebx, eax", "lsl ecx, eax", f"mov eax, {SMALL}", "lsl edx, eax")
    made = run(32, asm(*lines, mode=32))
    assert made.registers["ebx"] == 0xC0F300
    assert (made.registers["ecx"], made.registers["edx"]) == (0xFFFFFFFF, 0xFF)


@pytest.mark.parametrize("code", ["0f00c0", "0f00c8", "0f00d0", "0f00e0", "0f02c0", "63c0"])
def test_selectors_are_not_looked_at_in_real_address_mode(code: str) -> None:
    assert execute(bytes.fromhex(code), mode=16).vector == 6


@pytest.mark.parametrize(
    ("first", "second", "result", "zero"), [(1, 3, 3, True), (2, 1, 2, False), (0xFFFC, 2, 0xFFFE, True)]
)
def test_arpl_raises_the_requested_privilege(first: int, second: int, result: int, zero: bool) -> None:
    lines = (f"mov eax, {first}", f"mov ebx, {second}", f"mov [{DATA}], eax", f"arpl word [{DATA}], bx", "arpl ax, bx")
    made = run(32, asm(*lines, mode=32))
    assert (made.registers["eax"], made.registers["eflags"] & ZF != 0) == (result, zero)
    assert made.memory[STACK][0x800:0x802] == result.to_bytes(2, "little")


def test_swapgs_exchanges_the_bases() -> None:
    code = asm(f"mov ecx, {KERNEL_GS_BASE}", "mov eax, 0x4000", "xor edx, edx", "wrmsr", "swapgs", "rdmsr")
    made = run(64, code, registers={"gs_base": 0x7000})
    assert (made.registers["gs_base"], made.registers["rax"]) == (0x4000, 0x7000)


def test_fsgsbase_needs_its_bit_in_cr4_and_a_canonical_base() -> None:
    assert run(64, asm("rdfsbase rax")).vector == 6
    enabled = {"cr4": 1 << 16, "rbx": 0x1234, "rcx": HOLE}
    made = run(64, asm("wrgsbase rbx", "rdgsbase rax", "wrfsbase ebx", "rdfsbase edx"), registers=enabled)
    assert (made.registers["rax"], made.registers["fs_base"], made.registers["rdx"]) == (0x1234, 0x1234, 0x1234)
    assert faults(run(64, asm("wrfsbase rcx"), registers=enabled)) == (13, 0)


# Ports.


def test_ports_float_high() -> None:
    made = run(64, asm("xor eax, eax", "in al, 0x80", "mov dx, 0x3f8", "out dx, eax", "in eax, dx", "out 0x80, al"))
    assert (made.stop, made.registers["rax"]) == ("end", 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("port", "size", "allowed"),
    [(0x10, 1, True), (0x11, 1, False), (0x10, 2, False), (0x1F, 2, True), (0x200, 1, False)],
)
def test_the_io_bitmap_of_the_tss_allows_ports_at_cpl_3(port: int, size: int, allowed: bool) -> None:
    tss = bytearray(0x80)
    tss[4:12] = (STACK + 0x800).to_bytes(8, "little")
    tss[0x66] = 0x68
    tss[0x68 + 2] = 1 << 1
    register = {1: "al", 2: "ax"}[size]
    code = enter_user(64, 0x1080) + asm(f"mov dx, {port}", f"in {register}, dx")
    wide = {TSS_SELECTOR: descriptor(0x9, base=TSS, limit=0x7F, flags=0), TSS_SELECTOR + 8: 0}
    made = run(64, code, descriptors=wide, memory={TSS: bytes(tss)})
    assert (made.stop == "end") == allowed


def test_without_a_bitmap_no_port_is_allowed_at_cpl_3() -> None:
    assert faults(run(64, enter_user(64, 0x1080) + asm("in al, 0x10"))) == (13, 0)
    assert faults(run(64, asm("in al, 0x10"), registers={"cpl": 3})) == (13, 0)


def test_iopl_allows_ports_and_the_interrupt_flag_at_cpl_3() -> None:
    assert run(64, asm("in al, 0x10", "sti", "cli"), registers={"cpl": 3, "rflags": 0x3002}).stop == "end"
    assert faults(run(64, asm("cli"), registers={"cpl": 3})) == (13, 0)


@pytest.mark.parametrize("line", ["clac", "stac"])
def test_the_smap_override_belongs_to_cpl_0(line: str) -> None:
    assert run(64, asm(line), registers={"cpl": 3}).vector == 6
    flags = run(64, asm(line), registers={"rflags": 0x40002}).registers["rflags"]
    assert flags & 1 << 18 == (1 << 18 if line == "stac" else 0)


# Extended state.


def area(*lines: str, **registers: int) -> Execution:
    return run(64, asm(*lines), registers={"rbx": DATA, **registers})


def test_fxrstor_loads_what_fxsave_stored() -> None:
    made = area("fxsave [rbx]", "fninit", "movq xmm1, rax", "fxrstor [rbx]",
                fpr0=0x3FFF8000000000000000, ftw=1, fsw=0, ymm1=5 << 128 | 7, mxcsr=0x1FBF)  # fmt: skip
    registers = made.registers
    assert (registers["fpr0"], registers["ftw"], registers["mxcsr"]) == (0x3FFF8000000000000000, 1, 0x1FBF)
    # Bits 255 to 128 are not in the image; MOVQ left them.
    assert registers["ymm1"] == 5 << 128 | 7


def test_xsavec_is_compacted_and_xrstor_reads_it() -> None:
    lines = ("mov eax, 6", "xor edx, edx", "xsavec [rbx]", "vzeroall", "xrstor [rbx]")
    made = area(*lines, ymm2=9 << 128 | 3, mxcsr=0x1FBF)
    image = made.memory[STACK][0x800:]
    assert int.from_bytes(image[512:528], "little") == (1 << 63 | 6) << 64 | 6
    assert (made.registers["ymm2"], made.registers["mxcsr"]) == (9 << 128 | 3, 0x1FBF)


def test_xrstor_of_x87_that_the_area_lacks_initializes_it() -> None:
    made = area("mov eax, 2", "xor edx, edx", "xsave [rbx]", "mov eax, 3", "xrstor [rbx]", fpr3=77, ftw=8, fcw=0x27F)
    assert (made.registers["fpr3"], made.registers["ftw"], made.registers["fcw"]) == (0, 0, 0x37F)


def test_a_compacted_area_without_sse_resets_mxcsr() -> None:
    made = area("mov eax, 1", "xor edx, edx", "xsavec [rbx]", "mov eax, 3", "xrstor [rbx]", ymm0=5, mxcsr=0x1FBF)
    assert (made.registers["ymm0"], made.registers["mxcsr"]) == (0, 0x1F80)


@pytest.mark.parametrize("name", ["xsave", "xsavec"])
def test_xrstor_loads_mxcsr_with_sse_and_of_a_standard_area_with_avx(name: str) -> None:
    """SDM vol. 1, 13.8.1 and 13.8.2."""
    for wanted in range(1, 8):
        lines = ("mov eax, 7", "xor edx, edx", f"{name} [rbx]", "ldmxcsr [rbx + 1024]", f"mov eax, {wanted}")
        made = run(64, asm(*lines, "xrstor [rbx]"), registers={"rbx": DATA - 0x400, "mxcsr": 0x1FBF},
                   memory={STACK: bytes(0x800) + 0x1F81.to_bytes(4, "little").ljust(0x800, b"\0")})  # fmt: skip
        loaded = wanted & 2 or (wanted & 4 and name == "xsave")
        assert (made.stop, made.registers["mxcsr"]) == ("end", 0x1FBF if loaded else 0x1F81)


def test_ldmxcsr_takes_16_bits_and_stmxcsr_stores_them() -> None:
    made = area("ldmxcsr [rbx]", "stmxcsr [rbx + 4]", "vldmxcsr [rbx]", "vstmxcsr [rbx + 8]")
    assert made.registers["mxcsr"] == 0
    for value in (0x1FBF, 0xFFFF):
        made = area(f"mov dword [rbx], {value}", "ldmxcsr [rbx]", "stmxcsr [rbx + 4]")
        assert (made.registers["mxcsr"], made.memory[STACK][0x804:0x808]) == (value, value.to_bytes(4, "little"))
    made = area("mov dword [rbx], 0x10000", "ldmxcsr [rbx]", mxcsr=0x1F80)
    assert (faults(made), made.registers["mxcsr"]) == ((13, 0), 0x1F80)


@pytest.mark.parametrize(
    ("offset", "written"),
    [(512, 8), (520, 1), (528, 1), (24, 1 << 16)],
    ids=["unknown component", "layout without compaction", "reserved", "MXCSR"],
)
def test_xrstor_refuses_a_bad_header(offset: int, written: int) -> None:
    lines = ("mov eax, 7", "xor edx, edx", "xsave [rbx]", f"mov qword [rbx+{offset}], {written}", "xrstor [rbx]")
    assert faults(area(*lines)) == (13, 0)


def test_a_compacted_header_names_what_it_holds() -> None:
    lines = ("mov eax, 3", "xor edx, edx", "xsavec [rbx]", "mov qword [rbx+512], 7", "xrstor [rbx]")
    assert faults(area(*lines)) == (13, 0)


def test_saved_state_needs_the_x87_enabled() -> None:
    lines = (("fxsave [rbx]", 5, 7), ("xsave [rbx]", 5, -1), ("xsave [rbx]", 9, 7), ("movups xmm0, [rbx]", 5, 6))
    for line, cr0, vector in (*lines, ("vmovups xmm0, [rbx]", 5, -1), ("vmovups xmm0, [rbx]", 9, 7)):
        assert area(line, cr0=cr0).vector == vector


def test_avx_needs_its_state_enabled_and_vex_protected_mode() -> None:
    off = ("mov eax, 3", "xor edx, edx", "xor ecx, ecx", "xsetbv")
    assert area(*off, "vmovups xmm0, [rbx]").vector == 6
    assert area(*off, "andn eax, ebx, ecx").stop == "end"
    for code in ("c5f81007", "c4e260f2c1", "c4e278f3c9", "c4e263f6c1", "c5f877"):
        assert execute(bytes.fromhex(code), mode=16, memory={0x2000: bytes(16)}).vector == 6
    # TZCNT is of BMI1 too, but has no VEX.
    assert execute(bytes.fromhex("f30fbcc1"), mode=16).stop == "end"


@pytest.mark.parametrize("line", ["movq mm0, mm1", "movd eax, mm0", "emms", "movq2dq xmm0, mm1", "movq mm0, [rbx]"])
def test_mmx_raises_a_pending_exception_of_the_x87(line: str) -> None:
    assert area(line, fsw=0x81, fcw=0x37E).vector == 16
    assert area(line, fsw=1).stop == "end"


@pytest.mark.parametrize("line", ["movq xmm0, xmm1", "movq xmm0, [rbx]", "movd xmm0, eax"])
def test_sse_moves_of_the_same_names_do_not(line: str) -> None:
    assert area(line, fsw=0x81, fcw=0x37E).stop == "end"


@pytest.mark.parametrize("text", ["sgdt [rbx]", "sidt [rbx]", "sldt rax", "str rax", "smsw eax"])
def test_umip_keeps_system_registers_from_user_code(text: str) -> None:
    umip = {"cr4": 1 << 11, "rbx": 0x4000}
    memory = {0x4000: bytes(16)}
    user = execute(asm(text), registers={**umip, "cpl": 3}, memory=memory)
    assert (user.stop, user.vector, user.error_code) == ("exception", 13, 0)
    assert execute(asm(text), registers=umip, memory=memory).stop == "end"
    assert execute(asm(text), registers={"cpl": 3, "rbx": 0x4000}, memory=memory).stop == "end"


def test_a_table_register_is_stored_as_a_whole() -> None:
    bus = FlatBus(0x3000)
    bus.deny(0x2000, 0x3000)
    regs = initial_registers(64)
    regs.gpr[0] = 0x1FFC
    regs.gdt_limit = 0xFFFF
    with pytest.raises(Fault):
        execute_insn(regs, decode(bytes.fromhex("0f0100"), True), bus)
    assert not any(bus.memory)
