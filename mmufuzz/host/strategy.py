"""The one place where a schedule strategy meets the model."""

from __future__ import annotations

from mypy_extensions import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class Strategy:
    """Decides what the default schedule leaves open.

    Actors are numbered: threads 0..n-1, then the store buffers of those threads n..2n-1. After ``horizon`` events
    the host stops asking and follows the default: that is the liveness phase.
    """

    horizon = 0

    def begin(self, threads: int) -> None:
        """A run with ``threads`` threads starts."""

    def pick(self, current: int, enabled: int, label: int) -> int:
        """The actor that acts next, one of the bits set in ``enabled``.

        ``current`` is the default answer. ``label`` is the last event of the thread that stands at the choice.
        """
        return current

    def hold(self, label: int) -> bool:
        """Whether the store ``label`` stays in its buffer until that buffer is picked or drains by itself."""
        return False


class Default(Strategy):
    """Never deviates."""
