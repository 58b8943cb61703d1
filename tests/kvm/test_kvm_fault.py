"""Page faults of an indirect MMU: what gets shadowed, what is delivered to the guest, what is MMIO."""

from __future__ import annotations

import pytest
from machines import (
    CODE,
    CODE2,
    DATA,
    DATA2,
    L1,
    L2,
    L3,
    NOWHERE,
    NX,
    PAGE,
    ROOT,
    TABLE,
    A,
    D,
    P,
    Tables,
    U,
    W,
    flat32,
    gva,
    long4,
    machine,
    run,
    usual,
)

from mmufuzz.case.model import Slot
from mmufuzz.kvm.memslots import gfn_to_pfn
from mmufuzz.kvm.role import ACC_ALL, ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, role_access, role_level
from mmufuzz.kvm.spte import SPTE_A, SPTE_D, SPTE_HOST_WRITABLE, SPTE_MMU_WRITABLE, SPTE_NX, SPTE_U, SPTE_W, spte_pfn
from mmufuzz.x86.state import (
    CR0_WP,
    CR4_PAE,
    CR4_SMEP,
    FLAG_AC,
    PFERR_FETCH,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_USER,
    PFERR_WRITE,
    VECTOR_GP,
    VECTOR_PF,
)


def test_first_access_shadows_four_tables_and_maps_one_page() -> None:
    m = run(usual(), long4("nop"))
    assert [(sp.gfn, role_level(sp.role)) for sp in m.kvm.active_mmu_pages] == [(L1, 1), (L2, 2), (L3, 3), (ROOT, 4)]
    assert [m.present(sp) for sp in m.kvm.active_mmu_pages] == [[CODE], [0], [0], [0]]
    assert m.count() == 4
    assert m.marks["page_fault.FIXED"] == 1
    assert m.marks["account_shadowed.first"] == 1
    assert m.vcpu().retired == 1


def test_a_mapped_page_is_reached_without_another_exit() -> None:
    m = run(usual(), long4("mov rcx, [rax]", "mov rdx, [rax]", rax=gva(DATA)))
    assert m.kvm.exits == {"page-fault": 2, "program-end": 1}


def test_a_writable_spte_is_dirty_accessed_and_mmu_writable_from_the_start() -> None:
    m = run(usual(), long4("mov [rax], rcx", rax=gva(DATA), rcx=7))
    spte = m.spte(gva(DATA))
    bits = SPTE_W | SPTE_U | SPTE_D | SPTE_A | SPTE_HOST_WRITABLE | SPTE_MMU_WRITABLE
    assert spte & bits == bits
    assert spte_pfn(spte) == gfn_to_pfn(DATA)
    assert m.word(DATA) == 7


def test_a_read_through_a_clean_gpte_maps_the_page_read_only_and_the_write_maps_it_writable() -> None:
    tables = usual().map(gva(DATA), DATA, PAGE & ~D)
    m = run(tables, long4("mov rcx, [rax]", rax=gva(DATA)))
    assert not m.spte(gva(DATA)) & SPTE_W
    assert not m.word(L1, DATA) & D
    m = run(tables, long4("mov rcx, [rax]", "mov [rax], rcx", rax=gva(DATA)))
    assert m.spte(gva(DATA)) & SPTE_W
    assert m.word(L1, DATA) & D
    assert m.kvm.exits["page-fault"] == 3


def test_accessed_bits_are_set_from_the_root_down_before_anything_is_shadowed() -> None:
    tables = Tables(table_flags=P | W | U).identity([CODE], P | W | U)
    m = run(tables, long4("nop"))
    atomics = [address for site, address in m.lines() if site == "gpte.atomic"]
    assert [address >> 12 for address in atomics] == [gfn_to_pfn(gfn) for gfn in (ROOT, L3, L2, L1)]
    assert m.word(ROOT) & A and m.word(L1, CODE) & A
    sites = m.sites()
    assert sites.index("gpte.atomic") < sites.index("indirect_shadow_pages.store", sites.index("gpte.load"))


def test_tables_in_a_read_only_slot_keep_their_accessed_bits_clear() -> None:
    tables = Tables(table_flags=P | W | U).identity([CODE], P | W | U)
    m = run(tables, long4("nop"), slots=(Slot(0, 0x10), Slot(0x10, 0x10, readonly=True)))
    assert m.vcpu().retired == 1
    assert m.passed("walk.set_accessed_dirty") == 0
    assert not m.word(ROOT) & A and not m.word(L1, CODE) & A


