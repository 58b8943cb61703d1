"""The public walk: its arguments, its answer, and the rules that a mode or a processor's features change."""

from __future__ import annotations

import doctest
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paging_phys import ALL, ON, chain
from walk_divergences import DIVERGENCES

from mmufuzz.x86 import (
    ACCESS_FETCH,
    ACCESS_READ,
    ACCESS_WRITE,
    PageTableReader,
    PagingRegisters,
    WalkResult,
    walk,
)
from mmufuzz.x86.paging import (
    CR4_LA57,
    CR4_PCIDE,
    CR4_PKE,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_NX,
    PTE_P,
    PTE_PAT_LARGE,
    PTE_PKEY_SHIFT,
    PTE_PS,
    PTE_U,
    PTE_W,
    PagingConfig,
    key_denies,
    pdpte_reserved,
    reserved_bits,
)
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    FLAG_AC,
    PFERR_FETCH,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_USER,
    PFERR_WRITE,
    VECTOR_GP,
    VECTOR_PF,
)

PAGE_DOC = Path(__file__).resolve().parents[2] / "docs" / "reference" / "page-walk.md"
PK = 1 << 5
LONG = EFER_LME | EFER_LMA | EFER_NX


def registers(mode: str, **changes: Any) -> PagingRegisters:
    """Registers of a mode, with the tables at 0x1000."""
    values: dict[str, Any] = {"cr0": ON, "cr3": 0x1000}
    if mode == "pae":
        values |= {"cr4": CR4_PAE, "efer": EFER_NX}
    elif mode != "32-bit":
        values |= {"cr4": CR4_PAE | (CR4_LA57 if mode == "5-level" else 0), "efer": LONG}
    values["cr4"] = values.get("cr4", 0) | changes.pop("cr4", 0)
    return PagingRegisters(**(values | changes))


def long_tables(leaf: int, level: int = 1) -> dict[int, int]:
    """4-level tables at frames 1 to 4 that map linear address 0 by ``leaf`` at ``level``."""
    return chain(0, leaf=level) | {5 - level << 12: leaf}


# Kinds of memory.

WORDS = long_tables(0x77 << 12 | ALL)


class Reader(PageTableReader):
    def read_entry(self, gpa: int) -> int:
        return WORDS.get(gpa, -1)


@pytest.mark.parametrize("memory", [WORDS, MappingProxyType(WORDS), lambda gpa: WORDS.get(gpa, 0), Reader()])
def test_any_kind_of_memory_will_do(memory: Mapping[int, int]) -> None:
    result = walk(memory, registers("4-level"), 0xABC, ACCESS_WRITE)
    assert (result.gpa, result.gfn, result.page_shift) == (0x77ABC, 0x77, 12)
    assert walk(memory, registers("4-level"), 0x1ABC).vector == VECTOR_PF


def test_a_table_outside_memory_is_told() -> None:
    result = walk(lambda gpa: -1, registers("4-level"), 0)
    assert (result.no_memory, result.vector, result.error_code) == (True, VECTOR_PF, 0)


def test_a_mapping_without_the_key_reads_as_not_present() -> None:
    result = walk({}, registers("4-level"), 0)
    assert (result.no_memory, result.error_code, result.entries) == (False, 0, [(0x1000, 0)])


# Arguments.


@pytest.mark.parametrize("access", [ACCESS_WRITE | ACCESS_FETCH, PFERR_USER, 1, 1 << 48])
def test_other_accesses_are_refused(access: int) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        walk({}, registers("4-level"), 0, access)


@pytest.mark.parametrize(("mode", "gva"), [("4-level", 1 << 64), ("4-level", -1), ("pae", 1 << 32), ("32-bit", -1)])
def test_addresses_out_of_range_are_refused(mode: str, gva: int) -> None:
    with pytest.raises(ValueError, match="is outside"):
        walk({}, registers(mode), gva)


@pytest.mark.parametrize(
    "values",
    [
        {"cr0": CR0_PG},
        {"cr0": CR0_PE, "efer": EFER_LMA, "cr4": CR4_PAE},
        {"cr0": ON, "efer": EFER_LMA},
        {"cr0": ON, "cr4": CR4_PAE | CR4_PCIDE},
        {"cr0": ON, "cpl": 4},
        {"cr0": ON, "pkru": 1 << 32},
        {"cr0": ON, "maxphyaddr": 53},
        {"cr0": ON, "cr4": CR4_PAE, "pdptes": (PTE_P | PTE_W, 0, 0, 0)},
    ],
)
def test_registers_that_no_processor_holds_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"without|outside|reserved"):
        PagingRegisters(cr3=0, **values)


