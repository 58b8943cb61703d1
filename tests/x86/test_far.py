"""Far transfers: call gates, the stacks in the TSS, conforming code, returns, real-address mode."""

from __future__ import annotations

import pytest
from descriptor_tables import (
    CODE0,
    CODE0_32,
    CODE3,
    DATA0,
    DATA3,
    HANDLER,
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
)

from mmufuzz.x86 import Execution, execute

GATE = 0x50
CONFORMING = 0x60
INNER_TSS = 0x70
POINTER = STACK + 0xF00
MODES = pytest.mark.parametrize("mode", [64, 32])
CALL_GATE = 12


def call_gate(offset: int, selector: int, dpl: int = 3, parameters: int = 0, present: int = 1) -> int:
    return gate(offset, selector, CALL_GATE, dpl, parameters, present)


def far(mode: int, name: str, selector: int, offset: int = 0) -> bytes:
    """CALLF or JMPF through a pointer in memory."""
    lines = (f"mov dword [{POINTER}], {offset}", f"mov word [{POINTER + 4}], {selector}", f"{name} fword [{POINTER}]")
    return asm(*lines, mode=mode)


def through_gate(mode: int, name: str, word: int, user: bool = False, high: int = 0) -> Execution:
    """CALLF or JMPF through ``GATE``, from CPL 0 or 3."""
    before = enter_user(mode, 0x1080) if user else in_code0(mode, b"").ljust(0x80, b"\x90")
    return run(mode, before + far(mode, name, GATE | (3 if user else 0)), descriptors={GATE: word, GATE + 8: high})


# Call gates.


