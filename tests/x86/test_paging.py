"""The reference walk: entry formats, access rights and page-fault error codes (SDM vol. 3, chapter 4)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paging_phys import ALL, PAGE, ROOT, chain, slot

from mmufuzz.x86.page_walk import PageTableReader, walk_tables
from mmufuzz.x86.paging import (
    ACCESS_FETCH,
    ACCESS_READ,
    ACCESS_USER,
    ACCESS_WRITE,
    CR4_LA57,
    NO_ADDRESS,
    NO_MEMORY,
    PTE_A,
    PTE_D,
    PTE_G,
    PTE_NX,
    PTE_P,
    PTE_PAT_LARGE,
    PTE_PCD,
    PTE_PS,
    PTE_PWT,
    PTE_U,
    PTE_W,
    PagingConfig,
    is_leaf,
    leaf_frame,
    paging_config,
    permitted,
    pte_frame,
    reserved_bits,
    table_index,
)
from mmufuzz.x86.state import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NX,
    FLAG_AC,
    FLAG_FIXED,
    PFERR_FETCH,
    PFERR_PRESENT,
    PFERR_RSVD,
    PFERR_USER,
    PFERR_WRITE,
    Regs,
)
from mmufuzz.x86.walk_result import WalkResult

GVA = 0x0000_1234_5678_9ABC


class Memory(PageTableReader):
    """Tables in a dictionary; absent entries read as zero, and above ``limit`` there is no memory."""

    def __init__(self, entries: dict[int, int], limit: int = 1 << 52) -> None:
        self.entries = entries
        self.limit = limit
        self.reads: list[int] = []

    def read_entry(self, gpa: int) -> int:
        self.reads.append(gpa)
        return NO_MEMORY if gpa >= self.limit else self.entries.get(gpa, 0)


def mapping(gva: int, flags: dict[int, int], leaf: int = 1, levels: int = 4) -> Memory:
    """Tables that map ``gva``; see ``chain``."""
    return Memory(chain(gva, flags, leaf, levels))


def look(memory: Memory, access: int, config: PagingConfig | None = None, gva: int = GVA) -> WalkResult:
    return walk_tables(config or PagingConfig(4), ROOT, gva, access, memory)


# Entry formats.


def test_table_index_takes_nine_bits_per_level() -> None:
    gva = 0x1F << 48 | 1 << 39 | 2 << 30 | 3 << 21 | 511 << 12 | 0xFFF
    assert [table_index(gva, level) for level in (1, 2, 3, 4, 5)] == [511, 3, 2, 1, 0x1F]


@given(st.integers(0, (1 << 40) - 1), st.integers(0, 0xFFF), st.integers(0, 0xFFF))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_frame_is_bits_12_to_51(frame: int, low: int, high: int) -> None:
    assert pte_frame(high << 52 | frame << 12 | low) == frame


@pytest.mark.parametrize(("level", "mask"), [(1, 0), (2, 0x1FF), (3, 0x3FFFF)])
def test_leaf_frame_of_a_large_page_takes_the_rest_from_the_address(level: int, mask: int) -> None:
    entry = 0x8_0000 << 12 | PTE_PAT_LARGE * (level > 1) | PTE_PS | ALL
    assert leaf_frame(level, entry, GVA) == 0x8_0000 | (GVA >> 12 & mask)


def test_ps_maps_a_page_at_levels_2_and_3_only() -> None:
    assert [level for level in range(1, 6) if is_leaf(level, PTE_P | PTE_PS)] == [1, 2, 3]
    assert [level for level in range(1, 6) if is_leaf(level, PTE_P)] == [1]


@pytest.mark.parametrize(
    ("level", "bits", "reserved"),
    [
        (1, 1 << 40, True),
        (1, 1 << 51, True),
        (1, 1 << 39, False),
        (1, 1 << 52, False),  # ignored, left to software
        (1, PTE_PS, False),  # PAT at level 1
        (1, 1 << 13, False),
        (1, PTE_G | PTE_PWT | PTE_PCD | PTE_A | PTE_D, False),
        (2, 1 << 13, False),  # an address bit of a table pointer
        (2, PTE_PS, False),
        (2, PTE_PS | PTE_PAT_LARGE, False),
        (2, PTE_PS | 1 << 13, True),
        (2, PTE_PS | 1 << 20, True),
        (2, PTE_PS | 1 << 21, False),
        (3, PTE_PS, False),
        (3, PTE_PS | PTE_PAT_LARGE, False),
        (3, PTE_PS | 1 << 21, True),
        (3, PTE_PS | 1 << 29, True),
        (3, PTE_PS | 1 << 30, False),
        (4, 0, False),
        (4, PTE_PS, True),
        (4, 1 << 45, True),
        (5, PTE_PS, True),
        (5, 0, False),
    ],
)
def test_reserved_bits(level: int, bits: int, reserved: bool) -> None:
    assert reserved_bits(PagingConfig(5), level, bits | PTE_P) == reserved


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("efer_nx", [False, True])
def test_nx_is_reserved_unless_efer_enables_it(level: int, efer_nx: bool) -> None:
    assert reserved_bits(PagingConfig(5, efer_nx=efer_nx), level, PTE_P | PTE_NX) != efer_nx


@pytest.mark.parametrize("maxphyaddr", [32, 40, 52])
def test_address_bits_from_maxphyaddr_are_reserved(maxphyaddr: int) -> None:
    config = PagingConfig(4, maxphyaddr=maxphyaddr)
    assert [bit for bit in range(12, 52) if reserved_bits(config, 1, PTE_P | 1 << bit)] == list(range(maxphyaddr, 52))


# Configuration.


def long_mode(cr0: int = 0, cr4: int = 0, efer: int = 0, rflags: int = 0) -> Regs:
    regs = Regs()
    regs.cr0 = CR0_PE | CR0_PG | cr0
    regs.cr4 = CR4_PAE | cr4
    regs.efer = EFER_LMA | efer
    regs.rflags = FLAG_FIXED | rflags
    return regs


def test_config_follows_the_registers() -> None:
    plain = paging_config(long_mode())
    assert (plain.paging, plain.level, plain.maxphyaddr) == (True, 4, 40)
    assert not (plain.cr0_wp or plain.smep or plain.smap or plain.efer_nx or plain.rflags_ac)
    assert paging_config(long_mode(cr0=CR0_WP)).cr0_wp
    assert paging_config(long_mode(cr4=CR4_SMEP)).smep
    assert paging_config(long_mode(cr4=CR4_SMAP)).smap
    assert paging_config(long_mode(cr4=CR4_LA57)).level == 5
    assert paging_config(long_mode(efer=EFER_NX)).efer_nx
    assert paging_config(long_mode(rflags=FLAG_AC)).rflags_ac
    assert paging_config(long_mode(), maxphyaddr=46).maxphyaddr == 46


def test_config_is_shared_between_equal_registers() -> None:
    assert paging_config(long_mode(cr0=CR0_WP)) is paging_config(long_mode(cr0=CR0_WP))
    assert paging_config(long_mode(cr0=CR0_WP)) is not paging_config(long_mode())


@pytest.mark.parametrize(("level", "maxphyaddr"), [(1, 40), (6, 40), (4, 31), (4, 53)])
def test_config_outside_its_range_is_refused(level: int, maxphyaddr: int) -> None:
    with pytest.raises(ValueError, match=r"no paging with|outside"):
        PagingConfig(level, maxphyaddr=maxphyaddr)


# Access rights.

BOTH = (False, True)
CONFIGS = [
    PagingConfig(4, cr0_wp=wp, smep=smep, smap=smap, rflags_ac=ac)
    for wp, smep, smap, ac in itertools.product(BOTH, repeat=4)
]
ACCESSES = [mode | kind for mode in (0, ACCESS_USER) for kind in (ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH)]


def manual_permits(config: PagingConfig, w: bool, user_address: bool, nx: bool, access: int) -> bool:
    """SDM 4.6.1, one line of the manual's list after the other."""
    rows = {
        # (user-mode access, kind): (supervisor-mode address, user-mode address)
        (False, ACCESS_READ): (True, not config.smap or config.rflags_ac),
        (False, ACCESS_WRITE): (
            w or not config.cr0_wp,
            (w or not config.cr0_wp) and (not config.smap or config.rflags_ac),
        ),
        (False, ACCESS_FETCH): (not nx, not config.smep and not nx),
        (True, ACCESS_READ): (False, True),
        (True, ACCESS_WRITE): (False, w),
        (True, ACCESS_FETCH): (False, not nx),
    }
    return rows[access & ACCESS_USER != 0, access & ~ACCESS_USER][user_address]


