"""What a reference walk answers (``page_walk``)."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.paging import ACCESS_WRITE, NO_ADDRESS, PAGE_SHIFT, PTE_A, PTE_D

_NO_VECTOR: Final = 0


class WalkResult:
    """What a walk found.

    ``vector``: 0, or of the exception that the access raises: 14 (#PF) with ``error_code``, or 13 (#GP(0)) for an
    address that is not canonical (#SS(0) if the access goes through SS, which is up to whoever executes it).
    ``level``: of the last entry read: of the leaf, or of the entry that stopped the walk; 0 without paging.
    ``gpa``, ``gfn``: of the byte accessed and its 4K frame, if a leaf was reached, even one that forbids the access;
    otherwise ``NO_ADDRESS``.
    ``page_shift``: log2 of the size of the page mapped; 0 if no leaf was reached.
    ``entries``: (gpa of the entry, its value) from the root down, the entry that stopped the walk included; PDPTE
    registers are not in memory and not listed.
    ``writable``, ``user``, ``nx``: accumulated over the present, well-formed entries of ``entries``.
    ``pkey``: protection key of the leaf (0..15; 0 where there are none). ``is_global``: G in the leaf, under CR4.PGE.
    ``no_memory``: a table lies outside memory. The error code then says "not present", as KVM's walker does
    (paging_tmpl.h:walk_addr_generic); hardware would read whatever the bus answers.
    """

    def __init__(self, access: int) -> None:
        self.access: Final = access
        self.vector = _NO_VECTOR
        self.error_code = 0
        self.gpa = NO_ADDRESS
        self.level = 0
        self.page_shift = 0
        # Up to five entries, one attribute each: a list would cost more than the rest of the walk.
        self._count = 0
        self._address_0 = self._address_1 = self._address_2 = self._address_3 = self._address_4 = 0
        self._entry_0 = self._entry_1 = self._entry_2 = self._entry_3 = self._entry_4 = 0
        self.writable = True
        self.user = True
        self.nx = False
        self.pkey = 0
        self.is_global = False
        self.no_memory = False

    @property
    def entries(self) -> list[tuple[int, int]]:
        """(gpa of the entry, its value) from the root down; see the class."""
        all_five = [
            (self._address_0, self._entry_0),
            (self._address_1, self._entry_1),
            (self._address_2, self._entry_2),
            (self._address_3, self._entry_3),
            (self._address_4, self._entry_4),
        ]
        return all_five[: self._count]

    def record(self, address: int, entry: int) -> None:
        """Add to ``entries``; for the walk alone. There are at most five."""
        count = self._count
        if count == 0:
            self._address_0 = address
            self._entry_0 = entry
        elif count == 1:
            self._address_1 = address
            self._entry_1 = entry
        elif count == 2:
            self._address_2 = address
            self._entry_2 = entry
        elif count == 3:
            self._address_3 = address
            self._entry_3 = entry
        else:
            self._address_4 = address
            self._entry_4 = entry
        self._count = count + 1

    @property
    def fault(self) -> bool:
        """True if the access raises an exception."""
        return self.vector != _NO_VECTOR

    @property
    def gfn(self) -> int:
        """4K frame of ``gpa``; ``NO_ADDRESS`` without one."""
        return self.gpa >> PAGE_SHIFT

    @property
    def ad_updates(self) -> list[tuple[int, int]]:
        """Accessed and dirty flags that the access sets: (gpa of the entry, bits that are clear), root first.

        SDM 4.8. Empty for an access that faults: hardware may then have set A in the upper entries, or not.
        An entry that a self-mapping table uses at two levels may be listed twice.
        """
        updates: list[tuple[int, int]] = []
        if self.fault:
            return updates
        remaining = self._count
        for gpa, entry in self.entries:
            remaining -= 1
            wanted = PTE_A
            if remaining == 0 and self.access & ACCESS_WRITE:
                wanted |= PTE_D
            missing = wanted & ~entry
            if missing:
                updates.append((gpa, missing))
        return updates
