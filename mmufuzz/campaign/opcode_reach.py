"""Which opcode-table entries the inputs of a corpus of ``atheris_insn`` reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmufuzz.campaign.files import InputError, reason
from mmufuzz.campaign.insn_inputs import MODES
from mmufuzz.campaign.insn_target import run
from mmufuzz.x86.opcodes import Form, entries


class OpcodeReach:
    """Entries by mode, as numbers in ``opcodes.FORMS``: which were executed, and which of those raised no exception."""

    def __init__(self) -> None:
        self.inputs = 0
        self.executed: dict[int, set[int]] = {bits: set() for bits in MODES}
        self.retired: dict[int, set[int]] = {bits: set() for bits in MODES}

    def add(self, data: bytes) -> None:
        """Execute an input."""
        self.inputs += 1
        for step in run(data):
            self.executed[step.bits].add(step.insn.form)
            if step.vector < 0:
                self.retired[step.bits].add(step.insn.form)

    def missing(self, bits: int) -> list[Form]:
        """Entries of a mode that were not executed, in the order of the tables."""
        return [form for form in entries(bits) if form.number not in self.executed[bits]]

    def as_json(self) -> dict[str, Any]:
        """By mode: how many entries there are, were executed and retired, and which are missing."""
        return {
            f"{bits}-bit": {
                "entries": len(entries(bits)),
                "executed": len(self.executed[bits]),
                "retired": len(self.retired[bits]),
                "missing": [describe(form) for form in self.missing(bits)],
            }
            for bits in MODES
        }


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
            raise InputError(str(path), f"expected a readable file or directory ({reason(error)})") from error
    return reach
