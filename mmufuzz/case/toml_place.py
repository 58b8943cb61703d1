"""Where in a TOML text a key stands, for error messages: ``tomllib`` keeps no positions."""

from __future__ import annotations


def line_of(text: str, path: str) -> int:
    """The line, from 1, of what ``path`` names ("vcpu[1].program[3]"); 0 if it cannot be told.

    Exact for the layout that ``dumps`` writes; an element of an array on one line has the line of its key.
    """
    lines = text.split("\n")
    parts = path.split(".")
    head, number = _split(parts[0])
    first = _find_header(lines, head, max(number, 0))
    if first < 0:
        first = 0
        end = _next_header(lines, 0)
    else:
        end = _next_header(lines, first + 1)
        first += 1
        if len(parts) == 1:
            return first
        head, number = _split(parts[1])
    key = _find_key(lines, first, end, head)
    if key < 0:
        # The key is missing: its table is the nearest place.
        return first
    return (key if number < 0 else _element(lines, key, number)) + 1


def _split(part: str) -> tuple[str, int]:
    """A name and the index behind it, or -1."""
    name, bracket, rest = part.partition("[")
    digits = rest.partition("]")[0]
    return name, int(digits) if bracket and digits.isdigit() else -1


def _find_header(lines: list[str], name: str, number: int) -> int:
    for index in range(len(lines)):
        if lines[index].partition("#")[0].strip() in (f"[{name}]", f"[[{name}]]"):
            if number == 0:
                return index
            number -= 1
    return -1


def _next_header(lines: list[str], start: int) -> int:
    for index in range(start, len(lines)):
        line = lines[index].partition("#")[0].strip()
        # An array's own brackets never hold a bare name alone on a line.
        if line.startswith("[") and line.endswith("]") and line.strip("[]").isidentifier():
            return index
    return len(lines)


def _find_key(lines: list[str], start: int, end: int, key: str) -> int:
    for index in range(start, end):
        name, equals, _ = lines[index].partition("=")
        if equals and name.strip().strip("\"'") == key:
            return index
    return -1


def _element(lines: list[str], key: int, number: int) -> int:
    """The line of an element of the array that starts at line ``key``, if it has one element a line."""
    if lines[key].partition("=")[2].partition("#")[0].strip() != "[":
        return key
    for index in range(key + 1, len(lines)):
        line = lines[index].strip()
        if line.startswith("]"):
            break
        if line == "" or line.startswith("#"):
            continue
        if number == 0:
            return index
        number -= 1
    return key
