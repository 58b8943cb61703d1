"""A core of two modules, compilers that misbehave, and a program that builds the one with the other.

    python toys.py COMPILER    builds it into the user's cache and prints the directory and the notes as JSON
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from mmufuzz.build.cache import Made, make
from mmufuzz.build.compilers import Compiler, cannot_generate, plain_compiler
from mmufuzz.build.core import COMPILED, Core

NEEDS_COMPILER = plain_compiler() is None or cannot_generate() != ""

ONE = """
def double(number: int) -> int:
    if number > 40:
        return number + number
    return 2 * number

def half(number: int) -> int:
    if number % 2:
        raise ValueError(number)
    return number // 2
"""
TWO = """
from toy.one import double, half

class Box:
    def __init__(self, held: int) -> None:
        self.held = held

def boxed(number: int) -> Box:
    return Box(double(number))

def quarter(number: int) -> int:
    return half(half(number))
"""


def toy(addition: str = "") -> Core:
    """The core; ``addition`` makes it another one."""
    return Core("toy", {"toy/one.py": (ONE + addition).encode(), "toy/two.py": TWO.encode()})


def compiler(command: str, kind: str = COMPILED) -> Compiler:
    """A compiler that is started by ``command``."""
    return Compiler(Path(command).name, kind, (command,), (command,), "1")


def script(path: Path, text: str) -> str:
    """A compiler that is a shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def logging_compiler(directory: Path) -> str:
    """The system's compiler, which notes each start in the file ``log``."""
    return script(directory / "logging-cc", f'echo "$$" >>{directory}/log\nexec {shutil.which("cc")} "$@" -O0')


def build(core: Core, *commands: str) -> Made:
    """Build ``core`` into the cache with the first of these compilers that can."""
    return make(core, [compiler(command) for command in commands], lambda step: None)


if __name__ == "__main__":
    made = build(toy(), *sys.argv[1:])
    print(json.dumps([str(made.directory), made.notes]))
