"""A nested guest behind a shadowed nested page table, with a pass-through root in front of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from machines import (
    CODE,
    DATA,
    DATA2,
    L1,
    L2,
    L3,
    NOWHERE,
    PAGE,
    ROOT,
    TABLE,
    A,
    D,
    Machine,
    P,
    U,
    W,
    gva,
    machine,
    npt4,
    run,
    usual,
)

from mmufuzz.case.model import Options
from mmufuzz.host.sched import Body
from mmufuzz.kvm.guest_events import SVM_EXIT_NPF
from mmufuzz.kvm.page import kvm_mmu_get_shadow_page, link_shadow_page
from mmufuzz.kvm.role import ROLE_CR0_WP, ROLE_GUEST_MODE, ROLE_PASSTHROUGH, child_role, role_level, role_text
from mmufuzz.kvm.track import kvm_mmu_track_write, kvm_mmu_unprotect_page
from mmufuzz.kvm.write_track import write_track_address
from mmufuzz.kvm.zap import kvm_mmu_zap_all_fast, make_mmu_pages_available
from mmufuzz.x86.state import PFERR_PRESENT, PFERR_USER, PFERR_WRITE, VECTOR_GP, VECTOR_UD


def test_the_pass_through_root_is_neither_counted_nor_tracked() -> None:
    m = run(usual(), npt4("nop"))
    top, below = m.pages(ROOT)[::-1]
    assert role_level(top.role) == 5 and top.role & ROLE_PASSTHROUGH
    assert role_level(below.role) == 4 and not below.role & ROLE_PASSTHROUGH
    assert m.count() == 4 and m.kvm.n_used_mmu_pages == 5
    assert m.host.memory.read(write_track_address(ROOT), 8) == 1
    assert role_text(top.role) == "L5 UWX passthrough"


def test_the_role_of_a_nested_table_has_guest_mode_and_no_write_protect() -> None:
    m = run(usual(), npt4("nop", flags="wp nx"))
    assert all(sp.role & ROLE_GUEST_MODE and not sp.role & ROLE_CR0_WP for sp in m.kvm.active_mmu_pages)


def test_a_nested_page_fault_goes_to_l1_with_a_user_access_and_leaves_cr2_alone() -> None:
    tables = usual().map(gva(DATA), DATA, P | W | A | D).map(gva(DATA2), DATA2, P | U | A)
    m = run(
        tables, npt4("mov ecx, [eax]", "mov [ebx], ecx", "mov ecx, [edx]", rax=gva(DATA), rbx=gva(DATA2), rdx=gva(0x30))
    )
    errors = [PFERR_PRESENT | PFERR_USER, PFERR_PRESENT | PFERR_USER | PFERR_WRITE, PFERR_USER]
    assert [exception[:2] for exception in m.vcpu().exceptions] == [(SVM_EXIT_NPF, error) for error in errors]
    assert m.vcpu().regs.cr2 == 0


def test_invlpg_in_a_nested_guest_does_not_exit() -> None:
    m = run(usual(), npt4("mov ecx, [eax]", "invlpg [eax]", "mov ecx, [eax]", rax=gva(DATA)))
    assert "invlpg" not in m.kvm.exits
    assert m.sites(step=2).count("spte.walk") == 5


@pytest.mark.parametrize(("kind", "walked"), [(0, 0), (1, 6), (2, 6), (3, 6)])
def test_invpcid_in_a_nested_guest_does_not_exit(kind: int, walked: int) -> None:
    steps = ("mov ecx, [eax]", "invpcid edi, [ebx]", "mov ecx, [eax]")
    m = run(usual(), npt4(*steps, rax=gva(DATA), rbx=gva(DATA2), rdi=kind))
    assert "invpcid" not in m.kvm.exits
    assert m.sites(step=2).count("spte.walk") == walked


def test_a_nested_guest_may_not_write_control_registers() -> None:
    m = run(usual(), npt4("mov cr3, eax", "fep mov cr3, eax"))
    assert [exception[0] for exception in m.vcpu().exceptions] == [VECTOR_GP, VECTOR_GP]


def test_a_write_to_its_own_nested_table_is_never_unprotected() -> None:
    m = run(usual(), npt4("add [eax], ecx", rax=gva(L1, 0x20), rcx=4))
    assert m.marks["emulate.done"] == 1 and m.passed("unprotect.zapped") == 0
    assert m.word(L1, 0x20) == 4


def test_emulation_that_fails_in_a_nested_guest_gives_it_ud() -> None:
    for kernel in ("v6.1", "v6.12"):
        m = run(usual(), npt4("movss [eax], xmm0", rax=gva(L1, 0x20)), kernel=kernel)
        assert m.vcpu().exceptions[0][0] == VECTOR_UD
        assert m.vcpu().userspace_exits == []


def test_tables_that_lose_their_last_parent_are_zapped_with_it() -> None:
    """mmu_page_zap_pte recurses for nested tables, unlike for those of a guest of its own."""
    m = run(usual(), npt4("mov [eax], cx", rax=gva(L3, 0x20) + 2))
    assert m.pages(L3) == m.pages(L2) == m.pages(L1) == []
    assert len(m.pages(ROOT)) == 2
    assert m.count() == 1


def test_a_table_with_another_parent_survives() -> None:
    tables = usual().set(L2, 1, L1 << 12 | TABLE)
    second = (1 << 21) + gva(DATA)
    m = run(tables, npt4("mov ecx, [ebx]", "mov [eax], ecx", rax=gva(L2, 1), rbx=second, rcx=0))
    # A store that zaps one SPTE passes no list, so nothing is zapped along with it.
    assert len(m.page(L1).parent_ptes) == 1


def test_reclaim_takes_a_nested_subtree_at_once() -> None:
    tables = usual().map(1 << 30, DATA).map(2 << 30, DATA2)
    m = run(tables, npt4("mov ecx, [eax]", "mov ecx, [ebx]", "mov ecx, [eax]", rax=1 << 30, rbx=2 << 30), max_pages=11)
    assert m.marks["reclaim"] >= 1
    assert m.vcpu().retired == 3
    assert m.log.warnings == []


def test_unprotecting_for_another_vcpu_takes_the_subtree_below() -> None:
    m = run(usual(), npt4("fep rep stosd", rax=0, rcx=6, rdi=gva(L2, 8)))
    assert m.marks["track_write.flooding"] == 1
    # The guest goes on at the instruction, and its fetch shadows both tables again.
    assert m.marks["get_shadow_page.created"] == 7


def test_zap_all_frees_a_nested_tree_once() -> None:
    m = run(usual(), npt4("nop", "nop"), host=["zap_all_fast"], schedule=["after vcpu0@0.guest.fetch 1 run host0"])
    assert m.vcpu().retired == 2
    assert m.count() == 4
    assert m.log.warnings == []


def test_a_table_that_is_its_own_parent_is_zapped_once() -> None:
    """gfn ROOT is a table of every level; one write that floods it zaps them all, each by way of its parent."""
    tables = usual().set(ROOT, 1, ROOT << 12 | TABLE)
    m = run(tables, npt4("mov ecx, [eax]", "fep mov [ebx], cx", rax=0, rbx=gva(ROOT, 0x30) + 2))
    assert m.log.warnings == []


def test_mmio_of_a_nested_guest_is_never_found_in_the_cache() -> None:
    tables = usual().map(gva(DATA), NOWHERE)
    m = run(tables, npt4("mov ecx, [eax]", "mov ecx, [eax]", rax=gva(DATA)))
    assert m.vcpu().userspace_exits == ["mmio read 0x100000 4 0x0"] * 2
    assert m.vcpu().mmio_gva == 0
    assert m.sites(step=1).count("mode.atomic") == 1


def test_code_of_a_nested_guest_runs_through_the_same_tables() -> None:
    m = run(usual().map(gva(0x30), CODE, PAGE), npt4("mov ecx, 7"))
    assert m.reg("rcx") == 7


class Probe(Body):
    """Runs a vCPU, links a page below one of the same frame, and zaps the frame's pages one after the other."""

    def __init__(self, made: Machine, first: Body, zap: Callable[[Machine], None]) -> None:
        self.made = made
        self.first = first
        self.zap = zap

    def run(self) -> None:
        self.first.run()
        kvm = self.made.kvm
        (parent,) = [sp for sp in self.made.pages(ROOT) if role_level(sp.role) == 4]
        child = kvm_mmu_get_shadow_page(kvm, ROOT, child_role(parent.role, False, 7))
        link_shadow_page(kvm, parent.spte_address(1), child)
        # As if the child had been there first: the bucket has the newest page in front.
        bucket = kvm.mmu_page_hash[ROOT]
        bucket.append(bucket.pop(0))
        self.zap(self.made)


