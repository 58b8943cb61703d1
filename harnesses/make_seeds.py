"""Writes ``corpus/seeds`` anew: ``python harnesses/make_seeds.py``.

``atheris_cases``: a few generated Cases of every shape, in bytes form; the random engine starts from them too.
``atheris_insn``: every entry of the opcode tables, in each mode that has it. The Hypothesis harnesses draw their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mmufuzz.campaign.insn_seeds import seeds
from mmufuzz.campaign.insn_states import bits_of
from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.generate import SHAPES, generate_shape
from mmufuzz.case.rng import Rng
from mmufuzz.outcome import OK
from mmufuzz.run import run

ROOT: Final = Path(__file__).resolve().parents[1] / "corpus" / "seeds"
PER_SHAPE: Final = 3


def main() -> None:
    """Write all seeds; Cases with a finding on the default kernel are no seeds."""
    cases = ROOT / "atheris_cases"
    cases.mkdir(parents=True, exist_ok=True)
    for shape, _ in SHAPES:
        written = 0
        number = 0
        while written < PER_SHAPE:
            case = generate_shape(Rng(number), shape)
            number += 1
            if run(case).verdict == OK:
                written += 1
                (cases / f"{shape}-{written}.case").write_bytes(case_bytes.encode(case))
    instructions = ROOT / "atheris_insn"
    instructions.mkdir(parents=True, exist_ok=True)
    for path in instructions.glob("*.bin"):
        path.unlink()
    for number, data in enumerate(seeds()):
        (instructions / f"{number:02}-{bits_of(data)}.bin").write_bytes(data)


if __name__ == "__main__":
    main()