FAULTS = {
    # name: leaf flags, vCPU flags, CPL, instruction, error code
    "read of a page that is not there": (0, "wp nx", 0, "mov rcx, [rax]", 0),
    "write to a page that is not there": (0, "wp nx", 0, "mov [rax], rcx", PFERR_WRITE),
    "user read of a supervisor page": (P | W | A | D, "wp nx", 3, "mov rcx, [rax]", PFERR_PRESENT | PFERR_USER),
    "user write to a read-only page": (
        P | U | A | D,
        "wp nx",
        3,
        "mov [rax], rcx",
        PFERR_PRESENT | PFERR_USER | PFERR_WRITE,
    ),
    "supervisor write to a read-only page": (P | U | A | D, "wp nx", 0, "mov [rax], rcx", PFERR_PRESENT | PFERR_WRITE),
    "user write without CR0.WP": (P | U | A | D, "nx", 3, "mov [rax], rcx", PFERR_PRESENT | PFERR_USER | PFERR_WRITE),
    "fetch from a no-execute page": (PAGE | NX, "wp nx", 0, "jmp rax", PFERR_PRESENT | PFERR_FETCH),
    "fetch from a user page under SMEP": (PAGE, "wp smep", 0, "jmp rax", PFERR_PRESENT | PFERR_FETCH),
    "read of a user page under SMAP": (PAGE, "wp nx smap", 0, "mov rcx, [rax]", PFERR_PRESENT),
    "reserved bit": (PAGE | 1 << 45, "wp nx", 0, "mov rcx, [rax]", PFERR_PRESENT | PFERR_RSVD),
    "no-execute bit without EFER.NX": (PAGE | NX, "wp", 0, "mov rcx, [rax]", PFERR_PRESENT | PFERR_RSVD),
    "fetch without EFER.NX and SMEP": (0, "wp", 0, "jmp rax", 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_guest_gets_the_fault_that_its_tables_ask_for(name: str) -> None:
    flags, features, cpl, text, error_code = FAULTS[name]
    supervisor = P | W | A | D
    tables = Tables().map(gva(CODE), CODE, PAGE if cpl else supervisor).map(gva(DATA), DATA, flags)
    m = run(tables, long4(text, "nop", cpl=cpl, flags=features, rax=gva(DATA)))
    assert m.vcpu().exceptions == [(VECTOR_PF, error_code, gva(DATA), gva(DATA) if text == "jmp rax" else gva(CODE))]
    assert m.vcpu().regs.cr2 == gva(DATA)
    assert m.log.faults == [(0, gva(DATA), error_code)]
    assert m.vcpu().retired == (2 if text == "jmp rax" else 1)


def test_access_rights_of_upper_levels_reach_the_leaf() -> None:
    tables = usual().set(L3, 0, L2 << 12 | P | U | A)
    m = run(tables, long4("mov rcx, [rax]", "mov [rax], rcx", rax=gva(DATA)))
    assert m.vcpu().exceptions == [(VECTOR_PF, PFERR_PRESENT | PFERR_WRITE, gva(DATA), gva(CODE) + 16)]
    assert role_access(m.page(L2).role) == ACC_EXEC_MASK | ACC_USER_MASK
    assert role_access(m.page(L3).role) == ACC_ALL
    assert not m.spte(gva(DATA)) & SPTE_W


def test_a_table_outside_memory_counts_as_not_present() -> None:
    tables = usual().set(ROOT, 1, NOWHERE << 12 | TABLE)
    m = run(tables, long4("mov rcx, [rax]", rax=1 << 39))
    assert m.vcpu().exceptions == [(VECTOR_PF, 0, 1 << 39, gva(CODE))]


def test_two_parents_with_different_rights_give_one_table_two_shadow_pages() -> None:
    tables = usual().set(L2, 1, L1 << 12 | P | U | A)
    m = run(tables, long4("mov rcx, [rax]", "mov rcx, [rbx]", rax=gva(DATA), rbx=(1 << 21) + gva(DATA)))
    first, second = sorted(m.pages(L1), key=lambda sp: role_access(sp.role))
    assert role_access(first.role) == ACC_EXEC_MASK | ACC_USER_MASK
    assert role_access(second.role) == ACC_ALL
    assert m.spte(gva(DATA)) & SPTE_W
    assert not m.spte((1 << 21) + gva(DATA)) & SPTE_W


@pytest.mark.parametrize("smep", [False, True])
def test_without_cr0_wp_a_supervisor_write_turns_a_user_page_into_a_supervisor_page(smep: bool) -> None:
    tables = Tables().map(gva(CODE), CODE, P | W | A | D).map(gva(DATA), DATA, P | U | A)
    m = run(tables, long4("mov [rax], rcx", flags="nx smep" if smep else "nx", rax=gva(DATA), rcx=5))
    spte = m.spte(gva(DATA))
    assert m.word(DATA) == 5
    assert spte & SPTE_W and not spte & SPTE_U
    assert bool(spte & SPTE_NX) == smep
    assert m.marks["page_fault.cr0_wp"] == 1


def test_clearing_cr0_wp_moves_the_guest_to_shadow_pages_of_another_role() -> None:
    tables = usual().map(gva(DATA), DATA, P | U | A)
    steps = ("mov [rax], rcx", "mov cr0, rbx", "mov [rax], rcx", "mov cr0, rdx", "mov [rax], rcx")
    on = 1 << 31 | CR0_WP | 1
    m = run(tables, long4(*steps, rax=gva(DATA), rcx=9, rbx=on & ~CR0_WP, rdx=on))
    fault = (VECTOR_PF, PFERR_PRESENT | PFERR_WRITE, gva(DATA))
    assert [(exception[:3], exception[3] - gva(CODE)) for exception in m.vcpu().exceptions] == [(fault, 0), (fault, 64)]
    assert m.word(DATA) == 9
    assert len(m.pages(ROOT)) == 2
    assert m.marks["mmu_load"] == 3
    assert m.log.invalidated == []


def test_setting_smep_flushes_and_only_that_counts_as_an_invalidation() -> None:
    m = run(usual(), long4("mov cr4, rax", "mov cr4, rbx", rax=CR4_PAE | CR4_SMEP | 1 << 21, rbx=CR4_PAE))
    # The code page is a user page, so that SMEP stops the guest right after it was set.
    assert m.vcpu().exceptions[0][1] == PFERR_PRESENT | PFERR_FETCH
    assert m.log.invalidated == [(0, -1)]


@pytest.mark.parametrize("text", ["mov cr0, rax", "mov cr4, rax"])
def test_control_register_bits_that_are_not_modelled_give_gp(text: str) -> None:
    m = run(usual(), long4(text, rax=0))
    assert m.vcpu().exceptions == [(VECTOR_GP, 0, 0, gva(CODE))]


def test_a_cr3_beyond_the_physical_address_width_gives_gp() -> None:
    m = run(usual(), long4("mov cr3, rax", rax=1 << 40))
    assert m.vcpu().exceptions == [(VECTOR_GP, 0, 0, gva(CODE))]


def test_writing_a_control_register_its_own_value_changes_no_root() -> None:
    steps = ("mov rax, cr0", "mov cr0, rax", "mov rax, cr4", "mov cr4, rax", "mov rax, cr3", "mov cr3, rax")
    m = run(usual(), long4(*steps))
    assert m.marks["mmu_load"] == 1
    assert m.vcpu().exceptions == []
    assert m.log.invalidated == [(0, -1)]


def test_cr0_wp_means_nothing_to_a_guest_without_paging() -> None:
    m = run(None, flat32("mov cr0, eax", "mov cr4, ebx", "nop", rax=1, rbx=CR4_SMEP))
    assert m.vcpu().regs.cr0 == 1
    # CR4.SMEP is part of the role even so.
    assert m.marks["mmu_load"] == 2


def test_a_root_is_found_again_after_cr3_was_changed_and_changed_back() -> None:
    other = 0x20
    tables = usual().set(other, 0, L3 << 12 | TABLE)
    m = run(tables, long4("mov cr3, rax", "mov cr3, rbx", "nop", rax=other << 12, rbx=ROOT << 12))
    assert m.marks["mmu_load"] == 3
    assert m.marks["get_shadow_page.created"] == 5
    # Once the root and once, under the new root, the table both share.
    assert m.marks["get_shadow_page.found"] == 2
    assert m.page(ROOT).root_count == 1 and m.page(other).root_count == 0


def test_a_root_outside_memory_becomes_the_dummy_root_under_which_every_access_faults() -> None:
    m = run(usual(), long4("nop", "nop", root=NOWHERE))
    assert m.marks["root.dummy"] >= 1
    assert [exception[:2] for exception in m.vcpu().exceptions] == [(VECTOR_PF, PFERR_FETCH)] * 2
    assert m.kvm.active_mmu_pages == []


def test_before_the_dummy_root_a_root_outside_memory_was_a_triple_fault() -> None:
    m = run(usual(), long4("nop", "nop", root=NOWHERE), kernel="v6.1")
    assert m.vcpu().userspace_exits == ["shutdown", "shutdown"]
    assert m.marks["root.triple_fault"] == 2


def test_a_dummy_root_is_dropped_when_the_guest_loads_a_real_one() -> None:
    m = run(usual(), long4("mov cr3, rax", "nop", "mov cr3, rbx", "nop", rax=NOWHERE << 12, rbx=ROOT << 12))
    # Every step faults from the first load on: there is no way back.
    assert len(m.vcpu().exceptions) == 3
    assert m.page(ROOT).root_count == 0


@pytest.mark.parametrize("level", [2, 3])
def test_a_large_guest_page_is_mapped_small_through_direct_shadow_pages(level: int) -> None:
    tables = usual().map(1 << 30, 0, PAGE, level=level)
    m = run(tables, long4("mov rcx, [rax]", rax=(1 << 30) + gva(DATA)))
    assert spte_pfn(m.spte((1 << 30) + gva(DATA))) == gfn_to_pfn(DATA)
    direct = [sp for sp in m.kvm.active_mmu_pages if sp.role & 1 << 7]
    assert [(sp.gfn, role_level(sp.role)) for sp in direct] == [(0, at) for at in range(1, level)]
    assert m.marks["fetch.guest_huge_page"] == level - 1
    # Direct pages shadow no table.
    assert m.count() == (5 if level == 2 else 4)


def test_a_large_page_that_becomes_dirty_is_linked_to_a_direct_page_with_write_access() -> None:
    address = (1 << 30) + gva(DATA)
    tables = usual().map(1 << 30, 0, PAGE & ~D, level=2)
    m = run(tables, long4("mov rcx, [rax]", "mov [rax], rcx", "mov rcx, [rbx]", rax=address, rbx=address + 0x1000))
    accesses = sorted(role_access(sp.role) for sp in m.kvm.active_mmu_pages if sp.role & 1 << 7)
    assert accesses == [ACC_ALL & ~ACC_WRITE_MASK, ACC_ALL]
    assert m.spte(address) & SPTE_W and m.spte(address + 0x1000) & SPTE_W
    assert m.passed("flush.remote") == 1
    assert m.kvm.exits["page-fault"] == 4


def test_a_direct_page_is_kept_while_the_rights_stay() -> None:
    address = (1 << 30) + gva(DATA)
    m = run(
        usual().map(1 << 30, 0, PAGE, level=2),
        long4("mov [rax], rcx", "mov [rbx], rcx", rax=address, rbx=address + 0x1000),
    )
    assert m.passed("flush.remote") == 0
    assert len([sp for sp in m.kvm.active_mmu_pages if sp.role & 1 << 7]) == 1


def test_an_access_outside_memory_installs_an_mmio_spte_and_exits_to_userspace() -> None:
    tables = usual().map(gva(DATA), NOWHERE)
    m = run(tables, long4("mov rcx, [rax]", "mov [rax], rdx", rax=gva(DATA, 1), rcx=77, rdx=3))
    assert m.vcpu().userspace_exits == ["mmio read 0x100008 8 0x0", "mmio write 0x100008 8 0x3"]
    assert m.reg("rcx") == 0
    assert m.marks["mmio_spte"] == 1
    assert m.vcpu().retired == 2


def test_the_second_mmio_access_finds_the_page_in_the_cache_and_walks_nothing() -> None:
    tables = usual().map(gva(DATA), NOWHERE)
    m = run(tables, long4("mov rcx, [rax]", "mov rcx, [rax]", rax=gva(DATA)))
    assert "gpte.load" not in m.sites(step=1)[:-10]
    assert [site for site in m.sites(step=1) if site.startswith("mode.atomic")] == []


def test_an_mmio_page_that_fell_out_of_the_cache_is_found_by_a_lockless_walk() -> None:
    tables = usual().map(gva(DATA), NOWHERE).map(gva(DATA2), NOWHERE + 1)
    m = run(tables, long4("mov rcx, [rax]", "mov rcx, [rbx]", "mov rcx, [rax]", rax=gva(DATA), rbx=gva(DATA2)))
    exits = ["mmio read 0x100000 8 0x0", "mmio read 0x101000 8 0x0", "mmio read 0x100000 8 0x0"]
    assert m.vcpu().userspace_exits == exits
    # READING_SHADOW_PAGE_TABLES is announced with a locked exchange.
    assert m.sites(step=2).count("mode.atomic") == 1
    assert m.sites(step=2).count("spte.load") == 4
    assert m.marks["mmio_spte"] == 2


def test_a_guest_without_paging_finds_its_mmio_pages_again_too() -> None:
    outside = NOWHERE << 12
    steps = ("mov ecx, [eax]", "mov ecx, [ebx]", "mov ecx, [eax]")
    m = run(None, flat32(*steps, rax=outside, rbx=outside + 0x1000))
    exits = ["mmio read 0x100000 4 0x0", "mmio read 0x101000 4 0x0", "mmio read 0x100000 4 0x0"]
    assert m.vcpu().userspace_exits == exits


def test_nothing_is_cached_for_mmio_at_page_zero() -> None:
    m = run(usual().map(0, NOWHERE), long4("mov rcx, [rax]", "mov rcx, [rax]", rax=0))
    assert m.vcpu().userspace_exits == ["mmio read 0x100000 8 0x0"] * 2
    assert m.sites(step=1).count("mode.atomic") == 1


def test_the_mmio_cache_is_forgotten_when_the_guest_loads_cr3() -> None:
    tables = usual().map(gva(DATA), NOWHERE)
    m = run(tables, long4("mov rcx, [rax]", "mov rbx, cr3", "mov cr3, rbx", "mov rcx, [rax]", rax=gva(DATA)))
    assert m.sites(step=3).count("mode.atomic") == 1


def test_invlpg_forgets_the_mmio_cache_of_its_page_only() -> None:
    tables = usual().map(gva(DATA), NOWHERE)
    for other, walks in ((DATA, 1), (DATA2, 0)):
        m = run(tables, long4("mov rcx, [rax]", "invlpg [rbx]", "mov rcx, [rax]", rax=gva(DATA), rbx=gva(other)))
        assert m.sites(step=2).count("mode.atomic") == walks
        assert m.log.invalidated == [(0, gva(other))]


def test_a_user_access_to_a_cached_supervisor_mmio_page_still_faults() -> None:
    tables = usual().map(gva(DATA), NOWHERE, P | W | A | D)
    m = run(tables, long4("fep mov rcx, [rax]", "fep mov rcx, [rax]", cpl=3, rax=gva(DATA)))
    assert [exception[:2] for exception in m.vcpu().exceptions] == [(VECTOR_PF, PFERR_PRESENT | PFERR_USER)] * 2


def test_a_store_to_a_read_only_slot_exits_as_mmio_and_changes_nothing() -> None:
    slots = (Slot(0, 0x20), Slot(0x20, 1, readonly=True))
    m = run(usual().identity([0x20]), long4("mov rcx, [rax]", "mov [rax], rbx", rax=gva(0x20), rbx=5), slots=slots)
    assert m.vcpu().userspace_exits == ["mmio write 0x20000 8 0x5"]
    assert m.word(0x20) == 0
    assert not m.spte(gva(0x20)) & (SPTE_W | SPTE_HOST_WRITABLE)
    assert m.marks["faultin.readonly"] == 1


@pytest.mark.parametrize("kernel", ["v6.1", "v6.9", "v6.12"])
def test_a_store_to_a_read_only_slot_that_cannot_be_emulated_is_an_error_not_a_loop(kernel: str) -> None:
    slots = (Slot(0, 0x20), Slot(0x20, 1, readonly=True))
    m = run(usual().identity([0x20]), long4("movss [rax], xmm0", rax=gva(0x20)), slots=slots, kernel=kernel)
    assert m.vcpu().userspace_exits == ["internal-error"]


def test_memory_beyond_four_gigabytes_is_not_reached_by_32_bit_addresses() -> None:
    m = run(None, flat32("mov ecx, [eax]", "fep mov [eax], ecx", rax=0xFFFFFFFE, rcx=1), slots=(Slot(0, 64),))
    # The two upper bytes wrap to address 0, which is memory.
    assert m.vcpu().userspace_exits == ["mmio read 0xfffffffe 2 0x0", "mmio write 0xfffffffe 2 0x0"]
    assert m.vcpu().retired == 2


def test_a_write_protected_page_at_an_address_that_was_mmio_makes_kvm_warn() -> None:
    """A hazard of KVM itself: the MMIO cache goes by gva, and nothing but a flush by the guest empties it.

    kvm_mmu_write_protect_fault takes the coincidence for impossible.
    """
    tables = usual().map(gva(DATA), NOWHERE)
    steps = ("mov rcx, [rax]", "mov [rbx], rdx", "mov [rax], rcx")
    m = run(tables, long4(*steps, rax=gva(DATA), rbx=gva(L1, DATA), rdx=L2 << 12 | PAGE))
    assert m.log.warnings == ["kvm_mmu_write_protect_fault: write-protected gfn in the MMIO cache"]
    # The store goes to the device that used to be there.
    assert m.vcpu().userspace_exits == ["mmio read 0x100000 8 0x0", "mmio write 0x100000 8 0x0"]
    steps = ("mov rcx, [rax]", "mov [rbx], rdx", "invlpg [rax]", "mov [rax], rcx")
    m = run(tables, long4(*steps, rax=gva(DATA), rbx=gva(L1, DATA), rdx=L2 << 12 | PAGE))
    assert m.log.warnings == []


def test_6_1_looks_for_a_self_change_only_where_the_page_may_be_written() -> None:
    tables = usual().map(gva(DATA), L1, P | U | A | D)
    m = run(tables, long4("mov rcx, [rax]", rax=gva(DATA)), kernel="v6.1")
    assert m.passed("page_fault.write_pf_to_sp") == 0
    m = run(tables.map(gva(DATA), L1), long4("mov rcx, [rax]", rax=gva(DATA)), kernel="v6.1")
    assert m.marks["page_fault.write_pf_to_sp"] == 1


def test_smap_and_smep_without_cr0_wp_are_part_of_the_role() -> None:
    tables = Tables().identity([CODE, DATA], P | W | A | D)

    def roles(*features: str) -> int:
        return len({run(tables, long4("nop", flags=flags)).page(ROOT).role for flags in features})

    assert roles("nx", "nx smep", "nx smap", "nx smep smap") == 4
    assert roles("wp nx", "wp nx smep", "wp nx smap") == 1


def test_setting_smap_alone_makes_no_request_to_flush() -> None:
    tables = Tables().identity([CODE, DATA], P | W | A | D)
    m = run(tables, long4("mov cr4, rax", "nop", rax=CR4_PAE | 1 << 21))
    assert m.marks["mmu_load"] == 2
    assert m.log.invalidated == []
    assert m.sites().count("requests.atomic") == 0


def test_eflags_ac_lets_a_supervisor_reach_user_pages_under_smap() -> None:
    tables = Tables().map(gva(CODE), CODE, P | W | A | D).map(gva(DATA), DATA)
    m = machine(tables, long4("mov rcx, [rax]", "fep mov rcx, [rax]", flags="wp nx smap", rax=gva(DATA)))
    m.vcpu().regs.rflags |= FLAG_AC
    assert m.run().vcpu().exceptions == []


def test_two_guests_outside_memory_share_the_dummy_root() -> None:
    m = run(usual(), long4("nop", root=NOWHERE), long4("nop", root=NOWHERE, code=CODE2))
    assert m.marks["root.dummy"] == 2
    assert m.vcpu(0).mmu.root_pfn == m.vcpu(1).mmu.root_pfn == m.kvm.dummy_root_pfn


def test_a_write_to_a_cached_read_only_mmio_page_faults() -> None:
    tables = usual().map(gva(DATA), NOWHERE, P | U | A)
    m = run(tables, long4("mov rcx, [rax]", "fep mov [rax], rcx", cpl=3, rax=gva(DATA)))
    assert m.vcpu().userspace_exits == ["mmio read 0x100000 8 0x0"]
    assert m.vcpu().exceptions[0][:2] == (VECTOR_PF, PFERR_PRESENT | PFERR_USER | PFERR_WRITE)


def test_a_guest_without_paging_that_stores_to_a_read_only_slot_exits_as_mmio() -> None:
    slots = (Slot(0, 0x20), Slot(0x20, 1, readonly=True))
    m = run(None, flat32("mov [eax], ecx", rax=gva(0x20)), slots=slots)
    assert m.vcpu().userspace_exits == ["mmio write 0x20000 4 0x0"]
