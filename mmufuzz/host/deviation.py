"""One departure from the default schedule, named by labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mmufuzz.host.sites import BOOT

RUN: Final = 0  # after event `at`, run thread `actor`
HOLD: Final = 1  # keep store `at` in its buffer until event `until` (BOOT: until the buffer drains by itself)
EVICT: Final = 2  # after event `at`, thread `actor`'s TLB forgets the page of `address`
FILL: Final = 3  # after event `at`, thread `actor`'s CPU translates `address` speculatively


@dataclass(frozen=True)
class Deviation:
    """``kind`` is RUN, HOLD, EVICT or FILL; ``at`` and ``until`` are labels; ``address`` is a gva."""

    kind: int
    at: int
    actor: int = 0
    until: int = BOOT
    address: int = 0
