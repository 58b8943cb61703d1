"""Emulated writes to guest tables: write protection, what a store zaps, and what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
    P,
    Tables,
    U,
    flat32,
    gva,
    long4,
    run,
    usual,
)

from mmufuzz.case.model import Slot
from mmufuzz.kvm.memslots import gfn_to_pfn
from mmufuzz.kvm.spte import SPTE_W, is_shadow_present, spte_pfn
from mmufuzz.kvm.track import detect_write_misaligned
from mmufuzz.x86.state import FLAG_CF, PFERR_PRESENT, PFERR_WRITE, VECTOR_PF, VECTOR_UD


def test_a_table_is_mapped_read_only() -> None:
    m = run(usual(), long4("mov rcx, [rax]", rax=gva(L1)))
    assert not m.spte(gva(L1)) & SPTE_W


def test_a_store_to_a_table_is_emulated_and_zaps_exactly_the_spte() -> None:
    m = run(
        usual(), long4("mov rcx, [rax]", "mov [rbx], rdx", rax=gva(DATA), rbx=gva(L1, DATA), rdx=DATA2 << 12 | PAGE)
    )
    assert m.marks["page_fault.WRITE_PROTECTED"] == m.marks["emulate.done"] == 1
    assert m.word(L1, DATA) == DATA2 << 12 | PAGE
    assert m.present(m.page(L1)) == [CODE, L1]
    assert m.marks["flush.remote"] == 1
    assert m.passed("unprotect.zapped") == 0


def test_after_an_edited_gpte_and_invlpg_the_guest_sees_the_other_page() -> None:
    steps = ("mov rcx, [rax]", "mov [rbx], rdx", "invlpg [rax]", "mov rcx, [rax]")
    tables = usual().set(DATA, 0, 111).set(DATA2, 0, 222)
    m = run(tables, long4(*steps, rax=gva(DATA), rbx=gva(L1, DATA), rdx=DATA2 << 12 | PAGE))
    assert m.reg("rcx") == 222
    assert spte_pfn(m.spte(gva(DATA))) == gfn_to_pfn(DATA2)


@pytest.mark.parametrize("kind", range(4))
def test_after_an_edited_gpte_and_invpcid_of_any_type_the_guest_sees_the_other_page(kind: int) -> None:
    steps = ("mov rcx, [rax]", "mov [rbx], rdx", "mov [rsi+8], rax", "invpcid rdi, [rsi]", "mov rcx, [rax]")
    tables = usual().set(DATA, 0, 111).set(DATA2, 0, 222)
    addresses = {"rax": gva(DATA), "rbx": gva(L1, DATA), "rsi": gva(DATA + 2)}
    m = run(tables, long4(*steps, rdx=DATA2 << 12 | PAGE, rdi=kind, **addresses))
    assert (m.reg("rcx"), m.kvm.exits["invpcid"]) == (222, 1)


def test_invpcid_of_another_address_need_not_touch_a_page() -> None:
    m = run(usual(), long4("mov rcx, [rax]", "invpcid rdi, [rbx]", "mov rcx, [rax]", rax=gva(DATA), rbx=gva(DATA2)))
    assert m.sites(step=2).count("spte.walk") == 0


def test_a_store_to_an_entry_that_has_no_spte_zaps_nothing() -> None:
    m = run(usual(), long4("mov [rax], rcx", rax=gva(L1, 0x1F)))
    assert m.marks["track_write.locked"] == 1
    assert m.passed("flush.remote") == 0


def test_a_store_over_an_mmio_gpte_clears_the_mmio_spte_without_a_flush() -> None:
    tables = usual().map(gva(DATA), NOWHERE)
    steps = ("mov rcx, [rax]", "mov [rbx], rdx", "invlpg [rax]", "mov [rax], rdx")
    m = run(tables, long4(*steps, rax=gva(DATA), rbx=gva(L1, DATA), rdx=DATA << 12 | PAGE))
    assert m.passed("flush.remote") == 0
    assert m.word(DATA) == DATA << 12 | PAGE
    assert is_shadow_present(m.spte(gva(DATA)))


def test_a_store_to_an_upper_table_unlinks_the_child_and_keeps_it() -> None:
    m = run(usual(), long4("mov [rax], rcx", "nop", rax=gva(L2), rcx=L1 << 12 | TABLE))
    # The level-1 page is found in the hash, not made again.
    assert m.marks["get_shadow_page.created"] == 4
    assert m.marks["get_shadow_page.found"] == 1
    assert len(m.page(L1).parent_ptes) == 1


def test_the_third_write_without_a_fault_through_the_table_floods_it() -> None:
    # One emulated instruction with three stores: nothing faults in between.
    m = run(usual(), long4("fep rep stosq", rax=0, rcx=3, rdi=gva(L2, 8)))
    assert m.marks["track_write.flooding"] == 1
    # The guest goes on at the instruction, with nothing left to repeat, and its fetch shadows the table again.
    assert m.marks["get_shadow_page.created"] == 5


def test_a_fault_through_a_table_resets_its_count_of_writes() -> None:
    write = "mov [rax], rcx"
    read = "mov rdx, [rbx]"
    m = run(usual(), long4(write, write, read, write, write, rax=gva(L2, 8), rbx=gva(DATA)))
    assert m.passed("track_write.flooding") == 0
    assert m.page(L2).gfn == L2


def test_each_write_protected_fault_resets_the_count_of_the_tables_it_walked() -> None:
    m = run(usual(), long4(*["mov [rax], rcx"] * 6, rax=gva(L2, 8)))
    assert m.marks["page_fault.write_tracked"] == 5
    assert m.passed("track_write.flooding") == 0


def test_level_one_tables_do_not_flood() -> None:
    m = run(usual(), long4("fep rep stosq", rax=0, rcx=8, rdi=gva(L1, 0x20)))
    assert m.marks["track_write.locked"] == 8
    assert m.passed("track_write.flooding") == 0


def test_a_misaligned_write_zaps_the_page() -> None:
    m = run(usual(), long4("mov [rax], rcx", "nop", rax=gva(L1, 0x1E) + 4))
    assert m.marks["get_shadow_page.created"] == 5
    assert m.passed("track_write.flooding") == 0


def test_a_write_of_two_bytes_zaps_the_page() -> None:
    m = run(usual(), long4("mov [rax], cx", "nop", rax=gva(L1, 0x1E)))
    assert m.marks["get_shadow_page.created"] == 5


def test_a_write_of_one_aligned_byte_is_an_update_of_the_gpte() -> None:
    m = run(usual(), long4("mov rdx, [rbx]", "mov [rax], cl", rax=gva(L1, DATA), rbx=gva(DATA), rcx=0))
    assert m.marks["get_shadow_page.created"] == 4
    assert DATA not in m.present(m.page(L1))
    assert CODE in m.present(m.page(L1))


def test_a_write_of_one_byte_elsewhere_zaps_the_page() -> None:
    m = run(usual(), long4("mov [rax], cl", "nop", rax=gva(L1, DATA) + 1, rcx=0x40))
    assert m.marks["get_shadow_page.created"] == 5


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 4095), st.sampled_from([1, 2, 4, 8]))
def test_a_write_counts_as_misaligned_unless_it_updates_one_gpte(offset: int, size: int) -> None:
    within_one = offset // 8 == (offset + size - 1) // 8
    assert detect_write_misaligned(offset, size) == (not within_one or size < 4) or (size == 1 and offset % 8 == 0)


def test_four_bytes_that_straddle_two_gptes_leave_the_second_spte_behind() -> None:
    """A hazard of KVM itself: mmu_pte_write_fetch_gpte takes the write for one of eight bytes at the first gPTE."""
    steps = ("mov rcx, [rax]", "mov [rbx], edx", "invlpg [rax]", "mov rcx, [rax]")
    tables = usual().set(DATA2, 0, 111)
    at = gva(L1, DATA2) - 2
    # The low half of the gPTE of DATA2 becomes zero: not present any more.
    m = run(tables, long4(*steps, rax=gva(DATA2), rbx=at, rdx=0))
    assert not m.word(L1, DATA2) & P
    assert is_shadow_present(m.spte(gva(DATA2)))
    assert m.vcpu().exceptions == []
    # A writer without CR4.PAE is not taken to write half gPTEs: the page goes.
    m = run(
        tables,
        long4("mov rcx, [rax]", rax=gva(DATA2)),
        flat32("mov [ebx], edx", rbx=at, rdx=0),
        schedule=["after vcpu1@0.thread.start 1 run vcpu0"],
    )
    assert m.pages(L1) == []


def test_an_emulated_store_across_pages_is_two_stores() -> None:
    tables = usual()
    m = run(tables, long4("mov [rax], rcx", rax=gva(L1) - 4, rcx=0x1122334455667788))
    assert m.word(L1 - 1, 511) >> 32 == 0x55667788
    assert m.word(L1) & 0xFFFFFFFF == 0x11223344
    assert [site for site in m.sites() if site == "emul.store"] == ["emul.store"] * 2


def test_an_emulated_store_whose_second_page_faults_leaves_the_first_half_stored() -> None:
    """KVM's known deviation from hardware (x86.c:emulator_read_write)."""
    tables = usual().map(gva(DATA2), DATA2, P | U | A)
    m = run(tables, long4("fep mov [rax], rcx", rax=gva(DATA2) - 4, rcx=0x1122334455667788))
    assert m.word(DATA, 511) >> 32 == 0x55667788
    assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, PFERR_PRESENT | PFERR_WRITE, gva(DATA2))
    m = run(tables, long4("mov [rax], rcx", rax=gva(DATA2) - 4, rcx=0x1122334455667788))
    assert m.word(DATA, 511) == 0


