"""The one place where a schedule strategy meets the model."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

STOP: Final = -1


@mypyc_attr(allow_interpreted_subclasses=True)
class Strategy:
    """Decides what the default schedule leaves open.

    Actors are numbered: threads 0..n-1, then the store buffers of those threads n..2n-1. Before each visible operation,
    and where a thread waits, yields or ends, the host asks twice. First, while any buffer holds stores: which of
    them drains its oldest store (``enabled`` has their bits; ``current`` is the answer for none of them, and ends the
    question). Then, where more than one thread may run: which one (``enabled`` has no bit from n on).

    Subclasses set ``horizon`` in ``__init__``: the compiled core ignores class attributes of interpreted classes.
    After ``horizon`` events (at most ``sched.PATIENCE``) the host drains all buffers, stops asking and follows the
    default: that is the liveness phase. Before ``next_event`` events it does not ask at plain operations, only where
    threads wait, yield or end. It keeps ``events``, the visible operations so far, up to date for each question, and
    while ``wants_state`` is set, for ``pick`` also ``state``, ``Host.fingerprint()``.
    """

    horizon = 0
    next_event = 0
    events = 0
    wants_state = False
    state = 0

    def begin(self, threads: int) -> None:
        """A run with ``threads`` threads starts."""

    def pick(self, current: int, enabled: int, label: int) -> int:
        """The actor that acts next, one of the bits set in ``enabled``; ``STOP`` ends the run.

        ``current`` is the default answer. ``label`` is the last event of the thread that stands at the choice.
        """
        return current

    def hold(self, label: int) -> bool:
        """Whether the store ``label`` stays in its buffer until that buffer is picked or drains by itself."""
        return False