def by_unprotect(m: Machine) -> None:
    kvm_mmu_unprotect_page(m.kvm, ROOT)


def by_misaligned_write(m: Machine) -> None:
    kvm_mmu_track_write(m.vcpu(), gva(ROOT, 0x30) + 1, 2)


def by_zap_all(m: Machine) -> None:
    # The oldest page first, so the parent goes before the child.
    pages = m.kvm.active_mmu_pages
    pages.sort(key=lambda sp: role_level(sp.role))
    kvm_mmu_zap_all_fast(m.kvm)


def by_reclaim(m: Machine) -> None:
    m.kvm.active_mmu_pages.sort(key=lambda sp: role_level(sp.role))
    m.kvm.options = Options(n_max_mmu_pages=8)
    m.kvm.mmu_lock.acquire()
    assert make_mmu_pages_available(m.kvm) == 0
    m.kvm.mmu_lock.release()


@pytest.mark.parametrize("zap", [by_unprotect, by_misaligned_write, by_zap_all, by_reclaim])
def test_a_page_zapped_with_its_parent_is_not_zapped_again(zap: Callable[[Machine], None]) -> None:
    """The walk over pages meets one that the zap of its parent has already taken."""
    m = machine(usual(), npt4("nop"))
    m.host.threads[0].body = Probe(m, m.host.threads[0].body, zap)
    m.run()
    assert m.log.warnings == []
    assert [sp for sp in m.pages(ROOT) if role_level(sp.role) < 5] == []
    assert m.count() == len(m.kvm.active_mmu_pages) - (zap not in (by_zap_all,))
