"""Machines that are not x86-TSO: store buffers and fences with one thing wrong, planted for the length of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

import mmufuzz.host.thread
from mmufuzz.host.memory import StoreBuffer
from mmufuzz.host.sched import Host
from mmufuzz.host.thread import Thread

interpreted = pytest.mark.skipif(
    not str(mmufuzz.host.thread.__file__).endswith(".py"), reason="the methods of a compiled class cannot be replaced"
)


def _drain_youngest(self: StoreBuffer, count: int) -> None:
    for _ in range(count):
        entry = self.pending.pop()
        self.memory.write(entry.address, entry.size, entry.value)


def _forward_nothing(self: StoreBuffer, address: int, size: int) -> int:
    return -1


def _fence_without_drain(self: Thread, site: int) -> None:
    self.host.point(site)


def _read_without_drain(self: Thread, site: int, address: int, size: int = 8) -> int:
    self.host.point(site)
    value = self.host.memory.read(address, size)
    self.observed(value)
    self.host.detail(self.last, address, value)
    return value


def _hold_nothing(self: Host, label: int) -> bool:
    return False


MUTANTS = {
    "lifo": (StoreBuffer, "drain", _drain_youngest),
    "no forwarding": (StoreBuffer, "forward", _forward_nothing),
    "weak fence": (Thread, "fence", _fence_without_drain),
    "weak lock": (Thread, "atomic_load", _read_without_drain),
    "no buffer": (Host, "may_hold", _hold_nothing),
}
"""The first three by the names that ``toy.model_outcomes`` gives them."""


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Everything that runs inside has the mutation."""
    owner, method, replacement = MUTANTS[name]
    with mock.patch.object(owner, method, replacement):
        yield
