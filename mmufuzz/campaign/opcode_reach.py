"""Which entries of the opcode tables, the CPU's and the emulator's, a corpus of ``atheris_insn`` reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmufuzz.campaign.files import InputError, reason
from mmufuzz.campaign.insn_emulator import EmulatorDiffers, Place, place_of
from mmufuzz.campaign.insn_inputs import emulator_entries_of, entries_of
from mmufuzz.campaign.insn_states import MODES
from mmufuzz.campaign.insn_target import run
from mmufuzz.kvm.opcode_table import Opcode
from mmufuzz.x86.opcodes import Form


class OpcodeReach:
    """Entries by mode: which of the CPU's were executed, which of those retired, and which of the emulator's it did.

    The CPU's are numbers in ``opcodes.FORMS``. What raises an exception is executed but does not retire.
    """

    def __init__(self) -> None:
        self.inputs = 0
        self.differing: list[str] = []
        """What was said of inputs on which the emulator differs; they reach nothing."""
        self.executed: dict[int, set[int]] = {bits: set() for bits in MODES}
        self.retired: dict[int, set[int]] = {bits: set() for bits in MODES}
        self.emulated: dict[int, set[Place]] = {bits: set() for bits in MODES}

    def add(self, data: bytes) -> None:
        """Execute an input."""
        self.inputs += 1
        try:
            steps = run(data)
        except EmulatorDiffers as difference:
            self.differing.append(str(difference))
            return
        for step in steps:
            if step.insn is not None:
                self.executed[step.bits].add(step.insn.form)
                if step.vector < 0:
                    self.retired[step.bits].add(step.insn.form)
            if step.entry is not None:
                self.emulated[step.bits].add(place_of(step.entry))

    def missing(self, bits: int) -> list[str]:
        """Entries of the CPU's tables, then of the emulator's, that were not reached in a mode."""
        found = [describe(form) for form in entries_of(bits) if form.number not in self.executed[bits]]
        for entry in emulator_entries_of(bits):
            if place_of(entry) not in self.emulated[bits]:
                found.append(f"emulator: {describe_opcode(entry)}")
        return found

    def as_json(self) -> dict[str, Any]:
        """By mode: how many entries there are and how many were reached, and which are missing."""
        return {
            f"{bits}-bit": {
                "entries": len(entries_of(bits)),
                "executed": len(self.executed[bits]),
                "retired": len(self.retired[bits]),
                "emulator_entries": len(emulator_entries_of(bits)),
                "emulated": len(self.emulated[bits]),
                "missing": self.missing(bits),
            }
            for bits in MODES
        }


def describe_opcode(entry: Opcode) -> str:
    """The place of an entry of the emulator's tables, and its mnemonic."""
    escape = ("", "0F ", "0F38 ")[entry.map - 1]
    return f"{escape}{entry.opcode:02X} ({entry.line.split()[0]}) {entry.name}"


def describe(form: Form) -> str:
    """The place of an entry: map, opcode, extension, mandatory prefix, mnemonic."""
    escape = ("", "0F ", "0F38 ", "0F3A ", "VEX.0F ", "VEX.0F38 ", "VEX.0F3A ")[form.opcode_map]
    extension = f"/{form.reg}" if form.reg >= 0 else f"/{form.modrm:02X}" if form.modrm >= 0 else ""
    prefix = ("", "NP ", "66 ", "F3 ", "F2 ")[form.prefix + 1]
    return f"{prefix}{escape}{form.opcode:02X}{extension} {form.mnemonic}"


def reach_of(paths: list[Path]) -> OpcodeReach:
    """What the files in ``paths``, and in the directories among them, reach. Raises ``InputError``."""
    reach = OpcodeReach()
    for path in paths:
        try:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                if not file.name.startswith("."):
                    reach.add(file.read_bytes())
        except OSError as error:
            where = str(error.filename or path)
            raise InputError(where, f"expected a readable file or directory ({reason(error)})") from error
    return reach
