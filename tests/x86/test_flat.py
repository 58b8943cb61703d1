"""``mmufuzz.x86.execute``: flat code on a CPU of its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.x86 import Execution, execute
from mmufuzz.x86.asm import assemble

DATA = 0x8000


def code(*lines: str, mode64: bool = True) -> bytes:
    return b"".join(assemble(line, mode64) for line in lines)


def test_registers_and_memory_come_back() -> None:
    registers = {"rax": 2, "rcx": 3, "rbx": DATA}
    made = execute(code("add rax, rcx", "mov [rbx], rax"), registers=registers, memory={DATA: bytes(16)})
    assert (made.stop, made.instructions, made.registers["rax"]) == ("end", 2, 5)
    assert made.memory[DATA] == (5).to_bytes(16, "little")
    assert made.registers["rip"] == 0x1000 + 6


def test_the_callers_memory_is_left_alone() -> None:
    memory = {DATA: bytes(8)}
    execute(code("inc qword [rbx]"), registers={"rbx": DATA}, memory=memory)
    assert memory == {DATA: bytes(8)}


def test_a_loop_stops_at_the_limit() -> None:
    made = execute(code("jmp -2"), max_instructions=50)
    assert (made.stop, made.instructions) == ("limit", 50)


def test_hlt_stops_behind_itself() -> None:
    made = execute(code("hlt", "nop"))
    assert (made.stop, made.registers["rip"], made.instructions) == ("halt", 0x1001, 1)


def test_an_exception_without_an_idt_stops_at_the_instruction() -> None:
    made = execute(code("nop", "div ecx"))
    assert (made.stop, made.vector, made.error_code, made.registers["rip"]) == ("exception", 0, -1, 0x1001)


def test_memory_that_was_not_given_is_unmapped() -> None:
    made = execute(code("mov eax, [rbx]"), registers={"rbx": 0x5555})
    assert (made.stop, made.address) == ("unmapped", 0x5555)


def test_a_store_that_leaves_its_memory_stores_nothing() -> None:
    made = execute(code("mov [rbx], rcx"), registers={"rbx": DATA + 4, "rcx": -1 % (1 << 64)}, memory={DATA: bytes(8)})
    assert (made.stop, made.memory[DATA]) == ("unmapped", bytes(8))


def test_an_access_may_go_on_in_memory_that_touches() -> None:
    memory = {DATA: b"\x11\x22", DATA + 2: b"\x33\x44"}
    assert execute(code("mov eax, [rbx]"), registers={"rbx": DATA}, memory=memory).registers["rax"] == 0x44332211


def test_a_store_may_go_on_in_memory_that_touches_code_among_it() -> None:
    store = code("mov [rbx], rcx")
    # INC EAX and three NOPs behind the code become INC EDX by the upper half of the store.
    at = 0x1000 + len(store)
    made = execute(
        store + code("inc eax"),
        registers={"rbx": at - 1, "rcx": int.from_bytes(store[-1:] + code("inc edx", "inc edx", "nop"), "little")},
        memory={at + 2: b"\x11" * 8},
    )
    assert (made.stop, made.registers["rax"], made.registers["rdx"]) == ("end", 0, 1)
    assert made.memory[at + 2] == code("inc edx", "nop") + bytes(2) + b"\x11" * 3


def test_code_beyond_the_limit_of_its_segment_is_gp() -> None:
    jump = bytes.fromhex("66e9faff0000")
    made = execute(jump, mode=16, origin=0, memory={0x10000: b"\xf4"})
    assert (made.stop, made.vector, made.registers["eip"]) == ("exception", 13, 0)
    # Execution may run off its end as well.
    made = execute(b"\x90\x90", mode=16, origin=0xFFFF, memory={0x10001: b"\xf4"})
    assert (made.stop, made.vector, made.instructions) == ("exception", 13, 1)


def test_memory_of_no_bytes_is_no_memory() -> None:
    made = execute(code("nop"), memory={0x1000: b"", DATA: b""})
    assert (made.stop, list(made.memory)) == ("end", [0x1000])


def test_an_unmodelled_instruction_is_unsupported() -> None:
    # ADDPS xmm0, xmm1: every 64-bit CPU has it.
    assert execute(bytes.fromhex("0f58c1")).stop == "unsupported"


def test_an_undefined_instruction_is_an_exception() -> None:
    made = execute(bytes.fromhex("0f0b"))
    assert (made.stop, made.vector) == ("exception", 6)


def test_code_may_change_itself() -> None:
    # The store goes to the immediate of the next instruction.
    assert execute(code("mov byte [rip+2], 7", "add eax, 1")).registers["rax"] == 7


def test_a_loop_that_patches_its_own_body_runs_the_new_bytes() -> None:
    # INC EAX becomes DEC EAX (ModRM C0 to C8) in the second round.
    body = code("inc eax", "mov byte [rip-8], 0xc8", "dec ecx", "jnz -13")
    made = execute(body, registers={"rcx": 3})
    assert (made.stop, made.registers["rax"]) == ("end", 0xFFFFFFFF)


@pytest.mark.parametrize(("mode", "name"), [(64, "rax"), (32, "eax"), (16, "eax")])
def test_a_mode_has_its_registers(mode: int, name: str) -> None:
    made = execute(b"\x40\x90" if mode == 64 else b"\x90", mode=mode, registers={name: 5})
    assert made.registers[name] == 5


@pytest.mark.parametrize("mode", [64, 32, 16])
def test_every_register_is_taken_by_the_name_it_comes_back_by(mode: int) -> None:
    """Each alone, with a value that fits and leaves the machine in its mode."""
    names = execute(b"\x90", mode=mode).registers
    for number, name in enumerate(names):
        if name in ("rip", "eip"):
            continue
        value = {"rflags": 0x203, "eflags": 0x203, "cpl": 0, "cr0": names["cr0"] | 8}.get(name, number % 13 + 1)
        if name == "efer":
            value = names["efer"] | 1
        if name in ("cs", "cs_base"):
            value = 0
        made = execute(b"\x90", mode=mode, registers={name: value}).registers
        assert made[name] == value
        # A selector of real-address mode has a base; nothing else moves.
        moved = {other for other in names if made[other] != names[other]} - {name, "rip", "eip"}
        assert moved == ({name + "_base"} if mode == 16 and name in ("es", "ss", "ds", "fs", "gs") else set())


def test_an_xmm_register_is_the_low_half_of_its_ymm_register() -> None:
    assert execute(b"\x90", registers={"xmm3": (1 << 128) - 1}).registers["ymm3"] == (1 << 128) - 1
    with pytest.raises(ValueError, match="expected a value of 128 bits"):
        execute(b"\x90", registers={"xmm3": 1 << 128})


def test_16_bit_mode_runs_real_address_code() -> None:
    # MOV AX, [BX]; ADD AX, CX: DS is 0x800.
    made = execute(bytes.fromhex("8b0701c8"), mode=16, registers={"ds": 0x800, "ecx": 1}, memory={DATA: b"\x34\x12"})
    assert (made.stop, made.registers["eax"]) == ("end", 0x1235)


def test_a_word_beyond_the_end_of_a_real_mode_segment_is_gp() -> None:
    made = execute(bytes.fromhex("8b07"), mode=16, registers={"ebx": 0xFFFF}, memory={0xFFF0: bytes(0x20)})
    assert (made.stop, made.vector) == ("exception", 13)


def test_fs_and_gs_have_bases_in_64_bit_code() -> None:
    made = execute(bytes.fromhex("648b03"), registers={"fs_base": DATA, "rbx": 4}, memory={DATA: bytes(range(8))})
    assert made.registers["rax"] == 0x07060504


def test_rdtsc_reads_the_argument() -> None:
    made = execute(code("rdtsc"), tsc=0x1234567890)
    assert (made.registers["rdx"], made.registers["rax"]) == (0x12, 0x34567890)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": b""}, "code: expected at least one byte"),
        ({"mode": 8}, "mode 8: expected 64, 32 or 16"),
        ({"registers": {"eax": 1}}, "register 'eax': 64-bit code has no such register"),
        ({"registers": {"rax": 1 << 64}}, "register 'rax': expected a value of 64 bits, got 0x10000000000000000"),
        ({"mode": 32, "registers": {"xmm8": 1}}, "register 'xmm8': 32-bit code has no such register"),
        ({"memory": {0x1000: b"\0"}}, "memory at 0x1000 overlaps that at 0x1000"),
        ({"mode": 32, "memory": {1 << 32: b"\0"}}, "memory at 0x100000000: expected addresses below 0x100000000"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        execute(**{"code": b"\x90", **arguments})  # type: ignore[arg-type]  # wrong on purpose


def everything(made: Execution) -> tuple[object, ...]:
    return (made.registers, made.memory, made.stop, made.vector, made.error_code, made.address, made.instructions)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.binary(min_size=1, max_size=40), st.sampled_from([64, 32, 16]))
def test_any_bytes_run_to_a_stop_and_twice_to_the_same(data: bytes, mode: int) -> None:
    memory = {0: bytes(0x1000), 0x2000: bytes(0x2000)}
    first = execute(data, mode=mode, memory=memory, max_instructions=200)
    assert everything(first) == everything(execute(data, mode=mode, memory=memory, max_instructions=200))


@pytest.mark.parametrize(("room", "stop"), [(0x10000 - 4, "end"), (0x10000 - 3, "exception")])
def test_enter_faults_if_the_operand_would_not_fit_where_its_frame_ends(room: int, stop: str) -> None:
    # ENTER of 32 bits pushes EBP and reserves what makes the 16-bit stack pointer wrap to ``room``.
    start = 0x400
    reserved = start - 4 - room & 0xFFFF
    code = b"\x66\xc8" + reserved.to_bytes(2, "little") + b"\0"
    registers = {"esp": start, "ebp": 0x1234}
    made = execute(code, mode=16, registers=registers, memory={0x300: bytes(0x200)})
    assert made.stop == stop
    if stop == "end":
        assert (made.registers["esp"], made.registers["ebp"]) == (room, start - 4)
    else:
        assert (made.vector, made.registers["esp"], made.registers["ebp"]) == (12, start, 0x1234)
