"""Coverage of the instruction harness: counters for what its inputs make decoder, executor and emulator do."""

from __future__ import annotations

import zlib
from array import array
from typing import Final

from mmufuzz.campaign.insn_emulator import place_of
from mmufuzz.campaign.insn_inputs import emulator_entries_of
from mmufuzz.campaign.insn_states import MODES
from mmufuzz.campaign.insn_target import Step, run
from mmufuzz.x86.opcodes import FORMS

PLACES: Final = {
    place: number
    for number, place in enumerate(
        dict.fromkeys(place_of(entry) for bits in MODES for entry in emulator_entries_of(bits))
    )
}
N_FORMS: Final = 2 * len(FORMS) * len(MODES)
N_PLACES: Final = len(PLACES) * len(MODES)
N_VARIANTS: Final = 1 << 13
"""Counters for an instruction's size, prefixes and exception; two kinds seldom share one."""
N_COUNTERS: Final = N_FORMS + N_PLACES + N_VARIANTS


def counters(done: list[Step]) -> dict[int, int]:
    """What libFuzzer is to keep an input for: table entries that are executed and that retire, and kinds of steps."""
    met: dict[int, int] = {}
    for step in done:
        mode = MODES.index(step.bits)
        kind = f"{mode}"
        insn = step.insn
        if insn is not None:
            entry = len(FORMS) * mode + insn.form
            met[2 * entry + (step.vector < 0)] = 1
            kind += f".{insn.form}.{insn.size}.{insn.lock}.{insn.rep}.{insn.has_memory}.{step.vector}"
        if step.entry is not None:
            met[N_FORMS + len(PLACES) * mode + PLACES[place_of(step.entry)]] = 1
        met[N_FORMS + N_PLACES + zlib.crc32(kind.encode()) % N_VARIANTS] = 1
    return met


def reach(data: bytes) -> array[int]:
    """The counters that an input hits, in order; none if it shows an error."""
    try:
        return array("I", sorted(counters(run(data))))
    except AssertionError:
        return array("I")
