"""KVM's own bookkeeping, checked each time mmu_lock is released (reference section 6, scope U).

All of it is recomputed from the shadow pages, from the memory they lie in, and compared with the counters and
reverse maps. Pages are few and sparse, so the whole check costs less than keeping a shadow of it up to date would.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import GUEST_FRAMES, PAGE_SHIFT
from mmufuzz.host.thread import Thread
from mmufuzz.kvm.counters import BUFFERED_BOOKS, FLUSH_PENDING
from mmufuzz.kvm.memslots import gfn_to_memslot, gfn_to_pfn, pfn_to_gfn
from mmufuzz.kvm.requests import (
    REQ_MMU_FREE_OBSOLETE_ROOTS,
    REQ_TLB_FLUSH,
    REQ_TLB_FLUSH_CURRENT,
    REQ_TLB_FLUSH_GUEST,
)
from mmufuzz.kvm.role import (
    ACC_WRITE_MASK,
    ROLE_BITS,
    ROLE_CR0_WP,
    ROLE_DIRECT,
    ROLE_PASSTHROUGH,
    role_access,
    role_level,
    role_text,
    with_level_access,
)
from mmufuzz.kvm.spte import (
    SPTE_HOST_WRITABLE,
    SPTE_MMIO,
    SPTE_MMU_PRESENT,
    SPTE_MMU_WRITABLE,
    SPTE_NX,
    SPTE_P,
    SPTE_PS,
    SPTE_U,
    SPTE_W,
)
from mmufuzz.kvm.structs import INVALID_PFN, Kvm, ShadowPage, Vcpu
from mmufuzz.kvm.write_track import write_track_address
from mmufuzz.oracle.sink import Sink
from mmufuzz.x86.paging import MAXPHYADDR, PTE_G

_FRAME: Final = (1 << MAXPHYADDR) - 1 >> PAGE_SHIFT
_RESERVED: Final = (1 << 52) - (1 << MAXPHYADDR)
_WRITABLE: Final = SPTE_W | SPTE_MMU_WRITABLE
_NONLEAF: Final = SPTE_P | SPTE_W | SPTE_U
_NOT_A_GSP: Final = ROLE_DIRECT | ROLE_PASSTHROUGH
_FLUSHES: Final = REQ_TLB_FLUSH | REQ_TLB_FLUSH_CURRENT | REQ_TLB_FLUSH_GUEST

# (HOST_W, MMU_W, W) that a leaf may have (spte.h:check_spte_writable_invariants).
_LEAF_BITS: Final = SPTE_HOST_WRITABLE | SPTE_MMU_WRITABLE | SPTE_W
_LEGAL_LEAVES: Final = (_LEAF_BITS, SPTE_HOST_WRITABLE | SPTE_MMU_WRITABLE, SPTE_HOST_WRITABLE, 0)


class Accounting:
    """One check, ``check``. The first violation ends the run."""

    def __init__(self, kvm: Kvm, sink: Sink) -> None:
        self.kvm = kvm
        self.sink = sink
        self.words = kvm.memory.words
        self._tracked: dict[int, bool] = {}
        """gfns that were ever write-tracked: their counters must come back to zero."""
        for gfn in kvm.options.write_track:
            self._tracked[gfn] = True
        # Filled by one check, for use within it.
        self._gsps: dict[int, ShadowPage] = {}
        """Those that a vCPU may be using, by gfn."""
        self._accounted: list[ShadowPage] = []
        """All gSPs that are not invalid."""
        self._writable: list[tuple[int, int]] = []
        self._leaves = 0
        self._links = 0

    def check(self) -> None:
        """mmu_lock is about to be released by the current thread, or nobody holds it any more."""
        self._gsps = {}
        self._accounted = []
        self._writable = []
        self._leaves = 0
        self._links = 0
        thread = self.kvm.host.current
        for sp in self.kvm.by_pfn.values():
            self._check_page(sp, thread)
        self._check_counts(thread)
        self._check_reverse_maps()
        self._check_write_protection(thread)
        for entry in thread.buffer.pending:
            if entry.address >= GUEST_FRAMES << PAGE_SHIFT:
                self.kvm.counters.near(BUFFERED_BOOKS)
                break

    def _fail(self, invariant: str, what: str, detail: str) -> None:
        kind = "write-protection" if invariant in ("I7", "I8", "I33") else "accounting"
        self.sink.violated(kind, f"{invariant}: {what}", detail)

    def _read(self, thread: Thread, address: int) -> int:
        """A word as ``thread`` sees it; unlike Thread.peek it leaves no trace and drains nothing."""
        pending = thread.buffer.pending
        position = len(pending) - 1
        while position >= 0:
            if pending[position].address == address:
                return pending[position].value
            position -= 1
        return self.words.get(address >> 3, 0)

    # One page.

    def _check_page(self, sp: ShadowPage, thread: Thread) -> None:
        role = sp.role
        base = sp.pfn << PAGE_SHIFT
        for index in sp.used:
            address = base | index << 3
            # The common case of _read, inline: this is the hottest loop of all oracles.
            spte = self._read(thread, address) if thread.buffer.pending else self.words.get(address >> 3, 0)
            if spte & SPTE_MMU_PRESENT == 0:
                if spte and not spte & SPTE_MMIO:
                    self._fail("I22", "SPTE neither zero, present nor MMIO", f"{address:#x} holds {spte:#x}")
                continue
            if sp.invalid:
                self._fail("I20", "an invalid shadow page has a present SPTE", _page_text(sp))
            if spte & (PTE_G | _RESERVED) or not spte & SPTE_P:
                self._fail("I22", "SPTE with a reserved or global bit, or without P", f"{address:#x} holds {spte:#x}")
            if role & 15 == 1 or spte & SPTE_PS:
                self._check_leaf(sp, index, address, spte)
            else:
                self._check_link(sp, index, address, spte)
        if sp.invalid:
            if sp.parent_ptes or sp.unsync:
                self._fail("I20", "an invalid shadow page has parents or is unsync", _page_text(sp))
        elif not role & _NOT_A_GSP:
            self._accounted.append(sp)
            if sp.mmu_valid_gen == self.kvm.mmu_valid_gen and not sp.unsync:
                self._gsps[sp.gfn] = sp

    def _check_leaf(self, sp: ShadowPage, index: int, address: int, spte: int) -> None:
        level = sp.role & 15
        if spte & _LEAF_BITS not in _LEGAL_LEAVES:
            self._fail("I23", "HOST_W, MMU_W and W of a leaf do not go together", f"{address:#x} holds {spte:#x}")
        if sp.role & ROLE_DIRECT:
            gfn = sp.gfn + (index << 9 * (level - 1))
        elif index in sp.shadowed_gfn:
            gfn = sp.shadowed_gfn[index]
        else:
            self._fail("I16", "a leaf SPTE without its gfn", f"{address:#x} in {_page_text(sp)}")
            return
        if spte >> PAGE_SHIFT & _FRAME != gfn_to_pfn(gfn):
            self._fail("I24", "a leaf SPTE maps another frame than its gfn's", f"{address:#x} holds {spte:#x}")
        slot = gfn_to_memslot(self.kvm, gfn)
        if slot is None or slot.rmap[level - 1].get(gfn, []).count(address) != 1:
            self._fail("I16", "a leaf SPTE is not exactly once in its rmap", f"{address:#x} maps gfn {gfn:#x}")
        self._leaves += 1
        if spte & _WRITABLE:
            self._writable.append((gfn, address))

    def _check_link(self, sp: ShadowPage, index: int, address: int, spte: int) -> None:
        if spte & _NONLEAF != _NONLEAF or spte & SPTE_NX:
            self._fail("I22", "a non-leaf SPTE restricts rights", f"{address:#x} holds {spte:#x}")
        child = self.kvm.by_pfn.get(spte >> PAGE_SHIFT & _FRAME)
        if child is None:
            self._fail("I18", "a non-leaf SPTE points at no live shadow page", f"{address:#x} holds {spte:#x}")
            return
        if child.parent_ptes.count(address) != 1:
            self._fail("I15", "a parent SPTE is not exactly once in parent_ptes", f"{address:#x}, {_page_text(child)}")
        self._links += 1
        if child.invalid:
            self._fail("I18", "an SPTE links an invalid child", _page_text(child))
        expected = with_level_access(sp.role, (sp.role & 15) - 1, role_access(child.role)) & ~ROLE_PASSTHROUGH
        if (expected ^ child.role) & ~ROLE_DIRECT:
            self._fail("I18", "child's level or role bits do not follow its parent's", _link_text(sp, index, child))
        surplus = role_access(child.role) & ~role_access(sp.role)
        if child.role & ROLE_DIRECT:
            if not sp.role & ROLE_CR0_WP:
                surplus &= ~ACC_WRITE_MASK
            if sp.role & ROLE_DIRECT and child.gfn != sp.gfn + (index << 9 * ((sp.role & 15) - 1)):
                self._fail("I19", "a direct child for another range", _link_text(sp, index, child))
        elif sp.role & ROLE_DIRECT:
            self._fail("I18", "a direct page links an indirect one", _link_text(sp, index, child))
        elif sp.role & ROLE_PASSTHROUGH and child.gfn != sp.gfn:
            self._fail("I18", "a pass-through root links another table", _link_text(sp, index, child))
        if surplus:
            self._fail("I18", "child with access that its parent lacks", _link_text(sp, index, child))

    # All pages together.

    def _check_counts(self, thread: Thread) -> None:
        kvm = self.kvm
        pinned = 0
        valid: dict[int, bool] = {}
        for sp in kvm.by_pfn.values():
            if sp.invalid:
                if sp.root_count:
                    pinned += 1
            elif sp.mmu_valid_gen == kvm.mmu_valid_gen:
                key = sp.gfn << ROLE_BITS | sp.role
                if key in valid:
                    self._fail("I5", "two valid shadow pages for one gfn and role", _page_text(sp))
                valid[key] = True
        gsps = len(self._accounted)
        count = self._read(thread, kvm.indirect_shadow_pages)
        if count != gsps:
            self._fail("I1", "indirect_shadow_pages is wrong", f"it is {count} with {gsps} gSPs that are not invalid")
        if kvm.n_used_mmu_pages != len(kvm.active_mmu_pages) + pinned:
            detail = f"{kvm.n_used_mmu_pages} with {len(kvm.active_mmu_pages)} active and {pinned} pinned"
            self._fail("I2", "n_used_mmu_pages is wrong", detail)
        self._check_write_track(thread)
        self._check_disallow_lpage()
        self._check_roots()

    def _check_write_track(self, thread: Thread) -> None:
        for sp in self._accounted:
            if sp.role & 15 > 1:
                self._tracked[sp.gfn] = True
        for gfn in self._tracked:
            wanted = 1 if gfn in self.kvm.options.write_track else 0
            for sp in self._accounted:
                if sp.gfn == gfn and sp.role & 15 > 1:
                    wanted += 1
            found = self._read(thread, write_track_address(gfn))
            if found != wanted:
                self._fail("I3", "a write-track count is wrong", f"gfn {gfn:#x}: {found}, not {wanted}")

    def _check_disallow_lpage(self) -> None:
        for slot in self.kvm.slots:
            end = slot.base_gfn + slot.npages
            inside = 0
            for sp in self._accounted:
                if slot.base_gfn <= sp.gfn < end:
                    inside += 1
            for level in (2, 3):
                shift = 9 * (level - 1)
                counted = 0
                for huge, found in slot.disallow_lpage[level - 2].items():
                    wanted = 0
                    for sp in self._accounted:
                        if sp.gfn >> shift == huge and slot.base_gfn <= sp.gfn < end:
                            wanted += 1
                    counted += wanted
                    if found != wanted:
                        self._fail("I4", "disallow_lpage is wrong", f"level {level}, {huge:#x}: {found}")
                if counted != inside:
                    self._fail("I4", "disallow_lpage is wrong", f"level {level}: {inside - counted} not counted")

    def _check_roots(self) -> None:
        roots = 0
        for vcpu in self.kvm.vcpus:
            roots += (vcpu.mmu.root_sp is not None) + len(vcpu.mmu.pae_roots)
        for sp in self.kvm.by_pfn.values():
            users = 0
            for vcpu in self.kvm.vcpus:
                if vcpu.mmu.root_sp is sp:
                    users += 1
                for quarter in vcpu.mmu.pae_roots:
                    if quarter is sp:
                        users += 1
            roots -= users
            if sp.root_count != users:
                self._fail("I6", "root_count is wrong", f"{_page_text(sp)}: {sp.root_count}, not {users}")
            elif sp.invalid and sp.root_count == 0:
                self._fail("I6", "an invalid shadow page that is no root was not freed", _page_text(sp))
        if roots:
            self._fail("I6", "a vCPU's root was freed", f"{roots} roots are no live shadow pages")

    def _check_reverse_maps(self) -> None:
        """With ``_check_leaf`` and ``_check_link``: as many entries as SPTEs means there are no others."""
        entries = 0
        for slot in self.kvm.slots:
            for heads in slot.rmap:
                for head in heads.values():
                    entries += len(head)
        if entries != self._leaves:
            self._fail("I16", "an rmap entry without a present leaf SPTE", f"{entries} entries, {self._leaves} leaves")
        parents = 0
        for sp in self.kvm.by_pfn.values():
            parents += len(sp.parent_ptes)
        if parents != self._links:
            self._fail("I15", "a parent_ptes entry without a present SPTE", f"{parents} entries, {self._links} links")

    def _check_write_protection(self, thread: Thread) -> None:
        for gfn, address in self._writable:
            if gfn in self._gsps:
                self._fail("I8", "a shadowed table is mapped writable", f"SPTE {address:#x} maps gfn {gfn:#x}")
            if self._read(thread, write_track_address(gfn)):
                self._fail("I7", "a write-tracked gfn is mapped writable", f"SPTE {address:#x} maps gfn {gfn:#x}")
        if self._gsps or self._tracked:
            for vcpu in self.kvm.vcpus:
                self._check_tlb(vcpu, thread)

    def _check_tlb(self, vcpu: Vcpu, thread: Thread) -> None:
        """I33: MMU_W is cleared together with a flush, so no vCPU can go on using a writable translation."""
        for entry in vcpu.tlb.entries():
            if not entry.writable:
                continue
            gfn = pfn_to_gfn(entry.pfn)
            if gfn not in self._gsps and (gfn not in self._tracked or not self._read(thread, write_track_address(gfn))):
                continue
            if not vcpu.in_guest and self._will_flush(vcpu):
                self.kvm.counters.near(FLUSH_PENDING)
                return
            self._fail(
                "I33",
                "a TLB entry for a write-protected gfn outlives mmu_lock",
                f"{vcpu.thread.name}, gva {entry.vpn << PAGE_SHIFT:#x}, gfn {gfn:#x}",
            )

    def _will_flush(self, vcpu: Vcpu) -> bool:
        """True if the vCPU flushes before it runs guest code again."""
        requests = self.words.get(vcpu.requests_address >> 3, 0)
        if requests & _FLUSHES or vcpu.mmu.root_pfn == INVALID_PFN:
            return True
        root = vcpu.mmu.root_sp
        if not requests & REQ_MMU_FREE_OBSOLETE_ROOTS:
            return False
        return root is None or root.invalid or root.mmu_valid_gen != self.kvm.mmu_valid_gen


def _page_text(sp: ShadowPage) -> str:
    return f"shadow page of gfn {sp.gfn:#x} {role_text(sp.role)} (level {role_level(sp.role)})"


def _link_text(sp: ShadowPage, index: int, child: ShadowPage) -> str:
    return f"{_page_text(sp)} [{index}] -> {_page_text(child)}"
