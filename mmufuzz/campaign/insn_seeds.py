"""Seeds of the instruction harness, made from the opcode tables."""

from __future__ import annotations

from mmufuzz.campaign.insn_emulator import emulator_encoding, place_of
from mmufuzz.campaign.insn_inputs import MOST_INSTRUCTIONS, emulator_entries_of, encoding, entries_of
from mmufuzz.campaign.insn_states import HEADER, MODES
from mmufuzz.campaign.insn_target import run
from mmufuzz.case.rng import Rng


def seeds() -> list[bytes]:
    """Inputs at CPL 0 that together hold every entry of the CPU's and of the emulator's tables, in every mode."""
    inputs: list[bytes] = []
    for mode, bits in enumerate(MODES):
        rng = Rng(bits)
        inputs += _inputs(mode, [encoding(rng, form, bits) for form in entries_of(bits)])
    emulated = {(step.bits, place_of(step.entry)) for data in inputs for step in run(data) if step.entry is not None}
    for mode, bits in enumerate(MODES):
        rng = Rng(bits)
        missing = [entry for entry in emulator_entries_of(bits) if (bits, place_of(entry)) not in emulated]
        inputs += _inputs(mode, [emulator_encoding(rng, entry, bits) for entry in missing])
    return inputs


def _inputs(mode: int, codes: list[bytes]) -> list[bytes]:
    """As few inputs as hold ``codes``; ``mode`` is a place in ``MODES``."""
    return [
        bytes((mode, start & 0xFF)).ljust(HEADER, b"\0") + b"".join(codes[start : start + MOST_INSTRUCTIONS])
        for start in range(0, len(codes), MOST_INSTRUCTIONS)
    ]