def test_permitted_is_the_table_of_the_manual() -> None:
    for config, access in itertools.product(CONFIGS, ACCESSES):
        for w, u, nx in itertools.product(BOTH, repeat=3):
            expected = manual_permits(config, w, u, nx, access)
            assert permitted(config, w, u, nx, access) == expected, (vars(config), w, u, nx, access)


def test_permitted_grows_with_write_and_execute_rights() -> None:
    for config, access, u in itertools.product(CONFIGS, ACCESSES, BOTH):
        for w, nx in itertools.product(BOTH, repeat=2):
            if permitted(config, w, u, nx, access):
                assert permitted(config, True, u, False, access)


def test_user_bit_grants_to_users_and_denies_to_supervisors() -> None:
    for config, access, w, nx in itertools.product(CONFIGS, ACCESSES, BOTH, BOTH):
        supervisor_address = permitted(config, w, False, nx, access)
        user_address = permitted(config, w, True, nx, access)
        assert user_address >= supervisor_address if access & ACCESS_USER else user_address <= supervisor_address


def test_without_paging_everything_is_permitted() -> None:
    for access in ACCESSES:
        assert permitted(PagingConfig(0, smep=True, smap=True), False, False, True, access)


# Error codes.

P, W, U, RSVD, I = PFERR_PRESENT, PFERR_WRITE, PFERR_USER, PFERR_RSVD, PFERR_FETCH  # noqa: E741
PLAIN = PagingConfig(4, efer_nx=False)
NX = PagingConfig(4)
SMEP = PagingConfig(4, efer_nx=False, smep=True)
SMAP = PagingConfig(4, smap=True)
SMAP_AC = PagingConfig(4, smap=True, rflags_ac=True)
NO_WP = PagingConfig(4, cr0_wp=False)


