"""Random instructions agree with Unicorn: every form by itself, and sequences that hand their state on.

The sequences here are a slice of those that ``tox -e oracle`` runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("unicorn")

from unicorn_divergences import CANNOT_RUN, DIVERGENCES
from unicorn_oracle import Oracle, Walk, random_memory, sequences, usable_forms

from mmufuzz.x86.executor import supported
from mmufuzz.x86.opcodes import FORMS, MNEMONICS
from mmufuzz.x86.undefined import FLAGS

BITS = pytest.mark.parametrize("bits", [64, 32, 16])


@BITS
def test_every_form_agrees_with_unicorn(bits: int) -> None:
    oracle = Oracle(bits)
    bus = random_memory()
    oracle.uc.mem_write(0, bytes(bus.memory))
    unused = []
    for number, form in enumerate(usable_forms(bits)):
        walk = Walk(oracle, bus, number)
        used = 0
        for _ in range(40):
            used += walk.instruction([form]) is not None
            if used == 4:
                break
        walk.finish()
        bus.log.clear()
        if not used and not any(DIVERGENCES[name].skip for name in walk.seen):
            unused.append((form.mnemonic, form.opcode))
    assert unused == []


@BITS
def test_sequences_agree_with_unicorn(bits: int) -> None:
    used, _ = sequences(bits, 60, 6, 1)
    assert sum(used.values()) == 360


@BITS
def test_sequences_of_decimal_loads_and_stores_agree_with_unicorn(bits: int) -> None:
    used, seen = sequences(bits, 100, 6, 1, ("fbld", "fbstp", "fild", "fistp", "fchs", "fldcw", "ffree"))
    assert min(used["fbld"], used["fbstp"]) > 20
    assert {"x87-decimal-range", "x87-decimal-zero"} <= seen.keys()


@pytest.mark.oracle
@BITS
def test_many_sequences_agree_with_unicorn(bits: int) -> None:
    used, seen = sequences(bits, 100_000, 6, 2)
    assert len(used) > 100
    print(f"{bits}-bit: {sum(used.values())} instructions, {len(used)} mnemonics, divergences {seen}")


def test_every_decodable_mnemonic_has_a_handler() -> None:
    assert [form.mnemonic for form in FORMS if not supported(form.mnemonic)] == []


def test_the_lists_name_only_mnemonics_of_the_tables() -> None:
    assert sorted(CANNOT_RUN - set(MNEMONICS)) == []


def test_the_documentation_lists_the_divergences_and_the_undefined_flags() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "execute.md").read_text()
    for divergence in DIVERGENCES.values():
        assert f"| {divergence.what} | {divergence.right} |" in text
    table = text[text.index("| instruction | undefined |") : text.index("## Compared with Unicorn")].lower()
    for name in FLAGS:
        assert name in table, name
