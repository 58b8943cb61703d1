"""What the emulator checks before it executes, and in which order: each time what hardware does, unless it says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from emulated_sequences import CODE, DATA, GDT, LATEST, SIZE, Memory, Shown, compared, emulate, emulator
from flatbus import RAX, RBX, RCX, RDX, RSP

from mmufuzz.kvm.emulate import EMULATION_FAILED, EMULATION_OK
from mmufuzz.kvm.fixes import behaviours
from mmufuzz.kvm.switches import Fixes
from mmufuzz.oracle.emulator_compare import Comparison
from mmufuzz.oracle.emulator_deviations import explain
from mmufuzz.x86.flat_registers import initial_registers
from mmufuzz.x86.insn import CS, DS, SS, TR
from mmufuzz.x86.segments import install
from mmufuzz.x86.state import (
    CR0_EM,
    CR0_PE,
    CR0_TS,
    CR4_DE,
    CR4_TSD,
    EFER_LMA,
    EFER_LME,
    EFER_SCE,
    FLAG_AC,
    FLAG_FIXED,
    FLAG_ID,
    FLAG_RF,
    FLAG_VIF,
    FLAG_VIP,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    PFERR_WRITE,
    RIGHTS_UNUSABLE,
    VECTOR_DE,
    VECTOR_GP,
    VECTOR_MF,
    VECTOR_NM,
    VECTOR_NP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
    Regs,
    Segment,
)

Setup = Callable[[Regs, Memory], None]
NONE = (-1, -1)
GP0 = (VECTOR_GP, 0)
UD = (VECTOR_UD, -1)
FAR = 0x300
"""Where far returns go."""


def with_gpr(number: int, value: int) -> Setup:
    """One general register."""

    def setup(regs: Regs, bus: Memory) -> None:
        regs.gpr[number] = value

    return setup


def alike(bits: int, code: str, setup: Setup) -> Comparison:
    """The comparison of an instruction on both sides, which must agree."""
    made = compared(Shown(bits, code, setup))
    assert made.differences == []
    return made


def raised(made: Comparison) -> tuple[int, int]:
    """Vector and error code that the emulator raised."""
    return NONE if made.fault is None else (made.fault.vector, made.fault.error_code)


# The state of SSE, MMX and the x87.

MOVAPS, MOVQ, MOVQ_STORE, FNINIT, FNSTCW, FNSTSW = "0f2800", "0f6f00", "0f7f00", "dbe3", "d938", "dd38"
SUMMARY = 1 << 7


@pytest.mark.parametrize(
    ("cr0", "vector"),
    [(CR0_EM, VECTOR_UD), (CR0_TS, VECTOR_NM), (CR0_EM | CR0_TS, VECTOR_UD)],
    ids=["em", "ts", "both"],
)
@pytest.mark.parametrize("code", [MOVAPS, MOVQ, MOVQ_STORE])
def test_em_makes_sse_and_mmx_undefined_and_comes_before_ts(code: str, cr0: int, vector: int) -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.cr0 = CR0_PE | cr0
        # Nor is the operand read.
        regs.gpr[RAX] = SIZE

    assert raised(alike(64, code, setup)) == (vector, -1)


@pytest.mark.parametrize("cr0", [CR0_EM, CR0_TS, CR0_EM | CR0_TS], ids=["em", "ts", "both"])
@pytest.mark.parametrize(("bits", "code"), [(64, FNINIT), (64, FNSTCW), (64, FNSTSW), (64, "0fae00"), (32, "0fae00")])
def test_em_and_ts_both_make_the_x87_unavailable(bits: int, code: str, cr0: int) -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.cr0 = CR0_PE | cr0
        regs.gpr[RAX] = DATA

    assert raised(alike(bits, code, setup)) == (VECTOR_NM, -1)


@pytest.mark.parametrize(
    ("code", "vector"), [(MOVQ, VECTOR_MF), (MOVQ_STORE, VECTOR_MF), (MOVAPS, -1)], ids=["load", "store", "sse"]
)
def test_mmx_reports_what_the_x87_has_pending_and_sse_does_not(code: str, vector: int) -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.fsw = SUMMARY
        regs.gpr[RAX] = SIZE if vector >= 0 else DATA

    assert raised(alike(64, code, setup)) == (vector, -1)


# Privileged and system instructions.


@pytest.mark.parametrize(("cpl", "expected"), [(0, NONE), (3, GP0)])
def test_rdtsc_with_tsd_is_privileged(cpl: int, expected: tuple[int, int]) -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.cr4 = CR4_TSD
        regs.cpl = cpl

    assert raised(alike(64, "0f31", setup)) == expected


@pytest.mark.parametrize("code", ["0f01d8", "0f01da", "0f01db", "0f01dc", "0f01dd", "0f01de", "0f01df"])
def test_without_svm_its_instructions_are_undefined(code: str) -> None:
    assert raised(alike(64, code, with_gpr(RAX, (1 << 48) - 1))) == UD


@pytest.mark.parametrize("number", [4, 5, 6, 7])
def test_dr6_and_dr7_have_no_upper_half_under_either_number(number: int) -> None:
    code = f"0f23{0xC0 | number << 3:02x}"
    assert raised(alike(64, code, with_gpr(RAX, 1 << 32))) == GP0
    made = alike(64, code, with_gpr(RAX, 0xFFFFFFFF))
    assert made.after.dr[number | 2] == (0xFFFF2FFF if number & 1 else 0xFFFFEFFF)


def test_with_de_dr4_and_dr5_are_undefined() -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.cr4 = CR4_DE

    assert [raised(alike(64, code, setup)) for code in ("0f23e0", "0f23e8", "0f21e0", "0f21e8")] == [UD] * 4


@pytest.mark.parametrize(("value", "expected"), [(5, NONE), (15, NONE), (16, GP0), (1 << 32, GP0)])
def test_cr8_has_four_bits(value: int, expected: tuple[int, int]) -> None:
    made = alike(64, "440f22c0", with_gpr(RAX, value))
    assert raised(made) == expected
    assert made.after.cr8 == (value if expected == NONE else 0)


@pytest.mark.parametrize("value", [0, 1, 2, 3, 5, 7, 9])
def test_xsetbv_takes_x87_with_sse_with_avx(value: int) -> None:
    made = alike(64, "0f01d1", with_gpr(RAX, value))
    assert raised(made) == (NONE if value in (1, 3, 7) else GP0)
    assert made.after.xcr0 == (value if value in (1, 3, 7) else Regs().xcr0)


def test_far_transfers_through_a_register_are_undefined() -> None:
    assert [raised(alike(64, code, with_gpr(RAX, 0))) for code in ("ffd8", "ffe8", "0fb2c0")] == [UD] * 3


def test_aam_of_base_0_divides_by_zero() -> None:
    assert raised(alike(32, "d400", with_gpr(RAX, 7))) == (VECTOR_DE, -1)


# Ports.

BITMAP = 0x80
"""Where the I/O bitmap lies in the TSS."""


def port(number: int, forbidden: int, limit: int = 0xFF) -> Setup:
    """User code that reaches for a port; bits of the two bytes at it in the bitmap."""

    def setup(regs: Regs, bus: Memory) -> None:
        regs.cpl = 3
        regs.segments[TR] = Segment(0x10, DATA, limit, 0x8B)
        bus.poke(DATA + 0x66, 2, BITMAP)
        bus.poke(DATA + BITMAP + number // 8, 2, forbidden)
        regs.gpr[RDX] = number

    return setup


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize(("code", "size"), [("ec", 1), ("66ed", 2), ("ed", 4), ("ee", 1), ("ef", 4)])
def test_the_bitmap_of_the_tss_must_allow_every_port_of_an_access(code: str, size: int, bits: int) -> None:
    # Port 6: an access of 4 goes on in the next byte.
    for bit in range(16):
        expected = GP0 if 6 <= bit < 6 + size else NONE
        assert raised(alike(bits, code, port(6, 1 << bit))) == expected


@pytest.mark.parametrize(("limit", "expected"), [(0x66, GP0), (BITMAP, GP0), (BITMAP + 2, NONE)])
def test_ports_behind_the_end_of_the_tss_are_forbidden(limit: int, expected: tuple[int, int]) -> None:
    # BITMAP + 1, the first of the port's two bytes, is the deviation "io-bitmap".
    assert raised(alike(64, "ec", port(9, 0, limit))) == expected


def test_without_a_usable_tss_user_code_has_no_ports() -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        port(9, 0)(regs, bus)
        regs.segments[TR].rights |= RIGHTS_UNUSABLE

    assert raised(alike(64, "ec", setup)) == GP0


def test_a_bitmap_that_cannot_be_read_forbids_in_the_emulator() -> None:
    """Hardware raises #PF. The replay cannot tell: it finds a read without a value in the record."""

    def setup(regs: Regs, bus: Memory) -> None:
        port(9, 0)(regs, bus)
        bus.deny(DATA + BITMAP, DATA + BITMAP + 8)

    made = compared(Shown(64, "ec", setup))
    assert raised(made) == GP0


