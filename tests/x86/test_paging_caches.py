"""Caches against the walks that were possible: what no invalidation may leave behind (SDM vol. 3, 4.10)."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from paging_phys import ALL, ON, OTHER_ROOT, ROOT, Phys, slot

from mmufuzz.x86 import PagingRegisters, walk
from mmufuzz.x86.paging import (
    ACCESS_FETCH,
    ACCESS_READ,
    ACCESS_USER,
    ACCESS_WRITE,
    CR4_PCIDE,
    INVPCID_ADDRESS,
    INVPCID_ALL,
    INVPCID_ALL_GLOBAL,
    INVPCID_CONTEXT,
    PTE_G,
    PTE_NX,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    is_leaf,
    leaf_frame,
    permitted,
    pte_frame,
)
from mmufuzz.x86.paging_unit import (
    CR3_KEEP,
    PagingUnit,
)
from mmufuzz.x86.state import (
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LME,
    EFER_NX,
    FLAG_AC,
    Fault,
)

GLOBAL = ALL | PTE_G


class Caching(RuleBasedStateMachine):
    """Never a translation that no walk since the last invalidation covering it would have given; never a stale fault.

    The moments of the last invalidations are kept by rules of SDM 4.10.4.1 written down here a second time. Each level
    has two tables, and no two stores map the same frame, so that what is stale shows.
    """

    TABLES = {4: (ROOT, OTHER_ROOT), 3: (3, 6), 2: (4, 7), 1: (5, 8)}
    ADDRESSES = (0, 0x1000, 0x20_0000, 0x4000_1000)

    def __init__(self) -> None:
        super().__init__()
        self.phys = Phys()
        self.unit = PagingUnit(self.phys)
        self.unit.write_efer(EFER_LME | EFER_NX)
        self.unit.write_cr4(CR4_PAE)
        self.unit.write_cr3(ROOT << 12)
        self.unit.write_cr0(ON)
        self.unit.write_cr4(CR4_PAE | CR4_PCIDE | CR4_PGE)
        self.frames = 0x100
        for level, which, gva in itertools.product((4, 3, 2, 1), (0, 1), self.ADDRESSES):
            # Every other page is global.
            self.write(level, which, gva, GLOBAL if gva & 0x1000 and level == 1 else ALL, which)
        # When a PCID's translations, those of one page in it, all global ones, and one of these were last invalidated.
        self.context: dict[int, int] = {}
        self.page: dict[tuple[int, int], int] = {}
        self.globals = 0
        self.global_page: dict[int, int] = {}
        self.roots: list[tuple[int, int, int]] = [(0, 0, ROOT)]
        """(time, pcid, root) of each MOV to CR3."""

    addresses = st.sampled_from(ADDRESSES)
    pcids = st.sampled_from([0, 5])
    tables = st.sampled_from([0, 1])

    def now(self) -> int:
        self.phys.time += 1
        return self.phys.time

    def write(self, level: int, which: int, gva: int, flags: int, below: int) -> None:
        """Store the entry of ``gva`` in one of the tables of ``level``; ``below``: which of the next it leads to."""
        if level == 1 or flags & PTE_PS:
            self.frames += 1
            frame = self.frames << 9 * (level - 1)
        else:
            frame = self.TABLES[level - 1][below]
        self.phys.store(slot(self.TABLES[level][which], gva, level), frame << 12 | flags)

    # (gva, level, flags): what changes before an operation; (kind, cpl, rflags): how it is looked at afterwards.
    changes = st.tuples(
        addresses,
        st.sampled_from([1, 1, 1, 2, 3, 4]),
        st.sampled_from(
            [ALL] * 4 + [GLOBAL] * 3 + [PTE_P, ALL | PTE_NX, PTE_P | PTE_U, PTE_P | PTE_W, ALL | PTE_PS, 0]
        ),
    )
    looks = st.tuples(
        st.sampled_from([ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH]),
        st.sampled_from([0, 3]),
        st.sampled_from([2, FLAG_AC | 2]),
    )

    @rule(change=changes, which=tables, below=tables)
    def store(self, change: tuple[int, int, int], which: int, below: int) -> None:
        gva, level, flags = change
        self.write(level, which, gva, flags & ~PTE_PS if level in (1, 4) else flags, below)

    def use_and_change(self, change: tuple[int, int, int]) -> int:
        """Have an address cached, perhaps, and then its entries of one level changed in both tables. The address."""
        gva, level, _ = change
        self.access(gva, (ACCESS_READ, 0, FLAG_AC | 2))
        for which in (0, 1):
            old = self.phys.words[slot(self.TABLES[level][which], gva, level)]
            below = level > 1 and old >> 12 == self.TABLES[level - 1][0]
            self.store(change, which, int(below))
        return gva

    @rule(gva=addresses)
    def evict(self, gva: int) -> None:
        self.unit.tlb.evict(gva >> 12)

    @rule(gva=addresses)
    def fill(self, gva: int) -> None:
        self.unit.fill(gva, ACCESS_READ, cpl=3)

    @rule(root=tables, pcid=pcids, keep=st.booleans(), change=changes, look=looks)
    def move_to_cr3(
        self, root: int, pcid: int, keep: bool, change: tuple[int, int, int], look: tuple[int, int, int]
    ) -> None:
        gva = self.use_and_change(change)
        if not self.unit.cr4 & CR4_PCIDE:
            pcid, keep = 0, False
        self.unit.write_cr3(self.TABLES[4][root] << 12 | pcid | (CR3_KEEP if keep else 0))
        self.roots.append((self.now(), pcid, self.TABLES[4][root]))
        if not keep:
            self.context[pcid] = self.now()
        self.access(gva, look)

    @rule(other=addresses, change=changes, look=looks)
    def invlpg(self, other: int, change: tuple[int, int, int], look: tuple[int, int, int]) -> None:
        gva = self.use_and_change(change)
        self.unit.invlpg(gva)
        self.page[self.unit.pcid, gva >> 12] = self.global_page[gva >> 12] = self.now()
        self.access(gva, look)
        self.access(other, look)

    @precondition(lambda self: self.unit.cr4 & CR4_PCIDE)
    @rule(pcid=pcids, change=changes, look=looks)
    def invpcid_address(self, pcid: int, change: tuple[int, int, int], look: tuple[int, int, int]) -> None:
        gva = self.use_and_change(change)
        self.unit.invpcid(INVPCID_ADDRESS, pcid, gva)
        self.page[pcid, gva >> 12] = self.now()
        self.access(gva, look)

    @precondition(lambda self: self.unit.cr4 & CR4_PCIDE)
    @rule(pcid=pcids, change=changes, look=looks)
    def invpcid_context(self, pcid: int, change: tuple[int, int, int], look: tuple[int, int, int]) -> None:
        gva = self.use_and_change(change)
        self.unit.invpcid(INVPCID_CONTEXT, pcid, 0)
        self.context[pcid] = self.now()
        self.access(gva, look)

    @rule(with_globals=st.booleans(), change=changes, look=looks)
    def invpcid_all(self, with_globals: bool, change: tuple[int, int, int], look: tuple[int, int, int]) -> None:
        gva = self.use_and_change(change)
        self.unit.invpcid(INVPCID_ALL_GLOBAL if with_globals else INVPCID_ALL, 0, 0)
        self.everything(with_globals)
        self.access(gva, look)

    @rule(bit=st.sampled_from([CR4_PGE, CR4_PGE, CR4_SMEP, CR4_SMAP]), change=changes, look=looks)
    def toggle_cr4(self, bit: int, change: tuple[int, int, int], look: tuple[int, int, int]) -> None:
        gva = self.use_and_change(change)
        self.unit.write_cr4(self.unit.cr4 ^ bit)
        if bit == CR4_PGE:
            self.everything(True)
        elif bit == CR4_SMEP and self.unit.cr4 & CR4_SMEP:
            self.context[self.unit.pcid] = self.now()
        self.access(gva, look)

    @precondition(lambda self: not self.unit.cr3 & 0xFFF)
    @rule(change=changes, look=looks)
    def toggle_pcide(self, change: tuple[int, int, int], look: tuple[int, int, int]) -> None:
        gva = self.use_and_change(change)
        cleared = self.unit.cr4 & CR4_PCIDE
        self.unit.write_cr4(self.unit.cr4 ^ CR4_PCIDE)
        if cleared:
            self.everything(True)
        self.access(gva, look)

    @rule()
    def toggle_write_protect(self) -> None:
        self.unit.write_cr0(self.unit.cr0 ^ CR0_WP)

    @rule(change=changes, look=looks)
    def change_without_invalidation(self, change: tuple[int, int, int], look: tuple[int, int, int]) -> None:
        gva = self.use_and_change(change)
        self.access(gva, look)

    def everything(self, with_globals: bool) -> None:
        self.context = {0: self.now(), 5: self.now()}
        if with_globals:
            self.globals = self.now()

    @rule(gva=addresses, look=looks)
    def access(self, gva: int, look: tuple[int, int, int]) -> None:
        kind, cpl, flags = look
        unit = self.unit
        registers = PagingRegisters(
            cr0=unit.cr0, cr3=unit.cr3, cr4=unit.cr4, efer=unit.efer, rflags=flags, cpl=cpl
        )
        fresh = walk(dict(self.phys.words), registers, gva, kind)
        try:
            gpa = unit.translate(gva, kind, cpl=cpl, rflags=flags)
        except Fault as fault:
            if (fault.vector, fault.error_code) == (fresh.vector, fresh.error_code):
                return
            # A spurious fault has dropped what misled it.
            assert unit.mmu.spurious
            unit.mmu.spurious = False
            loads = self.phys.loads
            try:
                assert unit.translate(gva, kind, cpl=cpl, rflags=flags) == fresh.gpa
            except Fault as again:
                assert (again.vector, again.error_code) == (fresh.vector, fresh.error_code)
            assert self.phys.loads - loads == len(fresh.entries)
            unit.mmu.spurious = True
            return
        if gpa != fresh.gpa or fresh.fault:
            access = kind | (ACCESS_USER if cpl == 3 else 0)
            assert self.allowed(gva, gpa, access, flags)

    def allowed(self, gva: int, gpa: int, access: int, flags: int) -> bool:
        """True if some mixture of values since the last invalidation covering ``gva`` leads to ``gpa``."""
        pcid = self.unit.pcid
        since = max(self.context.get(pcid, 0), self.page.get((pcid, gva >> 12), 0))
        global_since = max(self.globals, self.global_page.get(gva >> 12, 0))
        config = self.unit.config(flags)
        for begin, any_pcid in ((since, False), (global_since, True)):
            for root in self.roots_since(begin, None if any_pcid else pcid):
                for entry, level, w, u, nx in self.leaves(root, gva, begin):
                    if any_pcid and not entry & PTE_G:
                        continue
                    if leaf_frame(level, entry, gva) == gpa >> 12 and permitted(config, w, u, nx, access):
                        return True
        return False

    def roots_since(self, since: int, pcid: int | None) -> set[int]:
        found = set()
        for owner in (0, 5) if pcid is None else (pcid,):
            used = [(time, root) for time, at, root in self.roots if at == owner]
            before = [root for time, root in used if time <= since]
            found.update(before[-1:])
            found.update(root for time, root in used if time > since)
        return found

    def leaves(self, root: int, gva: int, since: int) -> set[tuple[int, int, bool, bool, bool]]:
        """(leaf, level, W, U, NX) of all walks in which each entry has a value that it held from ``since`` on."""
        found = set()
        tables = {(root, True, True, False)}
        for level in (4, 3, 2, 1):
            below = set()
            for table, w, u, nx in tables:
                for entry in self.phys.values(slot(table, gva, level), since):
                    if not entry & PTE_P:
                        continue
                    rights = (w and entry & PTE_W != 0, u and entry & PTE_U != 0, nx or entry & PTE_NX != 0)
                    if is_leaf(level, entry):
                        found.add((entry, level, *rights))
                    else:
                        below.add((pte_frame(entry), *rights))
            tables = below
        return found


class SpuriousCaching(Caching):
    """The same for a processor that reports what stale entries say; a fault that is wrong is so only once."""

    def __init__(self) -> None:
        super().__init__()
        self.unit.mmu.spurious = True


TestCaching = Caching.TestCase
TestSpuriousCaching = SpuriousCaching.TestCase
TestSpuriousCaching.settings = settings(derandomize=True, deadline=None, max_examples=50, stateful_step_count=40)
TestCaching.settings = settings(derandomize=True, deadline=None, max_examples=100, stateful_step_count=40)


def test_the_search_for_an_allowed_walk_can_say_no() -> None:
    """The check above is worth something: it refuses what an invalidation should have dropped."""
    machine = Caching()
    gva = Caching.ADDRESSES[0]
    machine.write(1, 0, gva, ALL, 0)
    stale = machine.frames << 12
    machine.write(1, 0, gva, ALL, 0)
    assert machine.allowed(gva, stale, ACCESS_READ, 2)
    machine.page[0, gva >> 12] = machine.now()
    assert not machine.allowed(gva, stale, ACCESS_READ, 2)
    assert machine.allowed(gva, machine.frames << 12, ACCESS_READ, 2)
