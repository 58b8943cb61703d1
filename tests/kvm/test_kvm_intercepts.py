"""Instructions that exit by themselves: CPUID, hypercalls, MSRs, ports; and what a change of EFER does to the MMU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import CODE, DATA, L2, NOWHERE, NX, PAGE, Machine, flat32, gva, long4, machine, npt4, run, usual

from mmufuzz.case.model import Options
from mmufuzz.x86.paging import PTE_W
from mmufuzz.x86.state import EFER_LMA, EFER_LME, EFER_NX, EFER_SCE, PFERR_PRESENT, PFERR_WRITE, VECTOR_GP, VECTOR_PF

EFER = 0xC0000080


def vectors(m: Machine) -> list[int]:
    return [exception[0] for exception in m.vcpu().exceptions]


def test_cpuid_exits_and_the_guest_goes_on_behind_it() -> None:
    m = run(usual(), long4("cpuid", "nop"))
    assert m.kvm.exits["cpuid"] == 1
    assert m.reg("rax") >= 7
    assert m.vcpu().retired == 2
    emulated = run(usual(), long4("fep cpuid"))
    assert [emulated.reg(name) for name in ("rax", "rbx", "rcx", "rdx")] == [
        m.reg(name) for name in ("rax", "rbx", "rcx", "rdx")
    ]


def test_rdtsc_reads_what_the_case_says_and_does_not_exit() -> None:
    case = machine(usual(), long4("rdtsc", "nop")).case
    m = Machine(replace(case, options=Options(tsc=0x1122334455667788))).run()
    assert (m.reg("rdx"), m.reg("rax")) == (0x11223344, 0x55667788)
    assert set(m.kvm.exits) == {"page-fault", "program-end"}


def test_rdmsr_and_wrmsr_exit_at_cpl_0_and_fault_at_cpl_3() -> None:
    m = run(usual(), long4("wrmsr", "rdmsr", "nop", rcx=0xC0000102, rax=5, rdx=1))
    assert (m.kvm.exits["wrmsr"], m.kvm.exits["rdmsr"]) == (1, 1)
    assert (m.reg("rax"), m.reg("rdx")) == (5, 1)
    m = run(usual(), long4("rdmsr", "wrmsr", cpl=3, rcx=EFER))
    assert vectors(m) == [VECTOR_GP] * 2
    assert not {"rdmsr", "wrmsr"} & set(m.kvm.exits)


@pytest.mark.parametrize("prefix", ["", "fep "])
def test_an_msr_that_does_not_exist_is_a_gp_fault(prefix: str) -> None:
    m = run(usual(), long4(prefix + "rdmsr", "nop", rcx=0x12345))
    assert vectors(m) == [VECTOR_GP]


@pytest.mark.parametrize("prefix", ["", "fep "])
def test_clearing_efer_nx_gives_the_mmu_a_new_role(prefix: str) -> None:
    """Bit 63 is reserved then: the walk of a page that has it fails with RSVD."""
    tables = usual().map(gva(DATA), DATA, PAGE | NX)
    low = EFER_LME | EFER_LMA
    m = run(tables, long4(prefix + "wrmsr", "mov rbx, [rsi]", rcx=EFER, rax=low, rdx=0, rsi=gva(DATA)))
    assert m.vcpu().regs.efer == low
    assert m.marks["efer.role"] == 1
    assert m.marks["mmu_load"] == 2
    assert m.vcpu().exceptions[0][:2] == (VECTOR_PF, 9)


def test_setting_syscall_enable_leaves_the_mmu_alone() -> None:
    value = EFER_LME | EFER_LMA | EFER_NX | EFER_SCE
    m = run(usual(), long4("wrmsr", "nop", rcx=EFER, rax=value, rdx=0))
    assert m.vcpu().regs.efer == value
    assert m.marks["mmu_load"] == 1


def test_lma_is_kept_and_lme_cannot_change_under_paging() -> None:
    m = run(usual(), long4("wrmsr", "wrmsr", rcx=EFER, rax=EFER_NX, rdx=0))
    assert vectors(m) == [VECTOR_GP] * 2
    m = run(usual(), long4("wrmsr", "nop", rcx=EFER, rax=EFER_LME, rdx=0))
    assert m.vcpu().regs.efer == EFER_LME | EFER_LMA
    m = run(None, flat32("wrmsr", "nop", rcx=EFER, rax=EFER_LME, rdx=0))
    assert m.vcpu().regs.efer == EFER_LME
    assert m.marks["mmu_load"] == 2


def test_an_l2_guest_cannot_change_efer() -> None:
    m = run(usual(), npt4("wrmsr", rcx=EFER, rax=EFER_NX))
    assert vectors(m) == [VECTOR_GP]


def test_out_and_in_go_to_userspace_and_are_skipped_afterwards() -> None:
    m = run(usual(), long4("out 0x60, al", "in al, 0x60", "in eax, dx", rax=0x1141, rdx=0x5F))
    assert m.vcpu().userspace_exits == ["io out 0x60 1 0x41", "io in 0x60 1 0x41", "io in 0x5f 4 0xffff41ff"]
    assert m.reg("rax") == 0xFFFF41FF
    assert m.kvm.exits["io"] == 3
    assert m.vcpu().retired == 3
    assert m.passed("emulate") == 0


def test_ports_are_those_of_the_emulator_too() -> None:
    m = run(usual(), long4("fep out 0x60, al", "fep in al, 0x60", "nop", rax=0x1141))
    assert m.vcpu().userspace_exits == ["io out 0x60 1 0x41", "io in 0x60 1 0x41"]
    assert m.reg("rax") == 0x1141
    assert m.marks["emulate"] == 2
    assert m.vcpu().retired == 3


def test_ports_are_privileged_by_iopl() -> None:
    m = run(usual(), long4("out 0x60, al", "in al, 0x60", cpl=3))
    assert vectors(m) == [VECTOR_GP] * 2
    assert m.vcpu().userspace_exits == []


def test_string_input_is_emulated_and_reads_ahead_and_string_output_exits_for_each_element() -> None:
    m = run(usual(), long4("out dx, al", "rep insb", rax=0x41, rdx=0x60, rcx=2, rdi=gva(DATA)))
    assert m.vcpu().userspace_exits == ["io out 0x60 1 0x41", "io in 0x60 1 0x41 0x41"]
    assert m.word(DATA) == 0x4141
    m = run(usual().set(DATA, 0, 0x4241), long4("rep outsb", rdx=0x60, rcx=2, rsi=gva(DATA)))
    assert m.vcpu().userspace_exits == ["io out 0x60 1 0x41", "io out 0x60 1 0x42"]
    assert m.reg("rcx") == 0


def test_a_string_that_cannot_be_stored_has_read_its_port() -> None:
    m = run(usual(), long4("insb", "nop", rdx=0x60, rdi=gva(0x30)))
    assert m.vcpu().userspace_exits == ["io in 0x60 1 0xff"]
    assert vectors(m) == [VECTOR_PF]


def test_ports_to_mmio_wait_for_userspace_twice() -> None:
    m = run(usual().map(gva(DATA), NOWHERE), long4("insb", "nop", rdx=0x60, rdi=gva(DATA)))
    assert m.vcpu().userspace_exits == ["io in 0x60 1 0xff", "mmio write 0x100000 1 0xff"]
    assert m.vcpu().retired == 2


@pytest.mark.parametrize("text", ["mov cr3, rax", "invlpg [rax]", "hlt", "cpuid", "out 0x60, al"])
def test_without_a_length_from_the_cpu_an_instruction_is_decoded_to_be_skipped(text: str) -> None:
    case = machine(usual(), long4(text, "mov rbx, 7", rax=0x10000)).case
    m = Machine(replace(case, options=Options(decode_to_skip=True))).run()
    assert m.marks["emulate"] == 1
    assert m.passed("emulate.done") == 0
    assert m.reg("rbx") == 7
    assert m.vcpu().retired == 2


def test_what_cannot_be_decoded_to_be_skipped_is_an_internal_error_for_user_code_too() -> None:
    """EMULTYPE_SKIP: there is no instruction to raise #UD for. Here CPL 0; the policy does not look at it."""
    case = machine(usual().set(8, 0, 0), long4("mov cr3, rax", "nop", rax=0x8000)).case
    m = Machine(replace(case, options=Options(decode_to_skip=True))).run()
    assert m.vcpu().userspace_exits[0] == "internal-error"
    case = machine(usual().set(8, 0, 0), long4("mov cr3, rax", rax=0x8000), revert=["skip-fails-on-exception"]).case
    m = Machine(replace(case, options=Options(decode_to_skip=True))).run()
    assert m.vcpu().exceptions[0] == (VECTOR_PF, 0x10, gva(CODE), gva(CODE))


