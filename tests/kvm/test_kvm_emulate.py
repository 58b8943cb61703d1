"""What reaches the emulator, and how it fails: forced emulation, #UD, fetches, control registers."""

from __future__ import annotations

import pytest
from machines import CODE, CODE2, DATA, NOWHERE, NX, PAGE, A, D, P, U, W, flat32, gva, long4, run, usual

from mmufuzz.kvm.emulator_access import pages, words
from mmufuzz.kvm.exits import EXIT_DONE
from mmufuzz.x86.asm import assemble
from mmufuzz.x86.state import CR0_WP, PFERR_FETCH, PFERR_WRITE, VECTOR_GP, VECTOR_PF, VECTOR_UD

BACK = assemble("jmp rdi")
END = gva(CODE) + 16
"""Where a program of one step ends."""


def test_the_forced_emulation_prefix_sends_an_instruction_to_the_emulator() -> None:
    m = run(usual().set(DATA, 0, 9), long4("fep mov rcx, [rax]", rax=gva(DATA)))
    assert m.marks["emulate.forced"] == m.marks["emulate.done"] == 1
    assert m.reg("rcx") == 9
    assert m.kvm.exits["invalid-opcode"] == 1
    # The emulator walks the guest's tables itself: the data page is never mapped.
    assert m.spte(gva(DATA)) == 0


def test_without_the_module_parameter_the_prefix_is_an_invalid_opcode() -> None:
    m = run(usual(), long4("fep mov rcx, [rax]"), fep=False)
    assert m.vcpu().exceptions == [(VECTOR_UD, -1, 0, gva(CODE))]
    assert m.kvm.exits["invalid-opcode"] == 1
    assert m.passed("emulate.forced") == 0


@pytest.mark.parametrize("text", ["ud2", "fep ud2", "fep movss [rax], xmm0", "fep mfence"])
def test_other_invalid_opcodes_go_back_to_the_guest(text: str) -> None:
    m = run(usual(), long4(text, "nop", rax=gva(DATA)))
    assert [exception[0] for exception in m.vcpu().exceptions] == [VECTOR_UD]
    assert m.passed("emulate.done") == 0
    assert m.vcpu().retired == 1


def test_an_opcode_that_only_hardware_refuses_keeps_its_ud() -> None:
    """The emulator would know LOCK XADD; LOCK on a register is refused by both."""
    m = run(usual(), long4(b"\xf0\x48\x0f\xc1\xc8", "nop"))
    assert [exception[0] for exception in m.vcpu().exceptions] == [VECTOR_UD]


def test_the_prefix_is_read_as_data_so_a_supervisor_under_smap_cannot_force_a_user_page() -> None:
    m = run(usual(), long4("fep mov rcx, [rax]", flags="wp nx smap", rax=gva(DATA)))
    assert m.vcpu().exceptions[0][0] == VECTOR_UD
    assert m.passed("emulate.forced") == 0


def test_the_prefix_may_cross_a_page() -> None:
    prefix = assemble("fep mov rcx, [rax]")
    end = gva(CODE) + 0x1000 - 2
    tables = usual().set(CODE, 511, int.from_bytes(b"\x90" * 6 + prefix[:2], "little"))
    tables.set(CODE2, 0, int.from_bytes(prefix[2:] + BACK, "little")).set(DATA, 0, 5)
    m = run(tables, long4("jmp rbx", rbx=end, rax=gva(DATA), rdi=END))
    assert m.marks["emulate.forced"] == 1
    assert m.reg("rcx") == 5


def test_a_page_of_code_that_is_not_there_is_a_fetch_fault_of_the_first_page() -> None:
    m = run(usual(), long4("jmp rax", "nop", rax=gva(0x30)))
    assert m.vcpu().exceptions == [(VECTOR_PF, PFERR_FETCH, gva(0x30), gva(0x30))]


def test_an_instruction_that_runs_into_the_next_page_fetches_it() -> None:
    last = int.from_bytes(b"\x90" * 6 + assemble("mov rcx, rax")[:2], "little")
    tables = usual().set(CODE, 511, last).set(CODE2, 0, int.from_bytes(assemble("mov rcx, rax")[2:] + BACK, "little"))
    m = run(tables, long4("jmp rbx", rbx=gva(CODE) + 0x1000 - 2, rax=77, rdi=END))
    assert m.reg("rcx") == 77