def test_a_load_across_pages_is_put_together() -> None:
    tables = usual().set(DATA, 511, 0x55667788 << 32).set(DATA2, 0, 0x11223344)
    for text in ("mov rcx, [rax]", "fep mov rcx, [rax]"):
        m = run(tables, long4(text, rax=gva(DATA2) - 4))
        assert m.reg("rcx") == 0x1122334455667788


def test_a_store_of_three_pieces_is_emulated_piece_by_piece() -> None:
    m = run(usual(), long4("fep mov [rax], rcx", rax=gva(DATA) + 3, rcx=(1 << 64) - 1))
    assert m.word(DATA) == 0xFFFFFFFFFF000000
    assert m.word(DATA, 1) == 0xFFFFFF


def test_rep_leaves_the_emulator_with_rip_at_the_instruction_and_nothing_left_to_repeat() -> None:
    m = run(usual(), long4("fep rep movsq", rcx=4, rsi=gva(CODE), rdi=gva(DATA)))
    assert [m.word(DATA, index) for index in range(4)] == [m.word(CODE, index) for index in range(4)]
    assert (m.reg("rcx"), m.reg("rdi")) == (0, gva(DATA, 4))
    assert m.marks["emulate"] == 1
    assert m.passed("emulate.done") == 0
    assert m.vcpu().retired == 1


