"""Digests of a fixed list of Cases: generated ones, each with its own schedule and under a strategy, and the corpus.

    python tests/data/make_digests.py            write digests.json beside this file
    python tests/data/make_digests.py --print    print them instead

Run it when the model, the generator or the corpus has changed on purpose.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mmufuzz.case import toml
from mmufuzz.case.generate import GenerateOptions, generate
from mmufuzz.case.model import Case
from mmufuzz.case.rng import Rng
from mmufuzz.run import run
from mmufuzz.search.strategies import portfolio

FILE = Path(__file__).with_name("digests.json")
CORPUS = Path(__file__).parents[2] / "corpus"
KERNELS = ("v6.1", "v6.8", "v6.9", "v6.12")
SEEDS = 60
HORIZON = 500
"""Visible operations for which the strategy decides."""


def generated(seed: int) -> Case:
    """A Case for one of the kernels in turn."""
    return generate(Rng(seed), GenerateOptions(kernel=KERNELS[seed % len(KERNELS)]))


def corpus() -> dict[str, Case]:
    """Reproducers by path."""
    paths = sorted(CORPUS.glob("regressions/*.toml")) + sorted(CORPUS.glob("known/*.toml"))
    return {path.relative_to(CORPUS.parent).as_posix(): toml.load(path) for path in paths}


def digests() -> dict[str, str]:
    """``Outcome.digest`` by name of the run."""
    made = {}
    for seed in range(SEEDS):
        case = generated(seed)
        made[f"seed {seed}"] = run(case).digest
        made[f"seed {seed}, portfolio"] = run(case, portfolio(seed, HORIZON)).digest
    for name, case in corpus().items():
        made[name] = run(case).digest
    return made


def main() -> None:
    """Print the digests, or write the file."""
    text = json.dumps(digests(), indent=1) + "\n"
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(text)
    else:
        FILE.write_text(text)


if __name__ == "__main__":
    main()
