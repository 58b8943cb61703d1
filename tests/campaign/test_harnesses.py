"""The harnesses: each makes valid Cases, says in one line what it did, and leaves a Case when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.campaign.budget import Budget, Stop
from mmufuzz.campaign.corpus import Corpus
from mmufuzz.campaign.engine_hypothesis import load_harness
from mmufuzz.campaign.findings import FindingStore
from mmufuzz.campaign.fuzz_target import record_crash
from mmufuzz.campaign.harness import session
from mmufuzz.campaign.kernel import Kernel
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.campaign.suspects import stuck
from mmufuzz.campaign.tally import Tally
from mmufuzz.case import toml
from mmufuzz.case.validate import validate
from mmufuzz.outcome import Outcome

ROOT = Path(__file__).resolve().parents[2]


def harness(name: str) -> ModuleType:
    """The module of a harness; skips where its engine is missing."""
    pytest.importorskip("atheris" if name.startswith("atheris") else "hypothesis")
    return load_harness(ROOT, name)


def recorder(directory: Path, *revert: str) -> Recorder:
    """A recorder that keeps its findings in ``directory``."""
    made = Recorder(
        Kernel(revert=revert), FindingStore(directory, None), Corpus(None), Tally(), Stop(), Budget(),
        reduce_findings=False,
    )  # fmt: skip
    made.begin("test", 1)
    return made


@pytest.mark.parametrize("name", ["state_machine", "cases", "atheris_cases", "atheris_insn"])
def test_a_harness_run_as_a_program_prints_one_line_of_what_it_did(name: str, tmp_path: Path) -> None:
    harness(name)
    command = [sys.executable, str(ROOT / "harnesses" / f"{name}.py"), "--cases", "20", "--seed", "1"]
    done = subprocess.run(
        [*command, "--findings", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(name)]
    assert "20 " in line and "seed 1, v6.12" in line and "findings" in line


def test_what_went_wrong_with_a_harness_is_printed_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = session("atheris_insn", ["--findings", str(tmp_path)])
    record_crash(work, b"\0\0", "the emulator differs from hardware")
    assert work.finish() == 70
    (saved,) = tmp_path.glob("harness-errors/*[!t]")
    assert f"  harness-error: atheris_insn: the emulator differs from hardware ({saved})" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["state_machine", "cases"])
def test_a_batch_makes_as_many_cases_as_it_was_asked_for_and_its_seed_decides_them(name: str, tmp_path: Path) -> None:
    made = []
    for run in ("one", "two"):
        work = recorder(tmp_path / run)
        harness(name).batch(work, lambda: False, 3, 12)
        made.append((work.tally.cases, work.tally.marks))
    assert made[0] == made[1]
    assert made[0][0] == 12


def test_the_state_machine_finds_a_reverted_fix_and_leaves_the_case(tmp_path: Path) -> None:
    work = recorder(tmp_path, "retry-guard")
    harness("state_machine").batch(work, lambda: bool(work.store.records), 1, 400)
    record = next(iter(work.store.records.values()))
    assert record.kind == "livelock"
    assert toml.load(record.case).expect.fingerprint == record.fingerprint


def test_a_failure_under_pytest_names_the_case_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("REVERT", "retry-guard"), ("FINDINGS", str(tmp_path))):
        monkeypatch.setenv(f"MMUFUZZ_{name}", value)
    module = harness("state_machine")
    machine = module.ShadowPaging()
    monkeypatch.setattr(module.ShadowPaging, "recorder", module.test_recorder("state_machine"), raising=False)
    monkeypatch.setattr(module.ShadowPaging, "raising", True)
    monkeypatch.setattr(module.ShadowPaging, "over", staticmethod(lambda: False))
    root_entry = module.ROOTS[0] << 12 | 1 << 3
    machine.builder.step(0, (module.STORES_64[4], module.STORES_32[4]), root_entry)
    with pytest.raises(AssertionError, match=r"livelock: .* the Case is in"):
        machine.teardown()
    assert list(tmp_path.glob("livelock-*.toml"))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_any_rules_in_any_order_leave_a_valid_case(data: st.DataObject) -> None:
    module = harness("state_machine")
    machine = module.ShadowPaging()
    rules = {
        name: function.hypothesis_stateful_rule.arguments
        for name, function in vars(module.ShadowPaging).items()
        if hasattr(function, "hypothesis_stateful_rule")
    }
    assert len(rules) >= 9
    for name in data.draw(st.lists(st.sampled_from(sorted(rules)), max_size=8)):
        getattr(machine, name)(**{key: data.draw(value) for key, value in rules[name].items()})
    validate(machine.builder.case())


def test_a_run_cut_short_is_reported_only_if_it_exits_and_hardly_anything_retires() -> None:
    outcome = Outcome()
    outcome.events = 20000
    outcome.exits = {"page-fault": 400}
    outcome.userspace = ((),)
    outcome.instructions = 5000
    assert not stuck(outcome)
    outcome.instructions = 3
    assert stuck(outcome)
    outcome.exceptions = 400  # a handler that faults, down its stack
    assert not stuck(outcome)
    outcome.exceptions = 0
    outcome.userspace = (("mmio write 0x100000 4 0x0",) * 400,)  # REP on MMIO
    assert not stuck(outcome)
    outcome.userspace = ((),)
    outcome.exits = {"page-fault": 9}  # one long REP instruction
    assert not stuck(outcome)
    outcome.exits = {"page-fault": 400}
    outcome.events = 40
    outcome.instructions = 0
    assert not stuck(outcome)


def test_a_run_is_not_stuck_if_one_vcpu_gets_on_and_keeps_the_others_from_it() -> None:
    outcome = Outcome()
    outcome.events = 20000
    outcome.exits = {"page-fault": 590}
    outcome.instructions = 69
    outcome.userspace = ((),)
    assert stuck(outcome)
    outcome.userspace = ((), (), ())
    assert not stuck(outcome)
