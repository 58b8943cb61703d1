"""The classic tests of x86-TSO have their published verdicts on the whole stack, and not on a broken machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_buffers import broken, interpreted

from mmufuzz.litmus.check import REFUTED, VALIDATED, Result, check
from mmufuzz.litmus.model import KINDS, LitmusTest
from mmufuzz.litmus.reader import read

CORPUS = Path(__file__).resolve().parents[2] / "corpus" / "litmus"
FILES = sorted(CORPUS.glob("*.litmus"))


def load(path: Path) -> LitmusTest:
    return read(path.name, path.read_text())


def checked(test: LitmusTest) -> Result:
    result = check(test, lambda case: case, lambda runs: False)
    assert result.finding is None
    assert result.complete
    return result


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_published_verdict_holds(path: Path) -> None:
    assert checked(load(path)).verdict == VALIDATED


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_comment_and_the_condition_say_the_same_verdict(path: Path) -> None:
    comment = path.read_text().split("(* ", 1)[1]
    assert comment.split(".", 1)[0] == KINDS[load(path).quantifier]


def test_there_are_tests_of_both_architectures_and_of_every_kind() -> None:
    tests = [load(path) for path in FILES]
    assert len(tests) >= 60
    assert {(test.arch, test.quantifier) for test in tests} >= {
        ("X86", "exists"), ("X86", "~exists"), ("X86", "forall"), ("X86_64", "exists"), ("X86_64", "~exists")
    }  # fmt: skip


CAUGHT = {
    "lifo": {"iwp2.1-amd1", "MP-64", "MP+sizes-64", "S", "2+2W", "CoWW", "R+po+mfence"},
    "no forwarding": {"iwp2.3.b", "iwp2.4-amd9", "n5", "n6", "n6-64", "CoWR"},
    "weak fence": {"amd5", "amd10", "SB+mfences-64", "R+po+mfence"},
    "weak lock": {"SB+lock-as-fence", "SB+xchg-as-fence", "MP+po-xchg+po", "2+2W+xchgs", "store+INC"},
    "no buffer": {"iwp2.3.a-amd4", "amd3", "n6", "n8", "R", "SB-64"},
}
"""Of the tests with at most two threads, some of those that each broken machine fails."""


@interpreted
@pytest.mark.parametrize("mutant", CAUGHT)
def test_a_broken_machine_is_caught_by_at_least_four_tests(mutant: str) -> None:
    caught = set()
    for path in FILES:
        test = load(path)
        if len(test.threads) <= 2:
            with broken(mutant):
                if checked(test).verdict == REFUTED:
                    caught.add(path.stem)
    assert caught >= CAUGHT[mutant]
    assert len(caught) >= 4
