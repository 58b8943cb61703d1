"""The paging hardware of one logical processor that runs on its own memory: registers, PCIDs, and what flushes.

SDM volume 3: 2.5 (which writes to control registers raise #GP), 4.4.1 (PDPTE registers), 4.10.1 (PCIDs), 4.10.4.1
(operations that invalidate); INVLPG and INVPCID as in volume 2. Retention is adversarial, as in ``tlb``: what an
operation does not have to invalidate stays. So a MOV to CR3 with bit 63 set, a change of CR0.WP, CR4.SMAP, EFER.NXE or
PKRU, and setting CR4.PCIDE invalidate nothing: rights that depend on those are judged at each access.

Checks that need more than these registers (CPL, the size of the code segment) are up to whoever executes the
instruction.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.mmu import HardwareMmu, HostPhys
from mmufuzz.x86.page_walk import PageTableReader, read_pdptes, root_of
from mmufuzz.x86.paging import (
    ACCESS_IMPLICIT,
    ACCESS_USER,
    CR4_LA57,
    CR4_PCIDE,
    INVPCID_ADDRESS,
    INVPCID_ALL,
    INVPCID_ALL_GLOBAL,
    INVPCID_CONTEXT,
    MAXPHYADDR,
    PAGE_SHIFT,
    PagingConfig,
    build_config,
    is_canonical,
    pdpte_reserved,
)
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    FLAG_AC,
    FLAG_FIXED,
    VECTOR_GP,
    Fault,
)
from mmufuzz.x86.tlb import PageCache, Tlb

CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR3_KEEP: Final = 1 << 63
"""Of the value that a MOV to CR3 writes, under CR4.PCIDE: translations of the PCID need not be invalidated."""

_PCID_MASK: Final = 0xFFF
# What reloads the PDPTE registers if PAE paging is in use afterwards (SDM 4.4.1).
_CR0_RELOADS: Final = CR0_CD | CR0_NW | CR0_PG
_CR4_RELOADS: Final = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP


class _PhysReader(PageTableReader):
    def __init__(self, phys: HostPhys) -> None:
        self.phys: Final = phys

    def read_entry(self, gpa: int) -> int:
        return self.phys.load_entry(gpa)


class PagingUnit:
    """Control registers, TLBs and walker of one logical processor. Begins with paging off and nothing cached."""

    def __init__(self, phys: HostPhys, *, maxphyaddr: int = MAXPHYADDR) -> None:
        self.phys: Final = phys
        self.maxphyaddr: Final = maxphyaddr
        self.cr0 = CR0_PE
        self.cr3 = 0
        self.cr4 = 0
        self.efer = 0
        self.pkru = 0
        self._global: Final = PageCache()
        self._tlbs: Final[dict[int, Tlb]] = {0: Tlb(self._global)}
        self.mmu: Final = HardwareMmu(self._tlbs[0], phys)
        self._config = self._build(FLAG_FIXED)
        self._config_ac = self._build(FLAG_AC)

    @property
    def pcid(self) -> int:
        """The current PCID: 0 unless CR4.PCIDE is set."""
        return self.cr3 & _PCID_MASK if self.cr4 & CR4_PCIDE else 0

    @property
    def tlb(self) -> Tlb:
        """What is cached for the current PCID."""
        return self.mmu.tlb

    def config(self, rflags: int = FLAG_FIXED) -> PagingConfig:
        """Paging configuration with these registers and EFLAGS."""
        return self._config_ac if rflags & FLAG_AC else self._config

    def translate(self, gva: int, access: int, *, cpl: int = 0, rflags: int = FLAG_FIXED) -> int:
        """Physical address of the byte at ``gva`` (unsigned; 32 bits outside long mode).

        ``access``: ACCESS_READ, ACCESS_WRITE or ACCESS_FETCH, perhaps with ACCESS_IMPLICIT. Raises ``Fault``: #GP(0) if
        ``gva`` is not canonical, #PF if the tables forbid the access.
        """
        config = self.config(rflags)
        self._check_canonical(config, gva)
        if cpl == 3 and not access & ACCESS_IMPLICIT:
            access |= ACCESS_USER
        return self.mmu.translate(config, root_of(config, self.cr3), config.level, gva, access)

    def fill(self, gva: int, access: int, *, cpl: int = 0) -> bool:
        """Speculatively cache the translation of the canonical ``gva``; see ``HardwareMmu.fill``."""
        config = self._config
        if cpl == 3:
            access |= ACCESS_USER
        return self.mmu.fill(config, root_of(config, self.cr3), config.level, gva, access)

    def write_cr0(self, value: int) -> None:
        """MOV to CR0; EFER.LMA follows CR0.PG (SDM 9.8.5). Raises ``Fault`` (#GP(0)) and then changes nothing."""
        if value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
            raise Fault(VECTOR_GP, 0)
        efer = self.efer & ~EFER_LMA
        if value & CR0_PG:
            if efer & EFER_LME:
                if not self.cr4 & CR4_PAE:
                    raise Fault(VECTOR_GP, 0)
                efer |= EFER_LMA
        elif self.cr4 & CR4_PCIDE:
            raise Fault(VECTOR_GP, 0)
        if (value ^ self.cr0) & _CR0_RELOADS and value & CR0_PG and not efer & EFER_LMA and self.cr4 & CR4_PAE:
            self._load_pdptes(self.cr3)
        if self.cr0 & CR0_PG and not value & CR0_PG:
            self._flush_everything()
        self.cr0 = value
        self.efer = efer
        self._reconfigure()

    def write_cr3(self, value: int) -> None:
        """MOV to CR3. Raises ``Fault`` (#GP(0)), for a reserved bit or a bad PDPTE, and then changes nothing."""
        keep = False
        if self.efer & EFER_LMA:
            if self.cr4 & CR4_PCIDE:
                keep = value & CR3_KEEP != 0
                value &= ~CR3_KEEP
            if value >> self.maxphyaddr:
                raise Fault(VECTOR_GP, 0)
        else:
            value &= (1 << 32) - 1
            if self._config.level == 3:
                self._load_pdptes(value)
        self.cr3 = value
        self._use_pcid()
        if not keep:
            self.tlb.flush_all(keep_global=True)

    def write_cr4(self, value: int) -> None:
        """MOV to CR4. Raises ``Fault`` (#GP(0)) and then changes nothing."""
        changed = value ^ self.cr4
        if self.efer & EFER_LMA and changed & (CR4_PAE | CR4_LA57):
            raise Fault(VECTOR_GP, 0)
        if changed & value & CR4_PCIDE and (not self.efer & EFER_LMA or self.cr3 & _PCID_MASK):
            raise Fault(VECTOR_GP, 0)
        pae = self.cr0 & CR0_PG != 0 and not self.efer & EFER_LMA and value & CR4_PAE != 0
        if pae and changed & _CR4_RELOADS:
            self._load_pdptes(self.cr3)
        if changed & CR4_PGE or changed & self.cr4 & CR4_PCIDE:
            self._flush_everything()
        elif changed & CR4_PAE or changed & value & CR4_SMEP:
            self.tlb.flush_all()
        self.cr4 = value
        self._use_pcid()
        self._reconfigure()

    def write_efer(self, value: int) -> None:
        """WRMSR to EFER; LMA is not written. Raises ``Fault`` (#GP(0)) if LME changes while paging is on."""
        if self.cr0 & CR0_PG and (value ^ self.efer) & EFER_LME:
            raise Fault(VECTOR_GP, 0)
        self.efer = (value & ~EFER_LMA) | (self.efer & EFER_LMA)
        self._reconfigure()

    def write_pkru(self, value: int) -> None:
        """WRPKRU. Takes effect at once, for cached translations too (SDM 4.6.2)."""
        self.pkru = value
        self._reconfigure()

    def invlpg(self, gva: int) -> None:
        """INVLPG; nothing happens if ``gva`` is not canonical."""
        if self._is_canonical(self._config, gva):
            self.tlb.invalidate(gva >> PAGE_SHIFT)

    def invpcid(self, kind: int, pcid: int, gva: int) -> None:
        """INVPCID with a descriptor of the two words ``pcid`` and ``gva``. Raises ``Fault`` (#GP(0)) for a bad one."""
        if not 0 <= kind <= INVPCID_ALL or pcid >> 12:
            raise Fault(VECTOR_GP, 0)
        if kind <= INVPCID_CONTEXT and pcid and not self.cr4 & CR4_PCIDE:
            raise Fault(VECTOR_GP, 0)
        if kind == INVPCID_ADDRESS:
            self._check_canonical(self._config, gva)
        if kind == INVPCID_ALL_GLOBAL:
            self._flush_everything()
        elif kind == INVPCID_ALL:
            for tlb in self._tlbs.values():
                tlb.flush_all(keep_global=True)
        elif pcid in self._tlbs:
            if kind == INVPCID_ADDRESS:
                self._tlbs[pcid].invalidate_address(gva)
            else:
                self._tlbs[pcid].flush_all(keep_global=True)

    def _build(self, rflags: int) -> PagingConfig:
        return build_config(self.cr0, self.cr4, self.efer, rflags, pkru=self.pkru, maxphyaddr=self.maxphyaddr)

    def _reconfigure(self) -> None:
        self._config = self._build(FLAG_FIXED)
        self._config_ac = self._build(FLAG_AC)

    def _use_pcid(self) -> None:
        tlb = self._tlbs.get(self.pcid)
        if tlb is None:
            tlb = Tlb(self._global)
            self._tlbs[self.pcid] = tlb
        self.mmu.tlb = tlb

    def _load_pdptes(self, cr3: int) -> None:
        pdptes = read_pdptes(_PhysReader(self.phys), cr3)
        for pdpte in pdptes:
            if pdpte_reserved(self._config, pdpte):
                raise Fault(VECTOR_GP, 0)
        self.mmu.pdptes = list(pdptes)

    def _flush_everything(self) -> None:
        for tlb in self._tlbs.values():
            tlb.flush_all()

    def _is_canonical(self, config: PagingConfig, gva: int) -> bool:
        return config.level < 4 or is_canonical(gva, config.linear_bits)

    def _check_canonical(self, config: PagingConfig, gva: int) -> None:
        if not self._is_canonical(config, gva):
            raise Fault(VECTOR_GP, 0)
