"""The tests run on the core that is installed, and leave the user's cache of builds alone."""

from __future__ import annotations

import os

# Before anything is imported, and inherited by the processes that tests start.
os.environ.setdefault("MMUFUZZ_CORE", "installed")
