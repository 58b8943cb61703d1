"""Requests, kicks and remote flushes; zap-all, obsolete roots and reclaim."""

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
    PAGE,
    ROOT,
    TABLE,
    Misuse,
    flat32,
    gva,
    long4,
    machine,
    run,
    usual,
)

from mmufuzz.host.memory import MemoryWatcher
from mmufuzz.kvm.requests import REQ_MMU_FREE_OBSOLETE_ROOTS, REQ_TLB_FLUSH
from mmufuzz.kvm.structs import EXITING_GUEST_MODE, OUTSIDE_GUEST_MODE

ZAP = "zap_all_fast"

LATE = ("after host0@1.slots_lock.lock 1 run vcpu0", "after vcpu0@0.thread.yield 2 run vcpu0")
"""The host thread runs one operation at the vCPU's first fault, and stops at the start of the next."""


class Freed(MemoryWatcher):
    """Collects accesses to memory that KVM has freed."""

    def __init__(self) -> None:
        self.touched: list[int] = []

    def freed_frame_accessed(self, address: int, write: bool) -> None:
        self.touched.append(address)


def test_zap_all_fast_obsoletes_every_root_and_the_vcpu_loads_a_fresh_one() -> None:
    m = run(usual(), long4("nop", "nop"), host=[ZAP])
    assert m.marks["root.freed_obsolete"] == 1
    assert m.marks["mmu_load"] == 2
    assert m.kvm.mmu_valid_gen == 1
    assert all(sp.mmu_valid_gen == 1 for sp in m.kvm.active_mmu_pages)
    assert m.kvm.zapped_obsolete_pages == []
    assert m.count() == m.kvm.n_used_mmu_pages == 4


def test_a_root_page_outlives_zap_all_until_its_vcpu_lets_go_of_it() -> None:
    m = run(usual(), long4("nop"), host=[ZAP, ZAP], schedule=LATE)
    # The vCPU ended first and never frees its root: invalid, pinned and still hashed.
    (root,) = m.kvm.mmu_page_hash[ROOT]
    assert root.invalid and root.root_count == 1 and not root.active
    assert m.kvm.n_used_mmu_pages == 1
    assert m.count() == 0


def test_zap_all_fast_twice_toggles_the_generation_back() -> None:
    m = run(usual(), long4("nop", "nop"), host=[ZAP, ZAP])
    assert m.kvm.mmu_valid_gen == 0
    assert m.marks["host.zap_all_fast"] == 2


def test_a_vcpu_in_guest_mode_is_interrupted_and_waited_for() -> None:
    m = run(usual(), long4("nop", "nop"), host=[ZAP, ZAP], schedule=[*LATE, "after vcpu0@0.guest.fetch 1 run host0"])
    sites = m.sites(1, step=1)
    assert "ipi.send" in sites
    assert sites.index("thread.wait") > sites.index("ipi.send")
    assert m.kvm.exits["external-interrupt"] == 1


def test_a_vcpu_outside_guest_mode_is_not_interrupted() -> None:
    m = run(usual(), long4("nop"), host=[ZAP], schedule=["after start run host0"])
    assert "ipi.send" not in m.sites(1)
    assert "mode.atomic" in m.sites(1)


def test_a_request_that_arrives_before_entry_cancels_it() -> None:
    m = run(usual(), long4("nop"), host=[ZAP], schedule=["after vcpu0@0.mb.fence 2 run host0"])
    assert m.marks["entry.cancelled"] >= 1
    assert m.vcpu().retired == 1
    assert m.host.memory.read(m.vcpu().mode_address, 8) == OUTSIDE_GUEST_MODE


def test_entry_is_cancelled_between_the_store_of_the_mode_and_the_check_of_the_requests() -> None:
    m = run(usual(), long4("nop"), host=[ZAP], schedule=["after vcpu0@0.mode.store 1 run host0"])
    assert m.marks["entry.cancelled"] == 1
    sites = m.sites(0)
    assert "vcpu.entry" not in sites[: sites.index("mode.load") + 4]


def test_a_request_seen_only_by_the_mode_cancels_the_entry_as_well() -> None:
    # The requester has marked the vCPU as exiting when the vCPU looks.
    m = run(usual(), long4("nop"), host=[ZAP], schedule=["after vcpu0@0.mode.store 1 run host0"])
    assert ("mode.load", EXITING_GUEST_MODE) in m.values()


