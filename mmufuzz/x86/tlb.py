"""Cached translations of one logical processor: the TLB and the paging-structure caches.

SDM volume 3, 4.10. Retention is adversarial: an entry stays until the owner removes it, since the
architecture allows a processor to keep an entry for ever and the interesting bugs need exactly that.
Equally, it allows any entry to go at any time: ``evict`` and ``psc_evict`` are for the owner to say when.

A ``Tlb`` is one address-space identifier. With VPIDs the owner keeps one for each; with PCIDs too, and those share the
translations of global pages (SDM 4.10.2.4).
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.paging import PAGE_SHIFT

PSC_LEVELS: Final = 4
"""Deepest table level that a paging-structure cache entry can point at with 5-level paging."""


class TlbEntry:
    """A cached translation of one 4K page; a larger mapping is held as 4K pieces (SDM 4.10.2.3).

    Immutable. ``vpn`` is gva >> 12 and ``pfn`` the frame it maps to. ``writable``, ``user`` and
    ``nx`` are accumulated over the levels. ``dirty``: the leaf's D flag was set when the entry was made.
    ``pkey``: the leaf's protection key. ``order``: log2 of the number of 4K pages that the leaf maps.
    ``tag`` means what the owner wants; the hardware walker puts the physical address of the leaf entry there.
    """

    def __init__(
        self,
        vpn: int,
        pfn: int,
        *,
        writable: bool,
        user: bool,
        nx: bool,
        dirty: bool,
        is_global: bool = False,
        tag: int = 0,
        pkey: int = 0,
        order: int = 0,
    ) -> None:
        self.vpn: Final = vpn
        self.pfn: Final = pfn
        self.writable: Final = writable
        self.user: Final = user
        self.nx: Final = nx
        self.dirty: Final = dirty
        self.is_global: Final = is_global
        self.tag: Final = tag
        self.pkey: Final = pkey
        self.order: Final = order


class PscEntry:
    """A cached pointer to a table, so that a walk can begin there (SDM 4.10.3.1). Immutable.

    ``level`` (1..4) is the level of the table at frame ``table_pfn``: 1 for what the manual calls
    a PDE-cache entry. ``writable``, ``user`` and ``nx`` are accumulated over the entries above that table.
    """

    def __init__(self, level: int, table_pfn: int, writable: bool, user: bool, nx: bool) -> None:
        self.level: Final = level
        self.table_pfn: Final = table_pfn
        self.writable: Final = writable
        self.user: Final = user
        self.nx: Final = nx


def psc_key(gva: int, level: int) -> int:
    """The upper bits of ``gva``, which select the table of ``level``."""
    return gva >> (PAGE_SHIFT + 9 * level)


class PageCache:
    """Cached translations by page. One of global pages is shared by all PCIDs of a processor (SDM 4.10.2.4)."""

    def __init__(self) -> None:
        self.pages: dict[int, TlbEntry] = {}
        self.has_large = False
        """Some entry may be a piece of a large page: INVLPG has to look at every entry."""

    def insert(self, entry: TlbEntry) -> None:
        """Add ``entry``, in place of any other for the same page."""
        self.pages[entry.vpn] = entry
        if entry.order:
            self.has_large = True

    def drop_page(self, vpn: int) -> None:
        """Drop the entry for ``vpn``, and all pieces of a large page that has ``vpn`` in it."""
        if vpn in self.pages:
            del self.pages[vpn]
        if self.has_large:
            for other in [entry.vpn for entry in self.pages.values() if entry.vpn >> entry.order == vpn >> entry.order]:
                del self.pages[other]

    def clear(self) -> None:
        """Drop everything."""
        if self.pages:
            self.pages = {}
        self.has_large = False


class Tlb:
    """All that one logical processor has cached of its translations. Every operation is deterministic.

    ``shared``: where global pages are kept, if other PCIDs use them too.
    """

    def __init__(self, shared: PageCache | None = None) -> None:
        self._own: Final = PageCache()
        self._global: Final = PageCache() if shared is None else shared
        # Indexed by level; index 0 is unused.
        self._psc: list[dict[int, PscEntry]] = [{} for _ in range(PSC_LEVELS + 1)]

    def lookup(self, vpn: int) -> TlbEntry | None:
        """The entry for ``vpn``, if there is one."""
        entry = self._own.pages.get(vpn)
        return self._global.pages.get(vpn) if entry is None else entry

    def insert(self, entry: TlbEntry) -> None:
        """Add ``entry``, in place of any other for the same page."""
        other = self._own if entry.is_global else self._global
        if entry.vpn in other.pages:
            del other.pages[entry.vpn]
        if entry.is_global:
            self._global.insert(entry)
        else:
            self._own.insert(entry)

    def entries(self) -> list[TlbEntry]:
        """All page entries, global ones last, each kind in the order in which its pages first entered."""
        found = list(self._own.pages.values())
        if self._global.pages:
            found.extend(self._global.pages.values())
        return found

    def evict(self, vpn: int) -> bool:
        """Drop the entry for ``vpn`` as for want of room; nothing else goes. True if there was one."""
        for cache in (self._own, self._global):
            if vpn in cache.pages:
                del cache.pages[vpn]
                return True
        return False

    def invalidate(self, vpn: int) -> None:
        """INVLPG: drop the entries for the page of ``vpn``, global or not, and every paging-structure entry.

        SDM 4.10.4.1. Of a large page all pieces go, whichever of them ``vpn`` is in.
        """
        self._own.drop_page(vpn)
        self._global.drop_page(vpn)
        self._psc_clear()

    def invalidate_address(self, gva: int) -> None:
        """INVPCID of type 0: drop what a translation of ``gva`` would use, but for global pages (SDM 4.10.4.1)."""
        self._own.drop_page(gva >> PAGE_SHIFT)
        self._psc_drop(gva)

    def invalidate_on_fault(self, gva: int) -> None:
        """What a #PF at ``gva`` drops: the page's entry and the paging-structure entries that ``gva`` would use.

        SDM 4.10.4.1, last paragraphs: they ensure that the fault does not recur on behalf of stale entries.
        """
        self.evict(gva >> PAGE_SHIFT)
        self._psc_drop(gva)

    def flush_all(self, keep_global: bool = False) -> None:
        """Drop everything, or with ``keep_global`` (a MOV to CR3) everything but global pages (SDM 4.10.4.1)."""
        self._own.clear()
        if not keep_global:
            self._global.clear()
        self._psc_clear()

    def psc_lookup(self, gva: int) -> PscEntry | None:
        """The deepest (lowest-level) paging-structure entry that covers ``gva``, if any."""
        for level in range(1, PSC_LEVELS + 1):
            entry = self._psc[level].get(psc_key(gva, level))
            if entry is not None:
                return entry
        return None

    def psc_insert(self, gva: int, entry: PscEntry) -> None:
        """Add ``entry`` for the upper bits of ``gva``, in place of any other of its level."""
        self._psc[entry.level][psc_key(gva, entry.level)] = entry

    def psc_evict(self, gva: int, level: int) -> bool:
        """Drop the entry of ``level`` that covers ``gva`` as for want of room. True if there was one."""
        key = psc_key(gva, level)
        entries = self._psc[level]
        if key not in entries:
            return False
        del entries[key]
        return True

    def canonical(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """All contents, sorted and hashable: equal for two TLBs that hold the same, however they came to it.

        Pages are (vpn, pfn, rights, tag), table pointers (level, key, table_pfn, rights).
        Frames and tags are as they are; renaming them is up to the caller.
        """
        pages: list[tuple[int, ...]] = []
        for page in self.entries():
            rights = _rights(page.writable, page.user, page.nx) | page.dirty << 3 | page.is_global << 4
            rights |= page.pkey << 5 | page.order << 9
            pages.append((page.vpn, page.pfn, rights, page.tag))
        pages.sort()
        tables: list[tuple[int, ...]] = []
        for level in range(1, PSC_LEVELS + 1):
            if self._psc[level]:
                for key, table in self._psc[level].items():
                    tables.append((level, key, table.table_pfn, _rights(table.writable, table.user, table.nx)))
        tables.sort()
        return tuple(pages), tuple(tables)

    def _psc_drop(self, gva: int) -> None:
        for level in range(1, PSC_LEVELS + 1):
            self.psc_evict(gva, level)

    def _psc_clear(self) -> None:
        for level in range(1, PSC_LEVELS + 1):
            if self._psc[level]:
                self._psc[level] = {}


def _rights(writable: bool, user: bool, nx: bool) -> int:
    return writable | user << 1 | nx << 2
