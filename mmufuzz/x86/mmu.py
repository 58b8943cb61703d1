"""The hardware page walker: TLB, paging-structure caches, and tables in host-physical memory.

SDM volume 3, 4.8 and 4.10. Under a hypervisor with shadow paging the tables are the shadow pages
and the configuration is the one the hypervisor runs the guest with (KVM on VMX forces CR0.WP and
EFER.NX on, vmx.c:vmx_set_cr0, update_transition_efer).

Where the manual leaves the processor a choice, this one is made:

* Cached entries are always used, however stale, as long as they permit the access.
* A fault is never reported on the word of a cached entry alone. If a TLB entry forbids the access, or a walk
  that began at a paging-structure entry fails, the walk is repeated from the root and that one
  decides. Hardware may do so, and may also report a spurious fault once, after which SDM 4.10.4.1
  makes the entries go: either way the second attempt sees the tables.
* A write through an entry without D walks from the root again, to set D.
* A is set in each upper entry as it is passed, even if the access faults further down. In the leaf, A and D are
  set together, after the access rights were checked.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.paging import (
    ACCESS_WRITE,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_A,
    PTE_D,
    PTE_G,
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
from mmufuzz.x86.state import PFERR_PRESENT, PFERR_RSVD, VECTOR_PF, Fault
from mmufuzz.x86.tlb import PscEntry, Tlb, TlbEntry

_OFFSET_MASK: Final = PAGE_SIZE - 1

# In place of a fault's cause: an entry changed between its load and its A/D update.
_RACED: Final = -1


@mypyc_attr(allow_interpreted_subclasses=True)
class HostPhys:
    """Host-physical memory, as the page walker reaches it."""

    def load_entry(self, hpa: int) -> int:
        """The 64-bit entry at ``hpa`` (a multiple of 8), unsigned, in one load."""
        raise NotImplementedError

    def set_entry_bits(self, hpa: int, expected: int, bits: int) -> bool:
        """Set ``bits`` at ``hpa`` by one locked operation if the entry is ``expected``; False if it is not."""
        raise NotImplementedError


class HardwareMmu:
    """The translation hardware of one logical processor. Owns no memory; caches in ``tlb``."""

    def __init__(self, tlb: Tlb, phys: HostPhys) -> None:
        self.tlb: Final = tlb
        self.phys: Final = phys
        # Why the last attempt made no entry. Written last thing before the attempt returns and read at once: loads may
        # switch threads, and whoever runs meanwhile may fill this processor's TLB.
        self._cause = 0

    def translate(self, config: PagingConfig, root_pfn: int, root_level: int, gva: int, access: int) -> int:
        """Host-physical address of the byte at ``gva``, by the tables of ``root_level`` (4 or 5) at ``root_pfn``.

        Sets A, and D for a write, by locked operations; a walk that loses to another writer of the
        entry starts over, for as long as it takes. Raises ``Fault`` (#PF, error code, ``gva``), after dropping the
        cached entries for the address. Without paging the answer is ``gva``.
        """
        if not config.paging:
            return gva
        offset = gva & _OFFSET_MASK
        cached = self.tlb.lookup(gva >> PAGE_SHIFT)
        start: PscEntry | None = None
        if cached is None:
            start = self.tlb.psc_lookup(gva)
        elif (cached.dirty or not access & ACCESS_WRITE) and permitted(
            config, cached.writable, cached.user, cached.nx, access
        ):
            return (cached.pfn << PAGE_SHIFT) | offset
        else:
            self.tlb.evict(cached.vpn)
        root = PscEntry(root_level, root_pfn, True, True, False)
        while True:
            made = self._walk(config, root if start is None else start, gva, access, False)
            if made is not None:
                return (made.pfn << PAGE_SHIFT) | offset
            if self._cause == _RACED:
                continue
            if start is None:
                break
            start = None
        self.tlb.invalidate_on_fault(gva)
        raise Fault(VECTOR_PF, fault_code(config, access, self._cause), gva)

    def fill(self, config: PagingConfig, root_pfn: int, root_level: int, gva: int, access: int) -> bool:
        """Speculatively cache the translation of ``gva`` (SDM 4.10.2.3); True if an entry was made.

        Nothing happens if the page is cached already. Sets A but never D: a write that does not
        retire must not dirty the page (SDM 4.8). A walk that fails, forbids ``access`` or loses a race is given up
        silently; it invalidates nothing, and the upper levels it passed stay cached.
        """
        if not config.paging or self.tlb.lookup(gva >> PAGE_SHIFT) is not None:
            return False
        start = self.tlb.psc_lookup(gva)
        if start is None:
            start = PscEntry(root_level, root_pfn, True, True, False)
        return self._walk(config, start, gva, access, True) is not None

    def _walk(
        self, config: PagingConfig, start: PscEntry, gva: int, access: int, speculative: bool
    ) -> TlbEntry | None:
        """One attempt from the table of ``start`` down. None: see ``_cause``."""
        level = start.level
        table = start.table_pfn
        writable = start.writable
        user = start.user
        nx = start.nx
        while True:
            hpa = entry_address(table, gva, level)
            entry = self.phys.load_entry(hpa)
            if not entry & PTE_P:
                self._cause = 0
                return None
            if reserved_bits(config, level, entry):
                self._cause = PFERR_PRESENT | PFERR_RSVD
                return None
            writable = writable and entry & PTE_W != 0
            user = user and entry & PTE_U != 0
            nx = nx or entry & PTE_NX != 0
            if is_leaf(level, entry):
                break
            if not self._set_bits(hpa, entry, PTE_A):
                return None
            table = pte_frame(entry)
            level -= 1
            # Only after A is set may the entry be cached (SDM 4.10.3.1).
            self.tlb.psc_insert(gva, PscEntry(level, table, writable, user, nx))
        if not permitted(config, writable, user, nx, access):
            self._cause = PFERR_PRESENT
            return None
        dirty = entry & PTE_D != 0
        wanted = PTE_A
        if access & ACCESS_WRITE and not speculative:
            wanted |= PTE_D
            dirty = True
        if not self._set_bits(hpa, entry, wanted):
            return None
        made = TlbEntry(
            gva >> PAGE_SHIFT,
            leaf_frame(level, entry, gva),
            writable=writable,
            user=user,
            nx=nx,
            dirty=dirty,
            is_global=config.pge and entry & PTE_G != 0,
            tag=hpa,
        )
        self.tlb.insert(made)
        return made

    def _set_bits(self, hpa: int, entry: int, wanted: int) -> bool:
        missing = wanted & ~entry
        if missing and not self.phys.set_entry_bits(hpa, entry, missing):
            self._cause = _RACED
            return False
        return True