@pytest.mark.parametrize(
    ("config", "flags", "access", "code"),
    [
        (NX, {1: 0}, ACCESS_READ, 0),
        (NX, {1: 0}, ACCESS_WRITE, W),
        (NX, {1: 0}, ACCESS_USER, U),
        (NX, {4: 0}, ACCESS_USER | ACCESS_WRITE, U | W),
        (NX, {1: 0}, ACCESS_FETCH, I),
        (SMEP, {1: 0}, ACCESS_FETCH, I),
        (PLAIN, {1: 0}, ACCESS_FETCH, 0),
        (PLAIN, {1: 0}, ACCESS_FETCH | ACCESS_USER, U),
        (NX, {1: ALL | 1 << 40}, ACCESS_READ, P | RSVD),
        (NX, {4: ALL | PTE_PS}, ACCESS_WRITE | ACCESS_USER, P | RSVD | W | U),
        (PLAIN, {1: ALL | PTE_NX}, ACCESS_READ, P | RSVD),
        (PLAIN, {1: ALL | PTE_NX}, ACCESS_FETCH, P | RSVD),
        (NX, {3: ALL | 1 << 50}, ACCESS_FETCH, P | RSVD | I),
        (NX, {1: 1 << 40}, ACCESS_READ, 0),  # reserved bits of an entry that is not present do not count
        (NX, {2: ALL | 1 << 40, 1: 0}, ACCESS_READ, P | RSVD),  # the upper entry is met first
        (NX, {2: 0, 1: ALL | 1 << 40}, ACCESS_READ, 0),
        (NX, {2: PTE_P | PTE_U, 1: 0}, ACCESS_WRITE, W),  # no right is checked before the leaf is known
        (NX, {1: PTE_P | PTE_U}, ACCESS_WRITE, P | W),
        (NX, {1: PTE_P | PTE_U}, ACCESS_WRITE | ACCESS_USER, P | W | U),
        (NX, {2: PTE_P | PTE_W}, ACCESS_USER, P | U),
        (NX, {4: ALL | PTE_NX}, ACCESS_FETCH | ACCESS_USER, P | U | I),
        (NX, {1: PTE_P | PTE_NX}, ACCESS_FETCH, P | I),
        (SMEP, {}, ACCESS_FETCH, P | I),
        (PLAIN, {2: PTE_P | PTE_W}, ACCESS_FETCH | ACCESS_USER, P | U),
        (SMAP, {}, ACCESS_READ, P),
        (SMAP, {}, ACCESS_WRITE, P | W),
        (NO_WP, {1: PTE_P | PTE_U}, ACCESS_WRITE | ACCESS_USER, P | W | U),
    ],
)
def test_error_code(config: PagingConfig, flags: dict[int, int], access: int, code: int) -> None:
    result = look(mapping(GVA, flags), access, config)
    assert (result.fault, result.error_code) == (True, code)


