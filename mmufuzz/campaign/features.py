"""What a run reached, as small names: the novelty that decides whether a Case is kept.

Lines of code do not tell interleavings apart. A feature here is a mark of the model, an exit reason, a verdict, or an
*interleaving pair*: thread A touched a word at site i, and the next to touch it was thread B at site j, one of them
writing.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import N_SITES, SITE_NAMES, label_site, label_thread
from mmufuzz.outcome import Outcome

_WRITES: Final = tuple(name.endswith((".store", ".atomic", ".lock", ".unlock")) for name in SITE_NAMES)


def pairs(trace: list[tuple[int, int, int]]) -> list[int]:
    """Interleaving pairs of a trace, each ``first site * N_SITES + second site``, in order of first appearance."""
    last: dict[int, tuple[int, int]] = {}
    found: dict[int, bool] = {}
    for label, address, _value in trace:
        if address == 0 or label < 0:
            continue
        word = address >> 3
        thread = label_thread(label)
        site = label_site(label)
        before = last.get(word)
        if before is not None and before[0] != thread and (_WRITES[before[1]] or _WRITES[site]):
            found[before[1] * N_SITES + site] = True
        last[word] = (thread, site)
    return list(found)


def features(outcome: Outcome) -> list[str]:
    """Everything ``outcome`` reached, without repetition, in a fixed order."""
    names = [f"mark:{name}" for name in sorted(outcome.marks)]
    names.extend(f"exit:{name}" for name in sorted(outcome.exits))
    names.extend(f"pair:{pair}" for pair in pairs(outcome.trace))
    names.append(f"verdict:{outcome.verdict}")
    return names