def test_the_vcpu_that_makes_the_request_does_not_interrupt_itself() -> None:
    m = run(usual(), long4("mov rcx, [rax]", "mov [rbx], rdx", rax=gva(DATA), rbx=gva(L1, DATA)))
    assert m.marks["flush.remote"] == 1
    assert "ipi.send" not in m.sites()
    # But it flushes before it runs the guest again.
    m = run(usual(), long4("mov rcx, [rax]", "mov [rbx], rdx", "nop", rax=gva(DATA), rbx=gva(L1, DATA)))
    assert m.sites(step=2).count("requests.atomic") == 1


def test_a_flush_waits_for_a_lockless_walk_of_the_shadow_tables() -> None:
    """mode is READING_SHADOW_PAGE_TABLES with interrupts off, so the acknowledgement comes after the walk."""
    reader = long4("mov [rax], rcx", "mov [rax], rcx", rax=gva(L2, 8))
    watcher = Freed()
    m = machine(usual(), reader, host=[ZAP, ZAP], schedule=[*LATE, "after vcpu0@1.mode.atomic 1 run host0"])
    m.host.memory.watcher = watcher
    m.run()
    assert m.marks["page_fault.write_tracked"] == 1
    assert "ipi.send" in m.sites(1, step=1) and "thread.wait" in m.sites(1, step=1)
    assert m.host.memory.freed and watcher.touched == []
    assert m.vcpu().retired == 2


def test_zap_all_takes_slots_lock_outside_mmu_lock() -> None:
    m = machine(usual(), long4("nop"), host=[ZAP])
    misuse = Misuse()
    m.kvm.mmu_lock.watcher = m.kvm.slots_lock.watcher = misuse
    m.run()
    sites = m.sites(1)
    assert [site for site in sites if "lock" in site] == [
        "slots_lock.lock",
        "mmu_lock.lock",
        "mmu_lock.unlock",
        "slots_lock.unlock",
    ]
    assert misuse.texts == []


def test_a_fault_that_finds_its_root_obsolete_is_retried() -> None:
    m = run(usual(), long4("nop"), host=[ZAP], schedule=["after vcpu0@0.gpte.load 4 run host0"])
    assert m.marks["page_fault.stale"] == 1
    assert m.marks["page_fault.RETRY"] == 1
    assert m.vcpu().retired == 1


def test_the_special_root_of_a_direct_mmu_is_stale_while_a_request_is_pending() -> None:
    m = run(None, flat32("nop"), host=[ZAP], schedule=["after vcpu0@0.vcpu.exit 1 run host0"])
    assert m.marks["page_fault.stale"] == 1
    assert m.marks["root.freed_obsolete"] == 1
    assert m.vcpu().retired == 1


def test_a_root_that_is_still_good_survives_a_request_made_for_another() -> None:
    other = 0x20
    tables = usual().set(other, 0, L3 << 12 | TABLE)
    first = long4("mov [rax], cx", "nop", rax=gva(ROOT, 0x20) + 4)
    second = long4("mov rdx, [rax]", "mov rdx, [rbx]", "nop", root=other, code=CODE2, rax=gva(DATA), rbx=gva(DATA2))
    m = run(tables, first, second)
    assert m.marks["zap.root"] == m.marks["root.freed_obsolete"] == 1
    # The other vCPU looked at its root, too, and kept it.
    assert m.sites(1).count("role.load") == 1
    assert m.marks["mmu_load"] == 3
    assert m.vcpu(1).mmu.root_sp is m.page(other)


def test_zap_all_drops_the_pages_of_a_direct_mmu_with_their_rmaps() -> None:
    m = run(None, flat32("nop", "nop"), host=[ZAP])
    assert m.log.warnings == []
    assert [len(heads) for heads in m.kvm.slots[0].rmap[0].values()] == [1]


def test_zapping_a_root_asks_every_vcpu_to_look_at_its_own() -> None:
    m = machine(usual(), long4("mov [rax], cx", rax=gva(ROOT, 0x20) + 4), long4("nop", code=CODE2)).run()
    assert m.marks["zap.root"] == 1
    assert all(guest.retired == 1 for guest in m.kvm.vcpus)


def test_a_vcpu_that_ended_keeps_the_requests_it_will_never_service() -> None:
    m = run(usual(), long4("nop"), host=[ZAP, ZAP], schedule=LATE)
    pending = m.host.memory.read(m.vcpu().requests_address, 8)
    assert pending & REQ_MMU_FREE_OBSOLETE_ROOTS and pending & REQ_TLB_FLUSH


