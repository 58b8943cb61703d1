"""A Hypothesis test over whole Cases: bytes, generated Cases and seeds with a few deviations run without a finding.

``python harnesses/cases.py [--time 10s] [--revert ID] …``
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mmufuzz.campaign.corpus import load_directory
from mmufuzz.campaign.harness import run_hypothesis_harness, test_recorder
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.generate import CAMPAIGN, generate
from mmufuzz.case.model import Case
from mmufuzz.case.repair import repair
from mmufuzz.case.rng import Rng
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, N_SITES, STORE_SITES, label

SITES: Final = st.integers(0, N_SITES - 1)
THREADS: Final = st.integers(0, 3)
PLACES: Final = st.builds(label, THREADS, st.integers(0, 15), SITES, st.integers(1, 4))
STORES: Final = st.builds(label, THREADS, st.integers(0, 15), st.sampled_from(STORE_SITES), st.integers(1, 2))
DEVIATIONS: Final = st.one_of(
    st.builds(Deviation, st.just(RUN), PLACES, THREADS),
    st.builds(lambda at, until: Deviation(HOLD, at, at >> 36, until), STORES, st.one_of(st.just(BOOT), PLACES)),
)


def generated(number: int, deviations: list[Deviation]) -> Case:
    """The Case that ``number`` seeds, under a sparse schedule."""
    return repair(replace(generate(Rng(number), CAMPAIGN), schedule=tuple(deviations)))


SEEDS: Final = load_directory(Path(__file__).resolve().parents[1] / "corpus" / "seeds" / "atheris_cases")
"""What Atheris starts from, a few Cases of each of the generator's shapes."""


def seeded(case: Case, deviations: list[Deviation]) -> Case:
    """A Case of the corpus under a sparse schedule."""
    return repair(replace(case, schedule=tuple(deviations)))


CASES: Final = st.one_of(
    st.builds(seeded, st.sampled_from(SEEDS), st.lists(DEVIATIONS, max_size=4)) if SEEDS else st.nothing(),
    st.builds(generated, st.integers(0, (1 << 32) - 1), st.lists(DEVIATIONS, max_size=4)),
    st.builds(case_bytes.decode, st.binary(max_size=512)),
)


def check(recorder: Recorder, case: Case, raising: bool) -> None:
    """Run ``case``; a new finding is recorded, and fails the test if ``raising``."""
    recorder.case()
    outcome = recorder.check(recorder.kernel.dress(case))
    if raising:
        for finding in outcome.findings:
            record = recorder.store.records.get(finding.fingerprint)
            assert record is None or not record.new, (
                f"{finding.kind}: {finding.fingerprint}; the Case is in {record.case}"
            )


def batch(recorder: Recorder, over: Callable[[], bool], number: int, examples: int) -> None:
    """Run so many examples; findings are recorded, not raised."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def every_case_runs(case: Case) -> None:
        if not over():
            check(recorder, case, False)

    every_case_runs()


@settings(max_examples=100, deadline=None)
@given(CASES)
def test_no_case_has_a_finding(case: Case) -> None:
    """For pytest: ``pytest harnesses/cases.py``."""
    check(test_recorder("cases"), case, True)


def main(arguments: list[str]) -> int:
    """The harness as a program."""
    return run_hypothesis_harness("cases", batch, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
