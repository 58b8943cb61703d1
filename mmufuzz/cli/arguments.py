"""Arguments that verbs share, and a parser whose errors are one line."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from mmufuzz.campaign.budget import parse_duration
from mmufuzz.campaign.kernel import Kernel, canonical
from mmufuzz.cli.status import Status


class Parser(argparse.ArgumentParser):
    """Prints one line for bad usage, not the whole usage text, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """See ``argparse``."""
        sys.stderr.write(f"{self.prog}: {message} (see {self.prog} --help)\n")
        sys.exit(Status.USAGE)


def duration(text: str) -> float:
    """Argument type: seconds."""
    try:
        return parse_duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a duration such as 60s, 2m or 1h, got {text!r}") from None


def count(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """Argument type: an integer of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")


def add_kernel(parser: argparse.ArgumentParser, default: str) -> None:
    """``--kernel``, ``--revert`` and ``--apply``; ``default`` is the profile without ``--kernel``."""
    parser.add_argument(
        "--kernel", metavar="NAME", default=default, help="kernel profile: v6.1, v6.8, v6.9, v6.12, latest"
    )
    parser.add_argument("--revert", metavar="ID", action="append", default=[], help="take a fix away (repeatable)")
    parser.add_argument("--apply", metavar="ID", action="append", default=[], help="add a fix (repeatable)")


def kernel_from(arguments: argparse.Namespace) -> Kernel:
    """The kernel that the arguments name, with canonical ids. Raises ``CaseError`` for an unknown profile or fix."""
    revert = tuple(canonical(name) for name in arguments.revert)
    apply = tuple(canonical(name) for name in arguments.apply)
    kernel = Kernel(arguments.kernel, revert, apply)
    kernel.check()
    return kernel