def test_the_walk_changes_nothing() -> None:
    words = dict(WORDS)
    walk(words, registers("4-level"), 0, ACCESS_WRITE)
    assert words == WORDS


# Linear addresses.


@pytest.mark.parametrize(
    ("mode", "gva", "vector"),
    [
        ("4-level", (1 << 47) - 1, VECTOR_PF),
        ("4-level", 1 << 47, VECTOR_GP),
        ("4-level", (1 << 64) - (1 << 47) - 1, VECTOR_GP),
        ("4-level", (1 << 64) - (1 << 47), VECTOR_PF),
        ("5-level", (1 << 56) - 1, VECTOR_PF),
        ("5-level", 1 << 56, VECTOR_GP),
        ("5-level", (1 << 64) - (1 << 56), VECTOR_PF),
    ],
)
def test_an_address_that_is_not_canonical_reads_no_table(mode: str, gva: int, vector: int) -> None:
    result = walk({}, registers(mode), gva)
    assert (result.vector, result.error_code, result.fault) == (vector, 0, True)
    assert (result.entries == []) == (vector == VECTOR_GP)


def test_without_paging_addresses_are_physical() -> None:
    result = walk({}, PagingRegisters(cr0=CR0_PE, cr3=0), 0xFFFF_FFFF, ACCESS_WRITE)
    assert (result.fault, result.gpa, result.level, result.page_shift) == (False, 0xFFFF_FFFF, 0, 0)


# 32-bit paging.


def test_entries_of_four_bytes_share_a_word() -> None:
    words = {0x1000: 0x2007 << 32, 0x2008: 0x7_7007 << 32 | 0x6_6007}
    result = walk(words, registers("32-bit"), 1 << 22 | 3 << 12 | 0xABC)
    assert (result.gpa, result.entries) == (0x77ABC, [(0x1004, 0x2007), (0x200C, 0x77007)])
    assert walk(words, registers("32-bit"), 1 << 22 | 2 << 12).gpa == 0x66000


def test_a_4m_page_takes_its_upper_address_bits_from_the_middle_of_the_entry() -> None:
    words = {0x1000: 0x1234 << 20 & 0xFFC0_0000 | 0xA5 << 13 | PTE_PAT_LARGE | PTE_PS | ALL}
    result = walk(words, registers("32-bit", cr4=CR4_PSE), 0x2A_BCDE)
    assert (result.gpa, result.page_shift) == (0xA5 << 32 | 0x1234 << 20 & 0xFFC0_0000 | 0x2A_BCDE, 22)


def test_without_pse_the_bit_is_ignored() -> None:
    words = {0x1000: 0x2000 | PTE_PS | ALL, 0x2000: 0x7_7000 | ALL}
    assert walk(words, registers("32-bit"), 0).gpa == 0x77000


@pytest.mark.parametrize("maxphyaddr", range(32, 53))
@pytest.mark.parametrize("pse36", [False, True])
def test_reserved_bits_of_a_4m_page(maxphyaddr: int, pse36: bool) -> None:
    config = PagingConfig(2, maxphyaddr=maxphyaddr, pse36=pse36)
    reserved = [bit for bit in range(12, 22) if reserved_bits(config, 2, PTE_P | PTE_PS | 1 << bit)]
    address_bits = min(maxphyaddr, 40) if pse36 else 32
    assert reserved == list(range(13 + address_bits - 32, 22))


def test_nothing_else_is_reserved_with_32_bit_paging() -> None:
    for level in (1, 2):
        assert not reserved_bits(PagingConfig(2, maxphyaddr=32), level, 0xFFFF_FFFF & ~(PTE_PS if level == 2 else 0))


@pytest.mark.parametrize(("smep", "fetch"), [(0, 0), (CR4_SMEP, PFERR_FETCH)])
def test_nxe_does_not_make_32_bit_paging_report_fetches(smep: int, fetch: int) -> None:
    result = walk({}, registers("32-bit", cr4=smep, efer=EFER_NX), 0, ACCESS_FETCH)
    assert result.error_code == fetch


# PAE paging.


def pae_words(pdpte: int, leaf: int = 0x77 << 12 | ALL) -> dict[int, int]:
    return {0x1020: pdpte, 0x2000: 0x3000 | ALL, 0x3000: leaf}