def test_reclaim_zaps_the_oldest_pages_that_are_no_roots() -> None:
    tables = usual()
    for number in range(1, 6):
        tables.map(number << 39, DATA)
    reads = [f"mov rcx, [{name}]" for name in ("rax", "rbx", "rdx", "rsi", "rdi")]
    regs = {name: number << 39 for number, name in enumerate(("rax", "rbx", "rdx", "rsi", "rdi"), 1)}
    m = run(tables, long4(*reads, **regs), max_pages=12)
    assert m.marks["reclaim"] >= 1
    assert m.passed("reclaim.enospc") == 0
    assert m.kvm.n_used_mmu_pages <= 12
    assert m.page(ROOT).root_count == 1
    assert m.vcpu().retired == 5


def test_without_a_free_shadow_page_the_fault_goes_to_userspace() -> None:
    m = run(usual(), long4("nop", "nop"), max_pages=1)
    assert m.marks["reclaim.enospc"] == 2
    assert m.vcpu().userspace_exits == ["enospc", "enospc"]
    assert m.vcpu().retired == 0


def test_without_a_shadow_page_for_a_root_the_entry_goes_to_userspace() -> None:
    m = run(usual(), long4("nop"), flat32("nop", "nop"), max_pages=1, schedule=["after start run vcpu0"])
    assert m.vcpu(1).userspace_exits == ["enospc", "enospc"]


def test_a_budget_that_the_roots_have_overdrawn_counts_as_empty() -> None:
    m = run(None, flat32("nop"), max_pages=2)
    assert m.kvm.n_used_mmu_pages == 4
    assert m.vcpu().userspace_exits == ["enospc"]


@pytest.mark.parametrize(
    "at", ["thread.start 1", "mmu_lock.unlock 1", "vcpu.entry 1", "vcpu.exit 1", "spte.store 2", "mmu_lock.unlock 2"]
)
def test_zap_all_at_any_moment_leaves_the_bookkeeping_right(at: str) -> None:
    tables = usual()
    m = run(
        tables, long4("mov rcx, [rax]", "nop", rax=gva(DATA)), host=[ZAP], schedule=[f"after vcpu0@0.{at} run host0"]
    )
    assert m.vcpu().retired == 2
    assert m.log.warnings == []
    shadowing = [sp for bucket in m.kvm.mmu_page_hash.values() for sp in bucket if not sp.invalid]
    assert m.count() == len(shadowing)


def test_edits_on_one_vcpu_reach_the_other_through_a_remote_flush() -> None:
    """The editor zaps; the reader, kicked out of the guest, flushes its TLB and faults."""
    tables = usual().set(DATA, 0, 111).set(DATA2, 0, 222)
    editor = long4("mov rcx, [rax]", "mov [rbx], rdx", rax=gva(DATA), rbx=gva(L1, DATA), rdx=DATA2 << 12 | PAGE)
    # The interrupt is taken between instructions, the one in flight completes: hence the NOP.
    reader = long4("mov rcx, [rax]", "nop", "mov rdx, [rax]", code=CODE2, rax=gva(DATA))
    m = run(tables, editor, reader, schedule=["after vcpu1@0.guest.load 1 run vcpu0"])
    assert (m.reg("rcx", 1), m.reg("rdx", 1)) == (111, 222)
    assert L2 in m.kvm.mmu_page_hash and CODE in m.present(m.page(L1))


def test_a_budget_used_up_by_the_roots_of_others_sends_the_entry_to_userspace() -> None:
    m = run(usual(), flat32("nop"), long4("nop"), max_pages=4)
    assert m.vcpu(1).userspace_exits == ["enospc"]


def test_reclaim_stops_when_it_has_enough() -> None:
    tables = usual()
    steps = []
    for number in range(1, 14):
        tables.map(number << 39, DATA)
        steps.append(f"mov rax, {number << 39:#x}; mov rcx, [rax]")
    m = run(tables, long4(*steps), max_pages=42)
    assert m.marks["reclaim"] == 1
    # 38 pages were in use, so that 21 of the oldest went.
    assert m.vcpu().retired == 26
    assert m.kvm.n_used_mmu_pages == m.count() < 42
    assert m.log.warnings == []
