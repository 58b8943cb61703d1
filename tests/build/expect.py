"""``python -I expect.py KIND``: status 1, and a line that says why, unless the installed core is of this kind."""

from __future__ import annotations

import sys

from mmufuzz.build.loader import in_use

if __name__ == "__main__":
    sys.exit(None if in_use().kind == sys.argv[1] else f"expected {sys.argv[1]}, got {in_use().line}")
