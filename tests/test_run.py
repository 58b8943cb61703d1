"""``run(case) -> Outcome``: verdicts, bad input, and failures of mmufuzz itself."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import FLAT32, SC, Case, Expect, HostThread, Options, Slot, Vcpu
from mmufuzz.host.strategy import Strategy
from mmufuzz.outcome import HARNESS_ERROR, OK, SUSPECT
from mmufuzz.run import run
from mmufuzz.x86.asm import assemble


def flat32(*program: str, **options: object) -> Case:
    code = tuple(assemble(text, False) for text in program)
    guest = Vcpu(FLAT32, code_gva=0x1000, code_gfn=1, regs=((0, 0x2000),), program=code)
    return Case(slots=(Slot(0, 8),), vcpus=(guest,), options=Options(**options))  # type: ignore[arg-type]


def test_a_guest_that_finishes_is_ok() -> None:
    outcome = run(flat32("mov dword [eax], 5", "mov ecx, [eax]"))
    assert outcome.verdict == OK
    assert (outcome.instructions, outcome.threads) == (2, ("vcpu0",))
    assert outcome.exits["program-end"] == 1
    assert outcome.locks["mmu_lock"] > 0


def test_a_guest_that_loops_is_suspect_when_the_limit_is_hit() -> None:
    outcome = run(flat32("jmp -2", event_limit=2000))
    assert (outcome.verdict, [finding.kind for finding in outcome.findings]) == (SUSPECT, ["suspect"])


def test_a_rep_store_to_mmio_meets_the_event_limit() -> None:
    case = flat32("rep stosb", event_limit=500)
    guest = replace(case.vcpus[0], regs=((1, 0x7FFFFFFF), (7, 0x100000)))
    assert run(replace(case, vcpus=(guest,))).verdict == SUSPECT


def test_guests_that_differ_in_memory_alone_have_different_guest_digests() -> None:
    one = run(flat32("mov dword [eax], 1"))
    two = run(flat32("mov dword [eax], 2"))
    assert one.guest != two.guest
    assert one.guest == run(flat32("mov dword [eax], 1")).guest


def test_the_memory_model_is_not_visible_without_a_held_store() -> None:
    case = flat32("mov dword [eax], 1")
    assert run(case).digest == run(replace(case, memory_model=SC)).digest


def test_the_digest_covers_the_trace() -> None:
    assert run(flat32("mov ecx, [eax]", "nop")).digest != run(flat32("nop", "mov ecx, [eax]")).digest


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"kernel": "v9.9"}, "kernel"),
        ({"revert": ("no-such-fix",)}, "fix"),
        ({"expect": Expect(reach=("no.such.mark",))}, "expect.reach"),
        ({"slots": (Slot(0, 8), Slot(4, 8))}, "slots"),
        ({"host": (HostThread(("no-such-op",)),)}, "host"),
    ],
)
def test_a_case_that_is_not_valid_is_refused_before_anything_runs(change: dict[str, object], place: str) -> None:
    with pytest.raises(CaseError) as error:
        run(replace(flat32("nop"), **change))  # type: ignore[arg-type]
    assert place in str(error.value)


class Broken(Strategy):
    """Fails where the model asks it."""

    def __init__(self) -> None:
        self.horizon = 1000

    def hold(self, label: int) -> bool:
        """Asked at every store that another thread could see late."""
        raise ZeroDivisionError("planted")


def test_a_failure_inside_mmufuzz_is_a_finding_about_mmufuzz() -> None:
    outcome = run(replace(flat32("mov dword [eax], 5"), host=(HostThread(("zap_all_fast",)),)), Broken())
    assert outcome.verdict == HARNESS_ERROR
    finding = outcome.findings[0]
    assert finding.kind == HARNESS_ERROR
    assert finding.fingerprint.startswith("ZeroDivisionError in ") and finding.fingerprint.endswith(".hold")


@pytest.mark.parametrize(
    ("case", "strategy"),
    [
        (flat32("mov dword [eax], 5"), None),
        (flat32("jmp -2", event_limit=500), None),
        (replace(flat32("mov dword [eax], 5"), host=(HostThread(("zap_all_fast",)),)), Broken()),
        (flat32("fep div ecx", fep=True), None),
    ],
    ids=["finished", "cut short", "failed", "fault in the emulator"],
)
def test_a_run_leaves_nothing_for_the_garbage_collector(case: Case, strategy: Strategy | None) -> None:
    gc.collect()
    run(case, strategy)
    assert gc.collect() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_leaves_the_garbage_collector_as_it_was(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        run(flat32("nop"))
        with pytest.raises(CaseError):
            run(replace(flat32("nop"), kernel="v9.9"))
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was_enabled else gc.disable()


def test_an_outcome_says_what_userspace_was_asked_to_do() -> None:
    code = assemble("mov [eax], ecx", False)
    store = Vcpu(FLAT32, code_gva=0x1000, code_gfn=1, regs=((0, 0x40000), (1, 5)), program=(code,))
    outcome = run(Case(slots=(Slot(0, 32),), vcpus=(store,)))
    assert outcome.userspace == (("mmio write 0x40000 4 0x5",),)
    assert "exit to userspace: mmio write 0x40000 4 0x5" in outcome.notes
