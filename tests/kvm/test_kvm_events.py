"""Exceptions in the guest: code breakpoints, single steps, the IDT, and events whose delivery exits."""

from __future__ import annotations

import pytest
from machines import (
    CODE,
    DATA,
    DATA2,
    L1,
    PAGE,
    Machine,
    Tables,
    flat32,
    gva,
    long4,
    machine,
    run,
    usual,
)

from mmufuzz.x86.asm import assemble
from mmufuzz.x86.state import (
    CR0_AM,
    DR6_BS,
    VECTOR_AC,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_DF,
    VECTOR_GP,
    VECTOR_OF,
    VECTOR_PF,
    VECTOR_UD,
)

SYSTEM, HANDLER, STACK = 6, 7, 8
"""Pages of a guest with an IDT: tables, handlers, stack."""
GDT, IDT = 0, 0x100
CODE64 = 0x00AF9B000000FFFF
CODE32 = 0x00CF9B000000FFFF
DATA64 = 0x00CF93000000FFFF


def step(number: int) -> int:
    """gva of a step."""
    return gva(CODE) + 16 * number


def vectors(m: Machine) -> list[int]:
    return [exception[0] for exception in m.vcpu().exceptions]


def with_idt(*handlers: tuple[int, str], tables: Tables | None = None) -> Tables:
    """Tables of a guest whose IDT has these handlers, each 64 bytes behind the other in HANDLER."""
    made = usual() if tables is None else tables
    made.set(SYSTEM, 2, CODE64).set(SYSTEM, 3, DATA64)
    made.set(SYSTEM, 62, (0xFFF) | gva(SYSTEM) + GDT << 16).set(SYSTEM, 64, 0xFFF | gva(SYSTEM) + IDT << 16)
    for place, (vector, text) in enumerate(handlers):
        address = gva(HANDLER) + 64 * place
        made.set(SYSTEM, IDT // 8 + 2 * vector, address & 0xFFFF | 0x10 << 16 | 0x8E << 40 | address >> 16 << 48)
        code = b"".join(assemble(part, True) for part in text.split(";")).ljust(64, b"\x90")
        for index in range(8):
            made.set(HANDLER, 8 * place + index, int.from_bytes(code[8 * index : 8 * index + 8], "little"))
    return made


def table_as_stack() -> Tables:
    """The usual tables and one more, in frame 0x14, which maps 2 MiB and is mapped where it lies."""
    return usual().map(1 << 21, DATA2).map(gva(0x14), 0x14)


LOAD = "lgdt [rbp]; lidt [rbp + 16]"
"""The descriptors of the tables lie in the system page, where RBP points."""
SKIP3 = "add qword [rsp + 8], 3; add rsp, 8; iretq"
"""A handler that skips an instruction of three bytes, and the error code."""


def idt(*steps: str, tables: Tables, **options: object) -> Machine:
    """A guest that loads its tables and runs the steps; RSP is at the top of the stack page."""
    regs: dict[str, object] = {"rsp": gva(STACK) + 0x800, "rbp": gva(SYSTEM, 62)}
    case = {}
    for name, value in options.items():
        (regs if name in ("rax", "rbx", "rcx", "rdx", "rsp", "rsi", "rdi") else case)[name] = value
    return run(tables, long4(LOAD, *steps, **regs), **case)  # type: ignore[arg-type]  # as given


def test_a_code_breakpoint_raises_db_before_the_instruction() -> None:
    steps = ("mov dr0, rax; mov dr7, rcx", "mov [rbx], rdx", "nop")
    m = run(usual(), long4(*steps, rax=step(1), rcx=1, rbx=gva(DATA), rdx=5))
    assert m.vcpu().exceptions == [(VECTOR_DB, -1, 0, step(1))]
    assert m.word(DATA) == 0
    assert m.vcpu().regs.dr[6] & 15 == 1
    assert m.kvm.exits["debug"] == 1


@pytest.mark.parametrize("dr7", [0, 1 << 16 | 1, 1 << 18 | 1], ids=["disabled", "for writes", "two bytes"])
def test_a_breakpoint_that_is_not_one_for_execution_is_passed(dr7: int) -> None:
    m = run(usual(), long4("mov dr0, rax; mov dr7, rcx", "mov [rbx], rdx", rax=step(1), rcx=dr7, rbx=gva(DATA), rdx=5))
    assert vectors(m) == []
    assert m.word(DATA) == 5


WRITES, ACCESSES = 1, 3
NOT_MAPPED = gva(0x30)
FOUR_BYTES = 3 << 2


def watch(*steps: str, kind: int, at: int = gva(DATA) + 2, **regs: int) -> Machine:
    """A guest whose first breakpoint watches the four bytes around ``at``. RBX is the page's address."""
    registers = {"rax": at, "rcx": (kind | FOUR_BYTES) << 16 | 1, "rbx": gva(DATA), "rsp": gva(DATA2) + 0x800} | regs
    return run(usual(), long4("mov dr0, rax; mov dr7, rcx", *steps, **registers))


@pytest.mark.parametrize(
    ("text", "kind", "hit"),
    [
        ("mov [rbx], al", WRITES, True),
        ("mov [rbx + 3], ax", WRITES, True),
        ("mov [rbx + 4], eax", WRITES, False),
        ("mov al, [rbx]", WRITES, False),
        ("mov al, [rbx]", ACCESSES, True),
        ("add [rbx], al", WRITES, True),
    ],
)
def test_a_data_breakpoint_raises_db_behind_the_instruction(text: str, kind: int, hit: bool) -> None:
    m = watch(text + "; nop", "nop", kind=kind)
    behind = step(1) + len(assemble(text))
    assert m.vcpu().exceptions == ([(VECTOR_DB, -1, 0, behind)] if hit else [])
    assert m.vcpu().regs.dr[6] & 15 == hit
    assert m.vcpu().finished


def test_an_instruction_that_faults_hits_no_data_breakpoint() -> None:
    m = watch("mov rax, [rbx]; nop", kind=ACCESSES, at=NOT_MAPPED, rbx=NOT_MAPPED)
    assert vectors(m) == [VECTOR_PF]


def test_a_single_step_over_a_data_breakpoint_is_one_exception_with_both_bits() -> None:
    m = watch("push 0x102; popf", "mov [rbx], al", "mov rsi, dr6", kind=WRITES)
    assert m.vcpu().exceptions[0] == (VECTOR_DB, -1, 0, step(3))
    assert m.reg("rsi") & (DR6_BS | 15) == DR6_BS | 1


def test_a_load_of_ss_puts_its_data_breakpoint_off_by_an_instruction() -> None:
    m = watch("mov ss, [rbx]; nop; nop", kind=ACCESSES)
    assert m.vcpu().exceptions == [(VECTOR_DB, -1, 0, step(1) + 3)]


def test_it_is_put_off_over_an_instruction_that_exits_and_is_skipped() -> None:
    m = watch("mov ss, [rbx]; invlpg [rbx]; nop", kind=ACCESSES)
    assert m.vcpu().exceptions == [(VECTOR_DB, -1, 0, step(1) + 5)]


def test_the_emulator_knows_no_data_breakpoints() -> None:
    m = watch("fep mov [rbx], al", kind=WRITES)
    assert vectors(m) == []
    assert m.passed("emulate.done") == 1


def test_the_emulator_looks_for_breakpoints_behind_the_forced_emulation_prefix() -> None:
    regs = {"rax": step(1) + 5, "rcx": 1 << 2 * 0, "rbx": gva(DATA), "rdx": 5}
    m = run(usual(), long4("mov dr0, rax; mov dr7, rcx", "fep mov [rbx], rdx", **regs))
    assert m.vcpu().exceptions == [(VECTOR_DB, -1, 0, step(1) + 5)]
    assert m.word(DATA) == 0


def test_a_single_step_is_a_trap_behind_the_instruction() -> None:
    m = run(usual(), long4("push 0x102; popf", "mov rax, rbx", "push 2; popf", "nop", rsp=gva(DATA2)))
    # POPF itself is not stepped; the second one is, as TF was set when it began.
    assert [exception[3] for exception in m.vcpu().exceptions] == [step(2), step(2) + 2, step(3)]
    assert vectors(m) == [VECTOR_DB] * 3
    assert m.vcpu().regs.dr[6] & 1 << 14
    assert m.vcpu().retired == 6


def test_what_the_emulator_or_an_exit_completes_is_stepped_too() -> None:
    steps = ("push 0x102; popf", "fep mov rax, rbx", "invlpg [rbx]", "nop")
    m = run(usual(), long4(*steps, rsp=gva(DATA2), rbx=gva(DATA)))
    # The #UD of the prefix is no instruction; and nobody asks for the one behind the end.
    assert vectors(m) == [VECTOR_DB] * 2
    assert m.marks["emulate.done"] == 1


def test_an_exception_enters_its_handler_and_returns() -> None:
    tables = with_idt((VECTOR_GP, SKIP3), (VECTOR_UD, "mov rsi, 7; add qword [rsp], 2; iretq"))
    m = idt("ud2", "mov rax, rbx", tables=tables, rbx=3, fep=False)
    assert m.marks["guest.idt"] == 1
    assert m.vcpu().exceptions == [(VECTOR_UD, -1, 0, step(1))]
    assert (m.reg("rsi"), m.reg("rax"), m.reg("rsp")) == (7, 3, gva(STACK) + 0x800)


def test_a_page_fault_brings_cr2_and_its_error_code() -> None:
    tables = with_idt((VECTOR_PF, "pop rdi; mov rsi, cr2; add qword [rsp], 3; iretq"))
    m = idt("mov [rax], rcx", "nop", tables=tables, rax=gva(0x30) + 24)
    assert (m.reg("rsi"), m.reg("rdi")) == (gva(0x30) + 24, 2)
    assert m.marks["guest.idt"] == 1


def test_a_handler_that_maps_the_page_lets_the_instruction_happen() -> None:
    entry = DATA << 12 | PAGE
    tables = with_idt((VECTOR_PF, f"mov dword [{gva(L1, 0x30):#x}], {entry:#x}; add rsp, 8; iretq"))
    m = idt("mov [rax], rcx", tables=tables, rax=gva(0x30), rcx=9)
    assert m.word(DATA) == 9
    assert vectors(m) == [VECTOR_PF]


def test_an_emulated_fault_enters_the_handler_too() -> None:
    tables = with_idt((VECTOR_PF, "pop rdi; mov rsi, cr2; add qword [rsp], 3; iretq"))
    m = idt("fep mov [rax], rcx", "nop", tables=tables, rax=gva(0x30))
    assert (m.reg("rsi"), m.reg("rdi")) == (gva(0x30), 2)


def test_int_goes_through_the_idt_and_comes_back_behind_itself() -> None:
    tables = with_idt((0x21, "mov rsi, 5; iretq"), (VECTOR_BP, "mov rdi, 6; iretq"))
    m = idt("int 0x21", "int3", "mov rax, rsi", tables=tables)
    assert (m.reg("rax"), m.reg("rdi")) == (5, 6)


@pytest.mark.parametrize("kernel", ["v6.1", "v6.12"])
def test_a_write_protected_stack_is_unprotected_when_an_exception_is_pushed_on_it(kernel: str) -> None:
    """The frame goes to a page table: the event must be delivered again, not the instruction emulated."""
    tables = with_idt((VECTOR_UD, "mov rsi, 7; add qword [rsp], 2; iretq"), tables=table_as_stack())
    m = idt("mov rax, [rcx]", "ud2", tables=tables, rcx=1 << 21, rsp=gva(0x14) + 0xF00, fep=False, kernel=kernel)
    assert m.marks["unprotect.reinjection"] >= 1
    assert m.reg("rsi") == 7
    # The #UD itself exits, and KVM looks whether it is a hypercall.
    assert m.passed("emulate") == 1
    assert vectors(m) == [VECTOR_UD]


@pytest.mark.parametrize(("text", "vector"), [("int 0x21", 0x21), ("int3", VECTOR_BP)])
def test_int_is_delivered_again_after_a_page_fault_on_its_stack(text: str, vector: int) -> None:
    tables = with_idt((vector, "mov rsi, 5; iretq"), tables=table_as_stack())
    m = idt("mov rax, [rcx]", text, tables=tables, rcx=1 << 21, rsp=gva(0x14) + 0xF00)
    assert m.marks["unprotect.reinjection"] == 1
    assert m.reg("rsi") == 5
    assert m.reg("rsp") == gva(0x14) + 0xF00


@pytest.mark.parametrize("kernel", ["v6.1", "v6.12"])
@pytest.mark.parametrize(("text", "vector"), [("into", VECTOR_OF), ("int3", VECTOR_BP), ("ud2", VECTOR_UD)])
def test_without_paging_an_event_is_delivered_again_and_nothing_is_unprotected(
    text: str, vector: int, kernel: str
) -> None:
    """The stack is not mapped yet, and there is no guest table that it could be."""
    skip = "; add dword [esp], 2" if text == "ud2" else ""
    tables = Tables().set(SYSTEM, 2, CODE32).set(SYSTEM, 62, 0xFFF | gva(SYSTEM) + GDT << 16)
    tables.set(SYSTEM, 64, 0xFFF | gva(SYSTEM) + IDT << 16)
    tables.set(SYSTEM, IDT // 8 + vector, gva(HANDLER) | 0x10 << 16 | 0x8E << 40)
    code = b"".join(assemble(part, False) for part in f"mov esi, 5{skip}; iretd".split(";")).ljust(16, b"\x90")
    for index in range(2):
        tables.set(HANDLER, index, int.from_bytes(code[8 * index : 8 * index + 8], "little"))
    regs = {"rsp": gva(STACK) + 0x800, "rbp": gva(SYSTEM, 62), "rcx": 0x7FFFFFFF}
    steps = ("lgdt [ebp]; lidt [ebp + 16]", f"inc ecx; {text}", "mov eax, esi")
    m = run(tables, flat32(*steps, **regs), kernel=kernel, fep=False)
    assert m.marks["guest.idt"] == 1
    assert (m.reg("rax"), m.reg("rsp")) == (5, gva(STACK) + 0x800)
    assert m.passed("unprotect.reinjection") == 0
    # #UD exits, and KVM looks whether it is a hypercall.
    assert m.passed("emulate") == (vector == VECTOR_UD)
    # Only hardware exceptions are logged. The two faults of the step are those of the frame and of the handler.
    assert vectors(m) == ([VECTOR_UD] if text == "ud2" else [])
    assert m.sites(step=1).count("mmu_lock.lock") == 2 and m.spte(gva(STACK))


def test_an_event_that_is_emulated_over_is_dropped() -> None:
    """Deviation 13: if the stack cannot be unprotected, KVM emulates what is at RIP, and the exception is gone."""
    steps = ("push 0x102; popf", "mov rsp, rbx", "mov rax, rdi", "nop")
    tables = with_idt((VECTOR_DB, "mov rsi, 7; iretq"))
    m = idt(*steps, tables=tables, rbx=gva(DATA2) + 0x100, rdi=5, write_track=[DATA2])
    assert m.marks["event.dropped"] >= 1
    assert vectors(m) == []
    assert (m.reg("rsi"), m.reg("rax")) == (0, 5)
    # Where it can be, the single step arrives.
    m = idt(*steps, tables=tables, rbx=gva(DATA2) + 0x100, rdi=5)
    assert m.passed("event.dropped") == 0
    assert vectors(m)[0] == VECTOR_DB
    assert m.reg("rsi") == 7


def test_a_fault_without_a_handler_is_a_double_fault() -> None:
    tables = with_idt((VECTOR_DF, "mov rsi, 8; add rsp, 8; add qword [rsp], 3; iretq"))
    m = idt("mov [rax], rcx", "nop", tables=tables, rax=gva(0x30))
    # The #PF itself has not arrived anywhere.
    assert vectors(m) == [VECTOR_DF]
    assert m.reg("rsi") == 8


def test_a_page_fault_on_the_stack_of_a_page_fault_is_a_double_fault_made_by_kvm() -> None:
    tables = with_idt((VECTOR_PF, SKIP3), (VECTOR_DF, "nop"))
    m = idt("mov [rax], rcx", "nop", tables=tables, rax=gva(0x30), rsp=gva(0x38))
    assert m.marks["exception.double_fault"] == 1
    # Its frame has no stack either: triple fault, KVM_EXIT_SHUTDOWN.
    assert m.vcpu().userspace_exits == ["shutdown"]
    assert m.vcpu().finished


def test_a_double_fault_without_a_handler_is_a_shutdown() -> None:
    m = idt("mov [rax], rcx", "nop", tables=with_idt(), rax=gva(0x30))
    assert m.vcpu().userspace_exits == ["shutdown"]
    assert m.kvm.exits["triple-fault"] == 1


def test_a_task_gate_is_an_internal_error() -> None:
    tables = Tables().set(SYSTEM, 0, 0xFFF | gva(SYSTEM) + IDT << 16).set(SYSTEM, IDT // 8 + VECTOR_UD, 0x85 << 40)
    m = run(tables, flat32("lidt [eax]", "ud2", "nop", rax=gva(SYSTEM)), fep=False)
    assert m.kvm.exits["task-switch"] == 1
    assert m.vcpu().userspace_exits == ["internal-error"]


def test_a_guest_without_an_idt_goes_on_at_its_next_step() -> None:
    m = run(usual(), long4("ud2", "mov rax, rbx", rbx=3), fep=False)
    assert m.reg("rax") == 3
    assert "guest.idt" not in m.marks


USER_DS, USER_CS, TSS = 0x2B, 0x33, 0x40


def with_user_segments(tables: Tables, rsp0: int) -> Tables:
    """Segments of CPL 3, and a TSS whose stack for CPL 0 is ``rsp0``."""
    base = gva(SYSTEM) + 0x800
    tables.set(SYSTEM, USER_DS >> 3, DATA64 | 3 << 45).set(SYSTEM, USER_CS >> 3, CODE64 | 3 << 45)
    tables.set(SYSTEM, TSS >> 3, 0x67 | (base & 0xFFFFFF) << 16 | 0x89 << 40 | base >> 24 << 56)
    return tables.set(SYSTEM, 0x100, rsp0 << 32).set(SYSTEM, 0x101, rsp0 >> 32)


def test_an_exception_of_user_code_switches_to_the_stack_in_the_tss() -> None:
    top = gva(STACK) + 0xF00
    tables = with_user_segments(with_idt((VECTOR_UD, "mov rsi, [rsp + 32]; add qword [rsp], 2; iretq")), top)
    enter = "push 0x2b; push rcx; push 2; push 0x33; push rdx; iretq"
    steps = ("mov ax, 0x40; ltr ax", enter, "ud2", "mov rax, rdi")
    m = idt(*steps, tables=tables, rcx=gva(DATA2), rdx=step(3), rdi=5, fep=False)
    assert m.vcpu().exceptions == [(VECTOR_UD, -1, 0, step(3))]
    assert m.reg("rsi") == USER_DS
    assert (m.reg("rax"), m.reg("rsp"), m.vcpu().regs.cpl) == (5, gva(DATA2), 3)
    # The frame lies below the stack pointer in the TSS.
    assert m.word(STACK, 0xF00 // 8 - 1) == USER_DS


# Alignment checks.

MISALIGNED = ("push 0x40202; popf", "mov rcx, [rbx]", "nop")


def user(*steps: str, tables: Tables) -> Machine:
    """User code with CR0.AM and a stack; RBX is odd."""
    m = machine(tables, long4(*steps, cpl=3, rsp=gva(DATA2) + 0x800, rbx=gva(DATA) + 1))
    m.vcpu().regs.cr0 |= CR0_AM
    return m.run()


def test_an_alignment_check_exits_and_is_injected() -> None:
    m = user(*MISALIGNED, tables=usual())
    assert m.vcpu().exceptions == [(VECTOR_AC, 0, 0, step(1))]
    assert m.kvm.exits["alignment-check"] == 1


def test_kvm_emulates_what_is_not_aligned() -> None:
    m = user("push 0x40202; popf", "fep mov rcx, [rbx]", tables=usual())
    assert vectors(m) == []
    assert m.passed("emulate.done") == 1


def test_mov_to_cr0_sets_am_and_keeps_the_root() -> None:
    m = run(usual(), long4("mov rax, cr0; or rax, rcx; mov cr0, rax", "mov rdx, [rbx]", rcx=CR0_AM, rbx=gva(DATA)))
    assert m.vcpu().regs.cr0 & CR0_AM
    assert vectors(m) == []
    assert m.passed("mmu_load") == 1
