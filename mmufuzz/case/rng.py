"""A seeded generator that answers the same on every Python: splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""

from __future__ import annotations

from typing import Final

_MASK: Final = (1 << 64) - 1


class Rng:
    """Uniform draws from a 64-bit seed."""

    def __init__(self, seed: int) -> None:
        self.state = seed & _MASK

    def next64(self) -> int:
        """The next 64-bit value."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        z = self.state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
        return z ^ z >> 31

    def below(self, bound: int) -> int:
        """A value in 0..bound-1; ``bound`` at least 1. The bias is below 2**-32 for bounds below 2**32."""
        return self.next64() % bound

    def bytes(self, count: int) -> bytes:
        """``count`` bytes."""
        words = [self.next64().to_bytes(8, "little") for _ in range((count + 7) // 8)]
        return b"".join(words)[:count]

    def chance(self, numerator: int, denominator: int) -> bool:
        """True with probability numerator/denominator."""
        return self.below(denominator) < numerator

    def fork(self) -> Rng:
        """An independent generator."""
        return Rng(self.next64())
