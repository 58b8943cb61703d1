"""A store that is better not emulated, or cannot be: unprotect, retry, give up; in three generations of policy."""

from __future__ import annotations

import pytest
from machines import CODE, DATA, L1, NOWHERE, ROOT, TABLE, A, Machine, P, U, flat32, gva, long4, run, usual

from mmufuzz.host.sched import EVENT_LIMIT
from mmufuzz.kvm.emulate_decode import decode
from mmufuzz.kvm.emulate_ops import EmulationFailed
from mmufuzz.kvm.opcode_table import PAGE_TABLE
from mmufuzz.x86.asm import assemble
from mmufuzz.x86.state import PFERR_WRITE, VECTOR_PF, VECTOR_UD

KERNELS = ("v6.1", "v6.8", "v6.9", "v6.12")
UNUSED = 0x20
"""A frame that is a table of another root: shadowed, but not on the way to the code."""


def with_other_root(*steps: str, cpl: int = 0, flags: str = "wp nx", **regs: int) -> tuple:  # type: ignore[type-arg]
    """Tables and a vCPU that has used the root ``UNUSED`` once, so that this frame is shadowed and write-protected."""
    tables = usual().set(UNUSED, 0, 0x11 << 12 | TABLE).map(gva(UNUSED), UNUSED)
    first = ("mov cr3, rbp",) if cpl == 0 else ()
    return tables, long4(*first, *steps, root=UNUSED, cpl=cpl, flags=flags, rax=gva(UNUSED), rbp=ROOT << 12, **regs)


def loops(m: Machine) -> bool:
    """The run hit its limit while nothing was retired."""
    return m.host.status == EVENT_LIMIT


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_store_that_is_no_gpte_update_unprotects_and_is_retried_natively(kernel: str) -> None:
    tables, guest = with_other_root("add [rax], rcx", rcx=8)
    m = run(tables, guest, kernel=kernel)
    assert m.marks["emulate.retried"] == 1
    assert m.marks["unprotect.zapped"] == 1
    assert m.passed("emulate.done") == 0
    assert m.pages(UNUSED) == []
    assert m.word(UNUSED) == (0x11 << 12 | TABLE) + 8


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_store_that_cannot_be_emulated_unprotects_and_is_retried_natively(kernel: str) -> None:
    tables, guest = with_other_root("movss [rax], xmm0")
    m = run(tables, guest, kernel=kernel)
    assert m.marks["emulate.reexecuted"] == m.marks["unprotect.zapped"] == 1
    assert m.vcpu().userspace_exits == []
    assert m.pages(UNUSED) == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cmpxchg_of_sixteen_bytes_fails_late_and_is_retried_natively(kernel: str) -> None:
    tables, guest = with_other_root("lock cmpxchg16b [rax]")
    m = run(tables, guest, kernel=kernel)
    # Its table entry is that of CMPXCHG8B, which is taken for a gPTE update: the retry comes after the attempt.
    assert m.marks["emulate.execution_failed"] == m.marks["emulate.reexecuted"] == 1
    assert m.vcpu().retired == 2


def test_a_retry_is_remembered_by_rip_and_address() -> None:
    tables, guest = with_other_root("add [rax], rcx", rcx=8)
    m = run(tables, guest)
    assert (m.vcpu().last_retry_eip, m.vcpu().last_retry_addr) == (gva(CODE) + 16, gva(UNUSED))


def test_the_guard_stops_the_second_unprotect_for_the_same_instruction() -> None:
    """The table written maps the code: zapping it unmaps the instruction, whose fetch brings it back."""
    m = run(usual(), long4("add [rax], rcx", rax=gva(L1, 0x20)))
    assert m.marks["retry_guard.hit"] == 1
    assert m.marks["emulate.retried"] == m.marks["emulate.done"] == 1
    assert m.vcpu().retired == 1


def test_another_write_protected_fault_clears_the_guard() -> None:
    tables, guest = with_other_root("add [rax], rcx", "mov [rbx], rcx", rbx=gva(L1, 0x1F))
    m = run(tables, guest)
    assert (m.vcpu().last_retry_eip, m.vcpu().last_retry_addr) == (0, 0)


