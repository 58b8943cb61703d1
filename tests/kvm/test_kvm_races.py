"""Interleavings that matter, each forced by a schedule of one to three deviations."""

from __future__ import annotations

import pytest
from machines import (
    CODE,
    CODE2,
    DATA,
    L1,
    L2,
    L3,
    PAGE,
    ROOT,
    TABLE,
    A,
    D,
    Machine,
    P,
    Tables,
    U,
    W,
    flat32,
    gva,
    long4,
    npt4,
    run,
    usual,
)

from mmufuzz.host.sched import ENDED
from mmufuzz.kvm.spte import SPTE_W, is_shadow_present
from mmufuzz.x86.state import PFERR_FETCH, VECTOR_PF

CLEAN = P | W | U


def test_an_accessed_bit_lost_to_another_cpu_restarts_the_walk() -> None:
    tables = Tables(table_flags=CLEAN).identity([CODE, CODE2, DATA], CLEAN)
    schedule = ["after vcpu0@0.gpte.load 4 run vcpu1"]
    m = run(tables, long4("nop"), long4("nop", code=CODE2), schedule=schedule)
    assert m.marks["walk.retry"] == 1
    # Twice down the tables, and once more under the lock.
    assert m.sites(0).count("gpte.load") == 12
    assert m.word(ROOT) & A and m.word(L1, CODE) & A


def test_a_gpte_that_changes_between_walk_and_lock_makes_the_fault_retry() -> None:
    writer = flat32("mov ecx, [eax]", "mov [eax], ecx", rax=gva(L1, CODE), rcx=0)
    m = run(usual(), writer, long4("nop"), schedule=["after vcpu1@0.gpte.load 4 run vcpu0"])
    assert m.vcpu(1).retired == 1
    # The root: read again before anything else.
    changer = flat32("mov ecx, [eax]", "mov ebx, 0x11067", "mov [eax], ebx", rax=gva(ROOT))
    m = run(usual(), changer, long4("nop", root=ROOT), schedule=["after vcpu1@0.mmu_lock.lock 1 run vcpu0"])
    assert m.host.status == ENDED


def changed(table: int, index: int, value: int) -> Machine:
    """A vCPU without paging changes a gPTE after another one's walk has read all four."""
    writer = flat32("fep mov ecx, [eax]", "fep mov [eax], ebx", rax=gva(table, index), rbx=value)
    guest = long4("mov rcx, [rax]", "nop", rax=gva(DATA))
    return run(usual(), writer, guest, schedule=["after start run vcpu1", "after vcpu1@0.gpte.load 12 run vcpu0"])


@pytest.mark.parametrize(
    "table, index, mark",
    [(ROOT, 0, "fetch.top_changed"), (L2, 0, "fetch.gpte_changed"), (L1, DATA, "fetch.gpte_changed")],
)
def test_every_gpte_on_the_way_is_read_again_under_the_lock(table: int, index: int, mark: str) -> None:
    m = changed(table, index, TABLE | 0x14000)
    assert m.marks[mark] >= 1
    assert m.marks["page_fault.RETRY"] >= 1


# The theoretical race of kvm_mmu_track_write: a store to a gPTE against the first shadow page of the VM.


def victim_long4(revert: tuple[str, ...], memory_model: str = "tso", kernel: str = "v6.12") -> Machine:
    """The emulated store stays in its buffer while the count is read; meanwhile the tables are shadowed."""
    tables = Tables().identity([CODE, CODE2])
    writer = flat32("fep mov [eax], ecx", code=3, rax=gva(ROOT))
    reader = long4("mov rdx, [rax]", rax=gva(CODE2))
    return run(
        tables,
        writer,
        reader,
        revert=revert,
        memory_model=memory_model,
        kernel=kernel,
        schedule=[
            "after vcpu1@0.thread.start 1 run vcpu0",
            "hold vcpu0@0.emul.store 1",
            "after vcpu0@0.indirect_shadow_pages.load 1 run vcpu1",
        ],
    )


def stale(m: Machine, address: int) -> bool:
    """The root's gPTE is zero, yet its SPTE is present."""
    return m.word(ROOT) == 0 and is_shadow_present(m.spte(address, 1))


@pytest.mark.parametrize("revert", ["track-write-barrier.emulator", "track-write-barrier", "H1"])
def test_without_the_barrier_of_the_emulator_a_stale_spte_stays(revert: str) -> None:
    m = victim_long4((revert,))
    assert m.marks["track_write.skipped"] == 1
    assert stale(m, gva(CODE2))
    assert m.vcpu(1).exceptions == []


