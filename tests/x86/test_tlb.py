"""Cached translations: what stays, and what each invalidation drops (SDM vol. 3, 4.10)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mmufuzz.x86.tlb import PscEntry, Tlb, TlbEntry

GVA = 0x1234_5678_9000
VPN = GVA >> 12


def page(vpn: int = VPN, pfn: int = 7, *, is_global: bool = False, dirty: bool = False, tag: int = 0) -> TlbEntry:
    return TlbEntry(vpn, pfn, writable=True, user=True, nx=False, dirty=dirty, is_global=is_global, tag=tag)


def pointer(level: int, table: int = 9) -> PscEntry:
    return PscEntry(level, table, True, True, False)


def table_at(tlb: Tlb, gva: int) -> tuple[int, int] | None:
    found = tlb.psc_lookup(gva)
    return None if found is None else (found.level, found.table_pfn)


def test_lookup_finds_what_was_inserted() -> None:
    tlb = Tlb()
    assert tlb.lookup(VPN) is None
    entry = page(tag=0x5008)
    tlb.insert(entry)
    assert tlb.lookup(VPN) is entry
    assert tlb.lookup(VPN + 1) is None


def test_nothing_leaves_by_itself() -> None:
    tlb = Tlb()
    for vpn in range(5000):
        tlb.insert(page(vpn))
    assert [entry.vpn for entry in tlb.entries()] == list(range(5000))


def test_insert_replaces_the_entry_of_the_same_page() -> None:
    tlb = Tlb()
    tlb.insert(page(pfn=7))
    tlb.insert(page(pfn=8))
    assert [entry.pfn for entry in tlb.entries()] == [8]


def test_evict_drops_one_page_and_no_table_pointer() -> None:
    tlb = Tlb()
    tlb.insert(page())
    tlb.insert(page(VPN + 1))
    tlb.psc_insert(GVA, pointer(1))
    assert tlb.evict(VPN)
    assert not tlb.evict(VPN)
    assert [entry.vpn for entry in tlb.entries()] == [VPN + 1]
    assert table_at(tlb, GVA) == (1, 9)


def test_invalidate_drops_the_page_and_every_table_pointer() -> None:
    tlb = Tlb()
    tlb.insert(page())
    tlb.insert(page(VPN + 1))
    far = GVA ^ 1 << 46
    for level in (1, 2, 3):
        tlb.psc_insert(GVA, pointer(level))
        tlb.psc_insert(far, pointer(level))
    tlb.invalidate(VPN)
    assert [entry.vpn for entry in tlb.entries()] == [VPN + 1]
    assert (table_at(tlb, GVA), table_at(tlb, far)) == (None, None)


def test_invalidate_drops_a_global_page() -> None:
    tlb = Tlb()
    tlb.insert(page(is_global=True))
    tlb.invalidate(VPN)
    assert tlb.entries() == []


def test_invalidate_drops_table_pointers_even_without_a_cached_page() -> None:
    tlb = Tlb()
    tlb.psc_insert(GVA, pointer(2))
    tlb.invalidate(VPN + 12345)
    assert table_at(tlb, GVA) is None


def test_fault_drops_only_what_its_address_would_use() -> None:
    tlb = Tlb()
    tlb.insert(page(is_global=True))
    tlb.insert(page(VPN + 1))
    other_2m, other_1g, other_512g = GVA ^ 1 << 21, GVA ^ 1 << 30, GVA ^ 1 << 39
    for level, neighbour in ((1, other_2m), (2, other_1g), (3, other_512g)):
        tlb.psc_insert(GVA, pointer(level))
        tlb.psc_insert(neighbour, pointer(level, 20 + level))
    tlb.invalidate_on_fault(GVA | 0x123)
    assert [entry.vpn for entry in tlb.entries()] == [VPN + 1]
    assert table_at(tlb, GVA) is None
    assert [table_at(tlb, gva) for gva in (other_2m, other_1g, other_512g)] == [(1, 21), (2, 22), (3, 23)]


def test_full_flush_leaves_nothing() -> None:
    tlb = Tlb()
    tlb.insert(page(is_global=True))
    tlb.psc_insert(GVA, pointer(1))
    tlb.flush_all()
    assert tlb.canonical() == Tlb().canonical()


def test_flush_that_keeps_global_pages_drops_every_table_pointer() -> None:
    tlb = Tlb()
    tlb.insert(page(1))
    tlb.insert(page(2, is_global=True))
    tlb.psc_insert(GVA, pointer(3))
    tlb.flush_all(keep_global=True)
    assert [entry.vpn for entry in tlb.entries()] == [2]
    assert table_at(tlb, GVA) is None


def test_deepest_table_pointer_wins() -> None:
    tlb = Tlb()
    for level in (3, 1, 2):
        tlb.psc_insert(GVA, pointer(level, 20 + level))
    assert table_at(tlb, GVA) == (1, 21)
    assert tlb.psc_evict(GVA, 1)
    assert not tlb.psc_evict(GVA, 1)
    assert table_at(tlb, GVA) == (2, 22)


def test_table_pointer_covers_the_addresses_with_its_upper_bits() -> None:
    for level, size in ((1, 1 << 21), (2, 1 << 30), (3, 1 << 39), (4, 1 << 48)):
        tlb = Tlb()
        tlb.psc_insert(GVA, pointer(level))
        start = GVA // size * size
        assert table_at(tlb, start) == table_at(tlb, start + size - 1) == (level, 9)
        assert table_at(tlb, start + size) is None


def test_canonical_form_forgets_the_order_of_insertion() -> None:
    one, two = Tlb(), Tlb()
    entries = [page(3), page(1, is_global=True), page(2, dirty=True)]
    for tlb, order in ((one, entries), (two, entries[::-1])):
        for entry in order:
            tlb.insert(entry)
        for entry in order:
            tlb.psc_insert(entry.vpn << 30, pointer(2, entry.vpn))
    assert one.canonical() == two.canonical()
    assert hash(one.canonical()) == hash(two.canonical())


def test_canonical_form_tells_every_attribute_apart() -> None:
    def form(pfn: int, rights: int, tag: int) -> object:
        bits = [bool(rights & 1 << bit) for bit in range(5)]
        tlb = Tlb()
        tlb.insert(
            TlbEntry(
                1, pfn, writable=bits[0], user=bits[1], nx=bits[2], dirty=bits[3], is_global=bits[4], tag=tag
            )
        )
        return tlb.canonical()

    forms = {form(pfn, rights, tag) for pfn in (1, 2) for rights in range(32) for tag in (0, 8)}
    assert len(forms) == 2 * 32 * 2


class Retention(RuleBasedStateMachine):
    """A TLB holds exactly what was inserted and not covered by a later invalidation."""

    def __init__(self) -> None:
        super().__init__()
        self.tlb = Tlb()
        self.pages: dict[int, tuple[int, bool]] = {}
        self.tables: dict[tuple[int, int], int] = {}

    vpns = st.sampled_from([0, 1, 512, 513, 1 << 18, 1 << 27])

    @rule(vpn=vpns, pfn=st.integers(0, 3), is_global=st.booleans())
    def insert(self, vpn: int, pfn: int, is_global: bool) -> None:
        self.tlb.insert(page(vpn, pfn, is_global=is_global))
        self.pages[vpn] = (pfn, is_global)

    @rule(vpn=vpns, level=st.integers(1, 3), table=st.integers(0, 3))
    def psc_insert(self, vpn: int, level: int, table: int) -> None:
        self.tlb.psc_insert(vpn << 12, pointer(level, table))
        self.tables[level, vpn // 512**level] = table

    @rule(vpn=vpns)
    def evict(self, vpn: int) -> None:
        assert self.tlb.evict(vpn) == (vpn in self.pages)
        self.pages.pop(vpn, None)

    @rule(vpn=vpns)
    def invalidate(self, vpn: int) -> None:
        self.tlb.invalidate(vpn)
        self.pages.pop(vpn, None)
        self.tables = {}

    @rule(vpn=vpns)
    def fault(self, vpn: int) -> None:
        self.tlb.invalidate_on_fault(vpn << 12)
        self.pages.pop(vpn, None)
        for level in (1, 2, 3):
            self.tables.pop((level, vpn // 512**level), None)

    @rule(keep_global=st.booleans())
    def flush(self, keep_global: bool) -> None:
        self.tlb.flush_all(keep_global)
        self.pages = {vpn: entry for vpn, entry in self.pages.items() if keep_global and entry[1]}
        self.tables = {}

    @invariant()
    def holds_what_it_should(self) -> None:
        pages, tables = self.tlb.canonical()
        assert {row[0]: (row[1], bool(row[2] & 16)) for row in pages} == self.pages
        assert {(row[0], row[1]): row[2] for row in tables} == self.tables


TestRetention = Retention.TestCase
TestRetention.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=25)
