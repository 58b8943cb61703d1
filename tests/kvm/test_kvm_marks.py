"""The named points of the model: every one is passed by some test of this folder, and no other name is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from machines import SEEN

from mmufuzz.kvm.marks import MARKS


def test_no_mark_has_two_entries() -> None:
    assert len(set(MARKS)) == len(MARKS)


def test_the_tests_of_this_folder_pass_every_mark_and_no_other(request: pytest.FixtureRequest) -> None:
    here = Path(__file__).parent
    collected = {item.path for item in request.session.items}
    if not set(here.glob("test_*.py")) <= collected:
        pytest.skip("only with all tests of the folder")
    assert set(SEEN) - set(MARKS) == set()
    assert set(MARKS) - set(SEEN) == set()