def test_rep_that_faults_keeps_the_elements_before() -> None:
    m = run(usual(), long4("fep rep stosq", rax=5, rcx=4, rdi=gva(0x14) - 16))
    assert m.vcpu().exceptions[0][:2] == (VECTOR_PF, PFERR_WRITE)
    assert m.reg("rcx") == 2


def test_a_locked_operation_is_emulated_by_cmpxchg() -> None:
    m = run(usual().set(DATA, 0, 40), long4("fep lock xadd [rax], rcx", rax=gva(DATA), rcx=2))
    assert (m.word(DATA), m.reg("rcx")) == (42, 40)
    assert m.marks["emulate.cmpxchg"] == 1


@pytest.mark.parametrize("offset, atomic", [(3, True), (60, False), (4092, False)])
def test_a_locked_operation_is_atomic_unless_it_crosses_a_cache_line(offset: int, atomic: bool) -> None:
    m = run(usual(), long4("fep lock xadd [rax], rcx", rax=gva(DATA) + offset, rcx=0x1234567890ABCDEF))
    assert m.sites().count("emul.atomic") == atomic
    found = m.word(DATA, offset // 8) | m.word(*((DATA, offset // 8 + 1) if offset < 4088 else (DATA2, 0))) << 64
    assert found >> offset % 8 * 8 & (1 << 64) - 1 == 0x1234567890ABCDEF


def test_locked_operations_on_mmio_and_read_only_memory_become_plain_writes() -> None:
    slots = (Slot(0, 0x20), Slot(0x20, 1, readonly=True))
    tables = usual().identity([0x20]).map(gva(DATA), NOWHERE)
    m = run(
        tables, long4("lock xadd [rax], rcx", "lock xadd [rbx], rcx", rax=gva(0x20), rbx=gva(DATA), rcx=2), slots=slots
    )
    exits = ["mmio write 0x20000 8 0x2", "mmio read 0x100000 8 0x0", "mmio write 0x100000 8 0x0"]
    assert m.vcpu().userspace_exits == exits
    assert m.passed("emulate.cmpxchg") == 0


def test_a_locked_operation_that_may_not_write_faults_as_a_plain_write_does() -> None:
    tables = usual().map(gva(DATA), DATA, P | U | A)
    m = run(tables, long4("fep lock xadd [rax], rcx", rax=gva(DATA), rcx=2))
    assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, PFERR_PRESENT | PFERR_WRITE, gva(DATA))


