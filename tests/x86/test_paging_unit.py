"""Control registers, PCIDs and invalidation (SDM vol. 3, 4.4.1, 4.10): what must go, what stays, and what faults."""

from __future__ import annotations

import pytest
from paging_phys import ALL, GVA, ON, OTHER_PAGE, OTHER_ROOT, PAGE, ROOT, Phys, chain, slot
from walk_cases import IMPLICIT, KINDS, MODES, Generator, WalkCase, reference

from mmufuzz.x86.paging import (
    ACCESS_IMPLICIT,
    ACCESS_READ,
    ACCESS_WRITE,
    CR4_LA57,
    CR4_PCIDE,
    CR4_PKE,
    INVPCID_ADDRESS,
    INVPCID_ALL,
    INVPCID_ALL_GLOBAL,
    INVPCID_CONTEXT,
    PTE_G,
    PTE_P,
    PTE_PKEY_SHIFT,
    PTE_PS,
    PTE_U,
    PTE_W,
    is_canonical,
)
from mmufuzz.x86.paging_unit import (
    CR0_NW,
    CR3_KEEP,
    PagingUnit,
)
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    FLAG_AC,
    PFERR_PRESENT,
    PFERR_USER,
    PFERR_WRITE,
    VECTOR_GP,
    VECTOR_PF,
    Fault,
)


def long_mode(cr4: int = 0, efer: int = EFER_NX) -> PagingUnit:
    """4-level paging by the tables of ``chain``; ``OTHER_ROOT`` names the same ones."""
    phys = Phys()
    for address, entry in chain(GVA).items():
        phys.store(address, entry)
    phys.store(slot(OTHER_ROOT, GVA, 4), phys.words[slot(ROOT, GVA, 4)])
    unit = PagingUnit(phys)
    unit.write_efer(efer | EFER_LME)
    unit.write_cr4(CR4_PAE)
    unit.write_cr3(ROOT << 12)
    unit.write_cr0(ON)
    unit.write_cr4(CR4_PAE | cr4)
    return unit


def remap(unit: PagingUnit, flags: int = ALL, frame: int = OTHER_PAGE) -> None:
    phys = unit.phys
    assert isinstance(phys, Phys)
    phys.store(slot(4, GVA, 1), frame << 12 | flags)


def frame(unit: PagingUnit, access: int = ACCESS_READ, cpl: int = 0) -> int:
    return unit.translate(GVA, access, cpl=cpl) >> 12


def gp(call: object, *values: int) -> bool:
    """True if ``call`` raises #GP(0)."""
    try:
        call(*values)  # type: ignore[operator]
    except Fault as fault:
        return (fault.vector, fault.error_code) == (VECTOR_GP, 0)
    return False


# Which operations drop a cached translation, and which must not have to.

GLOBAL = ALL | PTE_G


@pytest.mark.parametrize(
    ("operation", "plain_stays", "global_stays"),
    [
        (lambda unit: unit.write_cr3(ROOT << 12), False, True),
        (lambda unit: unit.write_cr3(ROOT << 12 | CR3_KEEP), True, True),
        (lambda unit: unit.invlpg(GVA), False, False),
        (lambda unit: unit.invlpg(GVA + 0x1000), True, True),
        (lambda unit: unit.invlpg(1 << 63), True, True),
        (lambda unit: unit.invpcid(INVPCID_ADDRESS, 0, GVA), False, True),
        (lambda unit: unit.invpcid(INVPCID_ADDRESS, 0, GVA + 0x1000), True, True),
        (lambda unit: unit.invpcid(INVPCID_ADDRESS, 5, GVA), True, True),
        (lambda unit: unit.invpcid(INVPCID_CONTEXT, 0, 0), False, True),
        (lambda unit: unit.invpcid(INVPCID_CONTEXT, 5, 0), True, True),
        (lambda unit: unit.invpcid(INVPCID_ALL_GLOBAL, 0, 0), False, False),
        (lambda unit: unit.invpcid(INVPCID_ALL, 0, 0), False, True),
        (lambda unit: unit.write_cr4(unit.cr4 & ~CR4_PGE), False, False),
        (lambda unit: unit.write_cr4(unit.cr4 & ~CR4_PCIDE), False, False),
        (lambda unit: unit.write_cr4(unit.cr4 | CR4_SMEP), False, False),
        (lambda unit: unit.write_cr4(unit.cr4 | CR4_SMAP), True, True),
        (lambda unit: unit.write_cr4(unit.cr4 | CR4_PKE), True, True),
        (lambda unit: unit.write_cr0(ON & ~CR0_WP), True, True),
        (lambda unit: unit.write_efer(EFER_LME), True, True),
        (lambda unit: unit.write_pkru(0), True, True),
    ],
)
def test_what_an_operation_invalidates(operation: object, plain_stays: bool, global_stays: bool) -> None:
    for flags, stays in ((ALL, plain_stays), (GLOBAL, global_stays)):
        unit = long_mode(CR4_PCIDE | CR4_PGE)
        remap(unit, flags, PAGE)
        unit.translate(GVA, ACCESS_READ, cpl=3)
        remap(unit)
        operation(unit)  # type: ignore[operator]
        assert frame(unit, cpl=3) == (PAGE if stays else OTHER_PAGE)