def emulated_across_pages(second: int) -> object:
    """A store to a tracked page whose last byte lies on the next code page, mapped as ``second`` says."""
    code = assemble("mov [rax], rcx")
    tables = usual().set(CODE, 511, int.from_bytes(b"\x90" * 6 + code[:2], "little"))
    tables.set(CODE2, 0, int.from_bytes(code[2:] + BACK, "little")).map(gva(CODE2), CODE2, second)
    return run(tables, long4("jmp rbx", rbx=gva(CODE) + 0x1000 - 2, rax=gva(DATA), rcx=3, rdi=END), write_track=[DATA])


def test_the_emulator_fetches_a_second_page_only_when_it_must() -> None:
    m = emulated_across_pages(PAGE)
    assert m.word(DATA) == 3  # type: ignore[attr-defined]
    assert m.marks["emulate.done"] == 1  # type: ignore[attr-defined]
    m = emulated_across_pages(0)
    assert m.vcpu().exceptions[0][:2] == (VECTOR_PF, PFERR_FETCH)  # type: ignore[attr-defined]


def test_an_instruction_of_more_than_fifteen_bytes_gives_gp_in_the_emulator_too() -> None:
    long = b"\x66" * 14 + b"\x48\x89\x08"
    tables = usual()
    for index in range(3):
        tables.set(3, index, int.from_bytes((long + b"\x90" * 7)[index * 8 : index * 8 + 8], "little"))
    m = run(tables, long4("jmp rbx", rbx=gva(3), rax=gva(DATA)), limit=3000)
    assert m.vcpu().exceptions[0][0] == VECTOR_GP


def test_code_outside_memory_cannot_be_emulated() -> None:
    tables = usual().map(gva(0x30), NOWHERE)
    m = run(tables, long4("jmp rax", rax=gva(0x30)))
    assert m.vcpu().userspace_exits == ["internal-error"]
    assert m.marks["emulate.decode_failed"] == 1


def test_a_no_execute_page_can_be_read_but_not_fetched_by_the_emulator() -> None:
    tables = usual().map(gva(DATA), DATA, PAGE | NX).set(DATA, 0, 4)
    m = run(tables, long4("fep mov rcx, [rax]", rax=gva(DATA)))
    assert m.reg("rcx") == 4


def test_a_read_modify_write_that_faults_on_its_read_reports_a_write() -> None:
    m = run(usual(), long4("fep add [rax], rcx", rax=gva(0x30)))
    assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, PFERR_WRITE, gva(0x30))
    assert m.marks["emulate.fault"] == 1


def test_an_emulated_access_at_cpl_3_is_a_user_access() -> None:
    tables = usual().map(gva(DATA), DATA, P | W | A | D)
    m = run(tables, long4("fep mov rcx, [rax]", "fep lock xadd [rax], rcx", cpl=3, rax=gva(DATA)))
    assert [exception[1] for exception in m.vcpu().exceptions] == [0b101, 0b111]


def test_an_emulated_fault_with_its_page_present_takes_mmu_lock_and_drops_the_tlb_entry() -> None:
    tables = usual().map(gva(DATA), DATA, P | U | A)
    m = run(tables, long4("mov rcx, [rax]", "fep mov [rax], rcx", "mov rcx, [rax]", rax=gva(DATA)))
    assert m.sites(step=1).count("mmu_lock.lock") == 1
    assert m.sites(step=2).count("spte.walk") == 4
    m = run(tables, long4("fep mov [rax], rcx", rax=gva(0x30)))
    assert m.vcpu().exceptions[0][1] == PFERR_WRITE


def test_emulated_control_register_writes_do_what_native_ones_do() -> None:
    for prefix in ("", "fep "):
        m = run(usual(), long4(f"{prefix}mov cr3, rax", f"{prefix}invlpg [rbx]", "nop", rax=gva(0x10), rbx=gva(DATA)))
        assert m.log.invalidated == [(0, -1), (0, gva(DATA))]
        assert m.vcpu().retired == 3
    m = run(usual(), long4("fep mov cr0, rax", rax=0))
    assert m.vcpu().exceptions[0][0] == VECTOR_GP
    m = run(usual(), long4("fep mov cr2, rax", "mov cr2, rbx", rax=5, rbx=6))
    assert m.vcpu().regs.cr2 == 6


def test_an_emulated_write_of_cr8_takes_four_bits() -> None:
    m = run(usual(), long4("fep mov cr8, rax", "fep mov cr8, rbx", "mov rcx, cr8", rax=9, rbx=16))
    assert m.reg("rcx") == 9
    assert m.vcpu().exceptions == [(VECTOR_GP, 0, 0, gva(CODE) + 16 + 5)]


