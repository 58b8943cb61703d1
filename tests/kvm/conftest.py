"""Lets the tests of this folder import ``machines``, and runs the test that looks back on all of them last."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order: ``test_kvm_marks`` asks what all other tests have reached."""
    items.sort(key=lambda item: "test_kvm_marks" in item.nodeid)
