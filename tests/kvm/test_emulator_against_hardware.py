"""KVM's emulator leaves what the hardware executor leaves, but for the deviations that are listed, each shown here.

The sequences are a slice of those that ``tox -e oracle`` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_sequences import CODE, DATA, GDT, SIZE, Comparer, Memory, Shown, compared, emulate, emulator

from mmufuzz.kvm.emulate import EMULATION_OK
from mmufuzz.kvm.emulate_ctxt import CMPXCHG, READ, SYSTEM, WRITE, Access, X86EmulateCtxt
from mmufuzz.kvm.emulate_handlers import EXECUTE, cannot_emulate
from mmufuzz.kvm.fixes import behaviours
from mmufuzz.kvm.opcode_table import NAMES
from mmufuzz.kvm.switches import Fixes
from mmufuzz.oracle.emulator_compare import ADDRESS, PRIVILEGE
from mmufuzz.oracle.emulator_deviations import DEVIATIONS, explain
from mmufuzz.x86.flat_registers import initial_registers
from mmufuzz.x86.insn import DS, ES, LDTR, SS, TR
from mmufuzz.x86.paging import CR4_LA57
from mmufuzz.x86.segments import install
from mmufuzz.x86.state import (
    CR0_AM,
    CR4_DE,
    CR4_UMIP,
    EFER_LMA,
    FLAG_AC,
    FLAG_DF,
    MSR_SYSENTER_CS,
    PFERR_WRITE,
    SHADOW_STI,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_PF,
    Fault,
    Regs,
    Segment,
)

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
BITS = pytest.mark.parametrize("bits", [64, 32, 16])


@BITS
def test_sequences_leave_what_hardware_leaves(bits: int) -> None:
    comparer = Comparer(bits, 1)
    for _ in range(300):
        comparer.sequence(6)
    assert comparer.unexplained == []
    assert len(comparer.used) > 80


@pytest.mark.oracle
@BITS
def test_many_sequences_leave_what_hardware_leaves(bits: int) -> None:
    comparer = Comparer(bits, 2)
    for _ in range(100_000):
        comparer.sequence(4)
    print(f"{bits}-bit: {sum(comparer.used.values())} instructions, {comparer.explained}")
    assert comparer.unexplained == []


def test_every_function_of_the_emulator_is_compared_in_some_mode() -> None:
    comparers = [Comparer(bits, 3) for bits in (64, 32, 16)]
    missing = []
    for number, handler in enumerate(EXECUTE):
        name = NAMES[number].split(".")[0]
        if handler is not cannot_emulate and not any(is_compared(comparer, name) for comparer in comparers):
            missing.append(name)
    assert missing == ["rsm"]
    assert [comparer.unexplained for comparer in comparers] == [[], [], []]


def is_compared(comparer: Comparer, name: str) -> bool:
    """Some of a few random instructions ``name`` have been compared."""
    comparer.only([name])
    if not comparer.forms:
        return False
    return any(comparer.instruction() and name in comparer.used for _ in range(60))


def test_a_table_register_that_does_not_fit_its_page_is_stored_by_neither() -> None:
    comparer = Comparer(64, 1)
    regs = initial_registers(64)
    regs.rip = CODE
    regs.gpr[RAX] = DATA + 0xFF8
    comparer.ours.poke(CODE, 3, 0x00010F)
    comparer.ours.deny(DATA + 0x1000, DATA + 0x2000)
    memory = bytes(comparer.ours.memory)
    comparer.theirs.memory[:] = memory
    before = regs.copy()
    ctxt = emulator(regs, comparer.ours)
    assert emulate(ctxt) == EMULATION_OK
    comparer.execute(comparer.replayed(ctxt, before), ctxt, before, b"\x0f\x01\x00", "")
    assert ctxt.have_exception
    assert comparer.unexplained == []
    assert comparer.ours.memory == memory


FAULTS = {
    "eip_check": ["jmp", "call", "ret"],
    "null_ss": ["lss"],
    "std_user_access": ["sgdt"],
    "locked_atomic": ["add"],
    "rep_zero_quirk": ["movs"],
    "segment_privilege": ["lfs"],
}


@pytest.mark.parametrize("fix", FAULTS)
def test_an_emulator_without_a_fix_differs(fix: str) -> None:
    """The comparison can fail: random instructions meet each of these faults."""
    fixes = Fixes(behaviours("latest", (), ()))
    setattr(fixes, fix, False)
    comparer = Comparer(64, 1, fixes)
    comparer.only(FAULTS[fix])
    for _ in range(300):
        comparer.sequence(10)
        if comparer.unexplained:
            return
    pytest.fail("no difference")


# The deviations one by one.


def _nothing(regs: Regs, bus: Memory) -> None:
    pass


def _four_trailing_zeros(regs: Regs, bus: Memory) -> None:
    regs.gpr[RCX] = 0x18
    regs.rflags |= 1


def _interruptible(regs: Regs, bus: Memory) -> None:
    regs.rflags |= 1 << 9


def _old_value(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 5 << 32


def _three_words(regs: Regs, bus: Memory) -> None:
    regs.gpr[RCX] = 3
    regs.gpr[RDI] = DATA


def _second_page_is_absent(regs: Regs, bus: Memory) -> None:
    regs.gpr[RCX] = 3
    regs.gpr[RAX] = (1 << 64) - 1
    regs.gpr[RDI] = 0x2000 - 8
    bus.deny(0x2000, 0x3000)


def _unequal(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 1
    regs.gpr[RBX] = 7 << 32 | 2


def _at_data(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = DATA


def _page_is_absent(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = DATA
    bus.deny(DATA, DATA + 0x1000)


def _user(regs: Regs, bus: Memory) -> None:
    regs.cpl = 3
    regs.cr4 |= CR4_DE


def _general_detect(regs: Regs, bus: Memory) -> None:
    regs.dr[7] |= 1 << 13


def _task(limit: int, kind: int) -> Callable[[Regs, Memory], None]:
    """User code with a TSS whose I/O bitmap is the two bytes at 0x68, and allows every port."""

    def setup(regs: Regs, bus: Memory) -> None:
        _user(regs, bus)
        regs.segments[TR] = Segment(0x10, DATA, limit, kind)
        bus.poke(DATA + 0x66, 4, 0x68)

    return setup


def _task_without_a_bitmap(read: int) -> Callable[[Regs, Memory], None]:
    """User code with a TSS of which the first ``read`` bytes are there; the I/O bitmap would be the last two."""

    def setup(regs: Regs, bus: Memory) -> None:
        _task(0x69, 0x8B)(regs, bus)
        regs.segments[TR].base = 0x2000 - read
        bus.poke(0x2000 - read + 0x66, 2, 0x68)
        bus.deny(0x2000, 0x3000)

    return setup


def _checked_for_alignment(regs: Regs, bus: Memory) -> None:
    _user(regs, bus)
    regs.cr0 |= CR0_AM
    regs.rflags |= FLAG_AC
    regs.gpr[RAX] = DATA + 1


def _compatibility_mode(regs: Regs) -> None:
    regs.efer |= EFER_LMA
    regs.compatibility = True


def _task_segment_that_is_the_last_entry(regs: Regs, bus: Memory) -> None:
    _compatibility_mode(regs)
    regs.gpr[RAX] = 0xF8
    bus.poke(GDT + 0xF8, 8, 0x00008900_3000_0067)


def _task_segment_whose_upper_half_counts(regs: Regs, bus: Memory) -> None:
    _compatibility_mode(regs)
    regs.gpr[RAX] = 0x10
    bus.poke(GDT + 0x10, 8, 0x00008900_3000_0067)
    bus.poke(GDT + 0x18, 8, 0x12)


def _wide_memory_that_ends_nowhere(register: int, behind: int) -> Callable[[Regs, Memory], None]:
    """57-bit addresses, ``register`` at the end of their low half, and memory there."""

    def load(_regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        return 0x01020304 if size >= 4 else 0x0102

    def store(_regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """Nobody looks at it."""

    def setup(regs: Regs, bus: Memory) -> None:
        regs.cr4 |= CR4_LA57
        regs.gpr[RCX] = 9
        regs.gpr[RDI] = DATA
        regs.gpr[register] = (1 << 56) + behind
        bus.load = load  # type: ignore[method-assign]  # only here is memory elsewhere
        bus.store = store  # type: ignore[method-assign]  # the same

    return setup


def _user_under_umip_without_the_page(regs: Regs, bus: Memory) -> None:
    _user(regs, bus)
    _page_is_absent(regs, bus)
    regs.cr4 |= CR4_UMIP


def _code_cannot_be_written(regs: Regs, bus: Memory) -> None:
    bus.no_store = [range(CODE, CODE + 0x1000)]


def _not_canonical(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 1 << 47


def _wide_physical_address(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 1 << 48


def _straddling(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = (1 << 47) - 4


def _straddling_57_bits(regs: Regs, bus: Memory) -> None:
    regs.cr4 |= CR4_LA57
    regs.gpr[RAX] = (1 << 56) - 4


def _table_register_that_leaves_the_low_half(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = (1 << 47) - 8
    bus.deny((1 << 47) - 8, 1 << 47)


def _table_register_that_leaves_its_segment(regs: Regs, bus: Memory) -> None:
    """There is no page at its beginning, and no segment at its end."""
    regs.gpr[RAX] = 0x1FFC
    install(regs, DS, 0, 0, 0x1FFF, regs.segments[DS].rights & ~0x8000)
    bus.deny(0x1000, 0x2000)


def _returns_to(code: int, rsp: int) -> Callable[[Regs, Memory], None]:
    """The selector on the stack is of ``code``, where the stack is a 16-bit one."""

    def setup(regs: Regs, bus: Memory) -> None:
        regs.segments[SS].rights = 0x93
        regs.gpr[RSP] = rsp
        bus.poke(rsp, 4, 8 << 16)
        bus.poke(GDT + 8, 8, code)

    return setup


def _jumps_beyond_the_code(regs: Regs, bus: Memory) -> None:
    """To code that is not marked accessed, and whose descriptor cannot be written."""
    regs.gpr[RAX] = DATA
    bus.poke(DATA, 6, 8 << 32 | 0x10000)
    bus.poke(GDT + 8, 8, 0x00409A000000FFFF)
    bus.no_store = [range(GDT, GDT + 0x1000)]


def _returns_beyond_the_code(regs: Regs, bus: Memory) -> None:
    bus.poke(regs.gpr[RSP], 16, 8 << 64 | 1 << 48)
    bus.poke(GDT + 8, 8, 0x00AF9A000000FFFF)
    bus.no_store = [range(GDT, GDT + 0x1000)]


def _unaligned_stack_operand_that_leaves_the_low_half(regs: Regs, bus: Memory) -> None:
    regs.gpr[RBP] = (1 << 47) - 2


def _word_ends_its_page(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0x2000 - 2
    bus.deny(0x2000, 0x3000)


def _word_ends_its_segment(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0x1FFE
    install(regs, DS, 0, 0, 0x1FFF, regs.segments[DS].rights & ~0x8000)


def _straddling_in_a_repetition(regs: Regs, bus: Memory) -> None:
    regs.gpr[RCX] = 3
    regs.gpr[RSI] = (1 << 47) - 3


def _stack_page_ends(regs: Regs, bus: Memory) -> None:
    regs.gpr[RSP] = 0x1008
    bus.deny(0, 0x1000)


def _null(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0


def _null_system_call_selector(regs: Regs, bus: Memory) -> None:
    regs.msr[MSR_SYSENTER_CS] = 3
    regs.gpr[RDX] = CODE
    regs.gpr[RCX] = 0x1800


def _selector_bits_that_do_not_count(regs: Regs, bus: Memory) -> None:
    regs.msr[MSR_SYSENTER_CS] = 0x10000
    regs.gpr[RDX] = 1 << 63 | (1 << 63) - 1


def _shadow_and_selector_bits_that_do_not_count(regs: Regs, bus: Memory) -> None:
    _selector_bits_that_do_not_count(regs, bus)
    regs.shadow = SHADOW_STI


def _shadow_and_a_piece_of_three(regs: Regs, bus: Memory) -> None:
    """REP INS reads ahead to the end of the page."""
    regs.shadow = SHADOW_STI
    regs.gpr[RCX] = 5
    regs.gpr[RDI] = 0x2000 - 3


def _local_selector(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0x1C


def _interrupt_table(regs: Regs, bus: Memory) -> None:
    regs.idt_limit = 0x3FF


def _no_interrupt_table(regs: Regs, bus: Memory) -> None:
    regs.idt_limit = 0x83


def _shadow_and_no_interrupt_table(regs: Regs, bus: Memory) -> None:
    regs.shadow = SHADOW_STI
    regs.idt_limit = 0x83


def _offset_beyond_the_limit(regs: Regs, bus: Memory) -> None:
    """CS takes its limit along in real mode, so the offset is refused behind the load."""
    bus.poke(0x2000, 8, 0x0001_2345)


def _read_ahead_over_a_page(regs: Regs, bus: Memory) -> None:
    regs.gpr[RCX] = 3
    regs.gpr[RDI] = 0x2000 - 8
    bus.deny(0x2000, 0x3000)


def _base_of_32_bits(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = DATA
    regs.gdt_base = 0x12345678


def _last_byte_below_4_gib(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0xFFFFFFFF
    install(regs, DS, 0, DATA + 1, 0xFFFFFFFF, regs.segments[DS].rights)


def _local_table(regs: Regs, bus: Memory) -> None:
    """A descriptor of an LDT in the LDT that there is."""
    regs.gpr[RAX] = 0xC
    regs.segments[LDTR] = Segment(0x80, DATA, 0xFF, 0x82)
    bus.poke(DATA + 8, 16, 0x00008200_3000_00FF)


def _large_local_table(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0xC
    regs.segments[LDTR] = Segment(0x80, DATA, 0x10007, 0x82)
    bus.poke(DATA + 8, 8, 0x00CF93000000FFFF)


def _table_that_ends_in_the_descriptor(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0xF8
    bus.poke(GDT + 0xF8, 16, 0x00008200_3000_00FF)


def _task_segment(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0x10
    bus.poke(GDT + 0x10, 16, 0x00008900_3000_0067)


def _task_segment_of_16_bits(regs: Regs, bus: Memory) -> None:
    regs.gpr[RAX] = 0x10
    bus.poke(GDT + 0x10, 16, 0x00008100_3000_0067)


def _small_stack(regs: Regs, bus: Memory) -> None:
    """A stack segment that ends below where ENTER moves the stack pointer, as that wraps."""
    install(regs, SS, 0, 0, 0xFFFF, regs.segments[SS].rights)
    regs.gpr[RSP] = 0x200


def _second_push_faults(regs: Regs, bus: Memory) -> None:
    regs.idt_limit = 0x3FF
    regs.gpr[RSP] = 0x1002
    bus.deny(0, 0x1000)


def _marked_before_the_push(regs: Regs, bus: Memory) -> None:
    """A far pointer to code that is not marked accessed, and a stack that cannot be written."""
    regs.gpr[RAX] = DATA
    bus.poke(DATA, 6, 8 << 32)
    bus.poke(GDT + 8, 8, 0x00AF9A000000FFFF)
    regs.gpr[RSP] = 0x3000
    bus.deny(0x2000, 0x3000)


def _marked_before_the_limit(regs: Regs, bus: Memory) -> None:
    """A far pointer behind the limit of code that is not marked accessed."""
    regs.gpr[RAX] = DATA
    bus.poke(DATA, 6, 8 << 32 | 0x10000)
    bus.poke(GDT + 8, 8, 0x00409A000000FFFF)


def _stack_that_wraps(regs: Regs, bus: Memory) -> None:
    """A far pointer to 32-bit code, and a stack pointer whose second push wraps."""
    regs.gpr[RSP] = 6
    regs.gpr[RAX] = DATA
    bus.poke(DATA, 6, 8 << 32)
    bus.poke(GDT + 8, 8, 0x00CF9B000000FFFF)


def _local_table_and_selector_in_memory(regs: Regs, bus: Memory) -> None:
    _local_table(regs, bus)
    regs.gpr[RAX] = DATA
    bus.poke(DATA, 2, 0xC)


def _absent_local_table(regs: Regs, bus: Memory) -> None:
    _local_table(regs, bus)
    bus.poke(DATA + 8, 8, 0x00000200_3000_00FF)


def _stack_above_4_gib(regs: Regs, bus: Memory) -> None:
    """A far pointer to 32-bit code, whose pushes do not see the upper half of RSP."""
    _stack_that_wraps(regs, bus)
    regs.gpr[RSP] = 1 << 32 | 0x2000


SHOWN: dict[str, Shown] = {
    "tzcnt": Shown(64, "f30fbdc1", _four_trailing_zeros),
    "bsf-zero": Shown(64, "0fbcc1", _old_value),
    "rep-end": Shown(64, "f348ab", _three_words),
    "rep-flags": Shown(64, "f248af", _second_page_is_absent),
    "cmpxchg-register": Shown(64, "0fb1cb", _unequal),
    "sreg-rex": Shown(64, "448cd8", _nothing),
    "sreg-order": Shown(64, "8e08", _page_is_absent),
    "umip-order": Shown(64, "0f0000", _user_under_umip_without_the_page),
    "selector-width": Shown(64, "488c18", _at_data),
    "selector-read": Shown(64, "0f0000", _word_ends_its_page),
    "control-order": Shown(64, "0f20c8", _user),
    "debug-detect": Shown(64, "0f21f8", _general_detect),
    "io-bitmap": Shown(64, "ec", _task(0x68, 0x8B)),
    "io-bitmap-fault": Shown(64, "ec", _task_without_a_bitmap(0x68)),
    "mmx-fault": Shown(64, "0f7f00", _page_is_absent),
    "segment-override": Shown(64, "368b00", _not_canonical),
    "canonical-first-byte": Shown(64, "488b00", _straddling),
    "hypercall": Shown(64, "0f01d9", _nothing),
    "alignment": Shown(64, "488b00", _checked_for_alignment),
    "write-check": Shown(32, "2e0108", _page_is_absent),
    "null-ss": Shown(64, "8ed0", _null),
    "local-limit": Shown(64, "8ed8", _large_local_table),
    "lldt-local": Shown(64, "0f00d0", _local_table),
    "ltr-error": Shown(64, "0f00d8", _local_selector),
    "system-limit": Shown(64, "0f00d0", _table_that_ends_in_the_descriptor),
    "system-read": Shown(64, "0f00d8", _task_segment),
    "system-compatibility": Shown(32, "0f00d8", _task_segment_that_is_the_last_entry),
    "tss16": Shown(64, "0f00d8", _task_segment_of_16_bits),
    "enter-size": Shown(64, "66c8000000", _nothing),
    "enter-top": Shown(32, "c8000400", _small_stack),
    "undefined-prefix": Shown(64, "660fc308", _at_data),
    "pusha-stores": Shown(32, "60", _stack_page_ends),
    "far-call": Shown(64, "ff18", _stack_that_wraps),
    "far-mark": Shown(32, "ff28", _jumps_beyond_the_code),
    "far-return": Shown(64, "66ca0080", _returns_to(0x00CF9B000000FFFF, 0x9F00)),
    "interrupt-size": Shown(16, "66cd21", _interrupt_table),
    "interrupt-limit": Shown(16, "cd21", _no_interrupt_table),
    "interrupt-stores": Shown(16, "cd21", _second_push_faults),
    "iret-order": Shown(16, "66cf", _offset_beyond_the_limit),
    "ins-read-ahead": Shown(64, "f36d", _read_ahead_over_a_page),
    "sysexit-null": Shown(64, "480f35", _null_system_call_selector),
    "lgdt-order": Shown(32, "0f0110", _table_register_that_leaves_its_segment),
    "lgdt16": Shown(32, "660f0110", _at_data),
    "sgdt16": Shown(32, "660f0100", _base_of_32_bits),
    # The segment ends 320 bytes behind the operand.
    "fxsave-size": Shown(16, "0fae06c0fe", _nothing),
    "wrap-4g": Shown(32, "0f0110", _last_byte_below_4_gib),
    "sti-shadow": Shown(64, "fb", _interruptible),
    "movsxd-read": Shown(64, "666318", _word_ends_its_page),
    "pause-rex": Shown(64, "f34190", _old_value),
}


@pytest.mark.parametrize("name", [deviation.name for deviation in DEVIATIONS])
def test_a_listed_deviation_is_what_the_emulator_does(name: str) -> None:
    made = compared(SHOWN[name])
    assert made.differences
    assert explain(made) == name


def _wrapping_destination(regs: Regs, bus: Memory) -> None:
    regs.gpr[RCX] = 3
    regs.gpr[RDI] = SIZE - 2
    bus.memory.extend(bytes(16))


def _wrapping_destination_before_an_absent_page(regs: Regs, bus: Memory) -> None:
    _wrapping_destination(regs, bus)
    bus.deny(SIZE, SIZE + 0x1000)


def _down_to_the_end_of_the_offsets(regs: Regs, bus: Memory) -> None:
    """ES grows down, so that offset 0 is not in it; KVM checks the first byte of the piece and what follows it."""
    install(regs, ES, 0, DATA, 0xFF, regs.segments[ES].rights | 4)
    regs.gpr[RCX] = 3
    regs.gpr[RDI] = 0xFFFFFFFE


def _destination_at_the_limit(regs: Regs, bus: Memory) -> None:
    """Room for one element before ES ends, or DI wraps; KVM reads two."""
    _wrapping_destination(regs, bus)
    install(regs, ES, 0, 0, SIZE - 1, regs.segments[ES].rights)


OTHER_WAYS = [
    ("undefined-prefix", Shown(64, "f24a664a660fc308", _at_data)),
    ("canonical-first-byte", Shown(64, "114a00", _wide_memory_that_ends_nowhere(RDX, -2))),
    ("canonical-first-byte", Shown(64, "50", _wide_memory_that_ends_nowhere(RSP, 4))),
    ("canonical-first-byte", Shown(64, "5a", _wide_memory_that_ends_nowhere(RSP, -4))),
    ("canonical-first-byte", Shown(64, "48a5", _wide_memory_that_ends_nowhere(RSI, -2))),
    ("canonical-first-byte", Shown(64, "f3ab", _wide_memory_that_ends_nowhere(RDI, -3))),
    ("ins-read-ahead", Shown(64, "f3666d", _wide_memory_that_ends_nowhere(RDI, -6))),
    ("canonical-first-byte", Shown(64, "0f0110", _table_register_that_leaves_the_low_half)),
    ("canonical-first-byte", Shown(64, "660f6f4500", _unaligned_stack_operand_that_leaves_the_low_half)),
    ("far-mark", Shown(64, "48cb", _returns_beyond_the_code)),
    ("far-return", Shown(64, "66ca0010", _returns_to(0x008F9B000000FFFF, 0xF000))),
    ("selector-read", Shown(32, "0f0008", _word_ends_its_segment)),
    ("rep-end", Shown(64, "f36c", _shadow_and_a_piece_of_three)),
    ("sysexit-null", Shown(64, "480f35", _shadow_and_selector_bits_that_do_not_count)),
    ("io-bitmap-fault", Shown(64, "e405", _task_without_a_bitmap(0x66))),
    ("io-bitmap-fault", Shown(32, "f36c", _task_without_a_bitmap(0x68))),
    ("io-bitmap-fault", Shown(32, "6e", _task_without_a_bitmap(0x68))),
    ("system-compatibility", Shown(32, "0f00d8", _task_segment_whose_upper_half_counts)),
    ("ins-read-ahead", Shown(16, "f36d", _destination_at_the_limit)),
    ("ins-read-ahead", Shown(32, "f3666d", _destination_at_the_limit)),
    ("ins-read-ahead", Shown(32, "f3676d", _wrapping_destination)),
    ("ins-read-ahead", Shown(32, "f3666d", _down_to_the_end_of_the_offsets)),
    ("ins-read-ahead", Shown(32, "f366676d", _wrapping_destination_before_an_absent_page)),
    ("ins-read-ahead", Shown(64, "f3486d", _read_ahead_over_a_page)),
    ("hypercall", Shown(16, "0f01c1", _shadow_and_no_interrupt_table)),
    ("hypercall", Shown(64, "0f01d9", _code_cannot_be_written)),
    ("alignment", Shown(32, "0fba2800", _checked_for_alignment)),
    ("far-call", Shown(64, "ff18", _marked_before_the_push)),
    ("far-call", Shown(64, "ff18", _stack_above_4_gib)),
    ("far-call", Shown(16, "9a00000000", _second_push_faults)),
    ("io-bitmap", Shown(32, "ee", _task(0x69, 0x83))),
    ("undefined-prefix", Shown(64, "66670fc308", _at_data)),
    ("undefined-prefix", Shown(64, "64f2660fc308", _at_data)),
    ("lldt-local", Shown(64, "0f0010", _local_table_and_selector_in_memory)),
    ("lldt-local", Shown(64, "0f00d0", _absent_local_table)),
    ("far-call", Shown(64, "ff18", _marked_before_the_limit)),
    ("interrupt-limit", Shown(16, "cd21", _shadow_and_no_interrupt_table)),
    ("control-order", Shown(64, "0f01dd", _user)),
    ("control-order", Shown(64, "0f01da", _wide_physical_address)),
    ("sysexit-null", Shown(64, "480f35", _selector_bits_that_do_not_count)),
    ("canonical-first-byte", Shown(64, "488b00", _straddling_57_bits)),
    ("canonical-first-byte", Shown(64, "f3ad", _straddling_in_a_repetition)),
]
ALL_WAYS = [*SHOWN.items(), *OTHER_WAYS]


@pytest.mark.parametrize(("name", "shown"), OTHER_WAYS)
def test_a_deviation_shows_in_other_ways_too(name: str, shown: Shown) -> None:
    made = compared(shown)
    assert made.differences
    assert explain(made) == name


@pytest.mark.parametrize("name", [deviation.name for deviation in DEVIATIONS])
def test_a_deviation_explains_nothing_else(name: str) -> None:
    deviation = next(deviation for deviation in DEVIATIONS if deviation.name == name)
    others = [other for other in SHOWN if other != name]
    left = [deviation.expects(compared(SHOWN[other])) for other in others]
    assert [other for other, rest in zip(others, left, strict=True) if rest and not rest.differences] == []


def _another_flag(ctxt: X86EmulateCtxt) -> None:
    ctxt.regs.rflags ^= FLAG_DF


def _another_rip(ctxt: X86EmulateCtxt) -> None:
    ctxt.regs.rip ^= 0x100


def _another_segment(ctxt: X86EmulateCtxt) -> None:
    ctxt.regs.segments[DS].limit ^= 1


def _another_gdt(ctxt: X86EmulateCtxt) -> None:
    ctxt.regs.gdt_base ^= 1 << 30


def _another_idt(ctxt: X86EmulateCtxt) -> None:
    ctxt.regs.idt_base ^= 1 << 30


def _another_vector(ctxt: X86EmulateCtxt) -> None:
    ctxt.regs.xmm[1] ^= 1 << 130


def _another_store(ctxt: X86EmulateCtxt) -> None:
    ctxt.accesses.insert(0, Access(WRITE, 0x3F00, 1, 0x5A))


def _another_byte_stored(ctxt: X86EmulateCtxt) -> None:
    done = ctxt.accesses[:-1] if ctxt.have_exception and ctxt.exception.vector == VECTOR_PF else ctxt.accesses
    for access in done:
        if access.kind & ~SYSTEM in (WRITE, CMPXCHG):
            access.value ^= 1


def _another_exception(ctxt: X86EmulateCtxt) -> None:
    ctxt.have_exception = True
    ctxt.exception = Fault(VECTOR_NM)


@pytest.mark.parametrize(
    "plant",
    [
        *(_another_flag, _another_rip, _another_segment, _another_gdt, _another_idt, _another_vector),
        *(_another_store, _another_exception),
    ],
)
@pytest.mark.parametrize(("name", "shown"), ALL_WAYS)
def test_a_deviation_explains_no_other_error_of_its_instruction(
    name: str, shown: Shown, plant: Callable[[X86EmulateCtxt], None]
) -> None:
    made = compared(shown, plant)
    assert made.differences
    assert explain(made) == ""


@pytest.mark.parametrize(("name", "shown"), [(name, way) for name, way in ALL_WAYS if compared(way).bus.writes])
def test_a_deviation_explains_no_other_byte_stored(name: str, shown: Shown) -> None:
    made = compared(shown, _another_byte_stored)
    assert explain(made) == ""


@pytest.mark.parametrize(("name", "shown"), ALL_WAYS)
def test_a_deviation_explains_no_other_register(name: str, shown: Shown) -> None:
    explained = []
    for index in range(16 if shown.bits == 64 else 8):

        def plant(ctxt: X86EmulateCtxt, index: int = index) -> None:
            ctxt.regs.gpr[index] ^= 0x40

        if explain(compared(shown, plant)):
            explained.append(index)
    assert explained == []


def _refusal(ctxt: X86EmulateCtxt) -> None:
    ctxt.have_exception = True
    ctxt.exception = Fault(VECTOR_GP, 0)


def _another_entry_read(ctxt: X86EmulateCtxt) -> None:
    """As if INT had looked at another entry of the table."""
    for access in ctxt.accesses:
        if access.kind == READ | SYSTEM:
            access.gva += 4


def _null_pointer(regs: Regs, bus: Memory) -> None:
    """A far pointer with a null selector."""
    regs.gpr[RAX] = DATA


@pytest.mark.parametrize(
    ("shown", "plant"),
    [
        (Shown(64, "ff18", _stack_that_wraps), _refusal),
        (Shown(64, "ff18", _null_pointer), _another_flag),
        (Shown(16, "66cd21", _interrupt_table), _another_entry_read),
        (Shown(16, "cd21", _no_interrupt_table), _another_entry_read),
        (Shown(64, "480f35", _null_system_call_selector), _refusal),
    ],
    ids=["refused call", "null call", "interrupt", "interrupt beyond the limit", "refused sysexit"],
)
def test_no_deviation_explains_a_far_transfer_that_is_wrong(
    shown: Shown, plant: Callable[[X86EmulateCtxt], None]
) -> None:
    made = compared(shown, plant)
    assert made.differences
    assert explain(made) == ""


# Page faults, and the privilege of accesses.


def _user_at(address: int) -> Callable[[Regs, Memory], None]:
    """User code whose operand lies at ``address``; the page behind DATA's is absent."""

    def setup(regs: Regs, bus: Memory) -> None:
        _user(regs, bus)
        regs.gpr[RAX] = address
        bus.deny(DATA + 0x1000, DATA + 0x2000)

    return setup


