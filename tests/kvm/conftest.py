"""Lets the tests of this folder import ``machines`` and the helpers of ``tests/x86``, and runs one test last."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for _folder in ("kvm", "x86"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order: ``test_kvm_marks`` asks what all other tests have reached."""
    items.sort(key=lambda item: "test_kvm_marks" in item.nodeid)
