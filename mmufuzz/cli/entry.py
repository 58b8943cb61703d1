"""Where the ``mmufuzz`` command starts: it picks a core, and only then imports what uses it."""

from __future__ import annotations

import sys

from mmufuzz.cli.core import pick_core


def main() -> int:
    """The command line; its exit status."""
    pick_core("fuzz" in sys.argv[1:2])
    from mmufuzz.cli.main import main as run  # noqa: PLC0415 - it imports the core

    return run()


if __name__ == "__main__":
    sys.exit(main())
