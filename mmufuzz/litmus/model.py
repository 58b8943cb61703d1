"""A litmus test, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

X86: Final = "X86"
X86_64: Final = "X86_64"

EXISTS: Final = "exists"
NOT_EXISTS: Final = "~exists"
FORALL: Final = "forall"
KINDS: Final = {EXISTS: "Allowed", NOT_EXISTS: "Forbidden", FORALL: "Required"}
"""By quantifier, the kind of test that herd prints."""

DATA: Final = 0x30000
"""gva of the first location, and its gpa."""
SPACING: Final = 64
"""Bytes from one location to the next."""
MAX_LOCATIONS: Final = 32


@dataclass
class Location:
    """A variable in memory. ``size`` is 0 until a declaration or the first access tells it."""

    name: str
    index: int
    size: int = 0
    signed: bool = True
    initial: int = 0
    place: str = ""
    """File and line of the initial value."""

    @property
    def address(self) -> int:
        """Where it lies."""
        return DATA + SPACING * self.index

    @property
    def bit(self) -> int:
        """As a mask for ``search.order_strategy``."""
        return 1 << self.index


@dataclass(frozen=True)
class Register:
    """A general-purpose register, or its low ``size`` bytes; ``number`` is that of the encoding."""

    number: int
    size: int


@dataclass(frozen=True, order=True)
class Item:
    """What a condition speaks of: a register of a thread, or with ``thread`` -1 a location."""

    thread: int
    name: str

    def __str__(self) -> str:
        return f"[{self.name}]" if self.thread < 0 else f"{self.thread}:{self.name}"


@dataclass(frozen=True)
class Shown:
    """How an item's value is read and printed."""

    size: int
    signed: bool


@dataclass(frozen=True)
class Insn:
    """One instruction: for the assembler, and what it does to memory (a kind of ``search.order_strategy``)."""

    text: str
    kind: int
    location: int = 0
    """Bit mask."""


@dataclass
class Thread:
    """The program of one thread; ``registers`` are initial values by number."""

    registers: dict[int, int] = field(default_factory=dict)
    program: list[Insn] = field(default_factory=list)


# Propositions. ``values`` are unsigned and cut to the size of their items.


@dataclass(frozen=True)
class Atom:
    """``item`` has the value ``value``, which is printed as ``text``."""

    item: Item
    value: int
    text: str

    def holds(self, values: dict[Item, int]) -> bool:
        """Whether it is true of a final state."""
        return values[self.item] == self.value

    def __str__(self) -> str:
        return f"{self.item}={self.text}"


@dataclass(frozen=True)
class Not:
    """Negation."""

    inner: Prop

    def holds(self, values: dict[Item, int]) -> bool:
        """Whether it is true of a final state."""
        return not self.inner.holds(values)

    def __str__(self) -> str:
        return f"not ({self.inner})"


@dataclass(frozen=True)
class Joined:
    r"""Two or more propositions under ``/\`` or ``\/``, or none: true and false."""

    operator: str
    parts: tuple[Prop, ...]

    def holds(self, values: dict[Item, int]) -> bool:
        """Whether it is true of a final state."""
        if self.operator == "/\\":
            return all(part.holds(values) for part in self.parts)
        return any(part.holds(values) for part in self.parts)

    def __str__(self) -> str:
        if not self.parts:
            return "true" if self.operator == "/\\" else "false"
        inner = []
        for part in self.parts:
            composed = isinstance(part, Implies) or (isinstance(part, Joined) and part.parts)
            inner.append(f"({part})" if composed else str(part))
        return f" {self.operator} ".join(inner)


@dataclass(frozen=True)
class Implies:
    """Implication."""

    left: Prop
    right: Prop

    def holds(self, values: dict[Item, int]) -> bool:
        """Whether it is true of a final state."""
        return not self.left.holds(values) or self.right.holds(values)

    def __str__(self) -> str:
        return f"({self.left}) => ({self.right})"


Prop = Atom | Not | Joined | Implies


@dataclass
class LitmusTest:
    """``observed``: the items of the condition and of the ``locations`` line, registers first."""

    arch: str
    name: str
    locations: dict[str, Location] = field(default_factory=dict)
    threads: list[Thread] = field(default_factory=list)
    shown: dict[Item, Shown] = field(default_factory=dict)
    quantifier: str = EXISTS
    condition: Prop = Joined("/\\", ())
    observed: list[Item] = field(default_factory=list)


_LEGACY: Final = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


def _registers() -> dict[str, Register]:
    table = {}
    for number, name in enumerate(_LEGACY):
        table["r" + name] = Register(number, 8)
        table["e" + name] = Register(number, 4)
        table[name] = Register(number, 2)
        table[name[0] + "l" if number < 4 else name + "l"] = Register(number, 1)
    for number in range(8, 16):
        for suffix, size in (("", 8), ("d", 4), ("w", 2), ("b", 1)):
            table[f"r{number}{suffix}"] = Register(number, size)
    return table


_REGISTERS: Final = _registers()


def register(name: str, arch: str) -> Register | None:
    """The register that ``name`` (in either case) names in code for ``arch``."""
    found = _REGISTERS.get(name.lower())
    if found is not None and arch == X86:
        if found.size == 8 or found.number >= 8 or (found.size == 1 and found.number >= 4):
            return None
    return found
