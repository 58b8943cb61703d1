"""Conditions of litmus tests: ``locations [...]`` and ``exists``, ``~exists`` or ``forall`` with a proposition."""

from __future__ import annotations

import re
from typing import Final

from mmufuzz.case.error import CaseError
from mmufuzz.litmus.model import (
    EXISTS,
    FORALL,
    NOT_EXISTS,
    Atom,
    Implies,
    Item,
    Joined,
    LitmusTest,
    Not,
    Prop,
    Shown,
    register,
)
from mmufuzz.litmus.source import Source, quoted

_TOKEN: Final = re.compile(r"\s*(/\\|\\/|=>|==|!=|-?\d\w*|[A-Za-z_]\w*|\S)", re.ASCII)
_NUMBER: Final = re.compile(r"-?(?:0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})", re.ASCII)


def number(text: str) -> int | None:
    """A decimal or 0x number of at most 20 or 16 digits, with an optional sign; else None."""
    return int(text, 0 if "x" in text.lower() else 10) if _NUMBER.fullmatch(text) else None


def fits(value: int, size: int) -> bool:
    """Whether ``size`` bytes hold ``value``, signed or unsigned."""
    return -(1 << 8 * size - 1) <= value < 1 << 8 * size


class ConditionParser:
    r"""Recursive descent. As in herd, ``=>`` binds tighter than ``/\``, and that tighter than ``\/``."""

    def __init__(self, source: Source, start: int, test: LitmusTest) -> None:
        self.source = source
        self.test = test
        self.tokens: list[tuple[str, int]] = []
        """Texts, each with its offset in the source."""
        for match in _TOKEN.finditer(source.text, start):
            self.tokens.append((match.group(1), match.start(1)))
        self.next = 0

    def parse(self) -> None:
        """Fill in the quantifier, the condition and the observed items of the test."""
        items = self._locations()
        self.test.quantifier = self._quantifier()
        self.test.condition = self._either()
        self._skip(";")
        if self._peek():
            raise self._error("the end of the condition")
        for item in _items(self.test.condition) + items:
            if item not in self.test.observed:
                self.test.observed.append(item)
        self.test.observed.sort(key=lambda item: (item.thread < 0, item))

    def _peek(self) -> str:
        return self.tokens[self.next][0] if self.next < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self.next += 1
        return token

    def _skip(self, token: str) -> bool:
        if self._peek() != token:
            return False
        self.next += 1
        return True

    def _error(self, expected: str) -> CaseError:
        offset = self.tokens[self.next][1] if self.next < len(self.tokens) else len(self.source.text.rstrip())
        found = quoted(self._peek()) if self._peek() else "the end of the file"
        return self.source.error(offset, f"expected {expected}, got {found}")

    def _locations(self) -> list[Item]:
        items: list[Item] = []
        if self._skip("locations"):
            if not self._skip("["):
                raise self._error("'[' after 'locations'")
            while not self._skip("]"):
                items.append(self._item())
                if not self._skip(";") and self._peek() != "]":
                    raise self._error("';' or ']' after a location")
        return items

    def _quantifier(self) -> str:
        if self._skip("~") or self._skip("not"):
            if self._skip("exists"):
                return NOT_EXISTS
        elif self._peek() in (EXISTS, FORALL):
            return self._take()
        raise self._error("'exists', '~exists' or 'forall'")

    def _either(self) -> Prop:
        parts = [self._both()]
        while self._skip("\\/"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else Joined("\\/", tuple(parts))

    def _both(self) -> Prop:
        parts = [self._implication()]
        while self._skip("/\\"):
            parts.append(self._implication())
        return parts[0] if len(parts) == 1 else Joined("/\\", tuple(parts))

    def _implication(self) -> Prop:
        left = self._single()
        return Implies(left, self._implication()) if self._skip("=>") else left

    def _single(self) -> Prop:
        if self._skip("~") or self._skip("not"):
            return Not(self._single())
        if self._skip("("):
            inner = self._either()
            if not self._skip(")"):
                raise self._error(r"')', '/\' or '\/'")
            return inner
        if self._skip("true"):
            return Joined("/\\", ())
        if self._skip("false"):
            return Joined("\\/", ())
        return self._comparison()

    def _comparison(self) -> Prop:
        item = self._item()
        operator = self._peek()
        if operator not in ("=", "==", "!="):
            raise self._error(f"'=' or '!=' after {item}")
        self.next += 1
        text = self._peek()
        value = number(text)
        if value is None:
            location = self.test.locations.get(text)
            if location is None:
                raise self._error("a number or the name of a location")
            value = location.address
        size = self.test.shown[item].size
        if not fits(value, size):
            raise self._error(f"a value that fits the {size} bytes of {item}")
        self.next += 1
        atom = Atom(item, value & (1 << 8 * size) - 1, text)
        return Not(atom) if operator == "!=" else atom

    def _item(self) -> Item:
        if self._skip("["):
            item = self._location()
            if not self._skip("]"):
                raise self._error("']' after the name of a location")
            return item
        token = self._peek()
        thread = number(token.removeprefix("P"))
        if thread is None:
            return self._location()
        if not 0 <= thread < len(self.test.threads):
            raise self._error(f"a thread in 0..{len(self.test.threads) - 1}")
        self.next += 1
        if not self._skip(":"):
            raise self._error("':' and a register after the number of a thread")
        self._skip("%")
        found = register(self._peek(), self.test.arch)
        if found is None:
            raise self._error(f"a register of {self.test.arch}")
        item = Item(thread, self._take())
        self.test.shown.setdefault(item, Shown(found.size, True))
        return item

    def _location(self) -> Item:
        location = self.test.locations.get(self._peek())
        if location is None:
            raise self._error("a location of the test, or a register such as 0:EAX")
        self.next += 1
        item = Item(-1, location.name)
        self.test.shown[item] = Shown(location.size or 4, location.signed)
        return item


def _items(prop: Prop) -> list[Item]:
    """The items that ``prop`` speaks of."""
    match prop:
        case Atom(item):
            return [item]
        case Not(inner):
            return _items(inner)
        case Joined(_, parts):
            return [item for part in parts for item in _items(part)]
        case Implies(left, right):
            return _items(left) + _items(right)
