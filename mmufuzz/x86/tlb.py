"""Cached translations of one logical processor: the TLB and the paging-structure caches.

SDM volume 3, 4.10. Retention is adversarial: an entry stays until the owner removes it, since the
architecture allows a processor to keep an entry for ever and the interesting bugs need exactly that.
Equally, it allows any entry to go at any time: ``evict`` and ``psc_evict`` are for the owner to say when.

A ``Tlb`` is one address-space identifier. With PCIDs or VPIDs the owner keeps one for each.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.paging import PAGE_SHIFT

PSC_LEVELS: Final = 4
"""Deepest table level that a paging-structure cache entry can point at with 5-level paging."""


class TlbEntry:
    """A cached translation of one 4K page; a 2M or 1G mapping is held as 4K pieces (SDM 4.10.2.3).

    Immutable. ``vpn`` is gva >> 12 and ``pfn`` the frame it maps to. ``writable``, ``user`` and
    ``nx`` are accumulated over the levels. ``dirty``: the leaf's D flag was set when the entry was made.
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
    ) -> None:
        self.vpn: Final = vpn
        self.pfn: Final = pfn
        self.writable: Final = writable
        self.user: Final = user
        self.nx: Final = nx
        self.dirty: Final = dirty
        self.is_global: Final = is_global
        self.tag: Final = tag


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


class Tlb:
    """All that one logical processor has cached of its translations. Every operation is deterministic."""

    def __init__(self) -> None:
        self._pages: dict[int, TlbEntry] = {}
        # Indexed by level; index 0 is unused.
        self._psc: list[dict[int, PscEntry]] = [{} for _ in range(PSC_LEVELS + 1)]

    def lookup(self, vpn: int) -> TlbEntry | None:
        """The entry for ``vpn``, if there is one."""
        return self._pages.get(vpn)

    def insert(self, entry: TlbEntry) -> None:
        """Add ``entry``, in place of any other for the same page."""
        self._pages[entry.vpn] = entry

    def entries(self) -> list[TlbEntry]:
        """All page entries, in the order in which their pages first entered."""
        return list(self._pages.values())

    def evict(self, vpn: int) -> bool:
        """Drop the entry for ``vpn`` as for want of room; nothing else goes. True if there was one."""
        return self._pages.pop(vpn, None) is not None

    def invalidate(self, vpn: int) -> None:
        """INVLPG: drop the entry for ``vpn``, global or not, and every paging-structure entry (SDM 4.10.4.1)."""
        self._pages.pop(vpn, None)
        self._psc_clear()

    def invalidate_on_fault(self, gva: int) -> None:
        """What a #PF at ``gva`` drops: the page's entry and the paging-structure entries that ``gva`` would use.

        SDM 4.10.4.1, last paragraphs: they ensure that the fault does not recur on behalf of stale entries.
        """
        self._pages.pop(gva >> PAGE_SHIFT, None)
        for level in range(1, PSC_LEVELS + 1):
            self._psc[level].pop(psc_key(gva, level), None)

    def flush_all(self, keep_global: bool = False) -> None:
        """Drop everything, or with ``keep_global`` (a MOV to CR3) everything but global pages (SDM 4.10.4.1)."""
        kept: dict[int, TlbEntry] = {}
        if keep_global:
            for vpn, entry in self._pages.items():
                if entry.is_global:
                    kept[vpn] = entry
        self._pages = kept
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
        return self._psc[level].pop(psc_key(gva, level), None) is not None

    def canonical(self) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """All contents, sorted and hashable: equal for two TLBs that hold the same, however they came to it.

        Pages are (vpn, pfn, rights, tag), table pointers (level, key, table_pfn, rights).
        Frames and tags are as they are; renaming them is up to the caller.
        """
        pages: list[tuple[int, ...]] = []
        for vpn, page in self._pages.items():
            rights = _rights(page.writable, page.user, page.nx) | page.dirty << 3 | page.is_global << 4
            pages.append((vpn, page.pfn, rights, page.tag))
        pages.sort()
        tables: list[tuple[int, ...]] = []
        for level in range(1, PSC_LEVELS + 1):
            for key, table in self._psc[level].items():
                tables.append((level, key, table.table_pfn, _rights(table.writable, table.user, table.nx)))
        tables.sort()
        return tuple(pages), tuple(tables)

    def _psc_clear(self) -> None:
        for level in range(1, PSC_LEVELS + 1):
            self._psc[level].clear()


def _rights(writable: bool, user: bool, nx: bool) -> int:
    return writable | user << 1 | nx << 2