def test_a_cmpxchg_of_sixteen_bytes_fails_after_reading_its_operand() -> None:
    m = run(usual(), long4("fep lock cmpxchg16b [rax]", rax=gva(DATA)))
    assert m.vcpu().userspace_exits == ["internal-error"]
    assert m.marks["emulate.execution_failed"] == 1
    assert m.sites().count("emul.load") == 2
    m = run(usual(), long4("fep lock cmpxchg16b [rax]", cpl=3, rax=gva(DATA)))
    assert m.vcpu().exceptions[0][0] == VECTOR_UD
    m = run(usual(), long4("fep lock cmpxchg16b [rax]", rax=gva(0x30)))
    assert m.vcpu().exceptions[0][:3] == (VECTOR_PF, PFERR_WRITE, gva(0x30))


LOST = "after vcpu0@1.emul.load 1 run vcpu1"


def test_a_cmpxchg_that_loses_makes_the_guest_execute_the_instruction_again() -> None:
    first = long4("mov rdx, [rbx]", "fep lock xadd [rax], rcx", rax=gva(DATA), rbx=gva(DATA2), rcx=2)
    second = long4("mov rdx, [rax]", "mov [rax], rcx", code=2, rax=gva(DATA), rcx=100)
    m = run(usual(), first, second, schedule=[LOST])
    assert m.marks["emulate.cmpxchg_failed"] == 1
    assert (m.word(DATA), m.reg("rcx")) == (102, 100)


def test_a_cmpxchg_that_loses_leaves_the_flags_of_the_lost_attempt_behind() -> None:
    """A hazard of KVM itself: x86_emulate_instruction writes RFLAGS back although nothing else is.

    So LOCK ADC adds the carry of the attempt that failed: 1 + 1 with carry is 3, but the guest gets 2.
    """
    ones = (1 << 64) - 1
    first = long4("mov rdx, [rbx]; stc", "fep lock adc [rax], rcx", rax=gva(DATA), rbx=gva(DATA2), rcx=1)
    second = long4("mov rdx, [rax]", "mov [rax], rcx", code=2, rax=gva(DATA), rcx=1)
    m = run(usual().set(DATA, 0, 5), first, second, schedule=[LOST])
    assert m.marks["emulate.cmpxchg_failed"] == 1
    assert m.word(DATA) == 2
    assert not m.vcpu().regs.rflags & FLAG_CF
    m = run(usual().set(DATA, 0, ones), first)
    assert m.word(DATA) == 1


def test_a_tracked_cmpxchg_zaps_as_a_store_does() -> None:
    steps = ("mov rcx, [rbx]", "lock cmpxchg [rax], rdx")
    tables = usual()
    m = run(tables, long4(*steps, rax=gva(L1, DATA), rbx=gva(DATA), rdx=1))
    # RAX does not match: the old value is written back, which zaps the SPTE all the same.
    assert m.marks["emulate.cmpxchg"] == 1
    assert DATA not in m.present(m.page(L1))
    assert m.word(L1, DATA) == DATA << 12 | PAGE


