"""Segment loads, far transfers, system calls and events, run as flat code with tables in memory."""

from __future__ import annotations

import pytest
from descriptor_tables import (
    ABSENT,
    CODE0,
    CODE0_32,
    CODE3,
    DATA0,
    DATA3,
    GDT,
    HANDLER,
    IDT,
    READ_ONLY,
    SMALL,
    STACK,
    TSS,
    TSS_SELECTOR,
    asm,
    descriptor,
    enter_user,
    gate,
    in_code0,
    run,
    stack_words,
    tables,
)
from flatbus import RSP, FlatBus

from mmufuzz.x86 import execute
from mmufuzz.x86.breakpoints import code_breakpoint
from mmufuzz.x86.event import TripleFault, deliver_exception
from mmufuzz.x86.flat_registers import initial_registers
from mmufuzz.x86.insn import CS
from mmufuzz.x86.segments import install
from mmufuzz.x86.state import SHADOW_MOV_SS, SHADOW_STI, Fault

MODES = pytest.mark.parametrize("mode", [64, 32])


# Segment loads.


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [
        (DATA0, -1, -1),
        (CODE0, -1, -1),
        (READ_ONLY, -1, -1),
        (0, -1, -1),
        (3, -1, -1),
        (ABSENT, 11, ABSENT),
        (TSS_SELECTOR, 13, TSS_SELECTOR),
        (0x58, 13, 0x58),
        (DATA0 | 3, 13, DATA0),
        (DATA0 | 4, 13, DATA0 | 4),
    ],
)
@MODES
def test_a_data_segment_load_checks_its_descriptor(mode: int, selector: int, vector: int, error: int) -> None:
    made = run(mode, asm(f"mov eax, {selector}", "mov ds, eax", mode=mode))
    assert (made.vector, made.error_code) == (vector, error)
    if vector < 0:
        assert made.registers["ds"] == selector


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [
        (DATA0, -1, -1),
        (0, 13, 0),
        (DATA3, 13, DATA3),
        (READ_ONLY, 13, READ_ONLY),
        (CODE0, 13, CODE0),
        (ABSENT, 12, ABSENT),
    ],
)
def test_a_stack_segment_load_wants_writable_data_of_its_privilege(selector: int, vector: int, error: int) -> None:
    made = run(32, asm(f"mov eax, {selector}", "mov ss, eax", mode=32))
    assert (made.vector, made.error_code) == (vector, error)


def test_a_null_stack_selector_is_allowed_in_64_bit_code_at_cpl_0() -> None:
    assert run(64, asm("xor eax, eax", "mov ss, eax", "push rax")).stop == "end"


def test_an_access_through_a_null_selector_is_gp_outside_64_bit_code() -> None:
    lines = ("xor eax, eax", "mov ds, eax", "mov ecx, [0x14000]")
    assert (run(32, asm(*lines, mode=32)).vector, run(64, asm(*lines)).vector) == (13, -1)


def test_tables_wrap_at_4_gib_outside_long_mode() -> None:
    data = descriptor(0x13).to_bytes(8, "little")
    made = execute(
        asm("mov eax, 8", "mov es, eax", mode=32),
        mode=32,
        registers={"gdt_base": 0xFFFFFFF8, "gdt_limit": 0xF},
        memory={0: data},
    )
    assert (made.stop, made.registers["es"], made.memory[0][5] & 1) == ("end", 8, 1)


def test_limits_count_outside_64_bit_code() -> None:
    stops = []
    for offset in (0xFC, 0xFD):
        made = run(32, asm(f"mov eax, {SMALL}", "mov es, eax", f"mov edi, {offset}", "stosd", mode=32))
        stops.append((made.stop, made.vector))
    assert stops == [("unmapped", -1), ("exception", 13)]


def test_a_load_sets_the_accessed_bit() -> None:
    made = run(32, asm(f"mov eax, {DATA0}", "mov ds, eax", mode=32))
    assert made.memory[GDT][DATA0 + 5] & 1


# Far transfers.


@MODES
def test_a_far_return_enters_the_code_segment(mode: int) -> None:
    made = run(mode, in_code0(mode, b"\xf4"))
    assert (made.stop, made.registers["cs"]) == ("halt", CODE0)


@pytest.mark.parametrize(("selector", "vector", "error"), [(0, 13, 0), (DATA0, 13, DATA0), (0x58, 13, 0x58)])
@MODES
def test_a_far_return_checks_the_code_segment(mode: int, selector: int, vector: int, error: int) -> None:
    code = asm(f"push {selector}", "push 0x1000", mode=mode) + (b"\x48\xcb" if mode == 64 else b"\xcb")
    made = run(mode, code)
    assert (made.vector, made.error_code) == (vector, error)


