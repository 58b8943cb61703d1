"""The explain table: a column per thread, deviations and state changes beside, a lasso folded to one period."""

from __future__ import annotations

from mmufuzz.case.model import LONG4, Case, HostThread, Slot, Vcpu, Word
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import COUNT_LOAD, COUNT_STORE, EMUL_STORE, GUEST_STORE, MODE_LOAD, THREAD_START, label
from mmufuzz.host.trace import NOTE
from mmufuzz.kvm.memslots import gpa_to_hpa
from mmufuzz.kvm.structs import KERNEL_DATA
from mmufuzz.outcome import FINDING, Finding, Outcome
from mmufuzz.report.explain import explain
from mmufuzz.report.rows import cell, fold, mark_conflicts, rows
from mmufuzz.run import run

COUNTER = KERNEL_DATA + 0x110
STORE = label(0, 0, EMUL_STORE, 1)
READ = label(1, 0, COUNT_LOAD, 1)


def case(*schedule: Deviation) -> Case:
    """Two vCPUs and a host thread; what they do is in the outcome, not run."""
    vcpu = Vcpu(LONG4, cr3=0x10, code_gva=0x20000, code_gfn=0x20, regs=((0, 7),), program=(b"\x90",))
    return Case(
        revert=("retry-guard",), slots=(Slot(0, 64),), memory=(Word(0x10, 0, 0x11067), Word(0x30, 1, 5)),
        vcpus=(vcpu, vcpu), host=(HostThread(("zap_all_fast",)),), schedule=schedule,
    )  # fmt: skip


def outcome() -> Outcome:
    """A held store, and a load by another thread that it is hidden from."""
    made = Outcome()
    made.threads = ("vcpu0", "vcpu1", "host0")
    made.trace = [
        (label(0, 0, THREAD_START, 1), 0, 0),
        (STORE, gpa_to_hpa(0x10008), 0x42),
        (NOTE, 0, 0),
        (READ, COUNTER, 0),
    ]
    made.notes = ["spte gva 0x20000 = gfn 0x20"]
    return made


def row(lines: list[str], word: str) -> str:
    """The one line of the table with ``word``."""
    table = lines[next(index for index, line in enumerate(lines) if line.startswith("──")) :]
    (found,) = [line for line in table if word in line]
    return found


def test_the_header_tells_kernel_programs_and_tables() -> None:
    text = "\n".join(explain(case(), outcome(), "a.toml"))
    assert text.startswith("a.toml\n")
    assert "kernel v6.12, without retry-guard; memory model tso" in text
    assert "vcpu1: 64-bit, 4-level paging, root table gfn 0x10, CPL 0, wp nx" in text
    assert "rax = 0x7" in text and "nop" in text
    assert "gfn 0x10[0] = 0x0000000000011067  gfn 0x11 P W U A D" in text
    assert "gfn 0x30[1] = 0x0000000000000005" in text
    assert "host0: zap_all_fast" in text


def test_each_operation_stands_in_its_thread_s_column() -> None:
    lines = explain(case(), outcome(), "a.toml")
    header = row(lines, "───") and next(line for line in lines if line.split() == ["vcpu0", "vcpu1", "host0"])
    assert row(lines, "emul.store").index("0.emul.store") == header.index("vcpu0")
    assert row(lines, "indirect_shadow_pages").index("0.indirect") == header.index("vcpu1")


def test_addresses_read_as_guest_frames() -> None:
    assert "0.emul.store 1: gfn 0x10[1] ← 0x42" in row(explain(case(), outcome(), "a.toml"), "emul.store")


def test_state_changes_stand_beside_the_operation_they_follow() -> None:
    assert row(explain(case(), outcome(), "a.toml"), "emul.store").endswith("· spte gva 0x20000 = gfn 0x20")


def test_deviations_are_listed_and_marked_where_they_act() -> None:
    schedule = (Deviation(HOLD, STORE, 0, READ), Deviation(RUN, STORE, 1))
    text = "\n".join(explain(case(*schedule), outcome(), "a.toml"))
    assert "  hold vcpu0@0.emul.store 1 until vcpu1@0.indirect_shadow_pages.load 1" in text
    assert "⏸ held in the store buffer" in text
    assert "▶ then vcpu1 runs" in text
    assert "⏵ 0.emul.store 1 of vcpu0 drains to memory" in text


def test_a_deviation_whose_label_never_came_up_says_so() -> None:
    schedule = (Deviation(RUN, label(1, 5, GUEST_STORE, 1), 0),)
    assert any("never came up" in line for line in explain(case(*schedule), outcome(), "a.toml"))


def test_dull_stretches_are_folded_unless_full_is_asked_for() -> None:
    made = outcome()
    made.trace += [(label(2, 0, MODE_LOAD, number), KERNEL_DATA + 0x1000, 0) for number in range(1, 9)]
    assert "… 8 operations" in row(explain(case(), made, "a.toml"), "…")
    assert len([line for line in explain(case(), made, "a.toml", full=True) if "mode.load" in line]) == 8


def test_words_that_threads_share_and_somebody_writes_are_never_folded() -> None:
    made = outcome()
    made.trace = [(label(thread, 0, COUNT_LOAD, number), COUNTER, 0) for thread in (0, 1) for number in (1, 2, 3)]
    table = rows(made)
    mark_conflicts(table)
    assert [one.count for one in fold(table)] == [3, 3]
    made.trace.append((label(1, 0, COUNT_STORE, 1), COUNTER, 1))
    table = rows(made)
    mark_conflicts(table)
    assert [cell(one) for one in fold(table)] == [cell(one) for one in table]


def test_a_lasso_is_shown_as_one_period() -> None:
    made = outcome()
    made.verdict = FINDING
    made.findings = [Finding("livelock", "livelock|movss", "the same state came up again", READ)]
    lap = [(label(0, 1, MODE_LOAD, number), KERNEL_DATA + 0x1000, 0) for number in range(1, 4)]
    made.trace += lap + [(label(0, 1, MODE_LOAD, number), KERNEL_DATA + 0x1000, 0) for number in range(4, 20)]
    made.period = (4, 7)
    lines = explain(case(), made, "a.toml", full=True)
    start = next(index for index, line in enumerate(lines) if line.startswith("┌ one period"))
    end = next(index for index, line in enumerate(lines) if line.startswith("└"))
    assert end - start - 1 == len(lap)
    assert not any("mode.load 4" in line for line in lines)
    assert "livelock (seen after vcpu1@0.indirect_shadow_pages.load 1)" in lines


def test_a_real_run_can_be_explained_in_full() -> None:
    real = Case(
        slots=(Slot(0, 64),),
        memory=tuple(Word(0x10 + level, 0x20 if level == 3 else 0, (0x20 if level == 3 else 0x11 + level) << 12 | 0x67)
                     for level in range(4)),
        vcpus=(Vcpu(LONG4, cr3=0x10, code_gva=0x20000, code_gfn=0x20, program=(b"\x90",)),),
    )  # fmt: skip
    made = run(real)
    operations = [line for line in explain(real, made, "real.toml", full=True) if line[:4].strip().isdigit()]
    assert made.verdict == "ok"
    assert len(operations) >= made.events