@pytest.mark.parametrize("revert", [(), ("track-write-barrier.account",)])
def test_with_the_barrier_of_the_emulator_the_store_is_seen(revert: tuple[str, ...]) -> None:
    m = victim_long4(revert)
    assert m.word(ROOT) == 0
    assert not stale(m, gva(CODE2))
    assert m.vcpu(1).exceptions[0][:2] == (VECTOR_PF, PFERR_FETCH)


def test_under_sequential_consistency_there_is_no_race() -> None:
    assert not stale(victim_long4(("track-write-barrier",), memory_model="sc"), gva(CODE2))


def test_before_the_direct_call_srcu_was_the_emulators_barrier() -> None:
    assert not stale(victim_long4((), kernel="v6.1"), gva(CODE2))
    assert stale(victim_long4((), kernel="v6.8"), gva(CODE2))
    assert stale(victim_long4((), kernel="v6.9"), gva(CODE2))
    assert not stale(victim_long4(("page-track-direct-call", "track-write-barrier")), gva(CODE2))


def victim_npt4(revert: tuple[str, ...], kernel: str = "v6.12") -> Machine:
    """The raised count stays in its buffer while the gPTE is read again."""
    tables = Tables().identity([CODE, CODE2])
    writer = flat32("fep mov [eax], ecx", code=3, rax=gva(ROOT))
    reader = npt4("mov edx, [eax]", rax=gva(CODE2))
    return run(
        tables,
        writer,
        reader,
        revert=revert,
        kernel=kernel,
        schedule=[
            "hold vcpu1@0.indirect_shadow_pages.store 1 until vcpu0@0.indirect_shadow_pages.load 1",
            "after vcpu1@0.thread.yield 1 run vcpu1",
            "after vcpu1@0.gpte.load 6 run vcpu0",
        ],
    )


@pytest.mark.parametrize("revert", [("track-write-barrier.account",), ("track-write-barrier",)])
def test_without_the_barrier_of_account_shadowed_a_stale_spte_stays(revert: tuple[str, ...]) -> None:
    m = victim_npt4(revert)
    assert m.marks["track_write.skipped"] == 1
    assert stale(m, gva(CODE))


@pytest.mark.parametrize("revert", [(), ("track-write-barrier.emulator",)])
def test_with_the_barrier_of_account_shadowed_the_count_is_seen(revert: tuple[str, ...]) -> None:
    m = victim_npt4(revert)
    assert m.marks["track_write.locked"] == 1
    assert not stale(m, gva(CODE))


def test_6_1_is_exposed_through_account_shadowed_alone() -> None:
    assert stale(victim_npt4((), kernel="v6.1"), gva(CODE))


def test_a_locked_operation_of_the_guest_is_atomic_even_if_its_translation_is_evicted() -> None:
    tables = usual().set(DATA, 0, 1)
    first = long4("lock xadd [rax], rcx", rax=gva(DATA) - 4, rcx=0x1_0000_0000)
    second = long4("mov rdx, [rax]", "mov [rax], rcx", code=CODE2, rax=gva(DATA), rcx=7)
    for evict in (gva(DATA), gva(DATA) - 4):
        m = run(tables, first, second, schedule=[f"evict vcpu0 {evict:#x} after vcpu0@0.spte.walk 20"])
        assert m.word(DATA) in (2, 7, 8)


def test_a_translation_made_ahead_of_its_use_is_flushed_with_the_others() -> None:
    tables = usual().set(DATA, 0, 111)
    guest = long4("mov rcx, [rax]", "nop", "mov rdx, [rax]", rax=gva(DATA))
    m = run(
        tables,
        guest,
        schedule=[
            f"evict vcpu0 {gva(DATA):#x} after vcpu0@0.guest.load 1",
            f"fill vcpu0 {gva(DATA):#x} after vcpu0@1.guest.fetch 1",
        ],
    )
    assert (m.reg("rcx"), m.reg("rdx")) == (111, 111)
    # The fill walked without an event of its own; the load finds the page in the TLB.
    assert "spte.walk" not in m.sites(step=2)