LOADS = ["488b00", "480100", "0fc708", "48ff28", "0f1000"]
PLACES = [(0x1000, 0x2000), (0x1010, 0x2010), (0xFFE, 0x2000)]


@pytest.mark.parametrize(
    ("code", "place", "address"),
    [
        *[(code, place, address) for code in LOADS for place, address in PLACES],
        # A far pointer, which hardware reads in two pieces, of which the first is there.
        ("48ff28", 0xFF8, 0x2000),
    ],
)
def test_a_page_fault_has_the_address_of_the_first_byte_in_the_page(code: str, place: int, address: int) -> None:
    def another_address(ctxt: X86EmulateCtxt) -> None:
        fault = ctxt.exception
        ctxt.exception = Fault(fault.vector, fault.error_code, fault.address + 1)

    shown = Shown(64, code, _user_at(DATA + place))
    made = compared(shown)
    assert made.fault is not None
    assert (made.fault.vector, made.fault.address, made.differences) == (VECTOR_PF, address, [])
    made = compared(shown, another_address)
    assert made.differences == [ADDRESS]
    assert explain(made) == ""


@pytest.mark.parametrize(("code", "place"), [("488b00", 0), ("488900", 0), ("488b00", 0x1000), ("488900", 0x1000)])
def test_user_code_makes_user_accesses_also_if_they_fault(code: str, place: int) -> None:
    def as_the_supervisor(ctxt: X86EmulateCtxt) -> None:
        ctxt.accesses[0].kind |= SYSTEM

    shown = Shown(64, code, _user_at(DATA + place))
    assert compared(shown).differences == []
    assert compared(shown, as_the_supervisor).differences == [PRIVILEGE]