def test_turning_paging_off_and_on_drops_global_pages_too() -> None:
    unit = long_mode(CR4_PGE)
    remap(unit, GLOBAL, PAGE)
    frame(unit)
    remap(unit)
    unit.write_cr0(CR0_PE)
    assert unit.translate(GVA, ACCESS_READ) == GVA
    assert not unit.efer & EFER_LMA
    unit.write_cr0(ON)
    assert frame(unit) == OTHER_PAGE


def test_clearing_smep_invalidates_nothing() -> None:
    unit = long_mode(CR4_SMEP)
    frame(unit)
    remap(unit)
    unit.write_cr4(CR4_PAE)
    assert frame(unit) == PAGE


def test_pcids_keep_their_translations_apart() -> None:
    unit = long_mode(CR4_PCIDE)
    frame(unit)
    remap(unit)
    unit.write_cr3(OTHER_ROOT << 12 | 5)
    assert (unit.pcid, frame(unit)) == (5, OTHER_PAGE)
    unit.write_cr3(ROOT << 12 | CR3_KEEP)
    assert (unit.pcid, frame(unit)) == (0, PAGE)


def test_a_global_page_serves_every_pcid() -> None:
    unit = long_mode(CR4_PCIDE | CR4_PGE)
    remap(unit, GLOBAL, PAGE)
    frame(unit)
    remap(unit)
    unit.write_cr3(ROOT << 12 | 5)
    assert frame(unit) == PAGE
    unit.invlpg(GVA)
    unit.write_cr3(ROOT << 12 | CR3_KEEP)
    assert frame(unit) == OTHER_PAGE


def test_without_pge_no_page_is_global() -> None:
    unit = long_mode()
    remap(unit, GLOBAL, PAGE)
    frame(unit)
    remap(unit)
    unit.write_cr3(ROOT << 12)
    assert frame(unit) == OTHER_PAGE


def test_bit_63_of_cr3_is_not_kept_in_it() -> None:
    unit = long_mode(CR4_PCIDE)
    unit.write_cr3(ROOT << 12 | CR3_KEEP | 7)
    assert unit.cr3 == ROOT << 12 | 7


def test_invlpg_drops_every_piece_of_a_large_page_and_no_other() -> None:
    unit = long_mode()
    phys = unit.phys
    assert isinstance(phys, Phys)
    large, neighbour = GVA & -(1 << 21), (GVA & -(1 << 21)) + (1 << 21)
    for gva, target in ((large, 0x20_0000), (neighbour, 0x40_0000)):
        phys.store(slot(3, gva, 2), target | ALL | PTE_PS)
    pages = (large, large + 0x3000, neighbour)
    for gva in pages:
        unit.translate(gva, ACCESS_READ)
        phys.store(slot(3, gva, 2), 0x80_0000 | ALL | PTE_PS)
        phys.store(slot(3, large, 2), 0x20_0000 | ALL | PTE_PS)
    phys.store(slot(3, large, 2), 0x80_0000 | ALL | PTE_PS)
    unit.invlpg(large + 0x5000)
    assert [unit.translate(gva, ACCESS_READ) for gva in pages] == [0x80_0000, 0x80_3000, 0x40_0000]


@pytest.mark.parametrize("gva", [GVA, GVA + 0x1000])
def test_invpcid_of_an_address_drops_the_table_pointers_that_it_uses(gva: int) -> None:
    """A neighbour's translation would use the same pointers, so its invalidation drops them too."""
    unit = long_mode(CR4_PCIDE)
    phys = unit.phys
    assert isinstance(phys, Phys)
    frame(unit)
    phys.store(slot(6, GVA, 1), OTHER_PAGE << 12 | ALL)
    phys.store(slot(3, GVA, 2), 6 << 12 | ALL)
    unit.invpcid(INVPCID_ADDRESS, 0, gva)
    unit.tlb.evict(GVA >> 12)
    assert frame(unit) == OTHER_PAGE