@MODES
def test_a_call_gate_of_the_same_privilege_pushes_the_return_address(mode: int) -> None:
    made = through_gate(mode, "callf", call_gate(HANDLER, CODE0))
    after = 0x1080 + len(far(mode, "callf", GATE))
    assert (made.stop, stack_words(made, mode // 8, 2)) == ("halt", [after, CODE0])


@MODES
def test_a_call_gate_to_an_inner_privilege_switches_stacks(mode: int) -> None:
    made = through_gate(mode, "callf", call_gate(HANDLER, CODE0), user=True)
    after = 0x1080 + len(far(mode, "callf", GATE))
    assert (made.stop, made.registers["cpl"], made.registers["cs"]) == ("halt", 0, CODE0)
    assert stack_words(made, mode // 8, 4) == [after, CODE3 | 3, STACK + 0x200, DATA3 | 3]
    assert made.registers["ss"] == (0 if mode == 64 else DATA0)


def test_a_32_bit_call_gate_copies_its_parameters() -> None:
    code = enter_user(32, 0x1080) + asm("push 0x11", "push 0x22", mode=32) + far(32, "callf", GATE | 3)
    made = run(32, code, descriptors={GATE: call_gate(HANDLER, CODE0, parameters=2)})
    assert made.stop == "halt"
    assert stack_words(made, 4, 6)[1:] == [CODE3 | 3, 0x22, 0x11, STACK + 0x200 - 8, DATA3 | 3]


@MODES
def test_a_jump_through_a_gate_pushes_nothing(mode: int) -> None:
    made = through_gate(mode, "jmpf", call_gate(HANDLER, CODE0))
    assert (made.stop, made.registers["rsp" if mode == 64 else "esp"]) == ("halt", STACK + 0x200)


@MODES
@pytest.mark.parametrize(
    ("word", "high", "vector", "error"),
    [
        (call_gate(HANDLER, CODE0, dpl=2), 0, 13, GATE),
        (call_gate(HANDLER, CODE0, present=0), 0, 11, GATE),
        (call_gate(HANDLER, 0), 0, 13, 0),
        (call_gate(HANDLER, DATA0), 0, 13, DATA0),
        (call_gate(HANDLER, 0xF8), 0, 13, 0xF8),
        (descriptor(0x2, 3), 0, 13, GATE),
    ],
)
def test_a_call_gate_is_checked(mode: int, word: int, high: int, vector: int, error: int) -> None:
    made = through_gate(mode, "callf", word, user=True, high=high)
    assert (made.vector, made.error_code) == (vector, error)


@MODES
def test_a_jump_does_not_change_the_privilege(mode: int) -> None:
    made = through_gate(mode, "jmpf", call_gate(HANDLER, CODE0), user=True)
    assert (made.vector, made.error_code) == (13, CODE0)


def test_a_call_gate_of_long_mode_has_16_bytes_and_leads_to_64_bit_code() -> None:
    assert through_gate(64, "callf", call_gate(HANDLER, CODE0), high=1 << 40).error_code == GATE
    made = through_gate(64, "callf", call_gate(HANDLER, CODE0), high=1)
    assert (made.stop, made.address) == ("unmapped", 1 << 32 | HANDLER)
    code = in_code0(64, b"").ljust(0x80, b"\x90") + far(64, "callf", GATE)
    narrow = {GATE: call_gate(HANDLER, CODE0_32), GATE + 8: 0, CODE0_32: descriptor(0x1B)}
    assert run(64, code, descriptors=narrow).error_code == CODE0_32


def test_a_call_gate_of_long_mode_must_lie_within_the_table_with_both_halves() -> None:
    code = in_code0(64, b"").ljust(0x80, b"\x90") + far(64, "callf", GATE)
    gates = {GATE: call_gate(HANDLER, CODE0), GATE + 8: 0}
    assert run(64, code, descriptors=gates, registers={"gdt_limit": GATE + 15}).stop == "halt"
    made = run(64, code, descriptors=gates, registers={"gdt_limit": GATE + 14})
    assert (made.vector, made.error_code) == (13, GATE)


def test_an_offset_of_64_bits_must_be_canonical() -> None:
    jump = in_code0(64, asm("mov [rbx], rcx", f"mov word [rbx + 8], {CODE0}", "jmp far qword [rbx]"))
    made = run(64, jump, registers={"rbx": POINTER, "rcx": 1 << 47})
    assert (made.vector, made.error_code) == (13, 0)
    made = run(64, jump, registers={"rbx": POINTER, "rcx": (1 << 47) - 2})
    assert (made.stop, made.address) == ("unmapped", (1 << 47) - 2)


@pytest.mark.parametrize(
    ("high", "stop", "vector", "address"),
    [(0x8000, "exception", 13, 0), (0x7FFF, "unmapped", -1, 0x7FFF << 32 | HANDLER)],
)
def test_a_call_gate_leads_from_compatibility_mode_to_canonical_code(
    high: int, stop: str, vector: int, address: int
) -> None:
    descriptors = {GATE: call_gate(HANDLER, CODE0), GATE + 8: high, CODE0_32: descriptor(0x1B)}
    code = far(64, "jmpf", CODE0_32, 0x1080).ljust(0x80, b"\x90") + far(32, "callf", GATE)
    made = run(64, code, descriptors=descriptors)
    assert (made.stop, made.vector, made.address) == (stop, vector, address)


@pytest.mark.parametrize(("mode", "stop"), [(64, "exception"), (32, "unsupported")])
def test_a_task_switch_is_not_modelled_and_long_mode_has_none(mode: int, stop: str) -> None:
    made = run(mode, far(mode, "jmpf", TSS_SELECTOR), descriptors={GATE: 0})
    assert made.stop == stop


# The stacks of the TSS.


@MODES
@pytest.mark.parametrize("limit", [3, 0x67])
def test_a_call_to_an_inner_privilege_needs_its_stack_in_the_tss(mode: int, limit: int) -> None:
    code = enter_user(mode, 0x1080).replace(
        asm(f"mov eax, {TSS_SELECTOR}", mode=mode), asm(f"mov eax, {INNER_TSS}", mode=mode)
    )
    small = {GATE: call_gate(HANDLER, CODE0), GATE + 8: 0, INNER_TSS: descriptor(0x9, base=TSS, limit=limit, flags=0)}
    made = run(mode, code + far(mode, "callf", GATE | 3), descriptors=small)
    assert (made.stop, made.error_code) == (("halt", -1) if limit == 0x67 else ("exception", INNER_TSS))


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [(0, 10, 0), (DATA3, 10, DATA3), (CODE0, 10, CODE0), (0xF8, 10, 0xF8), (0x38, 12, 0x38)],
)
def test_the_inner_stack_segment_is_checked(selector: int, vector: int, error: int) -> None:
    tss = bytearray(0x68)
    tss[4:8] = (STACK + 0x800).to_bytes(4, "little")
    tss[8:10] = selector.to_bytes(2, "little")
    code = enter_user(32, 0x1080) + far(32, "callf", GATE | 3)
    made = run(32, code, descriptors={GATE: call_gate(HANDLER, CODE0)}, memory={TSS: bytes(tss)})
    assert (made.vector, made.error_code) == (vector, error)


def test_an_inner_stack_that_is_too_small_is_a_stack_fault() -> None:
    code = enter_user(32, 0x1080) + far(32, "callf", GATE | 3)
    small = {GATE: call_gate(HANDLER, CODE0), DATA0: descriptor(0x13, limit=0xFFF, flags=4)}
    tss = bytearray(0x68)
    tss[4:10] = (STACK + 0x800).to_bytes(4, "little") + (INNER_TSS + 8).to_bytes(2, "little")
    small[INNER_TSS + 8] = small.pop(DATA0)
    made = run(32, code, descriptors=small, memory={TSS: bytes(tss)})
    assert (made.vector, made.error_code) == (12, INNER_TSS + 8)


def test_an_inner_stack_may_grow_down_to_its_limit() -> None:
    tss = bytearray(0x68)
    tss[4:10] = (STACK + 0x800).to_bytes(4, "little") + (INNER_TSS + 8).to_bytes(2, "little")
    outcomes = []
    for limit in (STACK // 0x1000 - 1, STACK // 0x1000):
        # A limit in pages: valid are the offsets above it.
        down = {GATE: call_gate(HANDLER, CODE0), INNER_TSS + 8: descriptor(0x17, limit=limit)}
        made = run(32, enter_user(32, 0x1080) + far(32, "callf", GATE | 3), descriptors=down, memory={TSS: bytes(tss)})
        outcomes.append((made.stop, made.vector))
    assert outcomes == [("halt", -1), ("exception", 12)]


# Conforming code.


def conforming(dpl: int) -> dict[int, int]:
    return {CONFORMING: descriptor(0x1E, dpl)}


def test_conforming_code_runs_at_the_callers_privilege() -> None:
    made = run(32, enter_user(32, 0x1080) + far(32, "callf", CONFORMING, HANDLER + 8), descriptors=conforming(0))
    # HLT, which only privilege 0 may execute.
    assert (made.vector, made.registers["cs"], made.registers["eip"]) == (13, CONFORMING | 3, HANDLER + 8)


def test_conforming_code_of_an_outer_privilege_is_no_target() -> None:
    made = run(32, in_code0(32, far(32, "jmpf", CONFORMING, HANDLER)), descriptors=conforming(3))
    assert (made.vector, made.error_code) == (13, CONFORMING)


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [(CODE0 | 3, 13, CODE0), (CODE3, 13, CODE3), (DATA0, 13, DATA0), (0, 13, 0), (0xF8, 13, 0xF8)],
)
@pytest.mark.parametrize("name", ["jmpf", "callf"])
def test_a_direct_far_transfer_stays_at_its_privilege(name: str, selector: int, vector: int, error: int) -> None:
    made = run(32, far(32, name, selector, HANDLER), descriptors={GATE: 0})
    assert (made.vector, made.error_code) == (vector, error)


def test_a_far_call_beyond_the_limit_pushes_nothing() -> None:
    small = {GATE: descriptor(0x1B, limit=0xFFF, flags=4)}
    made = run(32, far(32, "callf", GATE, HANDLER), descriptors=small)
    assert (made.vector, made.error_code, made.registers["esp"]) == (13, 0, STACK + 0x200)


def test_long_mode_has_no_code_segment_with_both_l_and_d() -> None:
    both = {GATE: descriptor(0x1B, flags=0xE)}
    made = run(64, far(64, "jmpf", GATE, HANDLER), descriptors=both)
    assert (made.vector, made.error_code) == (13, GATE)


def test_an_absent_code_segment_is_np() -> None:
    made = run(32, far(32, "jmpf", GATE, HANDLER), descriptors={GATE: descriptor(0x1B, present=0)})
    assert (made.vector, made.error_code) == (11, GATE)


def test_a_far_jump_leads_from_64_bit_to_compatibility_mode() -> None:
    made = run(64, far(64, "jmpf", CODE0_32, HANDLER), descriptors={CODE0_32: descriptor(0x1B)}, memory={
        HANDLER: asm("dec eax", "hlt", mode=32)
    })  # fmt: skip
    # 48 is REX.W to 64-bit code.
    assert (made.stop, made.registers["rax"]) == ("halt", 0xFFFFFFFF)


# Returns.


def outer_return(mode: int, selectors: tuple[int, int], released: int = 0, before: bytes = b"") -> Execution:
    """RETF from CPL 0 to the selectors of CS and SS, with ``released`` bytes of parameters."""
    cs, ss = selectors
    size = mode // 8
    lines = [f"push {ss}", f"push {STACK + 0x600}"] + ["push 0x77"] * (released // size)
    code = before + asm(*lines, f"push {cs}", f"push {HANDLER + 4}", mode=mode)
    code += (b"\x48" if mode == 64 else b"") + (b"\xca" + released.to_bytes(2, "little") if released else b"\xcb")
    return run(mode, code, memory={HANDLER: b"\xf4" * 4 + b"\x90" * 8 + b"\xf4" * 8})


@MODES
@pytest.mark.parametrize("released", [0, 16])
def test_a_far_return_to_an_outer_privilege_takes_its_stack(mode: int, released: int) -> None:
    made = outer_return(mode, (CODE3 | 3, DATA3 | 3), released)
    registers = made.registers
    assert (made.vector, registers["cpl"], registers["cs"], registers["ss"]) == (13, 3, CODE3 | 3, DATA3 | 3)
    assert registers["rsp" if mode == 64 else "esp"] == STACK + 0x600 + released
    assert registers["rip" if mode == 64 else "eip"] == HANDLER + 12


@MODES
def test_a_return_to_an_outer_privilege_drops_inner_data_segments(mode: int) -> None:
    before = asm(f"mov eax, {DATA0}", "mov ds, eax", f"mov eax, {DATA3}", "mov es, eax", mode=mode)
    registers = outer_return(mode, (CODE3 | 3, DATA3 | 3), before=before).registers
    assert (registers["ds"], registers["es"]) == (0, DATA3)


@MODES
@pytest.mark.parametrize(
    ("selectors", "error"),
    [((CODE3 | 3, DATA0), DATA0), ((CODE3 | 3, DATA3), DATA3), ((CODE3 | 3, 0), 0), ((CODE3, DATA3), CODE3)],
)
def test_a_return_to_an_outer_privilege_checks_its_segments(mode: int, selectors: tuple[int, int], error: int) -> None:
    made = outer_return(mode, selectors)
    assert (made.vector, made.error_code, made.registers["cpl"]) == (13, error, 0)


@MODES
def test_a_far_return_to_an_inner_privilege_is_gp(mode: int) -> None:
    size = mode // 8
    code = enter_user(mode, 0x1080) + asm(f"push {CODE0}", f"push {HANDLER}", mode=mode)
    made = run(mode, code + (b"\x48\xcb" if size == 8 else b"\xcb"))
    assert (made.vector, made.error_code) == (13, CODE0)


def test_iret_of_a_nested_task_and_to_virtual_8086_mode_are_not_modelled() -> None:
    nested = asm("push 0x4002", "popfd", "iretd", mode=32)
    assert run(32, nested).stop == "unsupported"
    assert run(64, asm("push 0x4002", "popfq", "iretq")).vector == 13
    virtual = asm("push 0x20002", "push 8", "push 0x1000", "iretd", mode=32)
    assert run(32, virtual).stop == "unsupported"


VIF_VIP = 3 << 19


@MODES
def test_iret_at_cpl_0_loads_vif_and_vip_and_popf_leaves_them_alone(mode: int) -> None:
    size = mode // 8
    flags = "rflags" if mode == 64 else "eflags"
    back = asm(f"push {CODE0}", "push 0x1060", mode=mode) + (b"\x48\xcf" if size == 8 else b"\xcf")
    stack = asm(f"push {DATA0}", f"push {STACK + 0x100}", mode=mode) if size == 8 else b""
    load = in_code0(mode, stack + asm(f"push {VIF_VIP | 2}", mode=mode) + back).ljust(0x60, b"\xf4")
    assert run(mode, load).registers[flags] & VIF_VIP == VIF_VIP
    assert run(mode, load + asm("push 2", "popf", mode=mode)).registers[flags] & VIF_VIP == VIF_VIP
    made = run(mode, in_code0(mode, asm(f"push {VIF_VIP | 2}", "popf", mode=mode)))
    assert (made.stop, made.registers[flags] & VIF_VIP) == ("end", 0)


@pytest.mark.parametrize(("size", "line", "resume"), [(4, "iretd", 0x10000), (2, "iretw", 0)])
def test_only_an_iret_of_more_than_16_bits_loads_rf(size: int, line: str, resume: int) -> None:
    frame = b"".join(value.to_bytes(size, "little") for value in (0x1060, CODE0, 0x10002 & (1 << 8 * size) - 1))
    code = in_code0(32, asm("mov esp, 0x16000", line, mode=32)).ljust(0x60, b"\xf4")
    made = run(32, code, memory={0x16000: frame})
    assert (made.stop, made.registers["eflags"] & 0x10000) == ("end", resume)


@MODES
def test_iret_of_user_code_leaves_vif_and_vip_alone(mode: int) -> None:
    size = mode // 8
    frame = [f"push {CODE3 | 3}", "push 0x10c0"]
    stack = [f"push {DATA3 | 3}", f"push {STACK + 0x100}"] if size == 8 else []
    code = enter_user(mode, 0x1080) + asm(*stack, f"push {VIF_VIP | 0x10002}", *frame, mode=mode)
    made = run(mode, (code + (b"\x48\xcf" if size == 8 else b"\xcf")).ljust(0xC0, b"\xf4"))
    assert (made.stop, made.registers["cpl"]) == ("end", 3)
    assert made.registers["rflags" if mode == 64 else "eflags"] & (VIF_VIP | 0x10000) == 0x10000


# Fast returns.


def wrmsr(mode: int, number: int, value: int) -> bytes:
    lines = (f"mov ecx, {number}", f"mov eax, {value & 0xFFFFFFFF}", f"mov edx, {value >> 32}", "wrmsr")
    return asm(*lines, mode=mode)


@pytest.mark.parametrize(("wide", "cs", "ss"), [(False, 0x5B, 0x63), (True, 0x6B, 0x73)])
def test_sysexit_goes_to_cpl_3(wide: bool, cs: int, ss: int) -> None:
    code = wrmsr(64, 0x174, 0x4B) + asm(f"mov edx, {HANDLER}", f"mov ecx, {STACK + 0x300}")
    made = run(64, code + (b"\x48\x0f\x35" if wide else b"\x0f\x35"))
    registers = made.registers
    assert (made.vector, registers["rip"], registers["rsp"]) == (13, HANDLER, STACK + 0x300)
    assert (registers["cpl"], registers["cs"], registers["ss"]) == (3, cs, ss)


def test_sysexit_checks() -> None:
    assert run(64, asm("sysexit")).vector == 13
    enabled = wrmsr(64, 0x174, 8)
    assert run(64, enabled + enter_user(64, 0x1080 + len(enabled)) + asm("sysexit")).vector == 13
    assert run(64, enabled + asm("mov rdx, 0x800000000000", "sysexitq")).vector == 13


def test_sysret_checks() -> None:
    enabled = wrmsr(64, 0xC0000080, 0x501)
    assert run(64, asm("sysretq")).vector == 6
    assert run(64, enabled + asm("mov rcx, 0x800000000000", "sysretq")).vector == 13
    assert run(64, enabled + enter_user(64, 0x1080 + len(enabled)) + asm("sysretq")).vector == 13


def test_sysret_to_compatibility_mode_takes_32_bits() -> None:
    setup = wrmsr(64, 0xC0000080, 0x501) + wrmsr(64, 0xC0000081, 0x13 << 48)
    code = setup + asm(f"mov rcx, {hex(0x5500000000 + HANDLER)}", "xor eax, eax") + b"\x0f\x07"
    made = run(64, code, memory={HANDLER: asm("dec eax", "hlt", mode=32)})
    assert (made.vector, made.registers["cs"], made.registers["cpl"]) == (13, 0x13, 3)
    # 48 is REX.W to 64-bit code.
    assert made.registers["rax"] == 0xFFFFFFFF


# Real-address mode.


def real(code: str, **registers: int) -> Execution:
    memory = {0x2000: bytes(0x1000), 0x5000: b"\xf4" * 16}
    start = {"esp": 0x800, "ss": 0x200} | registers
    return execute(bytes.fromhex(code), mode=16, registers=start, memory=memory)


def test_real_mode_far_transfers_load_paragraphs() -> None:
    jump = real("ea00000005")
    assert (jump.stop, jump.registers["cs"], jump.registers["cs_base"]) == ("halt", 0x500, 0x5000)
    call = real("9a00000005")
    assert (call.stop, call.registers["esp"]) == ("halt", 0x7FC)
    assert call.memory[0x2000][0x7FC:0x800] == (0x1005).to_bytes(2, "little") + bytes(2)


def test_real_mode_far_return_and_iret_take_paragraphs() -> None:
    # PUSH 0x500, PUSH 0, RETF 4.
    back = real("6800056a00ca0400")
    assert (back.stop, back.registers["cs"], back.registers["esp"]) == ("halt", 0x500, 0x804)
    # PUSHF, PUSH 0x500, PUSH 0, IRET.
    iret = real("9c6800056a00cf", eflags=0x803)
    assert (iret.stop, iret.registers["esp"], iret.registers["eflags"]) == ("halt", 0x800, 0x803)


def test_real_mode_far_pointers_load_segments() -> None:
    # MOV WORD [BX], 0x1234; MOV WORD [BX+2], 0x567; LES AX, [BX].
    made = real("c7073412c747026705c407", ebx=0x2400)
    assert (made.registers["eax"], made.registers["es"], made.registers["es_base"]) == (0x1234, 0x567, 0x5670)


@pytest.mark.parametrize("code", ["66ea000001000005", "669a000001000005"])
def test_real_mode_far_transfers_beyond_64_kib_are_gp(code: str) -> None:
    assert real(code).vector == 13


def test_sysenter_needs_protected_mode() -> None:
    assert real("0f34").vector == 13
    assert real("0f35").vector == 13