def test_an_operand_in_the_page_of_a_stack_that_cannot_be_written_is_read() -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.gpr[RAX] = 0x2800
        regs.gpr[RSP] = 0x2408
        bus.deny(0x2000, 0x3000, load=False)

    made = compared(Shown(64, "ff30", setup))
    assert made.fault is not None
    assert (made.fault.vector, made.fault.error_code, made.fault.address) == (VECTOR_PF, PFERR_WRITE, 0x2400)
    assert made.differences == []


def test_so_is_a_far_pointer_that_hardware_reads_in_pieces() -> None:
    def setup(regs: Regs, bus: Memory) -> None:
        regs.gpr[RAX] = 0x2800
        bus.poke(0x2800, 6, 8 << 32 | 0x300)
        bus.poke(GDT + 8, 8, 0x00AF9B000000FFFF)
        regs.gpr[RSP] = 0x2404
        bus.deny(0x2000, 0x3000, load=False)

    made = compared(Shown(64, "ff18", setup))
    assert made.fault is not None
    assert (made.fault.vector, made.fault.error_code, made.fault.address) == (VECTOR_PF, PFERR_WRITE, 0x2400)
    assert made.differences == []


def test_the_documentation_lists_the_deviations() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "emulator.md").read_text()
    for deviation in DEVIATIONS:
        assert f"| `{deviation.name}` | {deviation.what} | {deviation.source} |" in text