def test_an_emulated_cr0_write_changes_the_role() -> None:
    m = run(usual(), long4("fep mov cr0, rax", "nop", rax=1 << 31 | 1))
    assert not m.vcpu().regs.cr0 & CR0_WP
    assert m.marks["mmu_load"] == 2


def test_hlt_exits_to_userspace_natively_and_emulated() -> None:
    m = run(usual(), long4("hlt", "fep hlt", "nop"))
    assert m.vcpu().userspace_exits == ["hlt", "hlt"]
    assert m.vcpu().retired == 3


def test_native_exceptions_other_than_page_faults_do_not_exit() -> None:
    m = run(usual(), long4("hlt", "mov cr3, rax", "nop", cpl=3))
    assert [exception[0] for exception in m.vcpu().exceptions] == [VECTOR_GP, VECTOR_GP]
    assert set(m.kvm.exits) == {"page-fault", EXIT_DONE}


def test_invlpg_without_paging_takes_no_lock() -> None:
    m = run(None, flat32("invlpg [eax]", rax=gva(DATA)))
    assert "mmu_lock.lock" not in m.sites()[m.sites().index("guest.fetch") :]


def test_a_fence_drains_the_store_buffer() -> None:
    m = run(usual(), long4("mov [rax], rcx; mfence", rax=gva(DATA), rcx=2), schedule=["hold vcpu0@0.guest.store 1"])
    assert m.word(DATA) == 2
    assert m.sites().count("guest.fence") == 1


def test_a_jump_out_of_the_program_and_back_keeps_its_step() -> None:
    tables = usual().set(3, 0, int.from_bytes(assemble("jmp rbx") + b"\x90" * 6, "little"))
    m = run(tables, long4("jmp rax", "mov rcx, 8", rax=gva(3), rbx=gva(CODE) + 16))
    assert m.reg("rcx") == 8
    assert m.vcpu().retired == 3


def test_a_vcpu_without_a_program_does_nothing() -> None:
    m = run(usual(), long4(), long4("nop"))
    assert m.sites(0) == ["thread.start", "thread.end"]


@pytest.mark.parametrize(
    "address, size, pieces",
    [
        (0, 8, [(0, 8)]),
        (4, 4, [(4, 4)]),
        (5, 4, [(5, 1), (6, 2), (8, 1)]),
        (0, 16, [(0, 8), (8, 8)]),
        (2, 10, [(2, 2), (4, 4), (8, 4)]),
    ],
)
def test_an_access_is_cut_into_pieces_that_lie_in_one_word(
    address: int, size: int, pieces: list[tuple[int, int]]
) -> None:
    assert words(address, size) == pieces


def test_an_access_is_cut_at_the_page_and_wraps_at_the_end_of_the_address_space() -> None:
    assert pages(0xFFC, 4, True) == [(0xFFC, 4)]
    assert pages(0xFFE, 4, True) == [(0xFFE, 2), (0x1000, 2)]
    assert pages(0xFFFFFFFE, 4, False) == [(0xFFFFFFFE, 2), (0, 2)]
    assert pages(0xFFFFFFFE, 4, True) == [(0xFFFFFFFE, 2), (1 << 32, 2)]


def test_an_opcode_that_is_repaired_before_kvm_looks_still_raises_ud() -> None:
    """KVM intercepts #UD for hypercalls of the other vendor only; whatever else it decodes gets its #UD."""
    first = long4("mov rcx, [rbx]", "ud2", rbx=gva(DATA))
    second = long4("mov rdx, [rbx]", "mov [rax], cx", code=CODE2, rax=gva(CODE) + 16, rbx=gva(DATA + 1), rcx=0x9090)
    m = run(usual(), first, second, schedule=["after vcpu0@1.vcpu.exit 1 run vcpu1"])
    assert m.word(CODE, 2) & 0xFFFF == 0x9090
    assert m.vcpu().exceptions == [(VECTOR_UD, -1, 0, gva(CODE) + 16)]


def test_too_long_an_instruction_behind_the_prefix_is_an_invalid_opcode() -> None:
    code = (assemble("fep nop")[:5] + b"\x66" * 16 + BACK).ljust(24, b"\x90")
    tables = usual()
    for index in range(3):
        tables.set(3, index, int.from_bytes(code[index * 8 : index * 8 + 8], "little"))
    m = run(tables, long4("jmp rbx", rbx=gva(3), rdi=END))
    assert m.marks["emulate.forced"] == 1
    assert m.vcpu().exceptions[0][0] == VECTOR_UD
