"""Atheris over the decoder, the executor and the emulator alone. ``python harnesses/atheris_insn.py [--time 10s] …``

Any bytes decode to an instruction or an architectural fault. What executes leaves registers in their ranges. What the
emulator is sent (forced emulation, one vCPU with paging off) ends without a finding.
"""

from __future__ import annotations

import sys
import zlib
from typing import Final

from mmufuzz.campaign.fuzz_target import CoverageTable, fuzz, restart_with_preload
from mmufuzz.campaign.harness import session
from mmufuzz.campaign.mutators import dictionary
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case.model import FLAT32, Case, Options, Slot, Vcpu
from mmufuzz.case.rng import Rng
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.executor import execute
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.state import EFER_LMA, Fault, Regs

FEP: Final = bytes.fromhex("0f0b6b766d")
MAX_INSN: Final = 15
N_FORMS: Final = 1 << 13
"""Counters for the forms of instructions met; two forms seldom share one."""
EMULATE_EVERY: Final = 8
"""One input in so many also goes through a VM: that is slower by two orders of magnitude."""


class FlatBus(Bus):
    """Memory in a dictionary, and no paging."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """See ``Bus``."""
        return sum(self.memory.get(gva + offset, 0) << (8 * offset) for offset in range(size))

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """See ``Bus``."""
        assert 0 <= value < 1 << (8 * size), "a store wider than its size"
        for offset in range(size):
            self.memory[gva + offset] = value >> (8 * offset) & 0xFF

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """See ``Bus``."""
        return bytes(self.memory.get(gva + offset, 0) for offset in range(size))

    def fence(self, regs: Regs) -> None:
        """See ``Bus``."""

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """See ``Bus``."""

    def invlpg(self, regs: Regs, gva: int) -> None:
        """See ``Bus``."""

    def halt(self, regs: Regs) -> None:
        """See ``Bus``."""


def decoded(code: bytes, mode64: bool) -> Insn | None:
    """The instruction; None for an architectural fault or too few bytes."""
    try:
        insn = decode(code, mode64, True)
    except (Fault, Truncated):
        return None
    assert 0 < insn.length <= MAX_INSN + len(FEP), "an impossible length"
    return insn


def executed(insn: Insn, mode64: bool, seed: int) -> None:
    """Execute with registers drawn from ``seed``."""
    rng = Rng(seed)
    regs = Regs()
    regs.gpr = [rng.next64() if mode64 else rng.below(1 << 32) for _ in range(16)]
    regs.gpr[1] &= 0xF  # a REP count that ends soon
    regs.efer = EFER_LMA if mode64 else 0
    regs.rip = 0x1000
    try:
        execute(regs, insn, FlatBus())
    except Fault as fault:
        assert 0 <= fault.vector < 32, "an impossible vector"
    assert all(0 <= value < 1 << 64 for value in regs.gpr), "a register out of range"
    assert 0 <= regs.rip < 1 << 64, "RIP out of range"


def emulated(recorder: Recorder, code: bytes) -> None:
    """Send ``code`` through the emulator of a whole VM."""
    program = (FEP + code[: MAX_INSN - len(FEP)],)
    vcpu = Vcpu(mode=FLAT32, flags=(), code_gva=0x2000, code_gfn=2, regs=((0, 0x3000), (3, 0x3008)), program=program)
    case = Case(options=Options(fep=True, event_limit=4000), slots=(Slot(0, 16),), vcpus=(vcpu,))
    recorder.check(recorder.kernel.dress(case))


def main(arguments: list[str]) -> None:
    """Run until the time is up."""
    restart_with_preload()
    work = session("atheris_insn", arguments)
    table = CoverageTable(N_FORMS)
    share = work.recorder.share

    def target(data: bytes) -> None:
        share.executions += 1
        if len(data) < 2:
            return
        mode64 = data[0] & 1 == 0
        code = data[1 : 1 + MAX_INSN + len(FEP)]
        insn = decoded(code, mode64)
        if insn is None:
            return
        forms = (
            f"{insn.opcode_map}.{insn.opcode}.{insn.reg_field}.{insn.prefix}",
            f"{insn.mnemonic}.{insn.size}.{insn.lock}.{insn.rep}.{insn.has_memory}",
        )
        table.add({zlib.crc32(form.encode()) % N_FORMS: 1 for form in forms})
        executed(insn, mode64, data[0])
        if share.executions % EMULATE_EVERY == 0 and not mode64:
            emulated(work.recorder, code)

    fuzz(work, target, dictionary())


if __name__ == "__main__":
    main(sys.argv[1:])