# Segments outside 64-bit mode.


def data(limit: int, rights: int, offset: int) -> Setup:
    """DS, and RAX in it."""

    def setup(regs: Regs, bus: Memory) -> None:
        install(regs, DS, 8, 0, limit, rights)
        regs.gpr[RAX] = offset

    return setup


LOAD, STORE = "8b00", "8900"


@pytest.mark.parametrize("code", [LOAD, STORE])
def test_an_access_through_a_null_segment_is_gp(code: str) -> None:
    assert raised(alike(32, code, data(0, RIGHTS_UNUSABLE, 0))) == GP0


@pytest.mark.parametrize(
    ("code", "rights", "expected"), [(LOAD, 0xC09B, NONE), (LOAD, 0xC099, GP0), (STORE, 0xC09B, GP0)]
)
def test_code_is_read_if_it_is_readable_and_never_written(code: str, rights: int, expected: tuple[int, int]) -> None:
    assert raised(alike(32, code, data(0xFFFFFFFF, rights, DATA))) == expected


@pytest.mark.parametrize("code", [LOAD, STORE])
@pytest.mark.parametrize(
    ("rights", "offset", "expected"),
    [(0xC097, 0x1FFF, GP0), (0xC097, 0x2000, NONE), (0x97, 0xFFFC, NONE), (0x97, 0xFFFD, GP0), (0x97, 0x10000, GP0)],
)
def test_a_segment_that_expands_down_holds_what_lies_above_its_limit(
    code: str, rights: int, offset: int, expected: tuple[int, int]
) -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        bus.memory.extend(bytes(16))
        data(0x1FFF, rights, offset)(regs, bus)

    assert raised(alike(32, code, setup)) == expected


