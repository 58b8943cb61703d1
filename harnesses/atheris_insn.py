"""Atheris over the decoder, the executor and the emulator alone. ``python harnesses/atheris_insn.py [--time 10s] …``

Any bytes decode to instructions or architectural faults; what executes leaves registers in their ranges, and what
faults leaves them alone; what KVM's emulator makes of the same instruction is what hardware does, or a listed deviation
(``mmufuzz.campaign.insn_target``). What goes through the emulator of a whole VM (forced emulation, one vCPU with paging
off) ends without a finding.
"""

from __future__ import annotations

import sys
from typing import Final

from mmufuzz.campaign.fuzz_target import CoverageTable, fuzz, record_crash, restart_with_preload
from mmufuzz.campaign.harness import session
from mmufuzz.campaign.insn_counters import N_COUNTERS, counters
from mmufuzz.campaign.insn_emulator import EmulatorDiffers
from mmufuzz.campaign.insn_inputs import crossed, mutated, steps
from mmufuzz.campaign.insn_states import bits_of
from mmufuzz.campaign.insn_target import run
from mmufuzz.campaign.mutators import dictionary
from mmufuzz.campaign.recorder import Recorder
from mmufuzz.case.model import FLAT32, Case, Options, Slot, Vcpu
from mmufuzz.case.rng import Rng

FEP: Final = bytes.fromhex("0f0b6b766d")
MAX_STEP: Final = 15
EMULATE_EVERY: Final = 8
"""One input in so many also goes through a VM: that is slower by two orders of magnitude."""


def emulated(recorder: Recorder, data: bytes) -> None:
    """Send 32-bit instructions through the emulator of a whole VM."""
    program = tuple(FEP + code for code in steps(data) if len(FEP) + len(code) <= MAX_STEP)
    if not program:
        return
    vcpu = Vcpu(mode=FLAT32, flags=(), code_gva=0x2000, code_gfn=2, regs=((0, 0x3000), (3, 0x3008)), program=program)
    case = Case(options=Options(fep=True, event_limit=4000), slots=(Slot(0, 16),), vcpus=(vcpu,))
    recorder.check(recorder.kernel.dress(case))


def main(arguments: list[str]) -> None:
    """Run until the time is up."""
    restart_with_preload(custom=True)
    import atheris  # noqa: PLC0415 - an extra; after the restart, which it must not see twice

    work = session("atheris_insn", arguments)
    table = CoverageTable(N_COUNTERS)
    share = work.recorder.share
    differences: set[str] = set()

    def target(data: bytes) -> None:
        share.executions += 1
        try:
            done = run(data)
        except EmulatorDiffers as difference:
            # One input a kind: there may be more to find behind the first.
            if difference.kind not in differences:
                differences.add(difference.kind)
                record_crash(work, data, str(difference))
            return
        table.add(counters(done))
        if share.executions % EMULATE_EVERY == 0 and data and bits_of(data) == 32:
            emulated(work.recorder, data)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        return mutated(data, max_size, Rng(number), lambda raw, size: bytes(atheris.Mutate(raw, size)))

    def cross(one: bytes, other: bytes, max_size: int, number: int) -> bytes:
        return crossed(one, other, max_size, Rng(number))

    # How often an edge was passed says only how often an instruction stands in the input.
    fuzz(work, target, dictionary(), mutate, cross, ("-use_counters=0",))


if __name__ == "__main__":
    main(sys.argv[1:])