def test_a_far_jump_and_call_in_32_bit_code() -> None:
    jump = b"\xea" + (0x1020).to_bytes(4, "little") + CODE0.to_bytes(2, "little")
    call = b"\x9a" + (0x1020).to_bytes(4, "little") + CODE0.to_bytes(2, "little")
    assert run(32, jump.ljust(0x20, b"\x90") + b"\xf4").registers["cs"] == CODE0
    made = run(32, call.ljust(0x20, b"\x90") + b"\xf4")
    assert stack_words(made, 4, 2) == [0x1007, 0]


# System calls.


def wrmsr(number: int, value: int) -> bytes:
    return asm(f"mov ecx, {number}", f"mov eax, {value & 0xFFFFFFFF}", f"mov edx, {value >> 32}", "wrmsr")


def test_syscall_and_sysret() -> None:
    setup = wrmsr(0xC0000080, 0x501) + wrmsr(0xC0000081, 0x13 << 48 | 8 << 32) + wrmsr(0xC0000082, HANDLER)
    made = run(64, setup + asm("stc", "syscall"), memory={HANDLER: b"\xf4" * 16})
    registers = made.registers
    assert (made.stop, registers["rcx"], registers["r11"] & 1) == ("halt", 0x1000 + len(setup) + 3, 1)
    assert (registers["cs"], registers["ss"]) == (8, 0x10)
    back = run(64, setup + asm("syscall", "nop"), memory={HANDLER: b"\x48\x0f\x07".ljust(16, b"\xf4")})
    assert (back.stop, back.registers["cpl"], back.registers["cs"], back.registers["ss"]) == ("end", 3, 0x23, 0x1B)


def test_syscall_clears_the_rpl_of_cs_and_not_of_ss() -> None:
    setup = wrmsr(0xC0000080, 0x501) + wrmsr(0xC0000081, 0xB << 32) + wrmsr(0xC0000082, HANDLER)
    registers = run(64, setup + asm("syscall"), memory={HANDLER: b"\xf4" * 16}).registers
    assert (registers["cs"], registers["ss"], registers["cpl"]) == (8, 0x13, 0)


def test_syscall_without_efer_sce_is_undefined() -> None:
    assert run(64, asm("syscall")).vector == 6


@MODES
def test_sysenter(mode: int) -> None:
    setup = b"".join(
        asm(f"mov ecx, {number}", f"mov eax, {value}", "xor edx, edx", "wrmsr", mode=mode)
        for number, value in ((0x174, CODE0), (0x175, STACK + 0x100), (0x176, HANDLER))
    )
    made = run(mode, setup + asm("sysenter", mode=mode))
    assert (made.stop, made.registers["cs"]) == ("halt", CODE0)
    assert made.registers["rsp" if mode == 64 else "esp"] == STACK + 0x100
    assert run(mode, asm("sysenter", mode=mode)).vector == 13


@pytest.mark.parametrize(
    "line",
    ["hlt", "wrmsr", "lgdt [rbx]", "mov cr0, rax", "invlpg [rbx]", "invpcid rax, [rbx]", "clts", "wbinvd", "in al, 5"],
)
def test_privileged_instructions_are_gp_at_cpl_3(line: str) -> None:
    made = run(64, asm(line), registers={"cpl": 3, "rbx": STACK})
    assert (made.vector, made.error_code) == (13, 0)


# Events.