# Loads of segment registers.

SELECTOR = 0x10
TO_DS, TO_SS, LLDT, LTR = "8ed8", "8ed0", "0f00d0", "0f00d8"
TASK = 0x0000_8900_3000_0067
LOCAL = 0x0000_8200_3000_00FF
PRESENT = 1 << 47


def descriptor(word: int, high: int = 0) -> Setup:
    """At the selector in RAX."""

    def setup(regs: Regs, bus: Memory) -> None:
        regs.gpr[RAX] = SELECTOR
        bus.poke(GDT + SELECTOR, 8, word)
        bus.poke(GDT + SELECTOR + 8, 8, high)

    return setup


@pytest.mark.parametrize(
    ("code", "word", "vector"),
    [
        (TO_DS, 0x00CF9B000000FFFF, -1),
        (TO_DS, 0x00CF99000000FFFF, VECTOR_GP),
        (TO_DS, 0x00CF19000000FFFF, VECTOR_GP),
        (TO_DS, 0x00CF12000000FFFF, VECTOR_NP),
        (TO_SS, 0x00CF12000000FFFF, VECTOR_SS),
        (TO_SS, 0x00CF72000000FFFF, VECTOR_GP),
        (TO_SS, 0x00CF9B000000FFFF, VECTOR_GP),
    ],
    ids=["code", "execute-only", "absent execute-only", "absent", "absent stack", "absent outer stack", "code stack"],
)
def test_type_and_privilege_of_a_segment_are_checked_before_its_presence(code: str, word: int, vector: int) -> None:
    assert raised(alike(64, code, descriptor(word))) == (NONE if vector < 0 else (vector, SELECTOR))


