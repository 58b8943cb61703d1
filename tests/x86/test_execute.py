"""What instructions do to registers and to the bus, and that faults leave no trace."""

from __future__ import annotations

import pytest
from flatbus import DATA, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, FlatBus, machine, run

from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import decode
from mmufuzz.x86.execute_operands import condition, read_reg, write_reg
from mmufuzz.x86.executor import execute
from mmufuzz.x86.paging import CR4_PCIDE
from mmufuzz.x86.state import (
    FLAG_CF,
    FLAG_DF,
    FLAG_FIXED,
    FLAG_OF,
    FLAG_PF,
    FLAG_SF,
    FLAG_ZF,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
    Fault,
    Regs,
)

HOLE = 0x0000_8000_0000_0000
"""The lowest non-canonical address."""


def snapshot(regs: Regs) -> dict[str, object]:
    return {"words": regs.words()}


def faults(text: str, regs: Regs, bus: Bus, mode64: bool = True) -> Fault:
    """The fault that one instruction raises, having changed no register."""
    before = snapshot(regs)
    with pytest.raises(Fault) as caught:
        run(text, regs, bus, mode64)
    assert snapshot(regs) == before
    return caught.value


@pytest.fixture
def bus() -> FlatBus:
    return FlatBus(0x4000)


# Registers.


def test_a_32_bit_write_clears_the_upper_half_and_a_narrower_one_keeps_the_rest() -> None:
    regs = Regs()
    for size, high8, expected in (
        (8, False, 0x11),
        (4, False, 0x11),
        (2, False, 0x8877665544330011),
        (1, False, 0x8877665544332211),
        (1, True, 0x88776655443311AA),
    ):
        regs.gpr[RDX] = 0x88776655443322AA
        write_reg(regs, RDX, size, 0x11, high8)
        assert regs.gpr[RDX] == expected
        assert read_reg(regs, RDX, size, high8) == 0x11


def test_conditions_come_in_pairs_of_opposites() -> None:
    for flags in (0, FLAG_CF, FLAG_ZF, FLAG_SF, FLAG_OF, FLAG_PF, FLAG_SF | FLAG_OF, FLAG_ZF | FLAG_SF | FLAG_OF):
        for cc in range(0, 16, 2):
            assert condition(flags, cc) != condition(flags, cc + 1)