@MODES
def test_an_interrupt_gate_saves_the_state_and_clears_if(mode: int) -> None:
    made = run(mode, in_code0(mode, asm("sti", "int 0x30", mode=mode)), {0x30: gate(HANDLER, CODE0)})
    assert made.stop == "halt"
    flags = made.registers["rflags" if mode == 64 else "eflags"]
    assert flags & 0x200 == 0
    words = stack_words(made, mode // 8, 3)
    assert words[0] == 0x1023
    assert (words[1], words[2] & 0x200) == (CODE0, 0x200)


@MODES
def test_a_trap_gate_leaves_if_alone(mode: int) -> None:
    made = run(mode, in_code0(mode, asm("sti", "int 0x30", mode=mode)), {0x30: gate(HANDLER, CODE0, 15)})
    assert made.registers["rflags" if mode == 64 else "eflags"] & 0x200


@MODES
def test_iret_undoes_an_interrupt(mode: int) -> None:
    back = {HANDLER: (b"\x48\xcf" if mode == 64 else b"\xcf").ljust(16, b"\xf4")}
    made = run(mode, in_code0(mode, asm("sti", "int 0x30", mode=mode)), {0x30: gate(HANDLER, CODE0)}, memory=back)
    assert (made.stop, made.registers["rsp" if mode == 64 else "esp"]) == ("end", STACK + 0x200)
    assert made.registers["rflags" if mode == 64 else "eflags"] & 0x200


@MODES
def test_a_fault_pushes_its_error_code_and_the_instruction_itself(mode: int) -> None:
    body = asm("mov eax, 0x58", "mov ds, eax", mode=mode)
    made = run(mode, in_code0(mode, body), {13: gate(HANDLER, CODE0)})
    words = stack_words(made, mode // 8, 4)
    assert (made.stop, words[0], words[1]) == ("halt", 0x58, 0x1025)
    # RF, so that the handler may return to the instruction.
    assert words[3] & 1 << 16


@MODES
def test_a_software_interrupt_needs_the_gates_privilege(mode: int) -> None:
    made = run(mode, asm("int 0x30", mode=mode), {0x30: gate(HANDLER, CODE0)}, {"cpl": 3})
    # #GP has no gate either, so #GP during #GP is #DF, and that is the end.
    assert made.stop == "shutdown"


@MODES
def test_an_inner_handler_runs_on_the_stack_of_the_tss(mode: int) -> None:
    code = enter_user(mode, 0x1080) + asm("int 0x30", mode=mode)
    made = run(mode, code, {0x30: gate(HANDLER, CODE0, dpl=3)})
    words = stack_words(made, mode // 8, 5)
    assert (made.stop, made.registers["cpl"]) == ("halt", 0)
    assert [words[0], words[1], words[3], words[4]] == [0x1082, CODE3 | 3, STACK + 0x200, DATA3 | 3]
    assert made.registers["rsp" if mode == 64 else "esp"] == STACK + 0x800 - 5 * mode // 8


def test_an_interrupt_stack_table_entry_switches_even_at_cpl_0() -> None:
    ltr = asm(f"mov eax, {TSS_SELECTOR}", "ltr ax")
    code = in_code0(64, ltr + asm("int 0x30"))
    assert run(64, code, {0x30: gate(HANDLER, CODE0, ist=1)}).registers["rsp"] == STACK + 0x400 - 40


def test_int1_needs_no_privilege_and_is_a_debug_exception() -> None:
    code = enter_user(32, 0x1080)
    made = run(32, code + b"\xf1", {1: gate(HANDLER, CODE0), 13: gate(HANDLER + 4, CODE0)})
    # It is a trap: the handler returns behind it.
    assert (made.registers["eip"], stack_words(made, 4, 1)) == (HANDLER + 1, [0x1081])
    made = run(32, code + b"\xcd\x01", {1: gate(HANDLER, CODE0), 13: gate(HANDLER + 4, CODE0)})
    assert (made.registers["eip"], stack_words(made, 4, 2)) == (HANDLER + 5, [1 << 3 | 2, 0x1080])


@pytest.mark.parametrize(("kind", "enabled"), [(6, 0), (7, 0x200)], ids=["interrupt gate", "trap gate"])
def test_a_16_bit_gate_has_a_16_bit_offset_and_frame(kind: int, enabled: int) -> None:
    # The upper half of the offset means nothing to it.
    low = gate(0x5000, CODE0, kind) | 0x1234 << 48
    made = run(32, in_code0(32, asm("sti", "int 0x30", mode=32)), {0x30: low}, memory={0x5000: b"\xf4"})
    assert (made.stop, made.registers["eip"], made.registers["esp"]) == ("halt", 0x5001, STACK + 0x200 - 6)
    assert stack_words(made, 2, 3) == [0x1023, CODE0, 0x202]
    assert made.registers["eflags"] & 0x200 == enabled


@pytest.mark.parametrize(
    ("mode", "selector", "error"),
    [(64, 0, 0), (32, 0, 0), (64, DATA0, DATA0), (32, DATA0, DATA0), (64, CODE3, CODE3), (32, CODE3, CODE3),
     (64, CODE0_32, CODE0_32), (32, 0xF8, 0xF8)],
)  # fmt: skip
@pytest.mark.parametrize("external", [0, 1])
def test_the_code_of_a_gate_is_checked(mode: int, selector: int, error: int, external: int) -> None:
    gates = {0x30: gate(HANDLER, selector, dpl=3), 13: gate(HANDLER, CODE0)}
    more = {CODE0_32: descriptor(0x1B), 0x50: 0} if mode == 64 else {0x50: 0}
    lines = ("sti", "nop", "nop") if external else ("int 0x30",)
    interrupts = {0: 0x30} if external else None
    made = run(mode, in_code0(mode, asm(*lines, mode=mode)), gates, descriptors=more, interrupts=interrupts)
    at = 0x1022 if external else 0x1020
    assert (made.stop, stack_words(made, mode // 8, 2)) == ("halt", [error | external, at])


STACK_FAULT = {12: gate(HANDLER, CODE0, ist=1), 0x30: gate(HANDLER, CODE0), 6: gate(HANDLER, CODE0)}
LOAD_TSS = asm(f"mov eax, {TSS_SELECTOR}", "ltr ax")


@pytest.mark.parametrize(
    ("lines", "interrupts", "external"),
    [(("int 0x30",), None, 0), (("ud2",), None, 1), (("sti", "nop", "nop"), {0: 0x30}, 1)],
    ids=["int", "exception", "interrupt"],
)
def test_the_stack_of_long_mode_must_be_canonical(
    lines: tuple[str, ...], interrupts: dict[int, int] | None, external: int
) -> None:
    code = in_code0(64, LOAD_TSS + asm("mov rsp, 0x800000001000", *lines))
    made = run(64, code, STACK_FAULT, interrupts=interrupts)
    assert (made.stop, stack_words(made, 8, 1)) == ("halt", [external])


@pytest.mark.parametrize(("line", "external"), [("int 0x30", 0), ("ud2", 1)])
def test_a_frame_that_does_not_fit_is_a_stack_fault_with_the_selector_of_an_inner_stack(
    line: str, external: int
) -> None:
    """#SS gets through because its code is conforming: it stays on the stack of CPL 3."""
    tss = bytearray(0x68)
    tss[4:10] = (STACK + 0x800).to_bytes(4, "little") + SMALL.to_bytes(2, "little")
    conforming = {0x50: descriptor(0x1E)}
    gates = {0x30: gate(HANDLER, CODE0, dpl=3), 6: gate(HANDLER, CODE0), 12: gate(HANDLER, 0x50), 13: 0}
    code = enter_user(32, 0x1080) + asm(line, mode=32)
    memory = {TSS: bytes(tss), HANDLER: b"\x90\xeb\xfe"}
    made = run(32, code, gates, descriptors=conforming, memory=memory, max_instructions=40)
    assert (made.stop, made.registers["cs"]) == ("limit", 0x53)
    assert stack_words(made, 4, 1) == [SMALL | external]


def test_the_stacks_of_a_16_bit_tss_are_not_modelled() -> None:
    small = {TSS_SELECTOR: descriptor(0x1, base=TSS, limit=0x67, flags=0)}
    code = enter_user(32, 0x1080) + asm("int 0x30", mode=32)
    made = run(32, code, {0x30: gate(HANDLER, CODE0, dpl=3)}, descriptors=small)
    assert (made.stop, made.registers["cpl"], made.registers["eip"]) == ("unsupported", 3, 0x1080)


def test_cr2_is_that_of_the_last_page_fault_on_the_way() -> None:
    """A page fault whose frame faults in turn is a double fault."""
    regs = initial_registers(32)
    install(regs, CS, CODE0, 0, 0xFFFFFFFF, 0xC09B)
    regs.gdt_base, regs.gdt_limit, regs.idt_base, regs.idt_limit = GDT, 0xFF, IDT, 0x7FF
    regs.gpr[RSP] = 0x3000
    bus = FlatBus(0x20000)
    for start, data in tables(32, {8: gate(HANDLER, CODE0), 14: gate(HANDLER + 0x10, CODE0)}, {}).items():
        bus.memory[start : start + len(data)] = data
    alone = regs.copy()
    deliver_exception(alone, bus, Fault(14, 2, 0x123456))
    assert (alone.cr2, alone.rip, bus.peek(0x2FF0, 4)) == (0x123456, HANDLER + 0x10, 2)
    bus.deny(0x2FF8, 0x2FFC)
    with pytest.raises(TripleFault):
        deliver_exception(regs, bus, Fault(14, 2, 0x123456))
    assert regs.cr2 == 0x2FF8


@MODES
def test_a_contributory_fault_during_a_contributory_fault_is_a_double_fault(mode: int) -> None:
    gates = {8: gate(HANDLER, CODE0), 13: gate(HANDLER, CODE0, present=0)}
    made = run(mode, in_code0(mode, asm("mov eax, 0x58", "mov ds, eax", mode=mode)), gates)
    assert (made.stop, stack_words(made, mode // 8, 1)) == ("halt", [0])


@MODES
def test_a_fault_during_a_double_fault_shuts_down(mode: int) -> None:
    gates = {8: gate(HANDLER, CODE0, present=0), 13: gate(HANDLER, CODE0, present=0)}
    assert run(mode, in_code0(mode, asm("mov eax, 0x58", "mov ds, eax", mode=mode)), gates).stop == "shutdown"


@MODES
def test_an_external_interrupt_waits_for_if_and_the_instruction_behind_sti(mode: int) -> None:
    code = in_code0(mode, asm("nop", "sti", "nop", "nop", mode=mode))
    made = run(mode, code, {0x40: gate(HANDLER, CODE0)}, interrupts={3: 0x40})
    assert (made.stop, stack_words(made, mode // 8, 1)) == ("halt", [0x1023])


def shadow(*lines: str, **changes: int) -> int:
    """The interrupt shadow that the last of these instructions leaves."""
    regs = initial_registers(64)
    for name, value in changes.items():
        setattr(regs, name, value)
    return execute(asm(*lines), registers=regs, memory={0x4000: bytes(16)}).regs.shadow


def test_sti_casts_a_shadow_over_the_next_instruction_only_if_it_sets_if() -> None:
    assert shadow("sti") == SHADOW_STI
    assert shadow("sti", "nop") == 0
    assert shadow("sti", "sti") == 0
    assert shadow("sti", rflags=1 << 9 | 2) == 0


def test_a_load_of_ss_casts_a_shadow_and_the_second_in_a_row_does_not() -> None:
    assert shadow("mov ss, eax") == SHADOW_MOV_SS
    assert shadow("mov ss, eax", "mov ss, eax") == 0
    assert shadow("mov ds, eax") == 0


def test_a_load_of_ss_in_the_shadow_of_sti_casts_its_own() -> None:
    assert shadow("sti", "mov ss, eax") == SHADOW_MOV_SS


def test_pop_ss_casts_a_shadow_and_pop_ds_does_not() -> None:
    for code, expected in ((b"\x17", SHADOW_MOV_SS), (b"\x1f", 0)):
        made = execute(code, mode=16, registers={"esp": 0x4000}, memory={0x4000: bytes(16)})
        assert made.regs.shadow == expected


def test_an_instruction_that_faults_stays_in_its_shadow() -> None:
    assert shadow("sti", "ud2") == SHADOW_STI


def test_delivery_ends_a_shadow() -> None:
    code = in_code0(64, asm("sti", "ud2"))
    assert run(64, code, {6: gate(HANDLER, CODE0)}).regs.shadow == 0


def test_the_frame_of_an_external_interrupt_has_rf_clear() -> None:
    code = in_code0(64, asm("sti", "nop", "nop"))
    made = run(64, code, {0x40: gate(HANDLER, CODE0), 6: gate(HANDLER, CODE0)}, interrupts={0: 0x40})
    assert stack_words(made, 8, 3)[2] & 1 << 16 == 0


def test_a_code_breakpoint_right_behind_a_load_of_ss_is_inhibited() -> None:
    regs = initial_registers(64)
    regs.dr[0], regs.dr[7], regs.rip = 0x1000, 1, 0x1000
    assert code_breakpoint(regs) == 1
    regs.shadow = SHADOW_STI
    assert code_breakpoint(regs) == 1
    regs.shadow = SHADOW_MOV_SS
    assert code_breakpoint(regs) == 0


def test_a_divide_error_in_real_address_mode_goes_through_the_vector_table() -> None:
    ivt = (0x0100).to_bytes(2, "little") + (0x1500).to_bytes(2, "little")
    made = execute(
        bytes.fromhex("f6f1"),
        mode=16,
        registers={"esp": 0x4200, "idt_limit": 0x3FF},
        memory={0: ivt, 0x4000: bytes(0x1000), 0x15100: b"\xf4"},
    )
    assert (made.stop, made.registers["cs"], made.registers["esp"]) == ("halt", 0x1500, 0x41FA)
    assert made.memory[0x4000][0x1FA:0x1FE] == bytes.fromhex("00100000")


def test_in_real_address_mode_the_vector_is_read_behind_the_pushes() -> None:
    """The frame lies over the vector: CS:IP of the interrupted code is where the handler is."""
    made = execute(
        bytes.fromhex("cd00f4"), mode=16, registers={"esp": 6, "idt_limit": 0x3FF}, memory={0: bytes(16)}, origin=0x1000
    )
    assert (made.stop, made.registers["cs"], made.registers["esp"]) == ("halt", 0, 0)
