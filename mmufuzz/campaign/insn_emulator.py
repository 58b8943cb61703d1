"""KVM's emulator beside the hardware executor, for the target of the instruction harness."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.rng import Rng
from mmufuzz.kvm.emulate import EMULATION_FAILED, EMULATION_RESTART, x86_decode_insn, x86_emulate_insn
from mmufuzz.kvm.emulate_ctxt import X86EmulateCtxt
from mmufuzz.kvm.emulate_decode import decode
from mmufuzz.kvm.emulate_ops import BusOps, EmulationFailed
from mmufuzz.kvm.fixes import LATEST, behaviours
from mmufuzz.kvm.opcode_table import ONLY64, TABLES, Opcode
from mmufuzz.kvm.switches import Fixes
from mmufuzz.kvm.x86 import toggle_interruptibility
from mmufuzz.oracle.emulator_compare import Comparison, replay
from mmufuzz.oracle.emulator_deviations import explain
from mmufuzz.oracle.emulator_replay import Replay
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.state import Fault, Regs

Place = tuple[int, int, str]
"""An entry of the emulator's tables: the length of the opcode, its last byte, and the table's line."""

_FIXES: Final = Fixes(behaviours(LATEST, (), ()))


class EmulatorDiffers(AssertionError):
    """The emulator's result is neither hardware's nor a listed deviation. ``kind`` leaves out what varies."""

    def __init__(self, kind: str, where: str) -> None:
        super().__init__(f"the emulator differs from hardware: {where}: {kind}")
        self.kind = kind


def place_of(entry: Opcode) -> Place:
    """What tells ``entry`` from the others."""
    return entry.map, entry.opcode, entry.line


def emulate(regs: Regs, bus: Bus) -> tuple[Opcode | None, int]:
    """Emulate the instruction that ``bus`` fetches, on a CPU in the state of ``regs``, which stay as they are.

    The entry of the instruction and its length; None and 0 if KVM's emulator has none. Raises ``EmulatorDiffers``.
    """
    after = regs.copy()
    ctxt = X86EmulateCtxt(after, _FIXES)
    ctxt.ops = BusOps(after, bus)
    try:
        x86_decode_insn(ctxt, False)
    except (EmulationFailed, Fault):
        return None, 0
    result = EMULATION_RESTART
    while result == EMULATION_RESTART:
        result = x86_emulate_insn(ctxt)
    entry = ctxt.insn.entry
    if result != EMULATION_FAILED and not ctxt.cmpxchg_failed and not ctxt.io_needed:
        if not ctxt.have_exception:
            after.rip = ctxt.eip
            after.rflags = ctxt.eflags
            toggle_interruptibility(after, ctxt.interruptibility)
        _compare(ctxt, regs.copy(), after)
    return entry, ctxt.insn.length


def _compare(ctxt: X86EmulateCtxt, before: Regs, after: Regs) -> None:
    made = Comparison(ctxt.insn, before, after)
    made.fault = ctxt.exception if ctxt.have_exception else None
    replay(made, ctxt.code, ctxt.accesses, Replay())
    if made.differences and not made.unmodelled and not explain(made):
        vectors = f"exception {made.emulated_vector}, hardware {made.expected_vector}"
        kind = f"{ctxt.insn.entry.mnemonic}: {', '.join(made.differences)}: {vectors}"
        raise EmulatorDiffers(kind, f"{ctxt.code[: ctxt.insn.length].hex()} in {made.bits}-bit code")


def emulator_entries(bits: int) -> list[Opcode]:
    """The entries of KVM's tables that code of ``bits`` (64, 32 or 16) can encode."""
    found: dict[Place, Opcode] = {}
    for number, table in enumerate(TABLES):
        for byte, row in enumerate(table):
            # REX prefixes, and VEX in the place of LES and LDS.
            if row is None or (bits == 64 and number == 0 and (byte >> 4 == 4 or byte in (0xC4, 0xC5))):
                continue
            for entry in [*row.entries, *row.exact.values()]:
                if entry is not None and (bits == 64 or not entry.flags & ONLY64):
                    found.setdefault(place_of(entry), entry)
    return list(found.values())


def emulator_encoding(rng: Rng, entry: Opcode, bits: int) -> bytes:
    """An instruction of ``entry``, which is among ``emulator_entries(bits)``."""
    while True:
        code = (b"", b"\x66", b"\xf2", b"\xf3")[rng.below(4)] + (b"", b"\x0f", b"\x0f\x38")[entry.map - 1]
        code += bytes((entry.opcode,)) + rng.bytes(10)
        try:
            insn = decode(code, bits)
        except EmulationFailed:
            continue
        if place_of(insn.entry) == place_of(entry):
            return code[: insn.length]
