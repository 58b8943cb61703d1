"""What libFuzzer's mutator and crossover do with the bytes form of a Case, and the words of its dictionary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.generate import CAMPAIGN, generate
from mmufuzz.case.generate_insn import FEP
from mmufuzz.case.model import Case
from mmufuzz.case.mutate import mutate, splice
from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import EVICT, FILL
from mmufuzz.host.sites import COUNT_LOAD, EMUL_STORE, GPTE_LOAD, GUEST_STORE, MMU_LOCK, MMU_UNLOCK, SPTE_WALK, label
from mmufuzz.outcome import Outcome
from mmufuzz.search.racing import Aims, Races
from mmufuzz.x86.asm import assemble

SHORT: Final = 24
"""Bytes below which a mutation starts from a fresh Case."""

RAW: Final = 30
AIMED: Final = 35
"""Mutations, of a hundred, that are libFuzzer's own, and that flip an observed race; the others change the Case."""

MOST_PARENTS: Final = 64
"""Parents whose races are remembered: libFuzzer changes one several times in a row."""


class Mutator:
    """``run`` executes a Case and records what it shows."""

    def __init__(self, run: Callable[[Case], Outcome]) -> None:
        self.run = run
        self.aims = Aims()
        self._races: dict[bytes, Races] = {}

    def mutated(self, data: bytes, max_size: int, rng: Rng, raw: Callable[[bytes, int], bytes]) -> bytes:
        """libFuzzer's custom mutator; ``raw`` is its own."""
        if len(data) < SHORT:
            return case_bytes.encode(generate(rng, CAMPAIGN))[:max_size]
        choice = rng.below(100)
        if choice < RAW:
            return raw(data, max_size)
        case = case_bytes.decode(data)
        changed = self._aimed(data, case, rng) if choice < RAW + AIMED else None
        return case_bytes.encode(changed if changed is not None else mutate(rng, case))[:max_size]

    def crossed(self, one: bytes, other: bytes, max_size: int, rng: Rng) -> bytes:
        """libFuzzer's custom crossover."""
        return case_bytes.encode(splice(rng, case_bytes.decode(one), case_bytes.decode(other)))[:max_size]

    def _aimed(self, data: bytes, case: Case, rng: Rng) -> Case | None:
        """``case`` under a schedule aimed at a race that its run shows; None if it shows none."""
        races = self._races.get(data)
        if races is None:
            races = Races(self.run(case).trace)
            if len(self._races) >= MOST_PARENTS:
                del self._races[next(iter(self._races))]
            self._races[data] = races
        aimed = self.aims.schedule(races, rng)
        if not aimed:
            return None
        kept = tuple(item for item in case.schedule if item.kind in (EVICT, FILL))
        return replace(case, schedule=aimed + kept)


_LINES: Final = (
    "mov [edi], ecx", "mov ecx, [edi]", "lock add dword [edi], ecx", "xchg [edi], ecx", "cmpxchg [edi], ecx",
    "lock cmpxchg8b qword [edi]", "movss dword [edi], xmm0", "fstp tbyte [edi]", "rep movsb", "invlpg [edi]", "mfence",
    "mov cr3, eax", "hlt", "push eax", "pop eax",
)  # fmt: skip


def dictionary() -> list[bytes]:
    """Words that byte mutations seldom make: instructions, the prefix, entry flags, and labels of racing events."""
    words = [FEP]
    for line in _LINES:
        words += [code := assemble(line, False), FEP + code]
    words += [flags.to_bytes(2, "little") for flags in (0x00, 0x01, 0x03, 0x07, 0x27, 0x67, 0xE7, 0x1E7)]
    for thread in (0, 1):
        for step in (0, 1):
            for site in (GUEST_STORE, EMUL_STORE, GPTE_LOAD, SPTE_WALK, COUNT_LOAD, MMU_LOCK, MMU_UNLOCK):
                words.append(label(thread, step, site, 1).to_bytes(6, "little"))
    return words


def dictionary_text(words: list[bytes]) -> str:
    """``words`` as a file that libFuzzer reads."""
    return "".join('"' + "".join(f"\\x{byte:02X}" for byte in word) + '"\n' for word in words)
