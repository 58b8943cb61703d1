"""A test vector, in whatever format it was recorded."""

from __future__ import annotations

from dataclasses import dataclass, field


class VectorError(ValueError):
    """A file that is not in one of the formats: ``place`` and what was expected there."""


@dataclass
class State:
    """Registers by name, and bytes of memory by address."""

    regs: dict[str, int] = field(default_factory=dict)
    ram: dict[int, int] = field(default_factory=dict)
    masks: dict[str, int] = field(default_factory=dict)
    """Bits of registers that are defined."""


@dataclass
class Vector:
    """One test: run from ``initial`` to HLT, or over one instruction, and expect ``final``."""

    name: str
    mode: int = 16
    initial: State = field(default_factory=State)
    final: State = field(default_factory=State)
    flags_address: int = -1
    """Where an exception pushed the flags, of which some may be undefined."""
    unsupported: bool = False
    """The test is of an instruction that its reader does not know."""
