"""``mmufuzz litmus``: what it prints, its exit statuses, its JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_cases import Answer

from mmufuzz.case import toml
from mmufuzz.case.model import Case
from mmufuzz.cli import litmus
from mmufuzz.litmus.check import Result, check
from mmufuzz.litmus.model import LitmusTest
from mmufuzz.outcome import HARNESS_ERROR, Finding
from mmufuzz.run import run

Run = Callable[..., Answer]

SB = r"""X86 SB
{ x=0; y=0; }
 P0          | P1          ;
 MOV [x],$1  | MOV [y],$1  ;
 MOV EAX,[y] | MOV EAX,[x] ;
exists (0:EAX=0 /\ 1:EAX=0)
"""


@pytest.fixture
def sb(tmp_path: Path) -> Path:
    path = tmp_path / "SB.litmus"
    path.write_text(SB)
    return path


@pytest.fixture
def forbidden(tmp_path: Path) -> Path:
    """The same with a condition that does not hold."""
    path = tmp_path / "forbidden.litmus"
    path.write_text(SB.replace("exists", "~exists"))
    return path


def test_a_test_whose_condition_holds_is_ok(mmufuzz: Run, sb: Path) -> None:
    answer = mmufuzz("litmus", sb)
    lines = answer.out.splitlines()
    assert answer.status == 0
    assert lines[:3] == ["Test SB Allowed", "States 4", "3     *>0:EAX=0; 1:EAX=0;"]
    assert lines[6:11] == [
        "Ok", "Witnesses", "Positive: 3 Negative: 11", r"Condition exists (0:EAX=0 /\ 1:EAX=0)",
        "Observation SB Sometimes 3 11",
    ]  # fmt: skip
    assert lines[11].startswith("Time SB ")
    assert answer.err == ""


def test_a_condition_that_does_not_hold_is_status_one_whatever_follows(mmufuzz: Run, sb: Path, forbidden: Path) -> None:
    answer = mmufuzz("litmus", forbidden, sb)
    assert answer.status == 1
    assert "No" in answer.out.splitlines()
    assert answer.out.count("Test SB") == 2


def test_a_limit_is_not_a_pass(mmufuzz: Run, sb: Path) -> None:
    answer = mmufuzz("litmus", "--schedules", 3, sb)
    assert answer.status == 3
    assert "Incomplete" in answer.out.splitlines()
    assert "Ok" not in answer.out.splitlines()


def test_a_directory_stands_for_the_tests_below_it(mmufuzz: Run, sb: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "MP.litmus").write_text(SB.replace("SB", "other"))
    (tmp_path / "notes.txt").write_text("not a test")
    answer = mmufuzz("litmus", tmp_path)
    assert [line for line in answer.out.splitlines() if line.startswith("Test")] == [
        "Test SB Allowed",
        "Test other Allowed",
    ]


def test_the_json_has_every_state(mmufuzz: Run, sb: Path) -> None:
    answer = mmufuzz("litmus", "--json", "-", sb)
    (row,) = answer.json
    assert (row["name"], row["kind"], row["verdict"], row["observation"]) == ("SB", "Allowed", "ok", "Sometimes")
    assert row["complete"] and row["finding"] is None
    assert row["states"][0] == {"state": "0:EAX=0; 1:EAX=0;", "schedules": 3, "holds": True}
    assert sum(state["schedules"] for state in row["states"]) == row["positive"] + row["negative"] == 14
    assert "Test SB Allowed" in answer.err


def test_the_witness_is_written_as_a_case(mmufuzz: Run, sb: Path, tmp_path: Path) -> None:
    target = tmp_path / "witnesses"
    answer = mmufuzz("litmus", "-o", target, sb)
    assert f"written to {target / 'SB'}.toml" in answer.out
    outcome = run(toml.load(target / "SB.toml"))
    assert [registers[0] for registers in outcome.registers] == [0, 0]
    assert mmufuzz("explain", target / "SB.toml").status == 0


def test_the_kernel_is_the_one_asked_for(mmufuzz: Run, sb: Path, tmp_path: Path) -> None:
    assert mmufuzz("litmus", "--kernel", "v6.1", "-o", tmp_path / "out", sb).status == 0
    assert toml.load(tmp_path / "out" / "SB.toml").kernel == "v6.1"


@pytest.mark.parametrize(
    "text, place",
    [
        ("AArch64 SB\n{ }\n", "1: expected 'X86 NAME'"),
        (SB.replace("MOV EAX,[y]", "JMP away"), "5: expected MOV, XCHG"),
        (SB.replace("1:EAX", "1:r99"), "6: expected a register of X86, got 'r99'"),
    ],
)
def test_bad_input_is_one_line_with_its_place(mmufuzz: Run, sb: Path, tmp_path: Path, text: str, place: str) -> None:
    bad = tmp_path / "bad.litmus"
    bad.write_text(text)
    answer = mmufuzz("litmus", sb, bad)
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith(f"mmufuzz litmus: {bad}:{place}")
    assert answer.err.count("\n") == 1


def test_what_cannot_be_read_is_refused(mmufuzz: Run, tmp_path: Path) -> None:
    (tmp_path / "latin.litmus").write_bytes(SB.encode() + b"(* \xe9 *)")
    (tmp_path / "huge.litmus").write_bytes(b" " * ((1 << 20) + 1))
    (tmp_path / "empty").mkdir()
    for name, word in (
        ("nowhere.litmus", "readable file"),
        ("latin.litmus", "latin.litmus:7: expected UTF-8"),
        ("huge.litmus", "at most 1048576 bytes"),
        ("empty", "a directory that holds some"),
    ):
        answer = mmufuzz("litmus", tmp_path / name)
        assert (answer.status, answer.out) == (2, "")
        assert name in answer.err and word in answer.err
        assert answer.err.count("\n") == 1


def finding_of(kind: str) -> Callable[..., Result]:
    def found(test: LitmusTest, dress: Callable[[Case], Case], should_stop: Callable[[int], bool]) -> Result:
        result = check(test, dress, lambda runs: True)
        result.finding = Finding(kind, "something is wrong", "", 0)
        result.internal = kind == HARNESS_ERROR
        return result

    return found


@pytest.mark.parametrize("kind, status", [("coherence", 1), (HARNESS_ERROR, 70)])
def test_a_finding_is_told(mmufuzz: Run, sb: Path, monkeypatch: pytest.MonkeyPatch, kind: str, status: int) -> None:
    monkeypatch.setattr(litmus, "check", finding_of(kind))
    answer = mmufuzz("litmus", sb)
    assert answer.status == status
    assert "finding: something is wrong" in answer.out
    assert "Finding" in answer.out.splitlines()