def test_pdptes_lie_at_any_multiple_of_32_and_grant_all_rights() -> None:
    result = walk(pae_words(0x2000 | PTE_P), registers("pae", cr3=0x1020, cpl=3), 0xABC, ACCESS_WRITE)
    assert (result.gpa, result.entries[0]) == (0x77ABC, (0x2000, 0x3000 | ALL))


def test_pdpte_registers_outlive_what_is_in_memory() -> None:
    held = registers("pae", cr3=0x1020, pdptes=(0x2000 | PTE_P, 0, 0, 0))
    assert walk(pae_words(0), held, 0).gpa == 0x77000
    result = walk(pae_words(0x2000 | PTE_P), held, 1 << 30)
    assert (result.vector, result.error_code, result.level) == (VECTOR_PF, 0, 3)


@pytest.mark.parametrize("index", range(4))
def test_a_bad_pdpte_in_memory_is_a_general_protection_fault_whichever_is_used(index: int) -> None:
    words = pae_words(0x2000 | PTE_P)
    words[0x1020 + 8 * index] = PTE_P | PTE_U
    assert walk(words, registers("pae", cr3=0x1020), 0).vector == VECTOR_GP


@pytest.mark.parametrize("maxphyaddr", range(32, 53))
def test_reserved_bits_of_pae_paging(maxphyaddr: int) -> None:
    config = PagingConfig(3, maxphyaddr=maxphyaddr)
    high = list(range(maxphyaddr, 63))
    assert [bit for bit in range(1, 64) if reserved_bits(config, 1, PTE_P | 1 << bit)] == high
    assert [bit for bit in range(1, 64) if reserved_bits(config, 2, PTE_P | 1 << bit)] == high
    large = [bit for bit in range(1, 64) if reserved_bits(config, 2, PTE_P | PTE_PS | 1 << bit)]
    assert large == [*range(13, 21), *high]
    assert [bit for bit in range(1, 64) if pdpte_reserved(config, PTE_P | 1 << bit)] == [1, 2, 5, 6, 7, 8, *high, 63]


# Processor features.


@pytest.mark.parametrize("maxphyaddr", range(32, 53))
@pytest.mark.parametrize("level", [4, 5])
def test_reserved_bits_follow_maxphyaddr(level: int, maxphyaddr: int) -> None:
    config = PagingConfig(level, maxphyaddr=maxphyaddr)
    high = list(range(maxphyaddr, 52))
    for at in range(1, level + 1):
        found = [bit for bit in range(12, 64) if reserved_bits(config, at, PTE_P | 1 << bit)]
        assert found == high
        assert reserved_bits(config, at, PTE_P | PTE_PS) == (at >= 4)


def test_without_1g_pages_ps_is_reserved_at_level_3() -> None:
    words = long_tables(PTE_PS | ALL, 3)
    assert walk(words, registers("4-level"), 0).page_shift == 30
    result = walk(words, registers("4-level", page_1g=False), 0)
    assert result.error_code == PFERR_PRESENT | PFERR_RSVD


def test_cr3_names_the_root_by_its_address_bits_alone() -> None:
    flags = 0x018
    assert walk(WORDS, registers("4-level", cr3=0x1000 | flags), 0).gpa == 0x77000
    assert walk(WORDS, registers("4-level", cr3=0x1005, cr4=CR4_PCIDE), 0).gpa == 0x77000


# Rights.


@pytest.mark.parametrize("cpl", [0, 1, 2])
def test_every_cpl_below_3_is_a_supervisor(cpl: int) -> None:
    words = long_tables(0x77 << 12 | PTE_P | PTE_W)
    assert not walk(words, registers("4-level", cpl=cpl), 0, ACCESS_WRITE).fault
    assert walk(words, registers("4-level", cpl=3), 0).error_code == PFERR_PRESENT | PFERR_USER


def test_an_implicit_access_is_a_supervisor_access_at_cpl_3() -> None:
    words = long_tables(0x77 << 12 | PTE_P | PTE_W)
    assert not walk(words, registers("4-level", cpl=3), 0, implicit=True).fault


@pytest.mark.parametrize(
    ("rflags", "implicit", "fault"), [(2, False, 1), (2 | FLAG_AC, False, 0), (2 | FLAG_AC, True, 1)]
)
def test_smap_yields_to_ac_only_for_explicit_accesses(rflags: int, implicit: bool, fault: int) -> None:
    result = walk(WORDS, registers("4-level", cr4=CR4_SMAP, rflags=rflags), 0, implicit=implicit)
    assert (result.vector, result.error_code) == (VECTOR_PF * fault, PFERR_PRESENT * fault)


