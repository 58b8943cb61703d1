"""The text of a litmus file, without its comments, and where in it something stands."""

from __future__ import annotations

from dataclasses import dataclass

from mmufuzz.case.error import CaseError


@dataclass(frozen=True)
class Source:
    """``text`` has blanks where comments were, so that offsets and lines are those of the file."""

    name: str
    text: str

    def error(self, offset: int, expected: str) -> CaseError:
        """The error that names the line of ``offset``."""
        return CaseError(f"{self.name}:{self.text.count(chr(10), 0, offset) + 1}", expected)


def quoted(text: str) -> str:
    """``text`` on one line and in quotes, shortened to what fits an error."""
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= 60 else f"'{line[:60]}...'"


def uncommented(name: str, text: str) -> Source:
    """``text`` with its comments, ``(* ... *)`` nested to any depth, blanked. Raises CaseError if one does not end."""
    result = []
    depth = 0
    opened = 0
    position = 0
    while position < len(text):
        pair = text[position : position + 2]
        if pair == "(*" or (depth and pair == "*)"):
            if depth == 0:
                opened = position
            depth += 1 if pair == "(*" else -1
            result.append("  ")
            position += 2
            continue
        character = text[position]
        result.append(character if not depth or character == "\n" else " ")
        position += 1
    if depth:
        raise Source(name, text).error(opened, "expected '*)' at the end of the comment that begins here")
    return Source(name, "".join(result))
