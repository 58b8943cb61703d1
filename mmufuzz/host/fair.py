"""Fair scheduling after Musuvathi and Qadeer (PLDI 2008): who may run, given who yielded to whom.

A thread that yields gives way to the threads that it kept from running since its last yield: those that were enabled
all that time, or that it disabled, and that never ran. So a loop that yields each time round cannot starve what it
waits for.
"""

from __future__ import annotations

from mmufuzz.host.memory import mix


class Fairness:
    """Sets of threads are bit masks. Each list has one for every thread; "since" is since that thread's last yield."""

    def __init__(self, count: int) -> None:
        everyone = (1 << count) - 1
        self._below = [0] * count
        """Those it may not run before, unless they cannot run."""
        self._enabled_since = [everyone] * count
        """Those enabled at every choice since."""
        self._disabled_by = [0] * count
        """Those that it disabled since."""
        self._scheduled_since = [everyone] * count
        """Those that ran since; at first everyone, so that a first yield lets anybody go on."""
        self._slice_enabled = everyone
        """Those enabled at the last choice."""

    def entered(self, index: int) -> None:
        """Thread ``index`` is about to run."""
        bit = 1 << index
        for other in range(len(self._below)):
            self._below[other] &= ~bit
            self._scheduled_since[other] |= bit

    def yielded(self, index: int, enabled: int) -> None:
        """Thread ``index`` yields while ``enabled`` could run."""
        starved = (self._enabled_since[index] | self._disabled_by[index]) & ~self._scheduled_since[index]
        self._below[index] |= starved
        self._enabled_since[index] = enabled
        self._disabled_by[index] = 0
        self._scheduled_since[index] = 0

    def left(self, index: int, enabled: int) -> None:
        """Thread ``index`` waits, has yielded or has ended, and one of ``enabled`` runs next."""
        self._disabled_by[index] |= self._slice_enabled & ~enabled
        self._slice_enabled = enabled
        for other in range(len(self._below)):
            self._enabled_since[other] &= enabled

    def allowed(self, enabled: int) -> int:
        """Those of ``enabled`` that may run: not empty unless ``enabled`` is."""
        allowed = 0
        for index in range(len(self._below)):
            if enabled >> index & 1 and not self._below[index] & enabled:
                allowed |= 1 << index
        return allowed if allowed else enabled

    def fingerprint(self, alive: int) -> int:
        """Equal for states that lead to the same answers while only threads of ``alive`` can run."""
        state = self._slice_enabled & alive
        for index in range(len(self._below)):
            if alive >> index & 1:
                state = mix(mix(state, self._below[index] & alive), self._enabled_since[index] & alive)
                state = mix(mix(state, self._disabled_by[index] & alive), self._scheduled_since[index] & alive)
        return state
