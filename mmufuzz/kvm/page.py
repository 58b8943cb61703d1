"""Finding and making shadow pages (mmu.c)."""

from __future__ import annotations

from mmufuzz.host.sites import SPTE_LOAD
from mmufuzz.kvm.counters import CREATED, FOUND
from mmufuzz.kvm.memslots import gfn_to_memslot
from mmufuzz.kvm.rmap import mmu_spte_set, read_spte
from mmufuzz.kvm.role import child_role, role_text
from mmufuzz.kvm.spte import is_last_spte, is_shadow_present, make_nonleaf_spte, spte_pfn
from mmufuzz.kvm.structs import Kvm, ShadowPage
from mmufuzz.kvm.write_track import account_shadowed, is_obsolete_sp, sp_has_gptes
from mmufuzz.kvm.zap import kvm_mmu_remote_flush_or_zap, mmu_page_zap_pte


def clear_sp_write_flooding_count(kvm: Kvm, sp: ShadowPage) -> None:
    """mmu.c:__clear_sp_write_flooding_count: an atomic the model glues to the caller's last visible operation."""
    kvm.memory.write(sp.flooding_address, 8, 0)


def kvm_mmu_get_shadow_page(kvm: Kvm, gfn: int, role: int) -> ShadowPage:
    """mmu.c:__kvm_mmu_get_shadow_page: the valid page for (gfn, role), made if there is none. Under mmu_lock."""
    for sp in kvm.mmu_page_hash.get(gfn, []):
        if sp.role == role and not is_obsolete_sp(kvm, sp):
            kvm.mark("get_shadow_page.found")
            kvm.count_page(FOUND, role)
            clear_sp_write_flooding_count(kvm, sp)
            return sp
    kvm.mark("get_shadow_page.created")
    kvm.count_page(CREATED, role)
    sp = ShadowPage(kvm.alloc_frame(), gfn, role, kvm.mmu_valid_gen)
    kvm.by_pfn[sp.pfn] = sp
    kvm.active_mmu_pages.insert(0, sp)
    kvm.n_used_mmu_pages += 1
    kvm.mmu_page_hash.setdefault(gfn, []).insert(0, sp)
    kvm.host.note("shadow gfn {0:#x} " + role_text(role), gfn)
    if sp_has_gptes(sp):
        account_shadowed(kvm, sp)
    return sp


def kvm_mmu_get_child_sp(
    kvm: Kvm, parent: ShadowPage, address: int, gfn: int, direct: bool, access: int
) -> ShadowPage | None:
    """mmu.c:kvm_mmu_get_child_sp: the page to link at ``address``; None (-EEXIST) if the right one is linked."""
    role = child_role(parent.role, direct, access)
    spte = read_spte(kvm, address)
    if is_shadow_present(spte) and not is_last_spte(spte, parent.role & 15):
        child = kvm.by_pfn[spte_pfn(spte)]
        if child.gfn == gfn and child.role == role:
            return None
    return kvm_mmu_get_shadow_page(kvm, gfn, role)


def link_shadow_page(kvm: Kvm, address: int, child: ShadowPage) -> None:
    """mmu.c:__link_shadow_page: point the SPTE at ``child``; what was there goes first, with a flush."""
    if is_shadow_present(read_spte(kvm, address)):
        kvm.mark("link.replaced")
        invalid_list: list[ShadowPage] = []
        mmu_page_zap_pte(kvm, address, invalid_list)
        kvm_mmu_remote_flush_or_zap(kvm, invalid_list, True)
    mmu_spte_set(kvm, address, make_nonleaf_spte(child.pfn))
    child.parent_ptes.append(address)


def read_spte_lockless(kvm: Kvm, address: int) -> int:
    """mmu_internal.h:mmu_spte_get_lockless."""
    return kvm.host.current.load(SPTE_LOAD, address)


def gfn_is_visible(kvm: Kvm, gfn: int) -> bool:
    """kvm_main.c:kvm_is_visible_gfn."""
    return gfn_to_memslot(kvm, gfn) is not None
