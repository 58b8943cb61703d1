"""What the emulator did to registers, flags, RIP and memory is what hardware does, listed deviations aside."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import X86EmulateCtxt
from mmufuzz.kvm.opcode_table import NAMES, STRING, UNUSUAL
from mmufuzz.kvm.structs import Kvm
from mmufuzz.oracle.emulator_compare import Comparison, replay
from mmufuzz.oracle.emulator_deviations import explain
from mmufuzz.oracle.emulator_replay import Replay
from mmufuzz.oracle.sink import Sink
from mmufuzz.x86.state import Regs

# Names of the opcode tables that change more than general registers, RIP and RFLAGS, without being UNUSUAL.
_SYSTEM: Final = frozenset(
    (
        *("push.sreg", "pop.sreg", "mov.from_sreg", "mov.to_sreg", "les", "lds", "lss", "lfs", "lgs"),
        *("callf", "jmpf", "retf", "int", "int3", "into", "iret", "syscall", "sysenter", "sysexit", "rsm", "vmcall"),
        *("sgdt", "sidt", "smsw", "rdpid", "cpuid", "cli", "sti", "fninit", "fnstcw", "fnstsw", "fxsave", "fxrstor"),
        "-",
    )
)


def _general() -> list[bool]:
    return [name not in _SYSTEM for name in NAMES]


_GENERAL: Final[list[bool]] = _general()


def changes_general_registers_only(ctxt: X86EmulateCtxt) -> bool:
    """Only general registers, RIP and RFLAGS can differ after the instruction: the rest needs no copy."""
    return ctxt.d & (UNUSUAL & ~STRING) == 0 and _GENERAL[ctxt.insn.entry.operation]


_SCRATCH: Final = Regs()
"""Takes the expected state of instructions on general registers; it is filled before each use."""


class Before:
    """What a vCPU had before the instruction that its emulator is at; ``regs`` unless it is on general registers."""

    def __init__(self) -> None:
        self.gpr: list[int] = []
        self.rip = 0
        self.rflags = 0
        self.regs: Regs | None = None

    def restore(self, regs: Regs) -> Regs:
        """The registers then; ``regs`` are those of the vCPU, which has the rest unchanged."""
        if self.regs is not None:
            return self.regs
        before = _SCRATCH
        before.gpr = self.gpr
        before.rip = self.rip
        before.rflags = self.rflags
        before.cr0 = regs.cr0
        before.cr4 = regs.cr4
        before.efer = regs.efer
        before.cpl = regs.cpl
        before.segments = regs.segments
        before.compatibility = regs.compatibility
        before.code16 = regs.code16
        before.stack16 = regs.stack16
        before.flat = regs.flat
        return before


class Emulator:
    """Compares, instruction by instruction."""

    def __init__(self, kvm: Kvm, sink: Sink) -> None:
        self.kvm = kvm
        self.sink = sink
        self.before: list[Before] = [Before() for _ in kvm.vcpus]
        self.bus = Replay()

    def begins(self, index: int) -> None:
        """``Observer.emulation_begins``."""
        vcpu = self.kvm.vcpus[index]
        regs = vcpu.regs
        before = self.before[index]
        if changes_general_registers_only(vcpu.emulate_ctxt):
            before.gpr = regs.gpr[:]
            before.rip = regs.rip
            before.rflags = regs.rflags
            before.regs = None
        else:
            before.regs = regs.copy()

    def ends(self, index: int) -> None:
        """``Observer.emulation_ends``: replays the instruction. What waits for userspace, or failed, is not judged."""
        vcpu = self.kvm.vcpus[index]
        ctxt = vcpu.emulate_ctxt
        if ctxt.cmpxchg_failed or ctxt.io_needed:
            return
        before = self.before[index]
        made = Comparison(ctxt.insn, before.restore(vcpu.regs), vcpu.regs, before.regs is None)
        if ctxt.have_exception:
            made.fault = ctxt.exception
        replay(made, ctxt.code, ctxt.accesses, self.bus)
        if made.unmodelled or not made.differences or explain(made):
            return
        what = f"{ctxt.insn.entry.mnemonic}: {', '.join(made.differences)}"
        detail = f"{vcpu.thread.name} emulated {ctxt.insn.entry.mnemonic} at rip {made.start:#x}: {_describe(made)}"
        self.sink.violated("emulator", what, detail)


def _vector(vector: int) -> str:
    return "no exception" if vector < 0 else f"exception {vector}"


def _describe(made: Comparison) -> str:
    """What the emulator made of the instruction, and what hardware makes of it."""
    after = made.after
    expected = made.expected
    parts = [f"{_vector(made.emulated_vector)}, hardware {_vector(made.expected_vector)}"]
    if after.rip != expected.rip:
        parts.append(f"rip {after.rip:#x}, hardware {expected.rip:#x}")
    if after.rflags != expected.rflags:
        parts.append(f"rflags {after.rflags:#x}, hardware {expected.rflags:#x}")
    for number in range(16):
        if after.gpr[number] != expected.gpr[number]:
            parts.append(f"register {number} {after.gpr[number]:#x}, hardware {expected.gpr[number]:#x}")
    return "; ".join(parts)
