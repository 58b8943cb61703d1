"""External interrupts: from userspace's controller by KVM_INTERRUPT and the interrupt window to the guest's IDT."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from machines import DATA, L1, NOWHERE, ROOT, Machine, Tables, flat32, gva, long4, machine, run, usual
from test_kvm_events import LOAD, STACK, SYSTEM, step, vectors, with_idt

from mmufuzz.host.strategy import Strategy
from mmufuzz.kvm.observer import Observer
from mmufuzz.outcome import Outcome
from mmufuzz.run import run as run_case
from mmufuzz.search.explore import COMPLETE, explore
from mmufuzz.x86.state import VECTOR_PF

IRQ, IRQ2 = 0x20, 0x21
RAISE = "interrupt vcpu0 0x20"
TOP = gva(STACK) + 0x800
COUNT = "inc rdx; iretq"
DATA64 = 0x00CF93000000FFFF


def guest(
    *steps: str,
    host: Sequence[str] = (RAISE,),
    tables: Tables | None = None,
    schedule: Sequence[str] = (),
    kernel: str = "v6.12",
    **regs: int,
) -> Machine:
    """A guest that loads its tables and runs ``steps``; handlers count in RDX. The host is done before step 1."""
    made = with_idt((IRQ, COUNT), (IRQ2, COUNT), (VECTOR_PF, "add rsp, 8; iretq"), tables=tables)
    registers = {"rsp": TOP, "rbp": gva(SYSTEM, 62)} | regs
    return run(made, long4(LOAD, *steps, **registers), host=host, schedule=schedule, kernel=kernel)


def taken_at(m: Machine) -> list[tuple[int, int]]:
    """Vectors of the interrupts that the guest was delivered, and RIP of what they came before."""
    return [(exception[0], exception[3]) for exception in m.vcpu().exceptions if exception[0] >= IRQ]


def test_an_interrupt_waits_in_userspace_until_the_guest_opens_the_window() -> None:
    m = guest("nop", "nop", "sti", "nop", "nop")
    assert taken_at(m) == [(IRQ, step(5))]
    assert m.reg("rdx") == 1
    assert m.passed("exit_userspace.irq_window") == 1
    assert m.kvm.exits["interrupt-window"] == 1


def test_an_interrupt_that_the_guest_never_lets_in_stays_with_userspace() -> None:
    m = guest("nop", "nop")
    assert taken_at(m) == []
    assert m.passed("host.interrupt") == 1
    assert m.passed("interrupt.queued") == 0


def test_cli_right_behind_sti_leaves_no_window() -> None:
    assert taken_at(guest("sti", "cli", "nop")) == []


def test_a_load_of_ss_in_the_shadow_of_sti_prolongs_it() -> None:
    assert taken_at(guest("mov ecx, ss", "sti", "mov ss, ecx", "nop", "nop")) == [(IRQ, step(5))]


def test_popf_opens_the_window_at_once() -> None:
    assert taken_at(guest("push 0x202; popf", "nop")) == [(IRQ, step(2))]


@pytest.mark.parametrize("opens, at", [("fep sti", 3), ("fep popf", 2)])
def test_the_emulator_casts_the_shadow_of_sti_and_none_for_popf(opens: str, at: int) -> None:
    m = guest(opens, "nop", "nop", tables=usual().set(STACK, 0x800 // 8, 0x202))
    assert taken_at(m) == [(IRQ, step(at))]


def test_an_emulated_instruction_ends_a_shadow() -> None:
    assert taken_at(guest("sti", "fep nop", "nop")) == [(IRQ, step(3))]


def test_an_instruction_that_kvm_skips_ends_a_shadow() -> None:
    m = guest("sti", "invlpg [rbx]", "nop", rbx=gva(DATA))
    assert taken_at(m) == [(IRQ, step(3))]


def test_the_handler_runs_with_interrupts_off_and_returns_to_where_it_came_from() -> None:
    m = guest("sti", "nop", "nop", host=(RAISE, "interrupt vcpu0 0x21"))
    assert taken_at(m) == [(IRQ2, step(3)), (IRQ, step(3))]
    assert m.reg("rdx") == 2
    assert m.vcpu().regs.rflags & 1 << 9


def test_the_highest_vector_comes_first_and_the_same_one_twice_is_one() -> None:
    m = guest("sti", "nop", "nop", host=(RAISE, RAISE, "interrupt vcpu0 0x60"), tables=with_idt((0x60, COUNT)))
    assert [vector for vector, _ in taken_at(m)] == [0x60, IRQ]


def test_a_frame_that_faults_in_the_shadow_tables_is_pushed_again() -> None:
    m = guest("sti", "nop", "nop")
    assert m.passed("event.delivery_exited") >= 1
    assert m.passed("interrupt.delivered") == 1
    assert m.word(STACK, 0x7F0 // 8 - 1) & 1 << 9
    # RF is for faults only.
    assert not m.word(STACK, 0x7F0 // 8 - 1) & 1 << 16


def test_kvm_comes_back_right_behind_an_injection() -> None:
    assert guest("sti", "nop", "nop").kvm.exits["preemption-timer"] == 1


def test_a_signal_gets_a_running_vcpu_out_of_the_guest() -> None:
    early = ["after vcpu0@0.thread.yield 1 run vcpu0", "after vcpu0@3.guest.fetch 1 run host0"]
    m = guest("sti", "nop", "nop", "nop", "nop", schedule=early)
    assert len(taken_at(m)) == 1


def test_a_signal_before_the_entry_cancels_it() -> None:
    made = usual()
    m = run(made, flat32("nop", "nop"), host=(RAISE,), schedule=["after vcpu0@0.mode.store 1 run host0"])
    assert m.passed("entry.cancelled") == 1


def test_a_halted_vcpu_wakes_for_an_interrupt() -> None:
    late = [f"after vcpu0@0.thread.yield {count} run vcpu0" for count in (1, 2, 3)]
    hold = ["after host0@0.thread.start 1 run vcpu0", "after host0@1.irq.atomic 1 run vcpu0"]
    m = guest("sti", "hlt", "nop", host=("zap_all_fast", RAISE), schedule=late + hold)
    assert m.passed("interrupt.woke") == 1
    assert taken_at(m) == [(IRQ, step(3))]


def test_hlt_with_nobody_left_to_interrupt_goes_on() -> None:
    m = guest("sti", "nop", "hlt", "nop")
    assert m.vcpu().finished
    assert m.vcpu().userspace_exits == ["hlt"]


def test_a_guest_without_an_idt_that_takes_an_interrupt_shuts_down() -> None:
    m = run(usual(), long4("sti", "nop", "nop", "nop", rsp=TOP), host=(RAISE,))
    assert m.vcpu().userspace_exits == ["shutdown"]
    assert m.passed("interrupt.delivered") == 0


def test_only_a_vcpu_that_somebody_interrupts_has_a_controller() -> None:
    m = run(usual(), long4("nop"), flat32("nop"), host=("interrupt vcpu1 0x20",))
    assert [vcpu.irqchip is not None for vcpu in m.kvm.vcpus] == [False, True]


def test_32_bit_code_takes_interrupts_too() -> None:
    tables = Tables().set(SYSTEM, 2, 0x00CF9B000000FFFF).set(SYSTEM, 3, DATA64)
    tables.set(SYSTEM, 62, 0xFFF | gva(SYSTEM) << 16).set(SYSTEM, 64, 0xFFF | (gva(SYSTEM) + 0x400) << 16)
    handler = gva(7)
    tables.set(SYSTEM, 0x400 // 8 + IRQ, handler | 0x10 << 16 | 0x8E << 40).set(7, 0, 0xCF42)
    steps = ("lgdt [ebp]; lidt [ebp + 16]", "sti", "nop", "nop")
    m = run(tables, flat32(*steps, rsp=TOP, rbp=gva(SYSTEM, 62)), host=(RAISE,))
    assert m.reg("rdx") == 1


def test_a_task_gate_ends_in_an_internal_error_and_takes_the_interrupt_with_it() -> None:
    tables = Tables().set(SYSTEM, 62, 0xFFF | gva(SYSTEM) << 16).set(SYSTEM, 64, 0xFFF | (gva(SYSTEM) + 0x400) << 16)
    tables.set(SYSTEM, 0x400 // 8 + IRQ, 0x85 << 40)
    steps = ("lidt [ebp + 16]", "sti", "nop", "nop", "nop")
    case = machine(tables, flat32(*steps, rsp=TOP, rbp=gva(SYSTEM, 62)), host=(RAISE,)).case
    outcome = run_case(case)
    assert outcome.findings == []
    assert outcome.userspace == (("internal-error",),)
    assert outcome.exits["task-switch"] == 1


class Entries(Observer):
    """Counts what it is told of VM entries."""

    def __init__(self) -> None:
        self.failed = 0

    def vm_entry_failed(self, vcpu: int) -> None:
        self.failed += 1


def test_vm_entry_with_an_interrupt_and_if_clear_fails() -> None:
    """POPF has exited to read MMIO, userspace has handed over an interrupt, and what is read clears IF."""
    steps = (LOAD, "sti; nop", "mov rsp, rsi", "popf", "nop")
    schedule = ["after vcpu0@0.thread.yield 1 run vcpu0", "after host0@0.irq.atomic 1 run vcpu0"]
    regs = {"rsp": TOP, "rbp": gva(SYSTEM, 62), "rsi": gva(0x20)}
    m = machine(usual().map(gva(0x20), NOWHERE), long4(*steps, **regs), host=(RAISE,), schedule=schedule)
    m.kvm.observer = entries = Entries()
    m.run()
    assert entries.failed == 1
    assert m.vcpu().userspace_exits[-1] == "fail-entry"


@pytest.mark.parametrize("kernel", ["v6.1", "v6.12"])
def test_a_frame_on_a_page_table_has_the_instruction_behind_it_emulated(kernel: str) -> None:
    schedule = ["after vcpu0@2.guest.fetch 1 run host0"]
    m = guest("sti", "nop", "cli", "nop", rsp=gva(L1) + 0x800, schedule=schedule, kernel=kernel)
    assert m.vcpu().userspace_exits == ["fail-entry"]
    assert m.kvm.exits["invalid-state"] == 1


def test_a_frame_on_the_root_is_put_off_as_long_as_kvm_emulates() -> None:
    m = guest("sti", "nop", "nop", "nop", rsp=gva(ROOT) + 0x800)
    assert vectors(m) == []
    assert m.vcpu().finished
    assert m.vcpu().interrupt is not None


@pytest.mark.parametrize("kernel", ["v6.1", "v6.12"])
def test_under_every_schedule_each_interrupt_is_taken_once(kernel: str) -> None:
    """HLT waits for the host, so that every interrupt comes before the program ends."""
    tables = with_idt((IRQ, COUNT), (IRQ2, COUNT))
    regs = {"rsp": TOP, "rbp": gva(SYSTEM, 62)}
    host = (RAISE, "interrupt vcpu0 0x21")
    case = machine(tables, long4(LOAD, "sti", "hlt", "hlt", "nop", **regs), host=host, kernel=kernel).case
    counts: set[int] = set()

    def one(strategy: Strategy) -> Outcome:
        outcome = run_case(case, strategy, track=True)
        assert outcome.findings == []
        if outcome.exits.get("program-end"):
            # A run that comes to a state that was met before is cut.
            counts.add(outcome.registers[0][2])
        return outcome

    assert explore(one, 2, lambda: False).verdict == COMPLETE
    assert counts == {2}
