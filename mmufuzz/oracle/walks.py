"""All the walks an allowed TLB could have made: the reference walk, with a choice of values for each entry."""

from __future__ import annotations

from mmufuzz.host.memory import StoreBuffer
from mmufuzz.kvm.memslots import gfn_to_memslot, gfn_to_pfn, gpa_to_hpa
from mmufuzz.kvm.structs import Kvm
from mmufuzz.oracle.history import History
from mmufuzz.x86.paging import (
    PAGE_SHIFT,
    PTE_NX,
    PTE_P,
    PTE_U,
    PTE_W,
    PagingConfig,
    entry_address,
    fault_code,
    is_leaf,
    leaf_frame,
    permitted,
    pte_frame,
    reserved_bits,
)
from mmufuzz.x86.state import PFERR_PRESENT, PFERR_RSVD

ANY_RIGHTS = -1
_NO_CODE = -1


class Walks:
    """A search for one walk of ``gva`` in which every entry has a value it held from ``since`` on.

    Ask one question of an object: ``reaches`` or ``faults``. ``path`` then holds the walk found: (hpa of entry, value).
    """

    def __init__(
        self, kvm: Kvm, history: History, config: PagingConfig, gva: int, since: int, buffer: StoreBuffer | None
    ) -> None:
        self.kvm = kvm
        self.history = history
        self.config = config
        self.gva = gva
        self.since = since
        self.buffer = buffer
        self.path: list[tuple[int, int]] = []
        self.mind_reserved = True
        """False: as if no bit were reserved, to tell why an access is wrong."""
        self._access = 0
        self._pfn = 0
        self._code = _NO_CODE
        # Tables that led nowhere, with the rights they were reached with: keeps the search polynomial.
        self._failed: dict[tuple[int, int, int], bool] = {}

    def reaches(self, root_gfn: int, access: int, pfn: int) -> bool:
        """True if some walk permits ``access`` (or ANY_RIGHTS) and ends at host frame ``pfn``."""
        self._access = access
        self._pfn = pfn
        return self._search(root_gfn, self.config.level, PTE_W | PTE_U)

    def faults(self, root_gfn: int, access: int, code: int) -> bool:
        """True if some walk raises #PF with exactly the error ``code`` for ``access``."""
        self._access = access
        self._code = code
        return self._search(root_gfn, self.config.level, PTE_W | PTE_U)

    def _search(self, table: int, level: int, rights: int) -> bool:
        """``rights``: W and U of the levels above, and NX in its place if one of them has it."""
        if gfn_to_memslot(self.kvm, table) is None:
            return self._faults_with(0)
        key = (table, level, rights)
        if key in self._failed:
            return False
        hpa = gpa_to_hpa(entry_address(table, self.gva, level))
        tried = 0
        if self.buffer is None or not self.buffer.pending:
            # The newest value, nearly always the one: a word may have had as many as there were stores to it.
            if self._leads(hpa, self.kvm.memory.words.get(hpa >> 3, 0), level, rights):
                return True
            tried = 1
        values = self.history.values(hpa, self.since, self.buffer)
        for position in range(tried, len(values)):
            if self._leads(hpa, values[position], level, rights):
                return True
        self._failed[key] = True
        return False

    def _leads(self, hpa: int, entry: int, level: int, rights: int) -> bool:
        """Whether a walk goes on from ``entry`` at ``hpa`` to what is asked for; ``path`` then has it."""
        self.path.append((hpa, entry))
        if self._entry_leads(entry, level, rights):
            return True
        self.path.pop()
        return False

    def _entry_leads(self, entry: int, level: int, rights: int) -> bool:
        if not entry & PTE_P:
            return self._faults_with(0)
        if self.mind_reserved and reserved_bits(self.config, level, entry):
            return self._faults_with(PFERR_PRESENT | PFERR_RSVD)
        rights = rights & entry & (PTE_W | PTE_U) | (rights | entry) & PTE_NX
        if not is_leaf(level, entry):
            return self._search(pte_frame(entry), level - 1, rights)
        if self._code != _NO_CODE:
            return not self._permits(rights) and self._faults_with(PFERR_PRESENT)
        gfn = leaf_frame(level, entry, self.gva)
        if gfn_to_pfn(gfn) != self._pfn or gfn_to_memslot(self.kvm, gfn) is None:
            return False
        return self._access == ANY_RIGHTS or self._permits(rights)

    def _permits(self, rights: int) -> bool:
        return permitted(
            self.config, rights & PTE_W != 0, rights & PTE_U != 0, rights & PTE_NX != 0, self._access
        )

    def _faults_with(self, cause: int) -> bool:
        return self._code != _NO_CODE and fault_code(self.config, self._access, cause) == self._code


def root_gfn(cr3: int) -> int:
    """Frame of the root table that CR3 names."""
    return cr3 >> PAGE_SHIFT & (1 << 40) - 1
