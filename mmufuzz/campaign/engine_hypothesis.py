"""Hypothesis as an engine: the harnesses' tests, in batches, until the time is up.

A test that fails stops Hypothesis' search; a campaign goes on. So in a campaign the harnesses record findings and
return, and only their own process or pytest raises.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

from mmufuzz.campaign.budget import Budget
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case.rng import Rng

BATCH: Final = 40
"""Examples between two looks at the clock; the tests themselves return at once when time is up."""


def load_harness(checkout: Path, name: str) -> ModuleType:
    """The module ``harnesses/<name>.py`` of the checkout, imported once per process."""
    qualified = f"harnesses.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    spec = importlib.util.spec_from_file_location(qualified, checkout / "harnesses" / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{qualified} cannot be loaded from {checkout}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    spec.loader.exec_module(module)
    return module


Batch = Callable[[Recorder, Callable[[], bool], int, int], None]
"""``batch(recorder, over, seed, examples)``: run so many examples; once ``over()``, those left return at once."""


def run_batches(batch: Batch, recorder: Recorder, seed: int, budget: Budget, tick: Callable[[], None]) -> None:
    """Run batches of a harness until ``budget`` is spent."""
    rng = Rng(seed)
    start = recorder.share.cases

    def over() -> bool:
        tick()
        return recorder.stop.requested or budget.spent(recorder.share.cases - start)

    while not over():
        examples = BATCH
        if budget.cases is not None:
            examples = min(BATCH, budget.cases - (recorder.share.cases - start))
        batch(recorder, over, rng.next64() >> 32, examples)
