"""What the verbs answer: exit statuses and JSON are a contract."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cli_cases import Answer, livelock_case, racing_case

from mmufuzz.campaign import running
from mmufuzz.case import toml
from mmufuzz.case.model import Case
from mmufuzz.cli import replay as replay_verb
from mmufuzz.cli.output import Output, encodable
from mmufuzz.kvm.fixes import FIXES

CORPUS = Path(__file__).resolve().parents[2] / "corpus"

Run = Callable[..., Answer]
Write = Callable[[Case, str], Path]


def test_replay_of_a_case_whose_expectation_holds_is_0(mmufuzz: Run, healthy: Path, broken: Path) -> None:
    answer = mmufuzz("replay", healthy, broken, "--json", "-")
    assert answer.status == 0
    assert [row["ok"] for row in answer.json] == [True, True]
    assert [row["verdict"] for row in answer.json] == ["ok", "finding"]
    assert all(len(row["digest"]) == 64 and row["case"] for row in answer.json)


def test_replay_of_a_case_whose_expectation_fails_is_1_and_says_which(mmufuzz: Run, broken: Path) -> None:
    answer = mmufuzz("replay", broken, "--apply", "retry-guard")
    assert answer.status == 1
    assert "expected the verdict finding, got ok" in answer.out


def test_replay_wants_every_mark_to_be_reached(mmufuzz: Run, healthy: Path) -> None:
    healthy.write_text(healthy.read_text() + 'reach = ["track_write.flooding"]\n')
    answer = mmufuzz("replay", healthy)
    assert answer.status == 1
    assert "expected to reach track_write.flooding" in answer.out


def test_replay_many_times_compares_digests(mmufuzz: Run, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mmufuzz("replay", broken, "--times", 5).status == 0
    drift = iter(range(100))

    def drifting(case: Case) -> object:
        outcome = running.safe_run(case)
        outcome.guest = str(next(drift))
        return outcome

    monkeypatch.setattr(replay_verb, "safe_run", drifting)
    answer = mmufuzz("replay", broken, "--times", 2)
    assert answer.status == 1
    assert "digest" in answer.out


def test_explore_of_a_healthy_case_is_complete_and_0(mmufuzz: Run, write: Write) -> None:
    answer = mmufuzz("explore", write(racing_case(), "race.toml"), "--bound", 1, "--json", "-")
    assert answer.status == 0
    assert answer.json["verdict"] == "complete"
    assert answer.json["schedules"] > 1 and answer.json["outcomes"] >= 1 and answer.json["seconds"] >= 0


def test_explore_that_hits_a_limit_is_3(mmufuzz: Run, write: Write) -> None:
    answer = mmufuzz("explore", write(racing_case(), "race.toml"), "--schedules", 2, "--json", "-")
    assert answer.status == 3
    assert answer.json["verdict"] == "incomplete"
    assert answer.json["schedules"] == 2


def test_explore_that_finds_something_is_1_and_writes_the_witness(mmufuzz: Run, broken: Path, tmp_path: Path) -> None:
    answer = mmufuzz("explore", broken, "-o", tmp_path / "witness.toml", "--json", "-")
    assert answer.status == 1
    assert answer.json["verdict"] == "finding" and answer.json["finding"]["kind"] == "livelock"
    assert mmufuzz("replay", tmp_path / "witness.toml").status == 0


def test_reduce_writes_a_smaller_case_with_the_same_finding(mmufuzz: Run, write: Write, tmp_path: Path) -> None:
    case = livelock_case()
    (vcpu,) = case.vcpus
    padded = replace(case, vcpus=(replace(vcpu, program=(b"\x90", *vcpu.program, b"\x90")),))
    answer = mmufuzz("reduce", write(padded, "long.toml"), "-o", tmp_path / "short.toml", "--json", "-")
    assert answer.status == 0
    assert answer.json["before"]["instructions"] == 3 and answer.json["after"]["instructions"] == 1
    assert toml.load(tmp_path / "short.toml").expect.fingerprint == answer.json["fingerprint"]
    assert mmufuzz("replay", tmp_path / "short.toml", "--times", 3).status == 0


def test_explain_shows_program_and_table(mmufuzz: Run, broken: Path) -> None:
    answer = mmufuzz("explain", broken)
    assert answer.status == 0
    assert "without retry-guard" in answer.out
    assert "movss" in answer.out
    assert "one period" in answer.out


def test_fixes_lists_every_fix_with_its_fields(mmufuzz: Run) -> None:
    answer = mmufuzz("fixes", "--json", "-")
    assert answer.status == 0
    assert [row["id"] for row in answer.json] == [fix.id for fix in FIXES]
    assert {"id", "title", "commit", "kernel", "kernels", "shows", "zoo", "citation"} <= set(answer.json[0])


def test_fixes_show_takes_an_id_or_an_entry_of_the_zoo(mmufuzz: Run) -> None:
    by_id = mmufuzz("fixes", "show", "track-write-barrier", "--json", "-")
    assert by_id.status == 0
    assert by_id.json[0]["shows"] == "coherence"
    assert mmufuzz("fixes", "show", by_id.json[0]["zoo"], "--json", "-").json == by_id.json


def test_corpus_stats_counts(mmufuzz: Run, healthy: Path, broken: Path, tmp_path: Path) -> None:
    answer = mmufuzz("corpus", "stats", tmp_path, "--json", "-")
    assert answer.status == 0
    assert (answer.json["files"], answer.json["expect_ok"], answer.json["expect_finding"]) == (2, 1, 1)


def test_corpus_verify_reports_what_is_not_in_order(mmufuzz: Run, healthy: Path, tmp_path: Path) -> None:
    assert mmufuzz("corpus", "verify", tmp_path).status == 0
    (tmp_path / "bad.toml").write_text("format = 99\n")
    answer = mmufuzz("corpus", "verify", tmp_path, "--json", "-")
    assert answer.status == 1
    assert {row["verdict"] for row in answer.json} == {"ok", "malformed"}


def test_corpus_opcodes_counts_entries_and_names_the_missing_ones(mmufuzz: Run, tmp_path: Path) -> None:
    assert mmufuzz("corpus", "opcodes", CORPUS / "seeds" / "atheris_insn").status == 0
    (tmp_path / "one").write_bytes(bytes(4) + b"\x90")
    answer = mmufuzz("corpus", "opcodes", tmp_path, "--json", "-")
    assert answer.status == 1
    mode = answer.json["modes"]["64-bit"]
    assert (answer.json["inputs"], mode["executed"], mode["retired"]) == (1, 1, 1)
    assert "0F A2 cpuid" in mode["missing"] and "90 nop" not in mode["missing"]


def test_corpus_opcodes_names_the_file_that_it_cannot_read(mmufuzz: Run, tmp_path: Path) -> None:
    (tmp_path / "inputs" / "inner").mkdir(parents=True)
    answer = mmufuzz("corpus", "opcodes", tmp_path / "inputs")
    assert answer.status == 2
    assert answer.err.startswith(f"mmufuzz corpus: {tmp_path / 'inputs' / 'inner'}: expected a readable file")


def test_doctor_finds_the_bug_it_plants(mmufuzz: Run) -> None:
    answer = mmufuzz("doctor", "--json", "-")
    assert answer.status == 0
    assert answer.json["verdict"] == "ok"
    assert answer.json["planted"]["found"] and answer.json["planted"]["seconds"] < 10
    assert answer.json["packages"]["greenlet"]


def test_an_internal_error_is_70_with_a_report_and_no_traceback(
    mmufuzz: Run, healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(case: Case) -> object:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(replay_verb, "safe_run", fail)
    answer = mmufuzz("replay", healthy)
    assert answer.status == 70
    assert answer.err.count("\n") == 1 and "Traceback" not in answer.err
    report = Path(answer.err.rsplit("report: ", 1)[1].strip())
    try:
        assert "a bug of ours" in report.read_text() and "Traceback" in report.read_text()
    finally:
        report.unlink()


def test_json_is_written_to_a_file_in_one_step(mmufuzz: Run, healthy: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    answer = mmufuzz("replay", healthy, "--json", target)
    assert answer.status == 0 and "1 replayed" in answer.out
    assert json.loads(target.read_text())[0]["ok"]
    assert list(tmp_path.glob(".out*")) == []


def test_a_reader_that_goes_away_changes_neither_status_nor_stderr(healthy: Path) -> None:
    # A pipe with nobody at the other end: every write to it fails with EPIPE.
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mmufuzz.cli.main", "replay", str(healthy)],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.returncode == 0
    assert done.stderr == ""


def test_text_degrades_to_what_the_stream_can_encode() -> None:
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert encodable("▶ a → b …", ascii_stream) == "> a -> b ..."
    assert encodable("▶ a", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == "▶ a"


def test_with_json_on_standard_output_the_text_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("-")
    output.line("for people")
    output.json({"for": "programs"})
    captured = capsys.readouterr()
    assert captured.err == "for people\n"
    assert json.loads(captured.out) == {"for": "programs"}


def test_corpus_merge_writes_the_cases_that_are_needed(
    mmufuzz: Run, tmp_path: Path, healthy: Path, broken: Path
) -> None:
    answer = mmufuzz("corpus", "merge", healthy, broken, healthy, "-o", tmp_path / "small", "--json", "-")
    assert answer.status == 0
    assert answer.json["read"] == 2 and answer.json["kept"] == len(list((tmp_path / "small").glob("*.case")))
    assert mmufuzz("corpus", "stats", tmp_path / "small").status == 0
