"""Bad input gets one clear line on standard error, exit status 2, and never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_cases import Answer, small_case
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.campaign.corpus import load_file
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case import toml
from mmufuzz.case.error import CaseError
from mmufuzz.cli.main import main

Run = Callable[..., Answer]


def refused(answer: Answer, *words: str) -> None:
    """Exit status 2, and one line that has all of ``words``."""
    assert answer.status == 2, answer
    assert answer.out == ""
    assert answer.err.count("\n") == 1 and answer.err.startswith("mmufuzz"), answer.err
    for word in words:
        assert word in answer.err


def changed(old: str, new: str) -> str:
    """The TOML of the small Case with one thing changed."""
    text = toml.dumps(small_case())
    assert old in text
    return text.replace(old, new, 1)


MALFORMED = {
    "unknown key": (changed('kernel = "v6.12"', 'kernel = "v6.12"\ncolour = "red"'), "colour"),
    "wrong type": (changed("cr3 = 0x10", 'cr3 = "root"'), "cr3"),
    "register out of range": (changed("rax = 0x7", "r16 = 0x7"), "r16"),
    "overlapping slots": (
        changed(
            "{ base_gfn = 0x0, npages = 64 },", "{ base_gfn = 0x0, npages = 64 },\n  { base_gfn = 0x8, npages = 8 },"
        ),
        "slot",
    ),
    "unknown fix": (changed('kernel = "v6.12"', 'kernel = "v6.12"\nrevert = ["no-such-fix"]'), "no-such-fix"),
    "unknown kernel": (changed('kernel = "v6.12"', 'kernel = "v5.99"'), "v5.99"),
    "not TOML": ("kernel = = 3\n", "TOML"),
    "an empty file": ("", "format"),
    "another version": (changed("format = 1", "format = 99"), "format"),
}


@pytest.mark.parametrize("text, word", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_toml_is_refused_with_file_and_key(mmufuzz: Run, tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    refused(mmufuzz("replay", path), "bad.toml", word)


@pytest.mark.parametrize("verb", ["replay", "explain", "explore", "reduce"])
def test_every_verb_that_reads_a_case_refuses_a_missing_file(mmufuzz: Run, verb: str) -> None:
    refused(mmufuzz(verb, "nowhere.toml"), "nowhere.toml")


def test_truncated_bytes_are_refused(mmufuzz: Run, tmp_path: Path) -> None:
    path = tmp_path / "cut.case"
    path.write_bytes(case_bytes.encode(small_case())[:-30])
    refused(mmufuzz("replay", path), "cut.case")


def test_bytes_of_another_version_are_refused(mmufuzz: Run, tmp_path: Path) -> None:
    data = bytearray(case_bytes.encode(small_case()))
    data[4] = 0xEE
    path = tmp_path / "future.case"
    path.write_bytes(data)
    refused(mmufuzz("replay", path), "future.case", "version")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.sampled_from(["random.case", "random.toml"]))
def test_random_bytes_are_refused_with_the_one_error_there_is(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    with pytest.raises(CaseError) as caught:
        load_file(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_without_cases_is_refused(mmufuzz: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(mmufuzz("replay", tmp_path / "empty"), "empty")


def test_a_malformed_file_is_told_before_any_other_is_run(mmufuzz: Run, tmp_path: Path, healthy: Path) -> None:
    (tmp_path / "zz.toml").write_text("format = 99\n")
    refused(mmufuzz("replay", tmp_path), "zz.toml")


@pytest.mark.parametrize("option", ["--findings", "--corpus"])
def test_a_directory_that_cannot_be_written_is_refused_before_the_campaign(
    mmufuzz: Run, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    answer = mmufuzz("fuzz", "--cases", 1, "--engine", "random", option, tmp_path / "file" / "sub")
    refused(answer, "file/sub", "writable")


def test_a_json_file_that_cannot_be_written_is_refused_before_the_campaign(mmufuzz: Run, tmp_path: Path) -> None:
    answer = mmufuzz("fuzz", "--time", "1h", "--json", tmp_path / "nowhere" / "out.json")
    refused(answer, "out.json")


@pytest.mark.parametrize("option", ["--revert", "--apply"])
@pytest.mark.parametrize(
    "verb", [("fuzz", "--cases", "1"), ("replay", "x.toml"), ("explore", "x.toml")], ids=lambda v: v[0]
)
def test_an_unknown_fix_is_refused(mmufuzz: Run, verb: tuple[str, ...], option: str) -> None:
    refused(mmufuzz(*verb, option, "no-such-fix"), "no-such-fix", "mmufuzz fixes")


def test_an_unknown_kernel_is_refused_with_those_there_are(mmufuzz: Run) -> None:
    refused(mmufuzz("fuzz", "--cases", 1, "--kernel", "v5.99"), "v5.99", "v6.12")


def test_showing_an_unknown_fix_is_refused(mmufuzz: Run) -> None:
    refused(mmufuzz("fixes", "show", "nonsense"), "nonsense")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["fuzz", "--time", "soon"],
        ["fuzz", "--time", "0s"],
        ["fuzz", "--time", "-3s"],
        ["fuzz", "--cases", "0"],
        ["fuzz", "--cases", "many"],
        ["fuzz", "--time", "1s", "--cases", "1"],
        ["fuzz", "--engine", "magic"],
        ["fuzz", "--harness", "none"],
        ["fuzz", "--seed", "-1"],
        ["fuzz", "--jobs", "0"],
        ["replay"],
        ["explore", "x.toml", "--bound", "-1"],
        ["corpus", "eat"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_status_2(mmufuzz: Run, arguments: list[str]) -> None:
    refused(mmufuzz(*arguments), "--help")


def test_a_harness_that_the_engine_cannot_run_is_refused(mmufuzz: Run) -> None:
    refused(mmufuzz("fuzz", "--engine", "random", "--harness", "state_machine"), "hypothesis")


def test_reducing_a_case_without_a_finding_is_refused(mmufuzz: Run, healthy: Path) -> None:
    refused(mmufuzz("reduce", healthy), "healthy.toml", "finding")


def test_opcodes_of_a_corpus_that_is_not_there_is_refused(mmufuzz: Run, tmp_path: Path) -> None:
    refused(mmufuzz("corpus", "opcodes", tmp_path / "none"), "none")


def test_help_is_not_an_error() -> None:
    assert main(["--help"]) == 0


def test_a_merge_needs_something_to_read_and_somewhere_to_write(mmufuzz: Run, tmp_path: Path, healthy: Path) -> None:
    refused(mmufuzz("corpus", "merge", healthy), "-o DIR")
    refused(mmufuzz("corpus", "merge", "-o", tmp_path / "out"), "PATH")
    refused(mmufuzz("corpus", "stats", healthy, "-o", tmp_path / "out"), "merge")
    (tmp_path / "bad.toml").write_text("format = 99\n")
    refused(mmufuzz("corpus", "merge", healthy, tmp_path / "bad.toml", "-o", tmp_path / "out"), "bad.toml")
    assert not (tmp_path / "out").exists()
