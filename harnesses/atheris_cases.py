"""Atheris over the bytes form of a Case: any bytes are one. ``python harnesses/atheris_cases.py [--time 10s] …``

Guidance is what the run reached (``kvm.counters``), handed to libFuzzer as coverage. A share of the mutations is
libFuzzer's own; the others know what a Case is and which races its run shows (``campaign.mutators``).
"""

from __future__ import annotations

import sys

from mmufuzz.campaign.fuzz_target import CoverageTable, fuzz, restart_with_preload
from mmufuzz.campaign.harness import session
from mmufuzz.campaign.mutators import Mutator, dictionary
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.counters import N_COUNTERS


def main(arguments: list[str]) -> None:
    """Run until the time is up."""
    restart_with_preload(custom=True)
    import atheris  # noqa: PLC0415 - an extra; after the restart, which it must not see twice

    work = session("atheris_cases", arguments)
    recorder = work.recorder
    table = CoverageTable(N_COUNTERS)
    mutator = Mutator(lambda case: recorder.check(recorder.kernel.dress(case)))

    def target(data: bytes) -> None:
        recorder.case()
        outcome = recorder.check(recorder.kernel.dress(case_bytes.decode(data)))
        table.add(outcome.counters)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        return mutator.mutated(data, max_size, Rng(number), lambda raw, size: bytes(atheris.Mutate(raw, size)))

    def cross(one: bytes, other: bytes, max_size: int, number: int) -> bytes:
        return mutator.crossed(one, other, max_size, Rng(number))

    fuzz(work, target, dictionary(), mutate, cross)


if __name__ == "__main__":
    main(sys.argv[1:])