def test_a_page_used_as_a_table_loses_its_writable_sptes_with_a_flush() -> None:
    """One vCPU's data is another's page table."""
    other = 0x20
    tables = usual().set(other, 0, L3 << 12 | TABLE)
    writer = flat32("mov [eax], ecx", rax=gva(ROOT, 5), rcx=0)
    m = run(tables, writer, long4("mov cr3, rax", "nop", root=other, rax=ROOT << 12))
    assert m.marks["account_shadowed.flush"] == 1
    assert not m.spte(gva(ROOT), 0) & SPTE_W


def test_a_store_before_the_first_table_is_shadowed_takes_no_lock() -> None:
    m = run(None, flat32("fep mov [eax], ecx", rax=gva(DATA), rcx=1))
    assert m.marks["track_write.skipped"] == 1
    # One for the root, one for the fault on the code page.
    assert m.sites().count("mmu_lock.lock") == 2


def test_an_external_write_tracker_makes_stores_go_through_the_emulator() -> None:
    m = run(usual(), long4("mov [rax], rcx", rax=gva(DATA), rcx=3), write_track=[DATA])
    assert m.word(DATA) == 3
    assert m.marks["emulate.done"] == 1
    assert not m.spte(gva(DATA)) & SPTE_W


def test_an_external_write_tracker_brings_a_barrier_of_its_own() -> None:
    """page_track.c:__kvm_page_track_write takes the SRCU read lock between the store and the read of the count."""
    for tracked, fences in (([], 0), ([DATA2], 1)):
        m = run(None, flat32("fep mov [eax], ecx", rax=gva(DATA)), write_track=tracked, revert=["track-write-barrier"])
        sites = m.sites()
        store = sites.index("emul.store")
        assert sites[store : sites.index("indirect_shadow_pages.load")].count("mb.fence") == fences


def test_the_walker_sets_dirty_bits_without_telling_the_shadow_mmu() -> None:
    tables = Tables().identity([CODE]).map(gva(DATA), DATA, PAGE & ~0x40)
    m = run(tables, long4("mov rcx, [rax]", "mov [rax], rcx", rax=gva(DATA)))
    assert m.passed("track_write.locked") == 0
    assert m.marks["walk.set_accessed_dirty"] == 1


def test_a_stale_leaf_that_faults_is_dropped_with_a_flush() -> None:
    """The hazard of the straddling write, one step on: the walk now leads to another frame than the SPTE."""
    low = DATA2 + 1 << 12 | PAGE
    tables = usual().map(gva(DATA2), DATA2, PAGE & ~D).set(DATA2 + 1, 0, 66)
    steps = ("mov rcx, [rax]", "mov [rbx], edx", "add qword [rax], 1")
    m = run(tables, long4(*steps, rax=gva(DATA2), rbx=gva(L1, DATA2) - 2, rdx=(low & 0xFFFF) << 16))
    assert (m.word(DATA2), m.word(DATA2 + 1)) == (0, 67)
    assert m.log.warnings == []
    # The same where the new frame is no memory: what was present makes way for an MMIO SPTE.
    slots = (Slot(0, DATA2 + 1), Slot(DATA2 + 2, 0x20))
    m = run(tables, long4(*steps, rax=gva(DATA2), rbx=gva(L1, DATA2) - 2, rdx=(low & 0xFFFF) << 16), slots=slots)
    assert m.vcpu().userspace_exits == ["mmio read 0x6000 8 0x0", "mmio write 0x6000 8 0x1"]
    assert m.log.warnings == []


def test_a_stale_table_that_faults_is_replaced_with_a_flush() -> None:
    tables = usual().set(L2, 1, L1 << 12 | TABLE).set(0x12, 1, 0x14 << 12 | TABLE)
    tables.set(0x14, 0, DATA << 12 | PAGE).set(0x15, 1, DATA2 << 12 | PAGE).set(DATA2, 0, 9)
    steps = ("mov rcx, [rax]", "mov [rbx], edx", "mov rcx, [rsi]")
    value = (0x15 << 12 & 0xFFFF | TABLE) << 16
    m = run(tables, long4(*steps, rax=1 << 21, rbx=gva(L2, 1) - 2, rsi=(1 << 21) + 0x1000, rdx=value))
    assert m.marks["link.replaced"] == 1
    assert m.reg("rcx") == 9
    assert m.log.warnings == []
