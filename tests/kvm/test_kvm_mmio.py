"""MMIO: fragments, exits to userspace, and how the instruction completes."""

from __future__ import annotations

import pytest
from machines import DATA, DATA2, NOWHERE, Machine, flat32, gva, long4, run, usual

from mmufuzz.case.model import Slot


def mapped(first: int, second: int) -> object:
    """The usual tables with pages DATA and DATA2, which touch, at these gfns."""
    return usual().map(gva(DATA), first).map(gva(DATA2), second)


def exits(m: Machine) -> list[str]:
    return m.vcpu().userspace_exits


def test_what_is_written_to_the_device_is_read_back() -> None:
    m = run(mapped(NOWHERE, DATA2), long4("mov [rax], rcx", "mov rdx, [rax]", rax=gva(DATA), rcx=0x1122334455667788))
    assert exits(m) == ["mmio write 0x100000 8 0x1122334455667788", "mmio read 0x100000 8 0x1122334455667788"]
    assert m.reg("rdx") == 0x1122334455667788
    assert m.vcpu().retired == 2


def test_the_device_is_one_for_all_vcpus() -> None:
    first = long4("mov [rax], ecx", rax=gva(DATA), rcx=7)
    second = long4("mov edx, [rax]", code=2, rax=gva(DATA))
    m = run(mapped(NOWHERE, DATA2), first, second, schedule=["after vcpu0@0.thread.end 1 run vcpu1"])
    assert m.reg("rdx", 1) == 7


def test_an_access_that_crosses_two_mmio_pages_is_two_exits() -> None:
    steps = ("mov [rax], rcx", "mov rdx, [rax]")
    m = run(mapped(NOWHERE, NOWHERE + 7), long4(*steps, rax=gva(DATA2) - 3, rcx=0x8877665544332211))
    assert exits(m) == [
        "mmio write 0x100ffd 3 0x332211",
        "mmio write 0x107000 5 0x8877665544",
        "mmio read 0x100ffd 3 0x332211",
        "mmio read 0x107000 5 0x8877665544",
    ]
    assert m.reg("rdx") == 0x8877665544332211


@pytest.mark.parametrize("low", [True, False], ids=["memory first", "device first"])
def test_an_access_that_crosses_from_memory_to_mmio_does_each_part_where_it_belongs(low: bool) -> None:
    tables = mapped(DATA, NOWHERE) if low else mapped(NOWHERE, DATA2)
    m = run(tables, long4("mov [rax], rcx", "mov rdx, [rax]", rax=gva(DATA2) - 4, rcx=0x8877665544332211))
    assert m.reg("rdx") == 0x8877665544332211
    assert len(exits(m)) == 2
    if low:
        assert exits(m)[0] == "mmio write 0x100000 4 0x88776655"
        assert m.word(DATA, 511) >> 32 == 0x44332211
    else:
        assert exits(m)[0] == "mmio write 0x100ffc 4 0x44332211"
        assert m.word(DATA2) & 0xFFFFFFFF == 0x88776655


def test_more_than_eight_bytes_are_several_exits() -> None:
    m = run(mapped(NOWHERE, DATA2), long4("movups [rax], xmm0", "movups xmm1, [rax]", rax=gva(DATA)))
    assert exits(m) == [f"mmio {what} {0x100000 + at:#x} 8 0x0" for what in ("write", "read") for at in (0, 8)]


def test_a_read_modify_write_reads_once_and_then_writes() -> None:
    m = run(mapped(NOWHERE, DATA2), long4("mov dword [rax], 5", "add dword [rax], 3", rax=gva(DATA)))
    assert exits(m)[1:] == ["mmio read 0x100000 4 0x5", "mmio write 0x100000 4 0x8"]
    assert m.vcpu().retired == 2


def test_an_instruction_that_reads_twice_keeps_its_first_value_while_it_waits_for_the_second() -> None:
    steps = ("mov dword [rsi], 5", "mov dword [rdi], 5", "cmpsd")
    m = run(mapped(NOWHERE, NOWHERE + 1), long4(*steps, rsi=gva(DATA), rdi=gva(DATA2)))
    assert exits(m)[2:] == ["mmio read 0x100000 4 0x5", "mmio read 0x101000 4 0x5"]
    assert m.vcpu().regs.rflags & 1 << 6


def test_a_write_is_done_for_the_guest_before_userspace_sees_it() -> None:
    """RIP is behind the instruction at the exit; a read has changed nothing yet."""
    m = run(mapped(NOWHERE, DATA2), long4("mov [rax], ecx", rax=gva(DATA)))
    assert m.marks["emulate"] == m.marks["emulate.done"] == 1
    m = run(mapped(NOWHERE, DATA2), long4("mov ecx, [rax]", rax=gva(DATA)))
    # Run again without decoding.
    assert m.marks["emulate"] == m.marks["emulate.done"] == 1
    assert m.sites().count("emul.fetch") == 1


def test_a_repeated_store_to_mmio_exits_for_every_element() -> None:
    m = run(mapped(NOWHERE, DATA2), long4("rep stosd", rdi=gva(DATA), rcx=3, rax=9))
    assert exits(m) == [f"mmio write {0x100000 + 4 * at:#x} 4 0x9" for at in range(3)]
    assert (m.reg("rcx"), m.reg("rdi")) == (0, gva(DATA) + 12)
    assert m.vcpu().retired == 1