@pytest.mark.parametrize(
    ("config", "flags", "access"),
    [
        (NX, {}, ACCESS_READ | ACCESS_USER),
        (NX, {}, ACCESS_WRITE | ACCESS_USER),
        (NX, {}, ACCESS_FETCH),
        (NX, {1: PTE_P}, ACCESS_READ),
        (NX, {1: PTE_P}, ACCESS_FETCH),
        (NX, {1: ALL | PTE_NX}, ACCESS_WRITE),
        (NO_WP, {1: PTE_P | PTE_U}, ACCESS_WRITE),
        (SMEP, {1: PTE_P}, ACCESS_FETCH),
        (SMEP, {}, ACCESS_FETCH | ACCESS_USER),
        (SMAP, {}, ACCESS_FETCH),
        (SMAP, {1: PTE_P | PTE_W}, ACCESS_WRITE),
        (SMAP_AC, {}, ACCESS_WRITE),
        (SMAP, {}, ACCESS_WRITE | ACCESS_USER),
    ],
)
def test_access_that_the_tables_allow(config: PagingConfig, flags: dict[int, int], access: int) -> None:
    result = look(mapping(GVA, flags), access, config)
    assert (result.fault, result.error_code) == (False, 0)
    assert (result.gfn, result.gpa, result.level) == (PAGE, PAGE << 12 | 0xABC, 1)


# The walk.


def test_without_paging_addresses_are_physical() -> None:
    result = walk_tables(PagingConfig(0), ROOT, 0x1234, ACCESS_WRITE | ACCESS_USER, Memory({}))
    assert (result.fault, result.gpa, result.gfn, result.level, result.entries) == (False, 0x1234, 1, 0, [])


@pytest.mark.parametrize(("leaf", "size"), [(1, 1 << 12), (2, 1 << 21), (3, 1 << 30)])
def test_page_offset_grows_with_the_level_of_the_leaf(leaf: int, size: int) -> None:
    result = look(mapping(GVA, {}, leaf), ACCESS_READ)
    assert result.level == leaf
    assert result.gpa % size == GVA % size
    assert result.gfn == result.gpa >> 12


def test_five_levels() -> None:
    gva = 0x00AB_1234_5678_9ABC
    result = look(mapping(gva, {}, levels=5), ACCESS_READ, PagingConfig(5), gva)
    assert (result.fault, result.gpa, len(result.entries)) == (False, PAGE << 12 | 0xABC, 5)


