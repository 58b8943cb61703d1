"""Exit statuses: a contract that CI relies on."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """What a verb answers to the shell."""

    CLEAN = 0
    """Nothing new was found; every expectation holds."""
    FOUND = 1
    """A new finding, or an expectation that failed."""
    USAGE = 2
    """Bad usage or bad input; one line on stderr says where and what was expected."""
    CUT_SHORT = 3
    """A limit ended the search before it was complete."""
    INTERNAL = 70
    """An error inside mmufuzz."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM; what was found is saved."""
