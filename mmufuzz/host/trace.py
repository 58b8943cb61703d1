"""What happened in a run, in order.

A run makes hundreds of entries and most of them are never looked at, so they are kept as plain numbers: text and tuples
are made for those who ask.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import BOOT

NOTE: Final = -1
"""In a trace, the place of a label: the entry is a note, its second field an index into ``notes``."""

WIDTH: Final = 3
"""Numbers per entry in ``Trace.flat``."""


class Trace:
    """An entry is three numbers: label, address, value of a visible operation; ``NOTE``, index, thread of a note."""

    def __init__(self) -> None:
        self._flat: list[int] = []
        self._open = BOOT
        """Label of the last entry while only its label is in ``_flat``, else BOOT."""
        self._texts: list[str] = []
        self._numbers: list[int] = []
        """Two for each of ``_texts``."""

    def __len__(self) -> int:
        """Entries so far."""
        return len(self.flat()) // WIDTH

    def flat(self) -> list[int]:
        """All entries, ``WIDTH`` numbers each, in one list."""
        if self._open != BOOT:
            self._complete(0, 0)
        return self._flat

    def event(self, label: int) -> None:
        """Add a visible operation that has accessed nothing yet."""
        if self._open != BOOT:
            self._complete(0, 0)
        self._flat.append(label)
        self._open = label

    def detail(self, label: int, address: int, value: int) -> None:
        """What the last entry accessed, if it is ``label`` and nothing is known of it yet."""
        if self._open == label:
            self._complete(address, value)

    def note(self, thread: int, text: str, first: int, second: int) -> None:
        """Add a line about what ``thread`` did: ``text``, a format of the two numbers."""
        flat = self.flat()
        flat.append(NOTE)
        flat.append(len(self._texts))
        flat.append(thread)
        self._texts.append(text)
        self._numbers.append(first)
        self._numbers.append(second)

    def entries(self) -> list[tuple[int, int, int]]:
        """(label, address, value) by visible operation; (NOTE, index into ``notes``, thread) by note."""
        flat = self.flat()
        made: list[tuple[int, int, int]] = []
        for at in range(0, len(flat), WIDTH):
            made.append((flat[at], flat[at + 1], flat[at + 2]))
        return made

    def notes(self) -> list[str]:
        """The notes as text."""
        made: list[str] = []
        for index in range(len(self._texts)):
            made.append(self._texts[index].format(self._numbers[2 * index], self._numbers[2 * index + 1]))
        return made

    def _complete(self, address: int, value: int) -> None:
        self._flat.append(address)
        self._flat.append(value)
        self._open = BOOT
