"""What Atheris' mutator and crossover make of Cases, and what becomes of crashes of a harness."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.campaign.budget import PARENT, Stop
from mmufuzz.campaign.findings import ERRORS, FindingStore
from mmufuzz.campaign.mutators import MOST_PARENTS, SHORT, Mutator, dictionary, dictionary_text
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.generate import CAMPAIGN, generate, generate_shape
from mmufuzz.case.model import Case
from mmufuzz.case.rng import Rng
from mmufuzz.case.validate import validate
from mmufuzz.host.deviation import RUN
from mmufuzz.outcome import HARNESS_ERROR, Finding, Outcome
from mmufuzz.run import run

ROOT = Path(__file__).resolve().parents[2]
SEEDS = st.integers(0, (1 << 32) - 1)
INPUTS = st.one_of(
    st.binary(max_size=200), st.integers(0, 999).map(lambda seed: case_bytes.encode(generate(Rng(seed))))
)
RACE = case_bytes.encode(generate_shape(Rng(5), "root-race"))


def unchanged(data: bytes, size: int) -> bytes:
    """In the place of libFuzzer's own mutator."""
    return data


@settings(derandomize=True, deadline=None, max_examples=60)
@given(INPUTS, SEEDS)
def test_a_mutation_is_a_valid_case_of_at_most_the_size_asked_for(data: bytes, seed: int) -> None:
    made = Mutator(run).mutated(data, 900, Rng(seed), unchanged)
    assert len(made) <= 900
    validate(case_bytes.decode(made))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(0, 999), SEEDS)
def test_a_crossover_is_a_valid_case(one: int, other: int, seed: int) -> None:
    parents = [case_bytes.encode(generate(Rng(number))) for number in (one, other)]
    made = Mutator(run).crossed(*parents, 4096, Rng(seed))
    validate(case_bytes.decode(made))


def test_what_is_too_short_for_a_case_becomes_a_fresh_one() -> None:
    made = Mutator(run).mutated(b"x" * (SHORT - 1), 4096, Rng(3), unchanged)
    assert case_bytes.decode(made) == generate(Rng(3), CAMPAIGN)


def test_mutations_of_all_three_kinds_come_up_and_one_aims_at_a_race_that_the_parent_shows() -> None:
    ran: list[Case] = []
    raw: list[bytes] = []

    def running(case: Case) -> Outcome:
        ran.append(case)
        return run(case)

    def libfuzzer(data: bytes, size: int) -> bytes:
        raw.append(data)
        return data

    mutator = Mutator(running)
    made = [case_bytes.decode(mutator.mutated(RACE, 4096, Rng(seed), libfuzzer)) for seed in range(60)]
    parent = case_bytes.decode(RACE)
    aimed = [case for case in made if case.vcpus == parent.vcpus and any(item.kind == RUN for item in case.schedule)]
    # Of 60 mutations about 18 are libFuzzer's, 21 aimed, 21 others; all 60 are decided by these seeds.
    assert len(raw) > 5 and len(aimed) > 5 and sum(case.vcpus != parent.vcpus for case in made) > 3
    # The parent ran once, however often it was mutated.
    assert ran == [parent]


def test_the_races_of_only_so_many_parents_are_remembered() -> None:
    mutator = Mutator(run)
    for seed in range(2 * MOST_PARENTS):
        mutator._aimed(b"%d" % seed, case_bytes.decode(RACE), Rng(1))
    assert len(mutator._races) == MOST_PARENTS


def test_the_dictionary_is_one_that_libfuzzer_reads() -> None:
    words = dictionary()
    assert len(words) == len(set(words)) and all(0 < len(word) <= 64 for word in words)
    assert dictionary_text([b"\x0f\x0bkvm"]) == '"\\x0F\\x0B\\x6B\\x76\\x6D"\n'


def atheris_script(path: Path, target: str) -> Path:
    """A harness whose target has this body."""
    pytest.importorskip("atheris")
    path.write_text(
        "import sys\n"
        "from mmufuzz.campaign.fuzz_target import fuzz, restart_with_preload\n"
        "from mmufuzz.campaign.harness import session\n"
        "restart_with_preload()\n"
        "work = session('toy', sys.argv[1:])\n"
        "def target(data):\n"
        "    work.recorder.share.executions += 1\n"
        f"    {target}\n"
        "fuzz(work, target, [b'word'])\n"
    )
    return path


def test_an_exception_in_a_target_is_70_with_the_input_kept_apart_from_the_findings(tmp_path: Path) -> None:
    script = atheris_script(tmp_path / "toy.py", "assert len(data) < 3, 'too long'")
    command = [sys.executable, str(script), "--time", "20s", "--findings", "findings", "--report", "report.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 70 and "too long" in done.stderr
    errors = tmp_path / "findings" / ERRORS
    (crash,) = [path for path in errors.iterdir() if path.suffix == ""]
    assert len(crash.read_bytes()) >= 3
    assert "too long" in crash.with_name(crash.name + ".txt").read_text()
    assert [path for path in (tmp_path / "findings").iterdir() if path.is_file()] == []


def test_a_crash_of_the_process_is_70_too(tmp_path: Path) -> None:
    script = atheris_script(tmp_path / "toy.py", "len(data) < 3 or __import__('os').abort()")
    command = [sys.executable, str(script), "--time", "20s", "--findings", "findings"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 70
    assert list((tmp_path / "findings" / ERRORS).glob("crash-*"))


def test_the_custom_mutator_is_in_use(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    command = [sys.executable, str(ROOT / "harnesses" / "atheris_cases.py"), "--cases", "150", "--seed", "1"]
    done = subprocess.run(
        [*command, "--findings", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    # A parent whose races are looked up runs without being a case.
    words = next(line for line in done.stdout.splitlines() if line.startswith("atheris_cases")).split()
    assert int(words[words.index("schedules") - 1]) > int(words[words.index("cases,") - 1]) >= 150


def test_an_error_of_mmufuzz_is_no_finding_about_kvm(tmp_path: Path) -> None:
    store = FindingStore(tmp_path, None)
    case = generate(Rng(1))
    record = store.add(case, case, Finding(HARNESS_ERROR, "KeyError in x", "boom", 0), {})
    assert Path(record.case).parent == tmp_path / ERRORS
    assert store.records == {} and list(store.errors) == ["KeyError in x"]
    assert store.again("KeyError in x")
    # A later campaign does not take it for something it saw before.
    assert FindingStore(tmp_path, None).seen == {}


def test_a_flood_of_fingerprints_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmufuzz.campaign.findings.MOST_RECORDS", 2)
    store = FindingStore(tmp_path, None)
    case = generate(Rng(1))
    for number in range(2):
        assert not store.again(f"f{number}")
        store.add(case, case, Finding("coherence", f"f{number}", "", 0), {})
    assert store.again("f2") and store.dropped == 1


def test_a_process_ends_when_the_one_it_works_for_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert not Stop().requested
    monkeypatch.setenv(PARENT, str(os.getppid() + 1))
    assert Stop().requested