# Hypercalls.

VMCALL, VMMCALL = bytes.fromhex("0f01c1"), bytes.fromhex("0f01d9")
EPERM, EOPNOTSUPP, ENOSYS = 1, 95, 1000


@pytest.mark.parametrize(("number", "result"), [(0, -ENOSYS), (1, 0), (9, -EOPNOTSUPP)])
def test_a_hypercall_is_unknown_but_for_one_that_has_nothing_to_do(number: int, result: int) -> None:
    m = run(usual(), long4(VMCALL, "nop", rax=number))
    assert m.reg("rax") == result & (1 << 64) - 1
    assert m.kvm.exits["hypercall"] == 1
    assert m.vcpu().retired == 2


def test_of_32_bit_code_a_hypercall_has_32_bit_registers() -> None:
    m = run(None, flat32(VMCALL, rax=1 << 32 | 1))
    assert m.reg("rax") == 0
    assert run(None, flat32(VMCALL)).reg("rax") == -ENOSYS & 0xFFFFFFFF


def test_user_code_may_not_call_the_hypervisor() -> None:
    assert run(usual(), long4(VMCALL, cpl=3)).reg("rax") == -EPERM & (1 << 64) - 1


def test_the_other_vendors_hypercall_is_patched_and_executed_again() -> None:
    m = run(usual(), long4(VMMCALL, "nop", rax=1))
    assert m.reg("rax") == 0
    assert m.word(CODE) & 0xFFFFFF == int.from_bytes(VMCALL, "little")
    assert (m.kvm.exits["invalid-opcode"], m.kvm.exits["hypercall"]) == (1, 1)
    assert m.passed("emulate.done") == 0
    assert m.vcpu().retired == 2


def test_of_an_l2_guest_vmcall_is_the_other_vendors() -> None:
    m = run(usual(), npt4(VMCALL, VMMCALL, rax=1))
    assert m.reg("rax") == -ENOSYS & 0xFFFFFFFF
    assert m.word(CODE) & 0xFFFFFF == int.from_bytes(VMMCALL, "little")
    assert m.kvm.exits["hypercall"] == 2


def test_code_that_cannot_be_written_takes_a_page_fault_for_the_other_vendors_hypercall() -> None:
    tables = usual().map(gva(CODE), CODE, PAGE & ~PTE_W)
    m = run(tables, long4(VMMCALL, "nop"))
    assert m.vcpu().exceptions == [(VECTOR_PF, PFERR_PRESENT | PFERR_WRITE, gva(CODE), gva(CODE))]


def test_a_patch_of_code_in_a_page_table_is_tracked() -> None:
    code = int.from_bytes(VMMCALL + bytes.fromhex("ffe3"), "little")
    m = run(usual().set(L2, 256, code), long4("jmp rax", "nop", rax=gva(L2) + 0x800, rbx=gva(CODE) + 16))
    assert m.kvm.exits["hypercall"] == 1
    assert m.passed("track_write.locked") == 1
