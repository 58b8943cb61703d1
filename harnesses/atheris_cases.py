"""Atheris over the bytes form of a Case: any bytes are one. ``python harnesses/atheris_cases.py [--time 10s] …``

Guidance is what the run reached (``kvm.counters``), handed to libFuzzer as coverage; half of the mutations are
libFuzzer's own, half know what a Case is.
"""

from __future__ import annotations

import sys

from mmufuzz.campaign.fuzz_target import CoverageTable, fuzz, restart_with_preload
from mmufuzz.campaign.harness import session
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.generate import generate
from mmufuzz.case.mutate import mutate
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.counters import N_COUNTERS

SHORT = 24
"""Bytes below which a mutation starts from a fresh Case."""


def mutated(data: bytes, max_size: int, number: int) -> bytes:
    """libFuzzer's custom mutator."""
    import atheris  # noqa: PLC0415 - an extra

    rng = Rng(number)
    if len(data) < SHORT:
        case = generate(rng)
    elif rng.chance(1, 2):
        return bytes(atheris.Mutate(data, max_size))
    else:
        case = mutate(rng, case_bytes.decode(data))
    return case_bytes.encode(case)[:max_size]


def main(arguments: list[str]) -> None:
    """Run until the time is up."""
    restart_with_preload()
    work = session("atheris_cases", arguments)
    recorder = work.recorder
    table = CoverageTable(N_COUNTERS)

    def target(data: bytes) -> None:
        recorder.case()
        outcome = recorder.check(recorder.kernel.dress(case_bytes.decode(data)))
        table.add(outcome.counters)

    fuzz(work, target, mutated)


if __name__ == "__main__":
    main(sys.argv[1:])
