"""Inputs of the harness of decoder, executor and emulator: their form, how they are changed, and the seeds.

An input is a header for the state it begins in (``insn_states``), and instructions (``insn_target`` executes them).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

from mmufuzz.campaign.insn_emulator import emulator_encoding, emulator_entries
from mmufuzz.campaign.insn_states import HEADER, bits_of
from mmufuzz.case.encodings import encode
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.opcode_table import Opcode
from mmufuzz.x86.decode import MAX_LENGTH, Truncated, decode, decode16
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.opcodes import FORMS, Form, entries
from mmufuzz.x86.state import Fault

MOST_INSTRUCTIONS: Final = 32


def decoded(code: bytes, bits: int) -> Insn | None:
    """The first instruction of ``code``; None for an architectural fault or too few bytes.

    An instruction ends where its length says: with a byte less it is truncated, and what follows does not matter.
    """
    try:
        insn = _decode(code, bits)
    except (Fault, Truncated):
        return None
    assert 0 < insn.length <= MAX_LENGTH, "an impossible length"
    assert FORMS[insn.form].mnemonic == insn.mnemonic, "another entry's instruction"
    assert _decode(code[: insn.length], bits).form == insn.form, "bytes behind an instruction decide what it is"
    try:
        _decode(code[: insn.length - 1], bits)
    except Truncated:
        return insn
    except Fault:
        pass
    raise AssertionError("an instruction goes on behind its end")


def _decode(code: bytes, bits: int) -> Insn:
    return decode16(code) if bits == 16 else decode(code, bits == 64)


def steps(data: bytes) -> list[bytes]:
    """The instructions of an input, each in bytes, in the mode it begins in; bytes that begin none are left out."""
    found: list[bytes] = []
    offset = HEADER
    while len(found) < MOST_INSTRUCTIONS and offset < len(data):
        insn = decoded(data[offset : offset + MAX_LENGTH], bits_of(data))
        if insn is None:
            offset += 1
        else:
            found.append(data[offset : offset + insn.length])
            offset += insn.length
    return found


@cache
def entries_of(bits: int) -> list[Form]:
    """``opcodes.entries``, made once."""
    return entries(bits)


@cache
def emulator_entries_of(bits: int) -> list[Opcode]:
    """``emulator_entries``, made once."""
    return emulator_entries(bits)


def any_encoding(rng: Rng, bits: int) -> bytes:
    """One instruction: mostly of a form that the CPU has, sometimes of an entry of the emulator."""
    if rng.below(4):
        forms = entries_of(bits)
        return encoding(rng, forms[rng.below(len(forms))], bits)
    opcodes = emulator_entries_of(bits)
    return emulator_encoding(rng, opcodes[rng.below(len(opcodes))], bits)


def encoding(rng: Rng, form: Form, bits: int) -> bytes:
    """One instruction of ``form``, which is among ``entries(bits)``."""
    while True:
        code = encode(rng, form, bits == 64)
        insn = decoded(code, bits)
        if insn is not None and insn.form == form.number:
            return code[: insn.length]


def mutated(data: bytes, max_size: int, rng: Rng, raw: Callable[[bytes, int], bytes]) -> bytes:
    """libFuzzer's custom mutator: every other time its own, ``raw``; else instructions come, go, change or double.

    Or the state changes that they begin in, but not its mode.
    """
    if len(data) > HEADER and rng.below(2):
        return raw(data, max_size)
    header = data[:HEADER] if len(data) >= HEADER else rng.bytes(HEADER)
    bits = bits_of(header)
    pieces = steps(data) if len(data) > HEADER else []
    place = rng.below(len(pieces) + 1)
    choice = rng.below(5)
    if choice == 4:
        header = bytes((header[0] & 3 | rng.below(64) << 2,)) + rng.bytes(HEADER - 1)
    elif choice < 2 or not pieces:
        pieces[place : place + choice] = [any_encoding(rng, bits)]
    elif choice == 2:
        del pieces[place : place + 1 + rng.below(4)]
    else:
        pieces.insert(place, pieces[rng.below(len(pieces))])
    return (header + b"".join(pieces[:MOST_INSTRUCTIONS]))[:max_size]


def crossed(one: bytes, other: bytes, max_size: int, rng: Rng) -> bytes:
    """libFuzzer's custom crossover: the first instructions of ``one``, then the last of ``other``."""
    if len(one) <= HEADER or len(other) <= HEADER:
        return (one or other)[:max_size]
    head = steps(one)
    tail = steps(other)
    pieces = head[: rng.below(len(head) + 1)] + tail[rng.below(len(tail) + 1) :]
    return (one[:HEADER] + b"".join(pieces[:MOST_INSTRUCTIONS]))[:max_size]
