"""Cases that the tests of the command line use, and what a run of it answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mmufuzz.case.model import LONG4, Case, HostThread, Slot, Vcpu, Word

RW = 0x67


def small_case() -> Case:
    """One vCPU that stores to its data page: nothing to find."""
    words = [Word(0x10 + level, 0, (0x11 + level) << 12 | RW) for level in range(3)]
    words += [Word(0x13, gfn, gfn << 12 | RW) for gfn in (0x13, 0x20, 0x30)]
    program = (bytes.fromhex("4889042500000300"), bytes.fromhex("488b142500000300"))
    vcpu = Vcpu(LONG4, cr3=0x10, code_gva=0x20000, code_gfn=0x20, regs=((0, 7),), program=program)
    return Case(slots=(Slot(0, 64),), memory=tuple(words), vcpus=(vcpu,), comment="a store and a load")


def livelock_case() -> Case:
    """A store that KVM cannot emulate, to the root table of the vCPU's own: a lasso without the retry guard."""
    words = [Word(0x10 + level, 0, (0x11 + level) << 12 | RW) for level in range(3)]
    words += [Word(0x13, gfn, gfn << 12 | RW) for gfn in (0x10, 0x20)]
    program = (bytes.fromhex("f30f11042508000100"),)
    vcpu = Vcpu(LONG4, cr3=0x10, code_gva=0x20000, code_gfn=0x20, program=program)
    return Case(revert=("retry-guard",), slots=(Slot(0, 64),), memory=tuple(words), vcpus=(vcpu,))


def racing_case() -> Case:
    """Two threads, so that there is something to explore; nothing to find."""
    host = (HostThread(("zap_all_fast",)),)
    case = small_case()
    return Case(slots=case.slots, memory=case.memory, vcpus=case.vcpus, host=host)


@dataclass
class Answer:
    """What a run of the command line answered."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)
