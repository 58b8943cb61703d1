"""Merging into a minimal corpus, libFuzzer's files, and temporary files that are never taken for input."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.campaign.budget import Budget
from mmufuzz.campaign.corpus import Corpus, files, load_directory, load_harness_cases
from mmufuzz.campaign.engine_atheris import case_reach, minimize
from mmufuzz.campaign.files import sweep
from mmufuzz.campaign.insn_counters import reach as insn_reach
from mmufuzz.campaign.kernel import Kernel
from mmufuzz.campaign.minimal import Unit, merge, minimal, reach
from mmufuzz.campaign.units import load_units, remove_torn, take_over
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case import toml
from mmufuzz.case.generate import generate
from mmufuzz.case.model import Case
from mmufuzz.case.rng import Rng

CASES = [generate(Rng(number)) for number in range(12)]

UNITS = st.lists(
    st.builds(Unit, st.binary(min_size=1, max_size=6), st.sets(st.integers(0, 8), min_size=1).map(sorted)),
    unique_by=lambda unit: unit.data,
    max_size=12,
)


def reached(units: list[Unit]) -> set[int]:
    """What they reach together."""
    return {item for unit in units for item in unit.reaches}


def minimal_of(units: list[Unit]) -> list[Unit]:
    """The minimal corpus of units whose reach is known."""
    reaches = {unit.data: unit.reaches for unit in units}
    return minimal([unit.data for unit in units], reaches.__getitem__)


def unit_of(case: Case) -> Unit:
    """``case``, run once."""
    data = case_bytes.encode(case)
    return Unit(data, reach(data))


@settings(derandomize=True, deadline=None)
@given(UNITS)
def test_a_minimal_corpus_reaches_all_and_none_of_it_can_be_left_out(units: list[Unit]) -> None:
    kept = minimal_of(units)
    assert reached(kept) == reached(units)
    for unit in kept:
        assert reached([other for other in kept if other is not unit]) != reached(units)


@settings(derandomize=True, deadline=None)
@given(UNITS, st.randoms(use_true_random=False))
def test_the_order_of_the_corpus_does_not_matter(units: list[Unit], random: object) -> None:
    shuffled = units[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert minimal_of(shuffled) == minimal_of(units)


def test_of_two_that_reach_the_same_the_smaller_wins() -> None:
    small, big = Unit(b"a", [1, 2]), Unit(b"bb", [1, 2])
    assert minimal_of([big, small]) == [small]
    parts = [Unit(b"a", [1]), Unit(b"b", [2]), Unit(b"ccc", [1, 2, 3])]
    assert minimal_of(parts) == parts[2:]


def merged(paths: list[Path], out: Path) -> list[str]:
    """Names in ``out`` after a merge."""
    merge(paths, out, lambda number: None)
    return sorted(path.name for path in out.iterdir())


def test_a_merge_reads_every_form_and_writes_a_corpus_that_reaches_the_same(tmp_path: Path) -> None:
    (tmp_path / "in" / "raw").mkdir(parents=True)
    for number, case in enumerate(CASES):
        data = case_bytes.encode(case)
        if number % 3 == 0:
            (tmp_path / "in" / f"{number}.toml").write_text(toml.dumps(case))
        elif number % 3 == 1:
            (tmp_path / "in" / f"{number}.case").write_bytes(data)
        else:
            (tmp_path / "in" / "raw" / hashlib.sha1(data).hexdigest()).write_bytes(data)
    names = merged([tmp_path / "in"], tmp_path / "out")
    assert 0 < len(names) <= len(CASES)
    assert reached([unit_of(case) for case in load_directory(tmp_path / "out")]) == reached(list(map(unit_of, CASES)))
    # Once more changes nothing, wherever it is written.
    assert merged([tmp_path / "out"], tmp_path / "out") == names
    assert merged([tmp_path / "out"], tmp_path / "again") == names


def test_a_merge_into_a_corpus_removes_what_is_no_longer_needed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for case in CASES:
        (out / unit_of(case).name).write_bytes(case_bytes.encode(case))
    (out / "notes.txt").write_text("kept")
    everything = reached(list(map(unit_of, CASES)))
    names = merged([out], out)
    assert "notes.txt" in names and len(names) - 1 == len(minimal_of(list(map(unit_of, CASES))))
    assert reached([unit_of(case) for case in load_directory(out)]) == everything


def raw_corpus(directory: Path, cases: list[Case]) -> list[Path]:
    """``cases`` as libFuzzer would have saved them."""
    directory.mkdir()
    paths = []
    for case in cases:
        data = case_bytes.encode(case)
        paths.append(directory / hashlib.sha1(data).hexdigest())
        paths[-1].write_bytes(data)
    return paths


def test_an_atheris_corpus_is_merged_in_place_unless_there_is_no_time(tmp_path: Path) -> None:
    raw_corpus(tmp_path / "raw", CASES)
    before = reached(list(map(unit_of, load_harness_cases(tmp_path / "raw"))))
    assert minimize(tmp_path / "raw", case_reach(Kernel()), Budget(1e-9), lambda: False) == 0
    removed = minimize(tmp_path / "raw", case_reach(Kernel()), Budget(), lambda: False)
    left = load_harness_cases(tmp_path / "raw")
    assert removed == len(CASES) - len(left) > 0
    assert reached(list(map(unit_of, left))) == before


def test_the_corpus_of_the_instruction_harness_is_merged_by_what_its_inputs_execute(tmp_path: Path) -> None:
    codes = (b"\x90", b"\x90\x90", b"\xf4", b"\x90\xf4")
    inputs = [bytes((mode, 0, 0, 0)) + code for mode in range(3) for code in codes]
    own = tmp_path / "atheris_insn"
    own.mkdir()
    for data in inputs:
        (own / hashlib.sha1(data).hexdigest()).write_bytes(data)
    before = {item for data in inputs for item in insn_reach(data)}
    assert before
    assert minimize(own, insn_reach, Budget(), lambda: False) > 0
    left = [path.read_bytes() for path in own.iterdir()]
    assert {item for data in left for item in insn_reach(data)} == before
    assert all(len(data) == 5 for data in left)


def test_a_torn_file_of_libfuzzer_is_no_input_and_goes_before_it_starts_again(tmp_path: Path) -> None:
    whole, torn, empty = raw_corpus(tmp_path / "raw", CASES[:3])
    torn.write_bytes(torn.read_bytes()[:-5])
    empty.write_bytes(b"")
    assert [path for path, _ in load_units(tmp_path / "raw")] == [whole]
    assert len(load_harness_cases(tmp_path / "raw")) == 1
    (tmp_path / "target").mkdir()
    assert take_over(tmp_path / "raw", tmp_path / "target") == 1
    assert [path.name for path in (tmp_path / "target").iterdir()] == [whole.name]
    assert remove_torn(tmp_path / "raw") == 2
    assert list((tmp_path / "raw").iterdir()) == [whole]


def test_temporary_files_are_no_input(tmp_path: Path) -> None:
    Corpus(tmp_path).keep(CASES[0])
    (kept,) = tmp_path.iterdir()
    (tmp_path / f".{kept.name}.{os.getpid()}.partial").write_bytes(kept.read_bytes()[:20])
    (tmp_path / ".probe.1234").write_bytes(b"")
    (tmp_path / ".half.case").write_bytes(b"MMUZ")
    (tmp_path / ".half.toml").write_text("format = ")
    assert len(load_directory(tmp_path)) == 1
    assert files(tmp_path) == [kept]


def test_temporary_files_of_the_dead_are_swept_those_of_the_living_stay(tmp_path: Path) -> None:
    number = int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))
    (tmp_path / "sub").mkdir()
    mine = tmp_path / f".a.case.{os.getpid()}.partial"
    for path in (mine, tmp_path / f".a.case.{number}.partial", tmp_path / "sub" / f".probe.{number}", tmp_path / ".x"):
        path.write_bytes(b"")
    assert sweep(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, ".x", "sub"])
    assert sweep(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("data", [b"", b"MMUZ", b"\xff" * 40])
def test_a_case_of_libfuzzer_s_may_be_any_bytes(data: bytes, tmp_path: Path) -> None:
    (tmp_path / hashlib.sha1(data).hexdigest()).write_bytes(data)
    assert load_harness_cases(tmp_path) == [case_bytes.decode(data)]
