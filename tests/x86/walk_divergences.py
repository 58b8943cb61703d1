"""Where an engine does not walk as the SDM says: the allow-list of the comparison.

An entry does not excuse a difference, it predicts what the engine does instead; a case is explained only if the
prediction is exactly what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

from walk_cases import IMPLICIT, KINDS, Ram, WalkCase

from mmufuzz.x86 import PagingRegisters, WalkResult, walk
from mmufuzz.x86.page_walk import read_pdptes, walk_tables
from mmufuzz.x86.paging import (
    ACCESS_IMPLICIT,
    ACCESS_USER,
    LOW_BITS,
    NO_ADDRESS,
    PAGE_SHIFT,
    PTE_NX,
    PTE_P,
    PTE_PAT_LARGE,
    PTE_PS,
    PTE_U,
    PTE_W,
    denial,
    fault_code,
    pte_frame,
)
from mmufuzz.x86.state import CR4_SMAP, FLAG_AC, PFERR_PRESENT, PFERR_RSVD, VECTOR_PF

IMPLICIT_SMAP = "SMAP lets implicit accesses through under EFLAGS.AC"
PDPTES_IN_MEMORY = "PDPTEs are read from memory at each walk"
LA57_PAGE_SIZE = "large pages of 5-level paging are 512 times too small"
ACCESSED_1G = "A is set in the entry of a 1G page before it is checked"


@dataclass(frozen=True)
class Divergence:
    """``sdm``: the section that says the reference is right; ``instead``: what the engine does."""

    engine: str
    name: str
    sdm: str
    instead: str


DIVERGENCES = (
    Divergence(
        "unicorn",
        IMPLICIT_SMAP,
        "4.6.1: data may not be read from a user-mode address if the access is implicit, whatever EFLAGS.AC",
        "an implicit access at CPL below 3 obeys EFLAGS.AC as if an instruction had asked for it",
    ),
    Divergence(
        "bochscpu",
        IMPLICIT_SMAP,
        "4.6.1: data may not be read from a user-mode address if the access is implicit, whatever EFLAGS.AC",
        "an implicit access obeys EFLAGS.AC as if an instruction had asked for it, at any CPL",
    ),
    Divergence(
        "unicorn",
        PDPTES_IN_MEMORY,
        "4.4.1: MOV to CR3 loads all four into registers, and raises #GP(0) for a reserved bit in any that is present",
        "a reserved bit from 40 up in the one in use gives #PF with RSVD; other reserved bits are ignored",
    ),
    Divergence(
        "unicorn",
        ACCESSED_1G,
        "4.8: A is set when an entry is used for a translation; one that is malformed or denies the access is not",
        "A is set in the entry of a 1G page whether the access is then allowed or not",
    ),
    Divergence(
        "bochscpu",
        LA57_PAGE_SIZE,
        "4.5.4: page sizes do not depend on the number of levels",
        "under CR4.LA57 a level-3 entry with PS maps 2M and a level-2 entry 4K, with the reserved bits of such pages",
    ),
)


def applicable(engine: str, case: WalkCase) -> list[str]:
    """Names of the divergences that can show in ``case``."""
    names = []
    implicit = case.kind == IMPLICIT and case.cr4 & CR4_SMAP and case.rflags & FLAG_AC
    if implicit and (engine == "bochscpu" or case.cpl < 3):
        names.append(IMPLICIT_SMAP)
    if engine == "unicorn" and case.mode == "pae":
        names.append(PDPTES_IN_MEMORY)
    if engine == "unicorn" and case.mode in ("4-level", "5-level"):
        names.append(ACCESSED_1G)
    if engine == "bochscpu" and case.mode == "5-level":
        names.append(LA57_PAGE_SIZE)
    return names


def predictions(engine: str, case: WalkCase) -> list[tuple[str, WalkResult, bool]]:
    """(names, result, whether A may be set in a 1G leaf that denies) for each way to diverge, fewest names first."""
    names = applicable(engine, case)
    found = []
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            found.append((" + ".join(chosen), predict(case, chosen), ACCESSED_1G in chosen))
    return found


def predict(case: WalkCase, names: tuple[str, ...]) -> WalkResult:
    """What a walk with these divergences ends in."""
    if IMPLICIT_SMAP in names:
        case = replace(case, cr4=case.cr4 & ~CR4_SMAP)
    registers = case.registers()
    if PDPTES_IN_MEMORY in names:
        return walk_from_memory(case, registers)
    result = walk(Ram(case.words), registers, case.gva, KINDS[case.kind], implicit=case.kind == IMPLICIT)
    if LA57_PAGE_SIZE in names:
        shrink_page(result, registers, case.gva)
    return result


def access_of(case: WalkCase) -> int:
    """The access in bits of the #PF error code."""
    if case.kind == IMPLICIT:
        return ACCESS_IMPLICIT
    return KINDS[case.kind] | (ACCESS_USER if case.cpl == 3 else 0)


def walk_from_memory(case: WalkCase, registers: PagingRegisters) -> WalkResult:
    """PAE paging without PDPTE registers."""
    access = access_of(case)
    pdpte = read_pdptes(Ram(case.words), case.cr3)[case.gva >> 30]
    if pdpte & PTE_P and not pdpte >> registers.config.maxphyaddr:
        return walk_tables(registers.config, pte_frame(pdpte), case.gva, access, Ram(case.words))
    result = WalkResult(access)
    result.vector = VECTOR_PF
    result.error_code = fault_code(registers.config, access, PFERR_PRESENT | PFERR_RSVD if pdpte & PTE_P else 0)
    return result


def shrink_page(result: WalkResult, registers: PagingRegisters, gva: int) -> None:
    """Take the leaf that ``result`` ended at for one of the next smaller size."""
    if not result.entries or result.level not in (2, 3):
        return
    entry = result.entries[-1][1]
    if not entry & PTE_P or not entry & PTE_PS:
        return
    config = registers.config
    shift = 21 if result.level == 3 else PAGE_SHIFT
    reserved = (1 << LOW_BITS) - (1 << config.maxphyaddr) | (0 if config.efer_nx else PTE_NX)
    reserved |= (1 << shift) - (1 << 13) if shift > PAGE_SHIFT else 0
    result.vector = 0
    result.error_code = 0
    if entry & reserved:
        cause = PFERR_PRESENT | PFERR_RSVD
    else:
        within = (1 << shift) - 1
        # Bit 12 is PAT still, even where it would be an address bit of so small a page.
        result.gpa = pte_frame(entry) << PAGE_SHIFT & ~within & ~PTE_PAT_LARGE | gva & within
        cause = denial(
            config,
            result.writable and entry & PTE_W != 0,
            result.user and entry & PTE_U != 0,
            result.nx or entry & PTE_NX != 0,
            0,
            result.access,
        )
    if cause:
        result.vector = VECTOR_PF
        result.error_code = fault_code(config, result.access, cause)
        result.gpa = NO_ADDRESS