@pytest.mark.parametrize("left", [0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("right", [0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_conditions_after_cmp_order_signed_and_unsigned_values(left: int, right: int, bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RAX], regs.gpr[RCX] = left, right
    run("cmp eax, ecx", regs, bus)
    signed_left, signed_right = (value - ((value >> 31) << 32) for value in (left, right))
    assert condition(regs.rflags, 2) == (left < right)
    assert condition(regs.rflags, 6) == (left <= right)
    assert condition(regs.rflags, 4) == (left == right)
    assert condition(regs.rflags, 12) == (signed_left < signed_right)
    assert condition(regs.rflags, 14) == (signed_left <= signed_right)


def test_cmov_reads_its_source_and_zero_extends_even_if_the_condition_fails(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RAX] = 0xFFFF_FFFF_1234_5678
    run("cmovz eax, dword [rbx]", regs, bus)
    assert regs.gpr[RAX] == 0x1234_5678
    assert bus.log == [("load", DATA, 4, False, False)]


# The bus.


def test_mov_to_memory_only_stores(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RCX] = 0x0123456789ABCDEF
    length = run("mov qword [rbx+8], rcx", regs, bus)
    assert bus.log == [("store", DATA + 8, 8, 0x0123456789ABCDEF, False)]
    assert regs.rip == 0x400000 + length


def test_a_read_modify_write_says_so_to_the_load(bus: FlatBus) -> None:
    run("add dword [rbx], 1", machine(), bus)
    assert bus.log == [("load", DATA, 4, True, False), ("store", DATA, 4, 1, False)]


@pytest.mark.parametrize(
    "text",
    [
        "lock add dword [rbx], 0",
        "lock not dword [rbx]",
        "lock bts dword [rbx], 0",
        "lock xadd dword [rbx], ecx",
        "lock cmpxchg dword [rbx], ecx",
        "xchg dword [rbx], ecx",
    ],
)
def test_a_locked_instruction_locks_its_load_and_its_store(text: str, bus: FlatBus) -> None:
    run(text, machine(), bus)
    assert [(entry[0], entry[1], entry[-1]) for entry in bus.log] == [("load", DATA, True), ("store", DATA, True)]


@pytest.mark.parametrize("text", ["cmp dword [rbx], ecx", "test dword [rbx], ecx", "bt dword [rbx], 3"])
def test_instructions_that_only_read_do_not_ask_for_write_access(text: str, bus: FlatBus) -> None:
    run(text, machine(), bus)
    assert bus.log == [("load", DATA, 4, False, False)]


def test_lea_and_nop_do_not_touch_memory(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RCX] = 3
    run("lea eax, [rbx+rcx*8-0x10]", regs, bus)
    execute(regs, decode(bytes.fromhex("0f1f00"), True), bus)
    assert regs.gpr[RAX] == DATA + 8
    assert bus.log == []


def test_rip_relative_addresses_count_from_the_next_instruction() -> None:
    bus = FlatBus(0x1000, base=0x400000)
    bus.poke(0x400123 + 7, 8, 77)
    regs = machine()
    assert run("mov rax, qword [rip+0x123]", regs, bus) == 7
    assert regs.gpr[RAX] == 77


def test_a_32_bit_address_size_wraps_at_4g(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RBX] = 0xABCD_0000_FFFF_FFFF
    run("mov al, byte [ebx+2]", regs, bus)
    assert bus.log == [("load", 1, 1, False, False)]


def test_a_register_bit_offset_reaches_beyond_the_operand(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RCX] = 2**64 - 1
    run("bts qword [rbx], rcx", regs, bus)
    assert bus.peek(DATA - 8, 8) == 1 << 63


def test_an_immediate_bit_offset_stays_in_the_operand(bus: FlatBus) -> None:
    run("bts word [rbx], 17", machine(), bus)
    assert bus.peek(DATA, 8) == 2


# Compare and exchange.


def test_cmpxchg_writes_memory_back_when_the_comparison_fails(bus: FlatBus) -> None:
    regs = machine()
    bus.poke(DATA, 4, 0x55)
    regs.gpr[RAX] = 0xFFFF_FFFF_0000_0001
    run("cmpxchg dword [rbx], ecx", regs, bus)
    assert bus.log[-1] == ("store", DATA, 4, 0x55, False)
    assert regs.gpr[RAX] == 0x55
    assert not regs.rflags & FLAG_ZF


def test_cmpxchg_leaves_the_register_it_does_not_choose_alone(bus: FlatBus) -> None:
    upper = 0xFFFF_FFFF_0000_0000
    regs = machine()
    regs.gpr[RAX], regs.gpr[RDX], regs.gpr[RCX] = upper | 1, upper | 2, 3
    run("cmpxchg edx, ecx", regs, bus)
    assert (regs.gpr[RAX], regs.gpr[RDX]) == (2, upper | 2)
    regs.gpr[RAX] = upper | 2
    run("cmpxchg edx, ecx", regs, bus)
    assert (regs.gpr[RAX], regs.gpr[RDX]) == (upper | 2, 3)


@pytest.mark.parametrize(("name", "size"), [("cmpxchg8b", 8), ("cmpxchg16b", 16)])
def test_cmpxchg_of_a_pair_stores_rcx_rbx_if_rdx_rax_is_found(name: str, size: int, bus: FlatBus) -> None:
    regs = machine()
    half = size // 2
    regs.gpr[RSI] = DATA
    regs.gpr[RAX], regs.gpr[RDX], regs.gpr[RBX], regs.gpr[RCX] = 1, 2, 3, 4
    bus.poke(DATA, half, 1)
    bus.poke(DATA + half, half, 2)
    run(f"lock {name} [rsi]", regs, bus)
    assert (bus.peek(DATA, half), bus.peek(DATA + half, half)) == (3, 4)
    assert regs.rflags & FLAG_ZF
    run(f"lock {name} [rsi]", regs, bus)
    assert bus.log[-1] == ("store", DATA, size, 4 << 8 * half | 3, True)
    assert (regs.gpr[RAX], regs.gpr[RDX]) == (3, 4)
    assert not regs.rflags & FLAG_ZF


# Faults.


@pytest.mark.parametrize(
    "text",
    [
        "mov dword [rbx], ecx",
        "add dword [rbx], ecx",
        "lock dec dword [rbx]",
        "shl dword [rbx], 1",
        "bts dword [rbx], ecx",
        "xchg dword [rbx], ecx",
        "xadd dword [rbx], ecx",
        "cmpxchg dword [rbx], ecx",
        "cmpxchg8b [rbx]",
        "cmpxchg16b [rbx]",
        "setz byte [rbx]",
        "pop qword [rbx]",
        "movups [rbx], xmm1",
        "movss dword [rbx], xmm1",
        "vmovdqu [rbx], ymm1",
        "fstp qword [rbx]",
        "movsd",
        "rep stosd",
    ],
)
@pytest.mark.parametrize("rmw_checks", [True, False], ids=["read-only", "store-only-fault"])
def test_a_fault_in_the_store_leaves_every_register_untouched(text: str, rmw_checks: bool, bus: FlatBus) -> None:
    class LateBus(FlatBus):
        """Faults in the store alone, as if the page had changed between."""

        def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
            return super().load(regs, gva, size, rmw_checks and rmw, locked)

    late = LateBus(0x4000)
    late.deny(DATA, DATA + 32, load=False)
    regs = machine()
    regs.gpr[RSI], regs.gpr[RDI], regs.gpr[RCX], regs.gpr[RAX] = DATA + 64, DATA, 3, 0x77
    fault = faults(text, regs, late)
    assert (fault.vector, fault.error_code, fault.address) == (VECTOR_PF, 2, DATA)


@pytest.mark.parametrize("text", ["push rax", "call 16", "call rax"])
def test_a_fault_on_the_stack_leaves_every_register_untouched(text: str, bus: FlatBus) -> None:
    bus.deny(0x1FF8, 0x2000)
    assert faults(text, machine(), bus).vector == VECTOR_PF


@pytest.mark.parametrize("text", ["hlt", "invlpg [rbx]", "invpcid rax, [rbx]", "mov cr3, rax", "mov rax, cr3"])
def test_privileged_instructions_need_cpl_0(text: str, bus: FlatBus) -> None:
    regs = machine()
    regs.cpl = 3
    fault = faults(text, regs, bus)
    assert (fault.vector, fault.error_code) == (VECTOR_GP, 0)
    assert bus.log == []


def test_ud2_and_the_forced_emulation_prefix_raise_ud(bus: FlatBus) -> None:
    assert faults("ud2", machine(), bus).vector == VECTOR_UD
    assert faults("fep mov qword [rbx], rcx", machine(), bus).vector == VECTOR_UD


@pytest.mark.parametrize("start", [HOLE, HOLE - 1, 2**64 - HOLE - 1, 1 << 56])
def test_a_non_canonical_byte_raises_gp_or_ss_for_stack_bases(start: int, bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RBX] = regs.gpr[RBP] = regs.gpr[RDI] = start
    assert faults("mov eax, dword [rbx]", regs, bus).vector == VECTOR_GP
    assert faults("mov eax, dword [rbp]", regs, bus).vector == VECTOR_SS
    assert faults("mov eax, dword [rcx+rbp]", regs, bus).vector == VECTOR_GP
    assert faults("stosd", regs, bus).vector == VECTOR_GP
    regs.gpr[RSP] = start + 4
    assert faults("push rax", regs, bus).vector == VECTOR_SS
    regs.gpr[RSP] = start
    assert faults("pop rax", regs, bus).vector == VECTOR_SS
    assert bus.log == []


def test_an_access_may_wrap_from_the_top_of_the_address_space_to_0(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RBX] = 2**64 - 2
    assert faults("mov eax, dword [rbx]", regs, bus).vector == VECTOR_PF
    assert bus.log == [("load", 2**64 - 2, 4, False, False)]


def test_five_level_paging_widens_canonical_addresses_to_57_bits(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RBX] = HOLE
    regs.cr4 = 1 << 12
    assert faults("mov eax, dword [rbx]", regs, bus).vector == VECTOR_PF
    regs.gpr[RBX] = 1 << 56
    assert faults("mov eax, dword [rbx]", regs, bus).vector == VECTOR_GP


@pytest.mark.parametrize("text", ["jmp rax", "call rax", "jmp qword [rbx]", "ret"])
def test_a_branch_to_a_non_canonical_target_faults_before_it_happens(text: str, bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RAX] = HOLE
    bus.poke(DATA, 8, HOLE)
    bus.poke(0x2000, 8, HOLE)
    assert faults(text, regs, bus).vector == VECTOR_GP
    assert "store" not in [entry[0] for entry in bus.log]


@pytest.mark.parametrize("text", ["movaps xmm0, [rbx]", "movdqa [rbx], xmm0", "cmpxchg16b [rbx]"])
def test_aligned_16_byte_accesses_raise_gp_off_their_boundary(text: str, bus: FlatBus) -> None:
    regs = machine()
    run(text, regs, bus)
    regs.gpr[RBX] = DATA + 8
    bus.log.clear()
    assert faults(text, regs, bus).vector == VECTOR_GP
    assert bus.log == []


# Repeated string instructions.


def test_rep_makes_one_access_per_element_and_advances_at_the_end(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RSI], regs.gpr[RDI], regs.gpr[RCX] = DATA, 0x1800, 2
    bus.poke(DATA, 8, 0x1122334455667788)
    length = run("rep movsd", regs, bus)
    assert bus.peek(0x1800, 8) == 0x1122334455667788
    assert [entry[:3] for entry in bus.log] == [
        ("load", DATA, 4),
        ("store", 0x1800, 4),
        ("load", DATA + 4, 4),
        ("store", 0x1804, 4),
    ]
    assert (regs.gpr[RSI], regs.gpr[RDI], regs.gpr[RCX]) == (DATA + 8, 0x1808, 0)
    assert regs.rip == 0x400000 + length


def test_a_fault_in_rep_keeps_the_elements_done_and_can_be_resumed(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RDI], regs.gpr[RCX], regs.gpr[RAX] = 0x1FF0, 4, 0xAA
    bus.deny(0x2000, 0x3000)
    with pytest.raises(Fault) as caught:
        run("rep stosq", regs, bus)
    assert caught.value.address == 0x2000
    assert (regs.gpr[RDI], regs.gpr[RCX], regs.rip) == (0x2000, 2, 0x400000)
    bus.no_load.clear()
    bus.no_store.clear()
    run("rep stosq", regs, bus)
    assert (regs.gpr[RDI], regs.gpr[RCX]) == (0x2010, 0)
    assert bus.peek(0x1FF0, 32) == int.from_bytes(bytes([0xAA, *[0] * 7]) * 4, "little")


def test_rep_with_a_count_of_zero_does_nothing_but_advance(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RDI] = HOLE
    length = run("rep stosb", regs, bus)
    assert (bus.log, regs.gpr[RDI], regs.rip) == ([], HOLE, 0x400000 + length)


def test_the_direction_flag_makes_strings_go_down(bus: FlatBus) -> None:
    regs = machine()
    regs.rflags |= FLAG_DF
    regs.gpr[RDI], regs.gpr[RCX] = DATA, 3
    run("rep stosw", regs, bus)
    assert [entry[1] for entry in bus.log] == [DATA, DATA - 2, DATA - 4]
    assert regs.gpr[RDI] == DATA - 6


# Stack and branches.


def test_call_and_ret_return_to_the_next_instruction(bus: FlatBus) -> None:
    regs = machine()
    length = run("call 0x100", regs, bus)
    assert regs.rip == 0x400000 + length + 0x100
    run("ret", regs, bus)
    assert (regs.rip, regs.gpr[RSP]) == (0x400000 + length, 0x2000)


def test_ret_with_an_immediate_releases_arguments(bus: FlatBus) -> None:
    regs = machine()
    run("ret 0x18", regs, bus)
    assert regs.gpr[RSP] == 0x2000 + 8 + 0x18


def test_push_and_pop_of_the_stack_pointer_use_its_old_value_and_its_popped_value(bus: FlatBus) -> None:
    regs = machine()
    run("push rsp", regs, bus)
    assert bus.peek(0x1FF8, 8) == 0x2000
    bus.poke(0x1FF8, 8, 0x3000)
    run("pop rsp", regs, bus)
    assert regs.gpr[RSP] == 0x3000


def test_pop_to_an_rsp_relative_address_uses_the_incremented_rsp(bus: FlatBus) -> None:
    regs = machine()
    bus.poke(0x2000, 8, 0x99)
    run("pop qword [rsp+0x10]", regs, bus)
    assert bus.peek(0x2018, 8) == 0x99


def test_jcc_goes_to_its_target_only_if_the_condition_holds(bus: FlatBus) -> None:
    regs = machine()
    length = run("jz 0x20", regs, bus)
    assert regs.rip == 0x400000 + length
    regs.rflags |= FLAG_ZF
    length += run("jz 0x20", regs, bus)
    assert regs.rip == 0x400000 + length + 0x20


def test_32_bit_code_wraps_addresses_and_pointers_at_4g() -> None:
    bus = FlatBus(0x1000, base=2**32 - 0x1000)
    regs = machine(False)
    regs.gpr[RSP] = 0
    run("push eax", regs, bus, False)
    assert regs.gpr[RSP] == 2**32 - 4
    regs.rip = 2**32 - 1
    run("nop", regs, bus, False)
    assert regs.rip == 0
    regs.gpr[RBX] = 4
    run("mov eax, dword [ebx-8]", regs, bus, False)
    assert bus.log[-1] == ("load", 2**32 - 4, 4, False, False)


# System.


def test_system_instructions_reach_the_bus_after_a_fence(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RAX] = 0x5000
    run("mov cr3, rax", regs, bus)
    run("invlpg [rbx]", regs, bus)
    assert bus.log == [("fence",), ("write_cr", 3, 0x5000), ("fence",), ("invlpg", DATA)]


def test_mfence_and_hlt_reach_the_bus_and_the_other_fences_order_nothing_more(bus: FlatBus) -> None:
    regs = machine()
    for text in ("mfence", "hlt", "lfence", "sfence"):
        run(text, regs, bus)
    assert bus.log == [("fence",), ("halt",)]


def test_invlpg_of_a_non_canonical_address_is_no_fault(bus: FlatBus) -> None:
    regs = machine()
    regs.gpr[RBX] = HOLE
    run("invlpg [rbx]", regs, bus)
    assert bus.log[-1] == ("invlpg", HOLE)


def invpcid(bus: FlatBus, kind: int, pcid: int, gva: int, cr4: int = CR4_PCIDE) -> tuple[object, ...]:
    """The last thing that reaches the bus; ("fault", vector, error code) in the place of a fault."""
    regs = machine()
    regs.cr4 = cr4
    regs.gpr[RAX] = kind
    bus.poke(DATA, 8, pcid)
    bus.poke(DATA + 8, 8, gva)
    try:
        run("invpcid rax, [rbx]", regs, bus)
    except Fault as fault:
        return ("fault", fault.vector, fault.error_code)
    return bus.log[-1]


@pytest.mark.parametrize("kind", range(4))
def test_invpcid_hands_type_pcid_and_address_to_the_bus(kind: int, bus: FlatBus) -> None:
    assert invpcid(bus, kind, 0xFFF, HOLE - 1) == ("invpcid", kind, 0xFFF, HOLE - 1)


@pytest.mark.parametrize(
    ("kind", "pcid", "gva", "cr4"),
    [(4, 0, 0, CR4_PCIDE), (1 << 32, 0, 0, CR4_PCIDE), (3, 1 << 12, 0, CR4_PCIDE), (3, 1 << 63, 0, CR4_PCIDE),
     (0, 1, 0, 0), (1, 1, 0, 0), (0, 0, HOLE, CR4_PCIDE)],
)  # fmt: skip
def test_invpcid_checks_its_operands(kind: int, pcid: int, gva: int, cr4: int, bus: FlatBus) -> None:
    assert invpcid(bus, kind, pcid, gva, cr4) == ("fault", VECTOR_GP, 0)


@pytest.mark.parametrize(("kind", "pcid", "gva", "cr4"), [(0, 0, 5, 0), (2, 7, HOLE, 0), (1, 7, HOLE, CR4_PCIDE)])
def test_invpcid_looks_only_at_what_its_type_uses(kind: int, pcid: int, gva: int, cr4: int, bus: FlatBus) -> None:
    assert invpcid(bus, kind, pcid, gva, cr4) == ("invpcid", kind, pcid, gva)


def test_invpcid_has_a_32_bit_type_outside_64_bit_code(bus: FlatBus) -> None:
    regs = machine(False)
    regs.gpr[RAX] = 1 << 32 | 2
    run("invpcid eax, [ebx]", regs, bus, False)
    assert bus.log[-1] == ("invpcid", 2, 0, 0)


def test_control_registers_are_read_from_the_register_file_and_cr2_written_to_it(bus: FlatBus) -> None:
    regs = machine()
    regs.cr0, regs.cr3, regs.cr4 = 0x80010001, 0x7000, 0x20
    for number, value in ((0, 0x80010001), (3, 0x7000), (4, 0x20)):
        run(f"mov rax, cr{number}", regs, bus)
        assert regs.gpr[RAX] == value
    run("mov cr2, rbx", regs, bus)
    assert regs.cr2 == DATA
    assert bus.log == []


def test_an_exit_raised_by_the_bus_leaves_the_instruction_unfinished() -> None:
    class VmExit(Exception):
        pass

    class ExitingBus(FlatBus):
        def halt(self, regs: Regs) -> None:
            raise VmExit

        def invlpg(self, regs: Regs, gva: int) -> None:
            raise VmExit

        def write_cr(self, regs: Regs, number: int, value: int) -> None:
            raise VmExit

    for text in ("hlt", "invlpg [rbx]", "mov cr3, rax"):
        regs = machine()
        before = snapshot(regs)
        with pytest.raises(VmExit):
            run(text, regs, ExitingBus(0))
        assert snapshot(regs) == before


def test_flag_instructions_change_their_one_flag(bus: FlatBus) -> None:
    regs = machine()
    for text, expected in (("stc", FLAG_CF), ("cmc", 0), ("cmc", FLAG_CF), ("clc", 0), ("std", FLAG_DF), ("cld", 0)):
        run(text, regs, bus)
        assert regs.rflags == FLAG_FIXED | expected