def test_a_store_to_the_own_leaf_table_that_cannot_be_emulated_is_an_error() -> None:
    # FNAME(fetch) or, in 6.1, is_self_change_mapping sees that the page written is a table of the walk.
    for kernel in KERNELS:
        m = run(usual(), long4("movss [rax], xmm0", rax=gva(L1, 0x20)), kernel=kernel)
        assert m.vcpu().userspace_exits == ["internal-error"], kernel
        assert m.marks["page_fault.write_pf_to_sp"] >= 1
    assert m.marks["reexecute.write_pf_to_sp"] == 1


def test_a_user_program_gets_ud_instead_of_the_error() -> None:
    m = run(usual(), long4("movss [rax], xmm0", cpl=3, rax=gva(L1, 0x20)))
    assert m.vcpu().exceptions == [(VECTOR_UD, -1, 0, gva(CODE))]
    assert m.marks["emulate.failure_ud"] == 1


OWN_ROOT = ("movss [rax], xmm0",)


def test_a_store_to_the_own_root_ends_in_an_error_in_6_1_through_is_self_change_mapping() -> None:
    m = run(usual(), long4(*OWN_ROOT, rax=gva(ROOT, 5)), kernel="v6.1")
    assert m.vcpu().userspace_exits == ["internal-error"]
    assert m.passed("retry_guard.hit") == 0
    assert m.marks["page_fault.write_pf_to_sp"] >= 1


def test_a_store_to_the_own_root_loops_for_ever_in_6_9() -> None:
    for kernel in ("v6.8", "v6.9"):
        m = run(usual(), long4(*OWN_ROOT, rax=gva(ROOT, 5)), kernel=kernel, limit=5000)
        assert loops(m)
        assert m.vcpu().retired == 0
        assert m.passed("page_fault.write_pf_to_sp") == 0


def test_a_store_to_the_own_root_ends_through_the_guard_in_6_12() -> None:
    m = run(usual(), long4(*OWN_ROOT, rax=gva(ROOT, 5)))
    assert m.vcpu().userspace_exits == ["internal-error"]
    assert m.marks["retry_guard.hit"] == 1
    assert m.passed("page_fault.write_pf_to_sp") == 0


def test_a_pinned_root_that_is_unprotected_does_not_count_as_zapped() -> None:
    # 6.12 goes by the list of freed pages, and a root is not on it: so it emulates instead of retrying.
    m = run(usual(), long4("add [rax], rcx", rax=gva(ROOT, 5), rcx=1))
    assert m.passed("emulate.retried") == 0
    assert m.marks["emulate.done"] == 1
    assert m.marks["zap.root"] == 1
    assert m.word(ROOT, 5) == 1


@pytest.mark.parametrize(
    "fix, text, table",
    [
        ("retry-guard", "add [rax], rcx", L1),
        ("skip-emulation-iff-unprotected", "add [rax], rcx", L1),
        ("retry-guard", "movss [rax], xmm0", ROOT),
        ("write-pf-to-sp", "movss [rax], xmm0", L1),
        ("retry-rewrite", "movss [rax], xmm0", ROOT),
    ],
)
def test_reverting_a_guard_brings_the_endless_loop_back(fix: str, text: str, table: int) -> None:
    assert not loops(run(usual(), long4(text, rax=gva(table, 0x20), rcx=1), limit=5000))
    m = run(usual(), long4(text, rax=gva(table, 0x20), rcx=1), revert=[fix], limit=5000)
    assert loops(m) and m.vcpu().retired == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_reverting_opt_in_reexecution_loops_on_mmio_that_cannot_be_emulated(kernel: str) -> None:
    tables = usual().map(gva(DATA), NOWHERE)
    m = run(tables, long4("movss [rax], xmm0", rax=gva(DATA)), kernel=kernel)
    assert m.vcpu().userspace_exits == ["internal-error"]
    assert loops(
        run(tables, long4("movss [rax], xmm0", rax=gva(DATA)), kernel=kernel, revert=["reexecute-opt-in"], limit=5000)
    )