@pytest.mark.parametrize(
    "operation",
    [
        lambda unit: unit.invpcid(INVPCID_ALL, 0, 0),
        lambda unit: unit.invpcid(INVPCID_ALL_GLOBAL, 0, 0),
        lambda unit: unit.invpcid(INVPCID_CONTEXT, 5, 0),
        lambda unit: unit.invpcid(INVPCID_ADDRESS, 5, GVA),
        lambda unit: unit.write_cr4(unit.cr4 ^ CR4_PGE),
    ],
)
def test_what_reaches_into_other_pcids(operation: object) -> None:
    unit = long_mode(CR4_PCIDE)
    unit.write_cr3(ROOT << 12 | 5)
    frame(unit)
    remap(unit)
    unit.write_cr3(ROOT << 12)
    operation(unit)  # type: ignore[operator]
    unit.write_cr3(ROOT << 12 | 5 | CR3_KEEP)
    assert frame(unit) == OTHER_PAGE


# Rights that registers decide take effect at once, and faults are never stale.


@pytest.mark.parametrize(("cpl", "filled"), [(0, True), (3, False)])
def test_speculation_has_the_privilege_of_the_code(cpl: int, filled: bool) -> None:
    unit = long_mode()
    remap(unit, ALL & ~PTE_U, PAGE)
    assert unit.fill(GVA, ACCESS_READ, cpl=cpl) == filled
    # What it has cached serves until it is invalidated.
    remap(unit)
    assert frame(unit) == (PAGE if filled else OTHER_PAGE)


def test_a_permission_upgrade_is_seen_without_invalidation() -> None:
    unit = long_mode()
    remap(unit, PTE_P)
    frame(unit)
    remap(unit, ALL, PAGE)
    assert frame(unit, ACCESS_WRITE, 3) == PAGE


def test_pkru_binds_cached_translations_at_once() -> None:
    unit = long_mode(CR4_PKE)
    remap(unit, ALL | 3 << PTE_PKEY_SHIFT, PAGE)
    frame(unit, ACCESS_WRITE, 3)
    unit.write_pkru(2 << 2 * 3)
    assert frame(unit, ACCESS_READ, 3) == PAGE
    with pytest.raises(Fault) as raised:
        frame(unit, ACCESS_WRITE, 3)
    assert raised.value.error_code == PFERR_PRESENT | PFERR_WRITE | PFERR_USER | 1 << 5


def test_write_protect_binds_cached_translations_at_once() -> None:
    unit = long_mode()
    unit.write_cr0(ON & ~CR0_WP)
    remap(unit, PTE_P | PTE_U, PAGE)
    frame(unit, ACCESS_WRITE)
    unit.write_cr0(ON)
    with pytest.raises(Fault):
        frame(unit, ACCESS_WRITE)


def test_smap_takes_flags_of_the_access_but_not_for_an_implicit_one() -> None:
    unit = long_mode(CR4_SMAP)
    assert unit.translate(GVA, ACCESS_READ, rflags=FLAG_AC) >> 12 == PAGE
    for cpl in (0, 3):
        with pytest.raises(Fault) as raised:
            unit.translate(GVA, ACCESS_READ | ACCESS_IMPLICIT, cpl=cpl, rflags=FLAG_AC)
        assert raised.value.error_code == PFERR_PRESENT


@pytest.mark.parametrize("gva", [1 << 47, (1 << 64) - (1 << 47) - 1, 1 << 63])
def test_an_address_that_is_not_canonical_is_a_general_protection_fault(gva: int) -> None:
    assert gp(lambda: long_mode().translate(gva, ACCESS_READ))


def test_five_levels_have_57_bit_addresses() -> None:
    assert is_canonical(1 << 47, 57) and is_canonical((1 << 64) - (1 << 56), 57)
    assert not is_canonical(1 << 56, 57) and not is_canonical((1 << 64) - (1 << 56) - 1, 57)


# Writes that fault.


@pytest.mark.parametrize(
    ("cr4", "register", "value"),
    [
        (0, "cr0", 1 << 32 | ON),
        (0, "cr0", CR0_PG),
        (0, "cr0", ON | CR0_NW),
        (CR4_PCIDE, "cr0", CR0_PE),
        (0, "cr3", 1 << 40),
        (0, "cr3", CR3_KEEP | ROOT << 12),
        (CR4_PCIDE, "cr3", CR3_KEEP | 1 << 45),
        (0, "cr4", 0),
        (0, "cr4", CR4_PAE | CR4_LA57),
        (0, "efer", 0),
    ],
)
def test_a_write_that_faults_changes_nothing(cr4: int, register: str, value: int) -> None:
    unit = long_mode(cr4)
    frame(unit)
    before = (unit.cr0, unit.cr3, unit.cr4, unit.efer, unit.tlb.canonical())
    assert gp(getattr(unit, f"write_{register}"), value)
    assert (unit.cr0, unit.cr3, unit.cr4, unit.efer, unit.tlb.canonical()) == before


