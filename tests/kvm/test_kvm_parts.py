"""Parts of the model on their own: warnings that no guest can cause, roles, SPTE bits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import DATA, L1, L2, ROOT, Machine, Misuse, gva, long4, machine, npt4, usual

from mmufuzz.host.thread import Body
from mmufuzz.kvm.emulator_access import emulator_cmpxchg_emulated
from mmufuzz.kvm.fault import EMULTYPE_ALLOW_RETRY_PF, kvm_mmu_page_fault
from mmufuzz.kvm.fetch import RET_PF_RETRY, PageFault, fetch
from mmufuzz.kvm.memslots import gfn_to_memslot, gfn_to_pfn, gpa_to_hpa, pfn_to_gfn
from mmufuzz.kvm.observer import Observer
from mmufuzz.kvm.page import link_shadow_page
from mmufuzz.kvm.requests import REQ_MMU_FREE_OBSOLETE_ROOTS
from mmufuzz.kvm.rmap import drop_parent_pte, drop_spte, mmu_spte_set, mmu_spte_update, rmap_remove
from mmufuzz.kvm.role import (
    ROLE_DIRECT,
    ROLE_PASSTHROUGH,
    child_role,
    role_access,
    role_level,
    role_text,
    with_level_access,
)
from mmufuzz.kvm.root import kvm_mmu_free_obsolete_roots, kvm_mmu_free_roots
from mmufuzz.kvm.spte import (
    SPTE_A,
    SPTE_D,
    SPTE_MMU_PRESENT,
    SPTE_MMU_WRITABLE,
    SPTE_W,
    is_mmio_spte,
    is_shadow_present,
    make_leaf_spte,
    make_mmio_spte,
    make_nonleaf_spte,
    mmio_spte_gfn,
    spte_has_volatile_bits,
    spte_pfn,
)
from mmufuzz.kvm.structs import INVALID_PFN
from mmufuzz.kvm.walker import GuestWalker, walk_addr
from mmufuzz.kvm.write_track import update_gfn_write_track
from mmufuzz.kvm.x86 import x86_emulate_instruction
from mmufuzz.kvm.zap import kvm_mmu_commit_zap_page

QUICK = settings(derandomize=True, deadline=None, max_examples=100)


class Then(Body):
    """Runs a vCPU to its end and then a probe on the same thread, where the model may be called."""

    def __init__(self, made: Machine, probe: object) -> None:
        self.made = made
        self.first = made.host.threads[0].body
        self.probe = probe

    def run(self) -> None:
        self.first.run()
        assert callable(self.probe)
        self.probe(self.made)


def after(probe: object, guest: object = None) -> Machine:
    """A machine on which ``probe`` is called when the usual guest has read a page."""
    spec = long4("mov rcx, [rax]", rax=gva(DATA)) if guest is None else guest
    made = machine(usual(), spec)  # type: ignore[arg-type]
    made.host.threads[0].body = Then(made, probe)
    return made.run()


def test_a_fault_without_a_root_warns_and_resumes() -> None:
    def probe(m: Machine) -> None:
        kvm_mmu_free_roots(m.vcpu())
        assert m.vcpu().mmu.root_pfn == INVALID_PFN
        assert kvm_mmu_page_fault(m.vcpu(), gva(DATA), 0).code == 1
        walker = walk_addr(m.vcpu(), gva(DATA), 0)
        assert isinstance(walker, GuestWalker)
        fetch(m.vcpu(), PageFault(gva(DATA), 0), walker)
        # Both are fine without one.
        kvm_mmu_free_roots(m.vcpu())
        kvm_mmu_free_obsolete_roots(m.vcpu())

    assert after(probe).log.warnings == ["kvm_mmu_page_fault: no root", "FNAME(fetch): no root"]


def test_an_spte_missing_from_its_rmap_warns() -> None:
    def probe(m: Machine) -> None:
        slot = gfn_to_memslot(m.kvm, DATA)
        assert slot is not None
        slot.rmap[0][DATA].clear()
        rmap_remove(m.kvm, m.page(L1).spte_address(DATA))

    assert after(probe).log.warnings == ["pte_list_remove: SPTE missing from its rmap"]


def test_a_parent_missing_from_its_child_warns() -> None:
    def probe(m: Machine) -> None:
        child = m.page(L1)
        address = m.page(L2).spte_address(0)
        drop_parent_pte(m.kvm, child, address)
        drop_parent_pte(m.kvm, child, address)

    assert after(probe).log.warnings == ["drop_parent_pte: parent SPTE missing from parent_ptes"]


def test_a_write_track_count_below_zero_warns_and_stays() -> None:
    def probe(m: Machine) -> None:
        update_gfn_write_track(m.kvm, DATA, -1)

    assert after(probe).log.warnings == ["update_gfn_write_track: write-track count out of range"]


def test_overwriting_a_present_spte_warns() -> None:
    def probe(m: Machine) -> None:
        address = m.page(L1).spte_address(DATA)
        mmu_spte_set(m.kvm, address, make_nonleaf_spte(1))

    assert after(probe).log.warnings == ["mmu_spte_set: overwrote a present SPTE"]


def test_freeing_a_page_that_is_a_root_warns() -> None:
    def probe(m: Machine) -> None:
        kvm_mmu_commit_zap_page(m.kvm, [m.page(ROOT)])

    assert after(probe).log.warnings == ["kvm_mmu_commit_zap_page: freed a shadow page that is a root"]


def test_linking_over_another_child_unlinks_that_one_with_a_flush() -> None:
    def probe(m: Machine) -> None:
        old = m.page(L1)
        before = m.passed("flush.remote")
        link_shadow_page(m.kvm, m.page(L2).spte_address(0), m.page(ROOT))
        assert old.parent_ptes == []
        assert m.passed("flush.remote") == before + 1

    assert after(probe).marks["link.replaced"] == 1


def test_linking_over_a_nested_child_zaps_that_one() -> None:
    def probe(m: Machine) -> None:
        link_shadow_page(m.kvm, m.page(L2).spte_address(0), m.pages(ROOT)[0])
        assert m.pages(L1) == []

    after(probe, npt4("mov ecx, [eax]", rax=gva(DATA)))


def test_a_flush_is_due_when_an_spte_loses_write_permission_or_its_dirty_or_accessed_bit() -> None:
    writable = make_leaf_spte(1, 7, True, True, False)
    protected = writable & ~(SPTE_W | SPTE_MMU_WRITABLE)
    cases = [
        (writable, protected, True),
        (writable & ~SPTE_W, protected, True),
        (protected, protected & ~SPTE_D, True),
        (protected, protected & ~SPTE_A, True),
        (protected & ~SPTE_D, protected & ~SPTE_D | 4, False),
        (protected, writable, False),
        (0, writable, False),
    ]

    def probe(m: Machine) -> None:
        address = m.page(L1).spte_address(0x100)
        for old, new, flush in cases:
            m.host.memory.write(address, 8, old)
            assert mmu_spte_update(m.kvm, address, new) == flush
            assert m.host.memory.read(address, 8) == new
            m.host.memory.write(address, 8, 0)

    assert after(probe).log.warnings == []


def test_the_observer_does_nothing_unless_told_otherwise() -> None:
    observer = Observer()
    observer.guest_access(0, 0, 0, 0, False)
    observer.guest_fault(0, 0, 0)
    observer.guest_invalidated(0, -1)
    observer.warn("site", "text")
    assert vars(observer) == {} if hasattr(observer, "__dict__") else True


def test_locks_are_taken_in_order_whatever_the_guest_does() -> None:
    made = machine(usual(), long4("mov [rax], cx", "nop", rax=gva(ROOT, 0x20) + 4), host=["zap_all_fast"])
    misuse = Misuse()
    made.kvm.mmu_lock.watcher = made.kvm.slots_lock.watcher = misuse
    made.run()
    assert misuse.texts == []


@QUICK
@given(st.integers(1, 5), st.integers(0, 7), st.integers(0, (1 << 14) - 1))
def test_a_role_keeps_level_and_access(level: int, access: int, other: int) -> None:
    role = with_level_access(other, level, access)
    assert (role_level(role), role_access(role)) == (level, access)
    assert role & ~0x7F == other & ~0x7F


@QUICK
@given(st.integers(2, 5), st.integers(0, 7), st.booleans())
def test_a_child_is_one_level_down_and_never_pass_through(level: int, access: int, direct: bool) -> None:
    role = with_level_access(ROLE_PASSTHROUGH | ROLE_DIRECT, level, 7)
    child = child_role(role, direct, access)
    assert (role_level(child), role_access(child)) == (level - 1, access)
    assert bool(child & ROLE_DIRECT) == direct
    assert not child & ROLE_PASSTHROUGH


def test_a_role_reads_as_level_and_rights() -> None:
    assert role_text(with_level_access(ROLE_DIRECT, 2, 1)) == "L2 --X direct"
    assert role_text(with_level_access(0, 4, 6)) == "L4 UW-"


@QUICK
@given(st.integers(0, (1 << 28) - 1), st.integers(0, 7), st.booleans(), st.booleans(), st.booleans())
def test_an_spte_gives_back_its_frame(pfn: int, access: int, host: bool, writable: bool, prefetch: bool) -> None:
    spte = make_leaf_spte(pfn, access, host, writable, prefetch)
    assert is_shadow_present(spte) and not is_mmio_spte(spte)
    assert spte_pfn(spte) == pfn
    assert bool(spte & SPTE_W) == writable
    assert spte_has_volatile_bits(spte) == prefetch
    assert spte_pfn(make_nonleaf_spte(pfn)) == pfn
    mmio = make_mmio_spte(pfn, access)
    assert is_mmio_spte(mmio) and not is_shadow_present(mmio) and not mmio & SPTE_MMU_PRESENT
    assert mmio_spte_gfn(mmio) == pfn


def test_what_hardware_may_change_is_replaced_atomically() -> None:
    writable = make_leaf_spte(1, 7, True, True, False)
    assert not spte_has_volatile_bits(writable)
    assert spte_has_volatile_bits(writable & ~SPTE_D)
    assert spte_has_volatile_bits(writable & ~SPTE_A)
    assert spte_has_volatile_bits(writable & ~SPTE_W)
    assert not spte_has_volatile_bits(writable & ~(SPTE_W | SPTE_MMU_WRITABLE))


@QUICK
@given(st.integers(0, 1 << 16))
def test_no_gfn_equals_the_frame_behind_it(gfn: int) -> None:
    assert pfn_to_gfn(gfn_to_pfn(gfn)) == gfn != gfn_to_pfn(gfn)
    assert gpa_to_hpa(gfn << 12 | 5) == gfn_to_pfn(gfn) << 12 | 5


@pytest.mark.parametrize("gfn, found", [(0, True), (63, True), (64, False), (-1, False)])
def test_a_gfn_is_in_a_slot_or_not(gfn: int, found: bool) -> None:
    assert (gfn_to_memslot(machine(None, long4()).kvm, gfn) is not None) == found


def test_a_leaf_that_hardware_may_be_changing_is_cleared_atomically() -> None:
    def probe(m: Machine) -> None:
        address = m.page(L1).spte_address(DATA)
        m.host.memory.write(address, 8, m.spte(gva(DATA)) & ~SPTE_A)
        drop_spte(m.kvm, address)
        assert m.sites()[-1] == "spte.atomic"

    assert after(probe).log.warnings == []


def test_a_fault_under_the_dummy_root_asks_for_another_root() -> None:
    """It takes a memslot that appears between the load of the root and the fault."""

    def probe(m: Machine) -> None:
        walker = walk_addr(m.vcpu(), gva(DATA), 0)
        m.vcpu().mmu.root_dummy = True
        assert fetch(m.vcpu(), PageFault(gva(DATA), 0), walker) == RET_PF_RETRY
        m.vcpu().mmu.root_dummy = False
        assert m.host.memory.read(m.vcpu().requests_address, 8) & REQ_MMU_FREE_OBSOLETE_ROOTS

    after(probe)


def test_a_locked_write_of_more_than_eight_bytes_is_a_plain_write() -> None:
    def probe(m: Machine) -> None:
        emulator_cmpxchg_emulated(m.vcpu(), gva(DATA), 16, 0, 5 << 64 | 4)
        assert (m.word(DATA), m.word(DATA, 1)) == (4, 5)

    assert after(probe).passed("emulate.cmpxchg") == 0


def test_a_retry_is_for_page_faults_only() -> None:
    def probe(m: Machine) -> None:
        x86_emulate_instruction(m.vcpu(), 0, EMULTYPE_ALLOW_RETRY_PF)

    m = after(probe)
    assert m.log.warnings == ["x86_emulate_instruction: a retry that is not for a #PF of L1"]