def test_a_cpu_fills_its_tlb_only_in_guest_mode() -> None:
    m = run(
        usual(),
        long4("mov rcx, [rax]", rax=gva(DATA)),
        schedule=[f"fill vcpu0 {gva(DATA):#x} after vcpu0@0.mmu_lock.lock 1"],
    )
    assert m.vcpu().retired == 1


def test_a_speculative_walk_sets_accessed_bits_in_the_sptes() -> None:
    guest = flat32("nop", "nop", code=CODE2)
    m = run(None, guest, schedule=["fill vcpu0 0x2000 after vcpu0@0.vcpu.entry 2"])
    assert m.vcpu().retired == 2


def test_a_dirty_bit_is_the_write_that_the_guest_may_miss_to_see() -> None:
    tables = usual().map(gva(DATA), DATA, PAGE & ~D)
    m = run(tables, long4("mov [rax], rcx", rax=gva(DATA)), long4("mov [rax], rcx", code=CODE2, rax=gva(DATA)))
    assert m.word(L1, DATA) & D
    assert m.spte(gva(DATA)) & SPTE_W
    assert L3 in m.kvm.mmu_page_hash


def test_a_write_fault_that_another_cpu_has_mended_is_spurious() -> None:
    """fast_page_fault of a direct MMU: no lock taken, the guest tries again."""
    user = long4("nop", code=3)
    first = flat32("mov ecx, [eax]", "add [eax], ecx", code=CODE, rax=gva(ROOT, 5))
    second = flat32("mov ecx, [eax]", "mov [eax], ecx", code=CODE2, rax=gva(ROOT, 6))
    schedule = ["after vcpu1@1.mode.store 1 run vcpu0", "after vcpu0@1.thread.yield 1 run vcpu0"]
    m = run(Tables().identity([3]), first, second, user, schedule=schedule, kernel="v6.9")
    assert m.marks["page_fault.SPURIOUS"] >= 1
    sites = m.sites(1, step=1)
    at = sites.index("spte.load")
    assert sites[at : at + 4] == ["spte.load", "spte.load", "mode.store", "requests.load"]
    assert [guest.retired for guest in m.kvm.vcpus] == [2, 2, 1]


def test_a_lockless_walk_ends_where_another_cpu_has_zapped() -> None:
    """The write fault was taken through tables that are gone when KVM resets their write counts."""
    writer = long4("mov rcx, [rax]", "mov [rax], rcx", rax=gva(L2, 8))
    other = long4("mov rdx, [rax]", "mov [rax], cx", code=CODE2, rax=gva(L3, 0x20) + 4)
    m = run(usual(), writer, other, schedule=["after vcpu0@1.mode.atomic 1 run vcpu1"])
    assert m.marks["page_fault.write_tracked"] >= 1
    assert m.host.status == ENDED
    assert [guest.retired for guest in m.kvm.vcpus] == [2, 2]


def test_a_reserved_bit_fault_on_a_replaced_mmio_spte_sends_the_guest_back() -> None:
    """handle_mmio_page_fault finds no MMIO SPTE any more."""
    tables = usual().map(gva(DATA), 0x100).map(gva(DATA + 1), 0x101)
    steps = ("mov rcx, [rsi]", "mov rcx, [rax]", "mov rcx, [rbx]", "mov rcx, [rax]")
    reader = long4(*steps, rax=gva(DATA), rbx=gva(DATA + 1), rsi=gva(DATA + 2))
    editor = long4("mov rdx, [rax]", "mov [rax], rcx", code=CODE2, rax=gva(L1, DATA), rcx=DATA << 12 | PAGE)
    schedule = ["after vcpu0@2.thread.yield 1 run vcpu0", "after vcpu0@3.vcpu.exit 1 run vcpu1"]
    m = run(tables, reader, editor, schedule=schedule)
    assert m.vcpu().userspace_exits == ["mmio read 0x100000 8 0x0", "mmio read 0x101000 8 0x0"]
    assert m.marks["page_fault.RETRY"] == 1
    assert m.vcpu().retired == 4


def test_a_speculative_walk_of_a_pdpte_sets_its_accessed_bit() -> None:
    m = run(None, flat32("nop", "nop"), schedule=["fill vcpu0 0x40000000 after vcpu0@0.vcpu.entry 1"])
    pdptes = m.vcpu().mmu.pae_root_pfn << 12
    assert [bool(m.host.memory.read(pdptes + 8 * quarter, 8) & A) for quarter in range(4)] == [True, True, False, False]