def test_an_external_write_tracker_is_not_taken_for_a_shadow_page() -> None:
    m = run(usual(), long4("add [rax], rcx", rax=gva(DATA), rcx=2), write_track=[DATA])
    assert m.marks["unprotect.nothing"] == 1
    assert m.word(DATA) == 2
    # Before 6.12 the guest was sent back once, for nothing.
    m = run(usual(), long4("add [rax], rcx", rax=gva(DATA), rcx=2), write_track=[DATA], kernel="v6.9")
    assert m.marks["emulate.retried"] == m.marks["emulate.done"] == 1
    reverted = ["skip-emulation-iff-unprotected"]
    assert loops(run(usual(), long4("add [rax], rcx", rax=gva(DATA)), write_track=[DATA], revert=reverted, limit=5000))


def test_with_an_external_write_tracker_an_instruction_that_cannot_be_emulated_looped_before_6_12() -> None:
    m = run(usual(), long4("movss [rax], xmm0", rax=gva(DATA)), write_track=[DATA])
    assert m.vcpu().userspace_exits == ["internal-error"]
    for kernel in ("v6.1", "v6.9"):
        assert loops(
            run(usual(), long4("movss [rax], xmm0", rax=gva(DATA)), write_track=[DATA], kernel=kernel, limit=5000)
        )


def test_a_direct_mmu_reads_the_count_before_it_unprotects() -> None:
    guest = flat32("movss [eax], xmm0", rax=gva(DATA))
    counts = {"v6.1": "locked", "v6.9": "lockless", "v6.12": "lockless"}
    for kernel, how in counts.items():
        m = run(None, guest, write_track=[DATA], kernel=kernel, limit=3000)
        sites = m.sites()
        at = sites.index("indirect_shadow_pages.load")
        assert (sites[at - 1] == "mmu_lock.lock") == (how == "locked"), kernel
    assert m.marks["unprotect.count_zero"] == 1
    # With nothing shadowed there is nothing to unprotect: the lock is all that differs.
    assert m.vcpu().userspace_exits == ["internal-error"]


FEB_2024 = ("reexecute-lockless", "reexecute-one-path", "reexecute-flag-only")


@pytest.mark.parametrize("applied", [(), *[(fix,) for fix in FEB_2024], FEB_2024[:2], FEB_2024[1:], FEB_2024])
def test_the_patches_of_february_2024_change_nothing_the_guest_can_see(applied: tuple[str, ...]) -> None:
    """For both kinds of MMU, with a frame that another vCPU uses as a table."""
    tables = usual().map(gva(UNUSED), UNUSED).set(UNUSED, 0, 0x11 << 12 | TABLE)
    writer = flat32("mov ecx, [eax]", "movss [eax], xmm0", rax=gva(UNUSED, 8))
    user = long4("nop", "mov cr3, rbp", "nop", root=UNUSED, rbp=ROOT << 12)
    m = run(tables, writer, user, kernel="v6.8", apply=applied)
    assert m.marks["reexecute.count_nonzero"] == 1
    assert m.marks["unprotect.zapped"] == 1
    assert [guest.retired for guest in m.kvm.vcpus] == [2, 3]


def test_the_count_of_the_whole_vm_can_be_nonzero_for_nothing() -> None:
    m = run(
        usual(), flat32("movss [eax], xmm0", rax=gva(DATA)), long4("nop"), write_track=[DATA], kernel="v6.9", limit=3000
    )
    assert m.marks["reexecute.false_positive"] >= 1


def test_the_count_can_be_zero_for_a_table_that_is_shadowed_a_moment_later() -> None:
    writer = flat32("movss [eax], xmm0", rax=gva(ROOT, 5))
    schedule = ["after vcpu1@0.thread.start 1 run vcpu0", "after vcpu0@0.indirect_shadow_pages.load 1 run vcpu1"]
    m = run(usual(), writer, long4("nop"), write_track=[ROOT], kernel="v6.9", schedule=schedule, limit=3000)
    assert m.marks["reexecute.count_zero"] == 1
    assert m.marks["reexecute.false_negative"] == 1
    # The write faults again, and the second attempt sees the count.
    assert m.marks["reexecute.count_nonzero"] >= 1 and m.marks["unprotect.zapped"] >= 1