def test_entries_are_listed_from_the_root_to_the_one_that_stopped_the_walk() -> None:
    memory = mapping(GVA, {2: PTE_A})
    result = look(memory, ACCESS_READ)
    assert [gpa for gpa, _ in result.entries] == memory.reads == [slot(1 + n, GVA, 4 - n) for n in range(3)]
    assert (result.level, result.gpa, result.gfn) == (2, NO_ADDRESS, NO_ADDRESS)


def test_rights_accumulate_over_the_levels() -> None:
    result = look(mapping(GVA, {4: PTE_P | PTE_U, 3: PTE_P | PTE_W, 2: ALL | PTE_NX}), ACCESS_READ)
    assert (result.writable, result.user, result.nx) == (False, False, True)


def test_forbidden_access_still_tells_where_it_would_have_gone() -> None:
    result = look(mapping(GVA, {1: PTE_P}), ACCESS_USER)
    assert (result.fault, result.gfn) == (True, PAGE)


def test_table_outside_memory_reads_as_not_present() -> None:
    memory = mapping(GVA, {})
    memory.limit = 3 << 12
    result = look(memory, ACCESS_WRITE)
    assert (result.fault, result.error_code, result.no_memory, result.level) == (True, W, True, 2)
    assert len(result.entries) == 2


def test_read_sets_accessed_at_every_level_that_lacks_it() -> None:
    result = look(mapping(GVA, {3: ALL | PTE_A}), ACCESS_READ)
    assert result.ad_updates == [(slot(1, GVA, 4), PTE_A), (slot(3, GVA, 2), PTE_A), (slot(4, GVA, 1), PTE_A)]


@pytest.mark.parametrize("leaf", [1, 2, 3])
def test_write_sets_dirty_in_the_leaf_only(leaf: int) -> None:
    updates = look(mapping(GVA, {}, leaf), ACCESS_WRITE).ad_updates
    assert [bits for _, bits in updates] == [PTE_A] * (4 - leaf) + [PTE_A | PTE_D]


def test_faulting_access_sets_nothing() -> None:
    assert look(mapping(GVA, {1: PTE_P}), ACCESS_WRITE).ad_updates == []


# Random tables.

INDICES = (0, 1, 511)
FRAMES = 6
BASE = st.sampled_from([ALL | PTE_A, ALL, ALL | PTE_A | PTE_D, PTE_P | PTE_U, PTE_P | PTE_W, PTE_P, PTE_W])
EXTRA = st.sampled_from([0] * 12 + [PTE_NX, PTE_PS, PTE_PS, PTE_G, 1 << 13, 1 << 45, 1 << 58])
ENTRY = st.builds(lambda base, extra, frame: base | extra | frame << 12, BASE, EXTRA, st.integers(0, FRAMES - 1))
LARGE = st.builds(lambda base, pat: base | PTE_PS | pat, BASE, st.sampled_from([0, PTE_PAT_LARGE]))  # of frame 0
TABLES = st.builds(
    lambda root, others: root + others,  # large pages in the root would be reserved bits in most examples
    st.lists(ENTRY, min_size=3, max_size=3),
    st.lists(st.one_of(ENTRY, ENTRY, ENTRY, LARGE), min_size=3 * FRAMES - 3, max_size=3 * FRAMES - 3),
)
ADDRESS = st.builds(
    lambda i4, i3, i2, i1, offset: i4 << 39 | i3 << 30 | i2 << 21 | i1 << 12 | offset,
    *[st.sampled_from(INDICES)] * 4,
    st.integers(0, 4095),
)
CONFIG = st.builds(
    lambda wp, smep, smap, nx, ac: PagingConfig(4, cr0_wp=wp, smep=smep, smap=smap, efer_nx=nx, rflags_ac=ac),
    *[st.booleans()] * 5,
)


def tables_of(entries: list[int]) -> dict[int, int]:
    places = itertools.product(range(FRAMES), INDICES)
    return {frame * 4096 + index * 8: entry for (frame, index), entry in zip(places, entries, strict=True)}