def test_a_repeated_move_from_mmio_goes_on_in_the_emulator_after_each_read() -> None:
    m = run(mapped(NOWHERE, DATA2), long4("rep movsd", rsi=gva(DATA), rdi=gva(DATA2), rcx=3))
    assert exits(m) == [f"mmio read {0x100000 + 4 * at:#x} 4 0x0" for at in range(3)]
    assert m.marks["emulate"] == 1


def test_a_repeated_instruction_leaves_the_emulator_every_1024_iterations() -> None:
    m = run(usual(), long4("rep stosb", rdi=gva(DATA), rcx=1500, rax=1), write_track=[DATA], apply=(), limit=200000)
    assert m.reg("rcx") == 0
    assert m.marks["emulate"] == 2


def test_the_last_store_of_an_instruction_with_several_decides_what_userspace_sees() -> None:
    """A deviation of KVM: emulator_read_write drops the fragments of an MMIO write that came before."""
    m = run(None, flat32("pusha", rsp=(NOWHERE << 12) + 32, rax=1, rdi=8))
    assert exits(m) == ["mmio write 0x100000 4 0x8"]


def test_a_fault_after_an_mmio_write_drops_it() -> None:
    """The second half of a page-crossing write faults: what the first half asked of userspace is forgotten."""
    tables = usual().map(gva(DATA), NOWHERE).map(gva(DATA2), DATA2, 0)
    m = run(tables, long4("mov [rax], rcx", rax=gva(DATA2) - 4))
    assert exits(m) == []
    assert [exception[:3] for exception in m.vcpu().exceptions] == [(14, 2, gva(DATA2))]


def test_a_write_that_crosses_pages_has_stored_its_first_part_when_the_second_faults() -> None:
    m = run(usual().map(gva(DATA2), DATA2, 0), long4("fep mov [rax], rcx", rax=gva(DATA2) - 4, rcx=0x1122334455667788))
    assert m.word(DATA, 511) >> 32 == 0x55667788
    assert m.vcpu().exceptions[0][:3] == (14, 2, gva(DATA2))


def test_each_half_of_a_tracked_write_is_tracked_with_its_own_length() -> None:
    """kvm_mmu_track_write begins with a barrier: one for each page."""
    inside = run(usual(), long4("fep mov [rax], rcx", "nop", rax=gva(DATA)))
    across = run(usual(), long4("fep mov [rax], rcx", "nop", rax=gva(DATA2) - 4))
    assert across.sites().count("mb.fence") == inside.sites().count("mb.fence") + 1


@pytest.mark.parametrize("text", ["sgdt [rax]", "sidt [rax]"])
def test_a_table_register_that_is_stored_to_memory_is_not_tracked(text: str) -> None:
    m = run(usual(), long4("fep " + text, "nop", rax=gva(DATA)))
    assert m.marks["emulate.done"] == 1
    assert m.sites().count("emul.store") >= 1
    moved = run(usual(), long4("fep mov [rax], rcx", "nop", rax=gva(DATA)))
    assert m.sites().count("mb.fence") == moved.sites().count("mb.fence") - 1


@pytest.mark.parametrize("text", ["sgdt [rax]", "sidt [rax]"])
def test_a_table_register_in_mmio_has_no_way_to_userspace(text: str) -> None:
    """kvm_read_guest_virt and its counterpart answer IO_NEEDED: the guest executes the instruction for ever."""
    m = run(mapped(NOWHERE, DATA2), long4(text, rax=gva(DATA)), limit=3000)
    assert m.marks["emulate.io_needed"] > 10
    assert exits(m) == []
    assert not m.vcpu().finished


@pytest.mark.parametrize("text", ["lgdt [rax]", "lidt [rax]"])
def test_a_table_register_loaded_from_mmio_leaves_for_userspace_in_vain(text: str) -> None:
    """Its entry declares a memory operand, which is read as MMIO; then em_lgdt() reads it again as memory."""
    m = run(mapped(NOWHERE, DATA2), long4(text, rax=gva(DATA)), limit=3000)
    assert m.marks["emulate.io_needed"] > 10
    assert set(exits(m)) == {f"mmio read {NOWHERE << 12:#x} 4 0x0"}
    assert not m.vcpu().finished


def test_a_table_register_that_is_stored_to_a_read_only_slot_loops_too() -> None:
    slots = (Slot(0, 0x20), Slot(0x20, 1, readonly=True))
    m = run(usual().identity([0x20]), long4("sgdt [rax]", rax=gva(0x20)), slots=slots, limit=3000)
    assert m.marks["emulate.io_needed"] > 10
    m = run(usual().identity([0x20]), long4("lgdt [rax]", rax=gva(0x20)), slots=slots, limit=3000)
    assert m.vcpu().finished


def test_a_read_that_userspace_answers_is_no_progress_until_the_instruction_retires() -> None:
    m = run(mapped(NOWHERE, DATA2), long4("mov rcx, [rax]", rax=gva(DATA)), long4("nop", code=2))
    assert (m.vcpu().progress, m.vcpu().retired) == (1, 1)