def test_an_indirect_mmu_whose_tables_forbid_the_write_by_now_is_sent_back_to_fault() -> None:
    """Between the fault and the emulation another vCPU takes the write permission away."""
    tables = usual()
    first = long4("mov rcx, [rbx]", "movss [rax], xmm0", rax=gva(L1, 0x20), rbx=gva(DATA))
    second = long4("mov rdx, [rax]", "mov [rax], rcx", code=2, rax=gva(L1, L1), rcx=L1 << 12 | P | U | A)
    for kernel in KERNELS:
        m = run(tables, first, second, kernel=kernel, schedule=["after vcpu0@1.vcpu.exit 1 run vcpu1"])
        assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, 1 | PFERR_WRITE, gva(L1, 0x20)), kernel


def test_the_faulting_access_may_be_gone_when_the_emulator_looks() -> None:
    """The write permission goes between the walk of the fault and the walk of the unprotect."""
    first = long4("mov rcx, [rbx]", "add [rax], rcx", rax=gva(L1, 0x20), rbx=gva(DATA))
    second = long4("mov rdx, [rax]", "mov [rax], rcx", code=2, rax=gva(L1, L1), rcx=L1 << 12 | P | U | A)
    for kernel in ("v6.1", "v6.12"):
        m = run(usual(), first, second, kernel=kernel, schedule=["after vcpu0@1.emul.fetch 1 run vcpu1"])
        assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, 1 | PFERR_WRITE, gva(L1, 0x20)), kernel
        assert m.passed("unprotect.zapped") == 0


def test_code_that_is_unmapped_before_it_is_emulated_is_fetched_again_by_the_cpu() -> None:
    first = long4("mov rcx, [rbx]", "mov [rax], rcx", rax=gva(L1, 0x20), rbx=gva(DATA))
    second = long4("mov rdx, [rax]", "mov [rax], rcx", code=2, rax=gva(L1, CODE), rcx=0)
    m = run(usual(), first, second, schedule=["after vcpu0@1.mmu_lock.unlock 1 run vcpu1"])
    assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, 0x10, gva(CODE) + 16)


WRITERS = {
    "or [rax], rcx": True,
    "and dword [rax], 5": True,
    "or dword [rax], 5": True,
    "xchg [rax], rcx": True,
    "mov [rax], cl": True,
    "mov dword [rax], 5": True,
    "lock bts [rax], rcx": True,
    "bts dword [rax], 5": True,
    "btc dword [rax], 5": True,
    "cmpxchg [rax], rcx": True,
    "cmpxchg8b [rax]": True,
    "add [rax], rcx": False,
    "xor dword [rax], 5": False,
    "xadd [rax], rcx": False,
    "btr dword [rax], 5": False,
    "inc dword [rax]": False,
    "cmpxchg16b [rax]": True,
    "movups [rax], xmm0": False,
    "stosq": False,
    "vmovdqu [rax], ymm0": False,
    "push rax": False,
}


@pytest.mark.parametrize("text", WRITERS)
def test_which_instructions_are_taken_for_gpte_updates(text: str) -> None:
    try:
        flags = decode(assemble(text), 64).d
    except EmulationFailed:
        flags = 0
    assert (flags & PAGE_TABLE != 0) == WRITERS[text]


def test_an_instruction_that_fails_late_is_retried_once_and_then_given_up() -> None:
    # CMPXCHG16B on a page that an external tracker protects: there is nothing to unprotect.
    m = run(usual(), long4("lock cmpxchg16b [rax]", rax=gva(DATA)), write_track=[DATA])
    assert m.marks["emulate.execution_failed"] == 2
    assert m.marks["emulate.reexecuted"] == m.marks["retry_guard.hit"] == 1
    assert m.vcpu().userspace_exits == ["internal-error"]


def test_the_write_may_be_forbidden_by_the_time_emulation_has_failed() -> None:
    first = long4("mov rcx, [rbx]", "movss [rax], xmm0", rax=gva(L1, 0x20), rbx=gva(DATA))
    second = long4("mov rdx, [rax]", "mov [rax], rcx", code=2, rax=gva(L1, L1), rcx=L1 << 12 | P | U | A)
    for kernel in ("v6.1", "v6.9"):
        m = run(usual(), first, second, kernel=kernel, schedule=["after vcpu0@1.emul.fetch 1 run vcpu1"])
        assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, 1 | PFERR_WRITE, gva(L1, 0x20)), kernel