def test_a_descriptor_that_cannot_be_marked_accessed_is_a_page_fault() -> None:
    """KVM reports the descriptor, the executor the byte: the oracle leaves that open."""

    def setup(regs: Regs, bus: Memory) -> None:
        descriptor(0x00CF92000000FFFF)(regs, bus)
        bus.deny(GDT, GDT + 0x100, load=False)

    made = alike(64, TO_DS, setup)
    assert raised(made) == (VECTOR_PF, PFERR_WRITE)
    assert made.after.segments[DS].selector == 0


@pytest.mark.parametrize(("code", "word", "index"), [(LTR, TASK, TR), (LLDT, LOCAL, 6)])
def test_system_segments_outside_long_mode_have_eight_bytes(code: str, word: int, index: int) -> None:
    made = alike(32, code, descriptor(word, 0x8000))
    assert raised(made) == NONE
    assert made.after.segments[index].base == 0x3000


@pytest.mark.parametrize(("code", "word"), [(LTR, TASK), (LLDT, LOCAL)])
def test_the_base_of_a_system_segment_must_be_canonical_in_long_mode(code: str, word: int) -> None:
    made = compared(Shown(64, code, descriptor(word, 0x8000)))
    assert raised(made) == (VECTOR_GP, SELECTOR)
    assert explain(made) == "system-read"


# Far returns.

CODE64, CODE32 = 0x00AF9B000000FFFF, 0x00CF9B000000FFFF
CONFORMING, L_AND_D, DPL3 = 4 << 40, 6 << 52, 3 << 45
RETURNS = [(64, 8, "48cb", CODE64), (64, 4, "cb", CODE64), (32, 4, "cb", CODE32)]


def frame(size: int, selector: int, word: int, cpl: int = 0, offset: int = FAR) -> Setup:
    """The stack of a far return to ``selector``, which ``word`` describes."""

    def setup(regs: Regs, bus: Memory) -> None:
        regs.cpl = cpl
        for index in (1, 2):
            regs.segments[index].rights |= cpl << 5
            regs.segments[index].selector = cpl
        bus.poke(regs.gpr[RSP], size, offset)
        bus.poke(regs.gpr[RSP] + size, size, selector)
        bus.poke(GDT + SELECTOR, 8, word)

    return setup


@pytest.mark.parametrize(("bits", "size", "code", "word"), RETURNS)
def test_a_far_return_of_the_same_privilege_enters_the_segment(bits: int, size: int, code: str, word: int) -> None:
    made = alike(bits, code, frame(size, SELECTOR, word))
    assert (made.after.segments[CS].selector, made.after.rip, made.after.gpr[RSP]) == (SELECTOR, FAR, 0x2000 + 2 * size)
    made = alike(bits, code.replace("cb", "ca1000"), frame(size, SELECTOR | 3, word | DPL3, 3))
    assert (made.after.segments[CS].selector, made.after.gpr[RSP]) == (SELECTOR | 3, 0x2010 + 2 * size)


@pytest.mark.parametrize(("bits", "size", "code", "word"), RETURNS)
def test_a_far_return_to_an_inner_privilege_is_gp(bits: int, size: int, code: str, word: int) -> None:
    assert raised(alike(bits, code, frame(size, SELECTOR, word, 3))) == (VECTOR_GP, SELECTOR)


@pytest.mark.parametrize(("bits", "size", "code", "word"), RETURNS)
def test_a_far_return_checks_the_segment(bits: int, size: int, code: str, word: int) -> None:
    found = [raised(alike(bits, code, frame(size, 0, word)))]
    for changed in (word | DPL3, TASK, 0x00CF93000000FFFF, word & ~PRESENT, word | CONFORMING | DPL3):
        found.append(raised(alike(bits, code, frame(size, SELECTOR, changed))))
    refused = (VECTOR_GP, SELECTOR)
    assert found == [GP0, refused, refused, refused, (VECTOR_NP, SELECTOR), refused]
    # Conforming code may be more privileged; both L and D are reserved in long mode only.
    assert raised(alike(bits, code, frame(size, SELECTOR | 3, word | CONFORMING, 3))) == NONE
    assert raised(alike(bits, code, frame(size, SELECTOR, word | L_AND_D))) == (refused if bits == 64 else NONE)