def test_pcide_needs_long_mode_and_pcid_zero() -> None:
    unit = long_mode()
    unit.write_cr3(ROOT << 12 | 5)
    assert gp(unit.write_cr4, CR4_PAE | CR4_PCIDE)
    assert gp(PagingUnit(Phys()).write_cr4, CR4_PAE | CR4_PCIDE)


def test_long_mode_needs_pae() -> None:
    unit = PagingUnit(Phys())
    unit.write_efer(EFER_LME)
    assert gp(unit.write_cr0, ON)


@pytest.mark.parametrize(
    ("cr4", "kind", "pcid", "gva", "faults"),
    [
        (0, 4, 0, 0, True),
        (CR4_PCIDE, INVPCID_ALL, 1 << 12, 0, True),
        (0, INVPCID_CONTEXT, 1, 0, True),
        (0, INVPCID_ADDRESS, 1, 0, True),
        (0, INVPCID_ALL, 1, 0, False),
        (CR4_PCIDE, INVPCID_CONTEXT, 1, 1 << 63, False),
        (CR4_PCIDE, INVPCID_ADDRESS, 1, 1 << 63, True),
    ],
)
def test_bad_invpcid_descriptors(cr4: int, kind: int, pcid: int, gva: int, faults: bool) -> None:
    assert gp(long_mode(cr4).invpcid, kind, pcid, gva) == faults


# PDPTE registers.


def pae(entries: tuple[int, int, int, int] = (3 << 12 | PTE_P, 0, 0, 0)) -> PagingUnit:
    phys = Phys()
    for index, entry in enumerate(entries):
        phys.store(0x9020 + 8 * index, entry)
    phys.store(slot(3, GVA, 2), 4 << 12 | ALL)
    phys.store(slot(4, GVA, 1), PAGE << 12 | ALL)
    unit = PagingUnit(phys)
    unit.write_cr4(CR4_PAE)
    unit.write_cr3(0x9020)
    unit.write_cr0(ON)
    return unit


def test_pdptes_are_read_when_registers_are_written_and_not_before() -> None:
    unit = pae()
    phys = unit.phys
    assert isinstance(phys, Phys)
    phys.store(0x9020, 0)
    unit.invlpg(GVA)
    assert frame(unit) == PAGE
    unit.write_cr3(0x9020)
    with pytest.raises(Fault) as raised:
        frame(unit)
    assert (raised.value.vector, raised.value.error_code) == (VECTOR_PF, 0)


@pytest.mark.parametrize("bit", [CR4_PGE, CR4_PSE, CR4_SMEP])
def test_cr4_writes_reload_the_pdptes(bit: int) -> None:
    unit = pae()
    phys = unit.phys
    assert isinstance(phys, Phys)
    phys.store(0x9020 + 24, PTE_P | PTE_W)
    assert not gp(unit.write_cr4, CR4_PAE | CR4_SMAP)
    assert gp(unit.write_cr4, CR4_PAE | CR4_SMAP | bit)
    assert unit.cr4 == CR4_PAE | CR4_SMAP


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 52, 63])
@pytest.mark.parametrize("present", [0, PTE_P])
def test_a_reserved_bit_in_a_present_pdpte_faults_when_it_is_loaded(bit: int, present: int) -> None:
    assert gp(pae, (0, 0, 1 << bit | present, 0)) == (present != 0)  # type: ignore[arg-type]


# All modes, over random tables.


def unit_of(case: WalkCase) -> PagingUnit:
    phys = Phys()
    phys.words = dict(case.words)
    unit = PagingUnit(phys)
    unit.write_efer(case.efer & ~EFER_LMA)
    unit.write_cr4(case.cr4)
    unit.write_pkru(case.pkru)
    unit.write_cr3(case.cr3)
    unit.write_cr0(case.cr0)
    return unit


@pytest.mark.parametrize("mode", MODES)
def test_hardware_walk_agrees_with_the_reference_walk(mode: str) -> None:
    """Address or fault, A and D bits, and the same again from what is cached then."""
    generator = Generator(mode, 3, pke=True, linear_bits=57 if mode == "5-level" else 48)
    for _ in range(1500):
        case = generator.case()
        expected = reference(case)
        if expected.no_memory:
            continue
        access = KINDS[case.kind] | (ACCESS_IMPLICIT if case.kind == IMPLICIT else 0)
        words = dict(case.words)
        for gpa, bits in expected.ad_updates:
            words[gpa & ~7] |= bits << (gpa & 4) * 8
        unit = None
        for _ in range(2):
            try:
                unit = unit or unit_of(case)
                gpa = unit.translate(case.gva, access, cpl=case.cpl, rflags=case.rflags)
            except Fault as fault:
                assert (fault.vector, fault.error_code) == (expected.vector, expected.error_code), case
            else:
                assert (gpa, expected.vector) == (expected.gpa, 0), case
                assert unit.phys.words == words, case  # type: ignore[attr-defined]