def manual_key_denies(cr0_wp: bool, user_address: bool, ad: bool, wd: bool, user: bool, kind: int) -> bool:
    """SDM 4.6.2, sentence by sentence."""
    if not user_address or kind == ACCESS_FETCH:
        return False
    if ad:
        return True
    return wd and kind == ACCESS_WRITE and (user or cr0_wp)


@given(st.booleans(), st.booleans(), st.integers(0, 15), st.integers(0, (1 << 32) - 1), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_protection_keys_follow_the_manual(wp: bool, user_address: bool, pkey: int, pkru: int, user: bool) -> None:
    config = PagingConfig(4, cr0_wp=wp, pke=True, pkru=pkru)
    ad, wd = pkru >> 2 * pkey & 1 != 0, pkru >> 2 * pkey & 2 != 0
    for kind in (ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH):
        expected = manual_key_denies(wp, user_address, ad, wd, user, kind)
        assert key_denies(config, user_address, pkey, kind | (PFERR_USER if user else 0)) == expected


@pytest.mark.parametrize(
    ("leaf", "cr4", "access", "code"),
    [
        (ALL, CR4_PKE, ACCESS_READ, PFERR_PRESENT | PFERR_USER | PK),
        (PTE_P | PTE_U, CR4_PKE, ACCESS_WRITE, PFERR_PRESENT | PFERR_USER | PFERR_WRITE | PK),
        (ALL, 0, ACCESS_READ, None),
        (ALL, CR4_PKE, ACCESS_FETCH, None),
        (ALL | PTE_NX, CR4_PKE, ACCESS_FETCH, PFERR_PRESENT | PFERR_USER | PFERR_FETCH),
        (PTE_P | PTE_W, CR4_PKE, ACCESS_READ, PFERR_PRESENT | PFERR_USER),
        (ALL | 1 << 50, CR4_PKE, ACCESS_READ, PFERR_PRESENT | PFERR_USER | PFERR_RSVD),
        (0, CR4_PKE, ACCESS_READ, PFERR_USER),
    ],
)
def test_the_pk_flag_of_the_error_code(leaf: int, cr4: int, access: int, code: int | None) -> None:
    words = long_tables(leaf | 0x77 << 12 | 9 << PTE_PKEY_SHIFT)
    result = walk(words, registers("4-level", cr4=cr4, cpl=3, pkru=1 << 18), 0, access)
    assert (result.error_code if result.fault else None) == code


def test_the_leaf_tells_its_key_and_whether_it_is_global() -> None:
    words = long_tables(0x77 << 12 | ALL | PTE_G | 9 << PTE_PKEY_SHIFT)
    result = walk(words, registers("4-level", cr4=CR4_PKE | CR4_PGE), 0)
    assert (result.pkey, result.is_global) == (9, True)
    plain = walk(words, registers("4-level"), 0)
    assert (plain.pkey, plain.is_global) == (0, False)


def test_updates_of_four_byte_entries_are_at_their_own_address() -> None:
    words = {0x1000: 0x2007 << 32, 0x2008: 0x7_7007 << 32}
    result = walk(words, registers("32-bit"), 1 << 22 | 3 << 12, ACCESS_WRITE)
    assert result.ad_updates == [(0x1004, PTE_A), (0x200C, PTE_A | PTE_D)]


# The reference page.


def test_the_example_in_the_documentation_is_real() -> None:
    outcome = doctest.testfile(str(PAGE_DOC), module_relative=False)
    assert outcome.attempted >= 6
    assert outcome.failed == 0


def test_the_documentation_names_every_attribute() -> None:
    text = PAGE_DOC.read_text()
    result = WalkResult(ACCESS_READ)
    for name in dir(result):
        if not name.startswith("_") and name not in ("access", "record"):
            assert f"`{name}`" in text, name


def test_the_documentation_lists_the_divergences_of_the_engines() -> None:
    rows = [f"| {d.engine} | {d.name} | SDM {d.sdm} | {d.instead} |" for d in DIVERGENCES]
    shown = [line for line in PAGE_DOC.read_text().splitlines() if line.startswith(("| unicorn |", "| bochscpu |"))]
    assert shown == rows