def emulated(bits: int, code: str, setup: Setup, fixes: Fixes = LATEST) -> int:
    """What x86_emulate_insn answers, or EMULATION_FAILED if it does not come to that."""
    regs = initial_registers(bits)
    regs.rip = CODE
    regs.gpr[RSP] = 0x2000
    regs.gdt_base = GDT
    regs.gdt_limit = 0xFF
    bus = Memory(SIZE)
    bus.poke(CODE, len(code) // 2, int.from_bytes(bytes.fromhex(code), "little"))
    setup(regs, bus)
    return emulate(emulator(regs, bus, fixes))


@pytest.mark.parametrize(("bits", "size", "code", "word"), RETURNS)
def test_a_far_return_to_an_outer_privilege_cannot_be_emulated(bits: int, size: int, code: str, word: int) -> None:
    assert emulated(bits, code, frame(size, SELECTOR | 3, word | DPL3)) == EMULATION_FAILED
    assert emulated(bits, code, frame(size, SELECTOR, word)) == EMULATION_OK


def test_a_far_return_beyond_the_limit_cannot_be_emulated_as_cs_is_loaded_by_then() -> None:
    small = 0x00409B000000FFFF
    assert emulated(32, "cb", frame(4, SELECTOR, small, offset=0x10000)) == EMULATION_FAILED
    assert emulated(32, "cb", frame(4, SELECTOR, small, offset=0xFFFF)) == EMULATION_OK


# Fast system calls, and IRET in real-address mode.


def sysenter(selector: int) -> Setup:
    """Its MSRs, with addresses of more than 32 bits; also the registers of SYSEXIT."""

    def setup(regs: Regs, bus: Memory) -> None:
        regs.msr |= {MSR_SYSENTER_CS: selector, MSR_SYSENTER_EIP: 0x1_0000_3000, MSR_SYSENTER_ESP: 0x2_0000_4000}
        regs.gpr[RDX] = 0x3_0000_5000
        regs.gpr[RCX] = 0x4_0000_6000

    return setup


def compatibility(selector: int) -> Setup:
    """SYSENTER from 32-bit code in long mode."""

    def setup(regs: Regs, bus: Memory) -> None:
        sysenter(selector)(regs, bus)
        regs.efer |= EFER_LME | EFER_LMA
        install(regs, CS, 8, 0, 0xFFFFFFFF, 0xC09B)

    return setup


def test_sysenter_from_compatibility_mode_enters_64_bit_code() -> None:
    made = alike(32, "0f34", compatibility(8))
    after = made.after
    assert (after.rip, after.gpr[RSP], after.long_mode) == (0x1_0000_3000, 0x2_0000_4000, True)
    made = alike(32, "0f34", sysenter(8))
    assert (made.after.rip, made.after.gpr[RSP], made.after.long_mode) == (0x3000, 0x4000, False)
    assert raised(alike(32, "0f34", compatibility(3))) == GP0


def test_a_descriptor_above_4_gib_is_marked_from_compatibility_mode() -> None:
    table = 1 << 32 | GDT

    def setup(regs: Regs, bus: Memory) -> None:
        compatibility(8)(regs, bus)
        regs.gdt_base = table
        regs.gpr[RAX] = 0x10
        bus.poke(GDT + 0x10, 8, 0x00CF92000000FFFF)
        load = bus.load
        store = bus.store

        def load_below(_regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
            return load(_regs, gva & 0xFFFF, size, rmw, locked)

        def store_below(_regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
            store(_regs, gva & 0xFFFF, size, value, locked)

        bus.load = load_below  # type: ignore[method-assign]  # only here is memory elsewhere
        bus.store = store_below  # type: ignore[method-assign]  # the same

    made = alike(32, "8ee0", setup)
    assert raised(made) == NONE
    assert [(write.gva, write.value) for write in made.bus.writes] == [(table + 0x10, 0x00CF93000000FFFF)]


def test_syscall_takes_the_rpl_of_ss_from_star() -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.efer |= EFER_SCE
        regs.msr |= {MSR_STAR: 0xB << 32, MSR_LSTAR: FAR}

    segments = alike(64, "0f05", setup).after.segments
    assert [(segments[index].selector, segments[index].rights >> 5 & 3) for index in (CS, SS)] == [(8, 0), (0x13, 0)]


def test_sysexit_goes_to_code_of_the_size_that_rex_says() -> None:
    after = alike(64, "480f35", sysenter(8)).after
    assert (after.rip, after.gpr[RSP], after.segments[CS].selector, after.long_mode) == (
        0x3_0000_5000,
        0x4_0000_6000,
        0x2B,
        True,
    )
    after = alike(64, "0f35", sysenter(8)).after
    assert (after.rip, after.gpr[RSP], after.segments[CS].selector, after.long_mode) == (0x5000, 0x6000, 0x1B, False)


def test_syscall_needs_sce_and_64_bit_code() -> None:
    assert raised(alike(64, "0f05", with_gpr(RAX, 0))) == UD

    def enabled(regs: Regs, bus: Memory) -> None:
        regs.efer |= 1

    assert raised(alike(32, "0f05", enabled)) == UD
    assert raised(alike(64, "0f05", enabled)) == NONE


@pytest.mark.parametrize(
    ("code", "size", "before", "loaded", "expected"),
    [
        ("66cf", 4, 0, 0xFFFFFFFF, 0x7FD7 | FLAG_RF | FLAG_AC | FLAG_ID),
        ("66cf", 4, FLAG_VIF | FLAG_VIP | FLAG_AC, 0, FLAG_FIXED | FLAG_VIF | FLAG_VIP),
        ("cf", 2, FLAG_VIF | FLAG_AC | FLAG_RF, 0xFFFF, 0x7FD7 | FLAG_VIF | FLAG_AC),
    ],
    ids=["set", "kept", "16 bits"],
)
def test_iret_in_real_mode_loads_all_flags_but_those_of_virtual_8086_mode(
    code: str, size: int, before: int, loaded: int, expected: int
) -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.rflags |= before
        for place, value in enumerate((FAR, 0x50, loaded)):
            bus.poke(0x2000 + size * place, size, value & (1 << 8 * size) - 1)

    made = alike(16, code, setup)
    assert made.after.rflags == made.expected.rflags == expected


# Operands, and where instructions lie.


@pytest.mark.parametrize(
    ("bits", "code", "place"),
    [
        (64, "8f0424", 0x2008),
        (64, "8f442410", 0x2018),
        (64, "668f0424", 0x2002),
        (64, "8f041c", 0x2028),
        (64, "8f03", 0x20),
        (32, "8f0424", 0x2004),
    ],
)
def test_pop_to_memory_addresses_with_the_stack_pointer_behind_the_pop(bits: int, code: str, place: int) -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.gpr[RBX] = 0x20
        bus.poke(0x2000, 2, 0x55AA)

    made = alike(bits, code, setup)
    (write,) = made.bus.writes
    assert (write.gva, write.value) == (place, 0x55AA)


def test_a_negative_immediate_fills_eight_bytes() -> None:
    made = alike(64, "48c700feffffff", with_gpr(RAX, DATA))
    (write,) = made.bus.writes
    assert (write.size, write.value) == (8, (1 << 64) - 2)


def test_movbe_of_16_bits_needs_its_fix() -> None:
    without = Fixes(behaviours("latest", ("emulate-movbe66",), ()))
    load = with_gpr(RAX, DATA)
    assert emulated(64, "660f38f008", load) == EMULATION_OK
    assert emulated(64, "660f38f008", load, without) == EMULATION_FAILED
    assert emulated(64, "0f38f008", load, without) == EMULATION_OK


class Wrapping(Memory):
    """The top 4 KiB of the address space lie in the last page."""

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        return super().fetch(regs, gva & SIZE - 1, size)


def test_an_instruction_at_the_end_of_the_address_space_goes_on_at_its_beginning() -> None:
    bus = Wrapping(SIZE)
    regs = initial_registers(64)
    regs.rip = (1 << 64) - 3
    # MOV RAX, imm32: 48 C7 C0 and the immediate.
    bus.poke(SIZE - 3, 3, 0xC0C748)
    bus.poke(0, 4, 0x12345678)
    ctxt = emulator(regs, bus)
    assert emulate(ctxt) == EMULATION_OK
    assert (regs.gpr[RAX], ctxt.eip) == (0x12345678, 4)