def naive(config: PagingConfig, tables: dict[int, int], base: int, gva: int, level: int) -> tuple[str, int, list[int]]:
    """What the tables say, by recursion on strings of bits: ("np" | "rsvd" | "ok", physical address, entries)."""
    width = 12 + 9 * level
    bits = f"{gva:064b}"[-width:]
    entry = tables.get(base + 8 * int(bits[:9], 2), 0)
    digit = f"{entry:064b}"[::-1]
    if digit[0] == "0":
        return "np", 0, [entry]
    page = level == 1 or digit[7] == "1"
    reserved = list(range(config.maxphyaddr, 52))
    if not config.efer_nx:
        reserved.append(63)
    if page and level == 4:
        reserved.append(7)
    if page and level in (2, 3):
        reserved += range(13, 12 + 9 * (level - 1))
    if any(digit[bit] == "1" for bit in reserved):
        return "rsvd", 0, [entry]
    target = int(digit[12:52][::-1], 2) * 4096
    if page:
        rest = bits[9:]
        return "ok", target >> len(rest) << len(rest) | int(rest, 2), [entry]
    verdict, address, below = naive(config, tables, target, gva, level - 1)
    return verdict, address, [entry, *below]


@given(CONFIG, TABLES, ADDRESS, st.sampled_from(ACCESSES))
@settings(derandomize=True, deadline=None, max_examples=600)
def test_walk_agrees_with_a_naive_one(config: PagingConfig, entries: list[int], gva: int, access: int) -> None:
    tables = tables_of(entries)
    result = walk_tables(config, 0, gva, access, Memory(tables))
    verdict, address, path = naive(config, tables, 0, gva, 4)
    assert [entry for _, entry in result.entries] == path
    code = access & (W | U) | (I if access & ACCESS_FETCH and (config.efer_nx or config.smep) else 0)
    if verdict == "np":
        assert (result.fault, result.error_code) == (True, code)
    elif verdict == "rsvd":
        assert (result.fault, result.error_code) == (True, code | P | RSVD)
    else:
        writable, user = (all(entry & bit for entry in path) for bit in (PTE_W, PTE_U))
        nx = any(entry & PTE_NX for entry in path)
        allowed = manual_permits(config, writable, user, nx, access)
        assert (result.writable, result.user, result.nx, result.gpa) == (writable, user, nx, address)
        assert (result.fault, result.error_code) == ((False, 0) if allowed else (True, code | P))


@given(CONFIG, TABLES, ADDRESS, st.sampled_from(ACCESSES))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_walk_changes_nothing_and_reads_one_entry_a_level(
    config: PagingConfig, entries: list[int], gva: int, access: int
) -> None:
    memory = Memory(tables_of(entries))
    before = dict(memory.entries)
    result = walk_tables(config, 0, gva, access, memory)
    assert memory.entries == before
    assert len(memory.reads) == len(result.entries) == 5 - result.level


@given(CONFIG, TABLES, ADDRESS, st.sampled_from(ACCESSES))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_after_its_updates_a_walk_has_none_left(
    config: PagingConfig, entries: list[int], gva: int, access: int
) -> None:
    memory = Memory(tables_of(entries))
    first = walk_tables(config, 0, gva, access, memory)
    for gpa, bits in first.ad_updates:
        memory.entries[gpa] |= bits
    again = walk_tables(config, 0, gva, access, memory)
    assert again.ad_updates == []
    assert (again.fault, again.error_code, again.gpa) == (first.fault, first.error_code, first.gpa)


# Against QEMU's walker. Unicorn gives no error codes and no easy way to CPL 3: what is compared is whether a
# supervisor access faults, where it goes, and which A and D flags it leaves.

PATTERN = b"".join(address.to_bytes(8, "little") for address in range(0, 1 << 20, 8))
NOPS = b"\x90" * (1 << 20)
CODE_GVA = 128 << 39
CODE_TABLES = {128 * 8: 16 << 12, 16 << 12: 17 << 12, 17 << 12: 18 << 12, 18 << 12: 19 << 12}
CODE = {ACCESS_READ: b"\x48\x8b\x07", ACCESS_WRITE: b"\x48\x89\x07", ACCESS_FETCH: b"\x90"}  # mov rax,[rdi] and back


