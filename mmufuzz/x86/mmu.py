"""The hardware page walker: TLB, paging-structure caches, and tables in host-physical memory.

SDM volume 3, 4.8 and 4.10. Under a hypervisor with shadow paging the tables are the shadow pages
and the configuration is the one the hypervisor runs the guest with (KVM on VMX forces CR0.WP and
EFER.NX on, vmx.c:vmx_set_cr0, update_transition_efer).

Where the manual leaves the processor a choice, this one is made:

* Cached entries are always used, however stale, as long as they permit the access.
* A fault is not reported on the word of a cached entry alone. If a TLB entry forbids the access, or a walk
  that began at a paging-structure entry fails, the walk is repeated from the root and that one
  decides. Hardware may do so, and may also report a spurious fault once (``HardwareMmu.spurious``), after which
  SDM 4.10.4.1 makes the entries go: either way the second attempt sees the tables.
* A write through an entry without D walks from the root again, to set D.
* A is set in each upper entry as it is passed, even if the access faults further down. In the leaf, A and D are
  set together, after the access rights were checked.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.paging import (
    ACCESS_WRITE,
    LOW,
    LOW_BITS,
    PAGE_SHIFT,
    PAGE_SIZE,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    PagingConfig,
    denial,
    fault_code,
    key_denies,
    permitted,
    pte_frame,
)
from mmufuzz.x86.state import PFERR_PRESENT, PFERR_RSVD, VECTOR_PF, Fault
from mmufuzz.x86.tlb import PscEntry, Tlb, TlbEntry

_OFFSET_MASK: Final = PAGE_SIZE - 1
_NX_HIGH: Final = 1 << 11  # bit 63 of an entry, in its upper part
_PKEY_HIGH_SHIFT: Final = 7

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

    def load_entry_32(self, hpa: int) -> int:
        """The 32-bit entry at ``hpa`` (a multiple of 4), unsigned, in one load."""
        return self.load_entry(hpa & -8) >> ((hpa & 4) << 3) & 0xFFFFFFFF

    def set_entry_bits_32(self, hpa: int, expected: int, bits: int) -> bool:
        """``set_entry_bits`` of a 32-bit entry. What happens to its neighbour in the 64-bit word does not matter."""
        shift = (hpa & 4) << 3
        while True:
            word = self.load_entry(hpa & -8)
            if word >> shift & 0xFFFFFFFF != expected:
                return False
            if self.set_entry_bits(hpa & -8, word, bits << shift):
                return True


class HardwareMmu:
    """The translation hardware of one logical processor. Owns no memory; caches in ``tlb``."""

    def __init__(self, tlb: Tlb, phys: HostPhys) -> None:
        self.tlb = tlb
        self.phys: Final = phys
        self.pdptes: list[int] = [0, 0, 0, 0]
        """The PDPTE registers (SDM 4.4.1); whoever loads them has checked their reserved bits."""
        self.spurious = False
        """Report a fault on the word of a stale entry, as hardware may after rights were raised (SDM 4.10.4.3)."""
        # Why the last attempt made no entry. Written last thing before the attempt returns and read at once: loads may
        # switch threads, and whoever runs meanwhile may fill this processor's TLB.
        self._cause = 0
        self.error_code = 0
        """Of the last #PF, as long as the processor does nothing else."""

    def translate(self, config: PagingConfig, root_pfn: int, root_level: int, gva: int, access: int) -> int:
        """``translation``, which raises ``Fault`` (#PF, error code, ``gva``)."""
        hpa = self.translation(config, root_pfn, root_level, gva, access)
        if hpa < 0:
            raise Fault(VECTOR_PF, self.error_code, gva)
        return hpa

    def translation(self, config: PagingConfig, root_pfn: int, root_level: int, gva: int, access: int) -> int:
        """Host-physical address of the byte at ``gva``, by the tables of ``root_level`` at ``root_pfn``.

        ``root_level`` is 4 or 5 with 8-byte entries, 2 with 4-byte ones; with PAE paging the PDPTE registers take the
        place of both. ``gva`` is canonical, and has 32 bits where linear addresses are that short.

        Sets A, and D for a write, by locked operations; a walk that loses to another writer of the
        entry starts over, for as long as it takes. Without paging the answer is ``gva``. For a #PF it is -1, with the
        error code in ``error_code``, after dropping the cached entries for the address, so that a spurious fault does
        not recur.
        """
        if not config.paging:
            return gva
        offset = gva & _OFFSET_MASK
        cached = self.tlb.lookup(gva >> PAGE_SHIFT)
        start: PscEntry | None = None
        if cached is None:
            start = self.tlb.psc_lookup(gva)
        elif (
            permitted(config, cached.writable, cached.user, cached.nx, access)
            and (cached.dirty or not access & ACCESS_WRITE)
            and not (config.pke and key_denies(config, cached.user, cached.pkey, access))
        ):
            return (cached.pfn << PAGE_SHIFT) | offset
        else:
            cause = denial(config, cached.writable, cached.user, cached.nx, cached.pkey, access)
            if cause and self.spurious:
                return self._fault(config, gva, access, cause)
            self.tlb.evict(cached.vpn)
        while True:
            made: TlbEntry | None = None
            begin = self._root(config, root_pfn, root_level, gva) if start is None else start
            if begin is None:
                self._cause = 0
            else:
                made = self._walk(config, begin, gva, access, False)
            if made is not None:
                return (made.pfn << PAGE_SHIFT) | offset
            if self._cause == _RACED:
                continue
            if start is None or self.spurious:
                break
            start = None
        return self._fault(config, gva, access, self._cause)

    def _fault(self, config: PagingConfig, gva: int, access: int, cause: int) -> int:
        self.tlb.invalidate_on_fault(gva)
        self.error_code = fault_code(config, access, cause)
        return -1

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
            start = self._root(config, root_pfn, root_level, gva)
        return start is not None and self._walk(config, start, gva, access, True) is not None

    def _root(self, config: PagingConfig, root_pfn: int, root_level: int, gva: int) -> PscEntry | None:
        """Where a walk of ``gva`` begins that uses no cached entry; None if its PDPTE register is not present."""
        if config.level != 3:
            return PscEntry(root_level, root_pfn, True, True, False)
        pdpte = self.pdptes[gva >> 30 & 3]
        if not pdpte & PTE_P:
            return None
        return PscEntry(2, pte_frame(pdpte), True, True, False)

    def _walk(
        self, config: PagingConfig, start: PscEntry, gva: int, access: int, speculative: bool
    ) -> TlbEntry | None:
        """One attempt from the table of ``start`` down. None: see ``_cause``."""
        level = start.level
        table = start.table_pfn
        writable = start.writable
        user = start.user
        nx = start.nx
        wide = config.wide
        while True:
            hpa = config.entry_address(table, gva, level)
            entry = self.phys.load_entry(hpa) if wide else self.phys.load_entry_32(hpa)
            # Apart, so that bit 63 costs nothing below.
            high = entry >> LOW_BITS
            low = entry & LOW
            if not low & PTE_P:
                self._cause = 0
                return None
            leaf = level == 1
            reserved = config.reserved_low
            if low & PTE_PS:
                reserved = config.reserved_low_ps[level]
                leaf = leaf or config.maps_page[level]
            if low & reserved or high & config.reserved_high:
                self._cause = PFERR_PRESENT | PFERR_RSVD
                return None
            writable = writable and low & PTE_W != 0
            user = user and low & PTE_U != 0
            nx = nx or high & _NX_HIGH != 0
            if leaf:
                break
            if not low & PTE_A and not self._set_bits(wide, hpa, entry, PTE_A):
                return None
            table = low >> PAGE_SHIFT
            level -= 1
            # Only after A is set may the entry be cached (SDM 4.10.3.1).
            self.tlb.psc_insert(gva, PscEntry(level, table, writable, user, nx))
        pkey = high >> _PKEY_HIGH_SHIFT & 15 if config.pke else 0
        cause = denial(config, writable, user, nx, pkey, access)
        if cause:
            self._cause = cause
            return None
        dirty = low & PTE_D != 0
        wanted = PTE_A
        if access & ACCESS_WRITE and not speculative:
            wanted |= PTE_D
            dirty = True
        missing = wanted & ~low
        if missing and not self._set_bits(wide, hpa, entry, missing):
            return None
        made = TlbEntry(
            gva >> PAGE_SHIFT,
            config.leaf_frame(level, low, gva),
            writable=writable,
            user=user,
            nx=nx,
            dirty=dirty,
            is_global=config.pge and low & PTE_G != 0,
            tag=hpa,
            pkey=pkey,
            order=config.index_bits * (level - 1),
        )
        self.tlb.insert(made)
        return made

    def _set_bits(self, wide: bool, hpa: int, entry: int, missing: int) -> bool:
        if wide:
            done = self.phys.set_entry_bits(hpa, entry, missing)
        else:
            done = self.phys.set_entry_bits_32(hpa, entry, missing)
        if not done:
            self._cause = _RACED
        return done