def unicorn_access(
    config: PagingConfig, tables: dict[int, int], gva: int, kind: int
) -> tuple[list[tuple[int, int]], int, bytes]:
    """Run one instruction at CPL 0: ((vector, CR2) of each fault, RAX, 1 MiB of memory afterwards)."""
    unicorn = pytest.importorskip("unicorn")
    const = pytest.importorskip("unicorn.x86_const")
    machine = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    machine.ctl_set_cpu_model(const.UC_CPU_X86_EPYC_ROME)  # has SMEP and SMAP, and 40 physical address bits
    machine.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
    machine.mem_map(0, len(PATTERN))
    machine.mem_write(0, NOPS if kind == ACCESS_FETCH else PATTERN)
    for gpa, entry in tables.items():
        machine.mem_write(gpa, entry.to_bytes(8, "little"))
    for gpa, target in CODE_TABLES.items():
        machine.mem_write(gpa, (target | PTE_P | PTE_A).to_bytes(8, "little"))
    machine.mem_write(19 << 12, CODE[kind])
    faults: list[tuple[int, int]] = []

    def stop(uc: object, vector: int, _data: object) -> None:
        faults.append((vector, machine.reg_read(const.UC_X86_REG_CR2)))
        machine.emu_stop()

    machine.hook_add(unicorn.UC_HOOK_INTR, stop)
    machine.reg_write(const.UC_X86_REG_CR3, 0)
    machine.reg_write(const.UC_X86_REG_CR4, CR4_PAE | CR4_SMEP * config.smep | CR4_SMAP * config.smap)
    machine.reg_write(const.UC_X86_REG_MSR, (0xC000_0080, EFER_LMA | 1 << 8 | EFER_NX * config.efer_nx))
    machine.reg_write(const.UC_X86_REG_CR0, CR0_PE | CR0_PG | CR0_WP * config.cr0_wp)
    machine.reg_write(const.UC_X86_REG_RFLAGS, FLAG_FIXED | FLAG_AC * config.rflags_ac)
    machine.reg_write(const.UC_X86_REG_RDI, gva)
    machine.reg_write(const.UC_X86_REG_RAX, 0x1122_3344_5566_7788)
    machine.emu_start(gva if kind == ACCESS_FETCH else CODE_GVA, 0, count=1)
    return faults, machine.reg_read(const.UC_X86_REG_RAX), bytes(machine.mem_read(0, len(PATTERN)))


def word(memory: bytes, gpa: int) -> int:
    return int.from_bytes(memory[gpa : gpa + 8], "little")


@given(CONFIG, TABLES, ADDRESS, st.integers(0x20, 0x1C0), st.sampled_from([ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH]))
@settings(derandomize=True, deadline=None, max_examples=500)
def test_walk_agrees_with_qemu(config: PagingConfig, entries: list[int], page: int, offset: int, kind: int) -> None:
    pytest.importorskip("unicorn")
    # A canonical address, away from the parts of a page that hold entries: a fetch there must find NOPs.
    gva = page & ~(511 << 39 | 4095) | (page >> 39 & 1) << 39 | offset * 8
    tables = tables_of(entries)
    result = walk_tables(config, 0, gva, kind, Memory(tables))
    if result.gpa >= len(PATTERN):
        return  # a large page that reaches beyond the memory of the comparison
    faults, rax, after = unicorn_access(config, tables, gva, kind)
    assert faults == ([(14, gva)] if result.fault else [])
    if result.fault:
        return
    if kind == ACCESS_READ:
        assert rax == word(PATTERN, result.gpa) == result.gpa
    elif kind == ACCESS_WRITE:
        assert word(after, result.gpa) == 0x1122_3344_5566_7788
    expected = dict(result.entries)
    for gpa, bits in result.ad_updates:
        expected[gpa] |= bits
    for gpa, entry in expected.items():
        assert word(after, gpa) == entry
