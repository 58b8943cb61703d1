"""What an emulated instruction left against what the executor leaves, from the same state."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import Access
from mmufuzz.kvm.emulate_decode import Decoded
from mmufuzz.kvm.opcode_table import STRING
from mmufuzz.oracle.emulator_replay import BeyondTheRecord, Replay
from mmufuzz.x86.decode import Truncated, Unsupported, decode, decode16
from mmufuzz.x86.executor import execute
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.state import FLAG_RF, VECTOR_PF, Fault, Regs

# What may differ.
EXCEPTION: Final = "exception"
ERROR_CODE: Final = "error code"
ADDRESS: Final = "address"
RIP: Final = "rip"
FLAGS: Final = "flags"
MEMORY: Final = "memory"
PRIVILEGE: Final = "privilege"
GPR: Final = "registers"
VECTORS: Final = "vector registers"
X87: Final = "x87"
SEGMENTS: Final = "segments"
SYSTEM: Final = "system registers"
SHADOW: Final = "interrupt shadow"
ACCESSES: Final = "accesses"

FAULT: Final = (EXCEPTION, ERROR_CODE, ADDRESS, ACCESSES)
"""What may differ if only one of them faults, or both for another reason."""
_OUTSIDE: Final = (*FAULT, MEMORY, PRIVILEGE)
"""What is not compared register by register."""

_MASK32: Final = 0xFFFFFFFF

NO_REPLAY: Final = Replay()
"""Stands where there is none yet."""


class Comparison:
    """One emulated instruction beside its hardware execution.

    ``decoded`` is the emulator's view, ``insn`` the CPU's (None if it raises an exception while decoding). The faults
    are what the instruction ended with; ``after`` is the emulator's state, ``expected`` the hardware's, ``origin()``
    what both began with.
    """

    def __init__(self, decoded: Decoded, before: Regs, after: Regs, general: bool = False) -> None:
        self.decoded = decoded
        self.general = general
        """Only general registers, RIP and RFLAGS can change."""
        self.insn: Insn | None = None
        self.code = b""
        self.before = before
        self.gpr = before.gpr[:]
        self.rflags = before.rflags
        self.shadow = before.shadow
        self.others: Regs | None = None if general else before.copy()
        """What else there was before the instruction; None if it cannot change."""
        self.after = after
        self.expected = before
        self.fault: Fault | None = None
        self.expected_fault: Fault | None = None
        self.mode64 = before.long_mode
        self.user = before.cpl == 3
        self.start = before.rip
        self.bits = 64 if before.long_mode else 16 if before.code16 else 32
        self.accesses: list[Access] = []
        self.bus = NO_REPLAY
        self.tried: tuple[str, ...] = ()
        """Deviations of the emulator that are made good already."""
        self.unmodelled = False
        """The executor lacks the instruction: there is nothing to compare with."""
        self.differences: list[str] = []

    def origin(self) -> Regs:
        """A copy of the registers before the instruction."""
        regs = self.after.copy() if self.others is None else self.others.copy()
        regs.gpr = self.gpr[:]
        regs.rip = self.start
        regs.rflags = self.rflags
        regs.shadow = self.shadow
        return regs

    @property
    def repeated(self) -> bool:
        """A string instruction with a REP prefix."""
        return self.decoded.rep != 0 and self.decoded.d & STRING != 0

    @property
    def emulated_vector(self) -> int:
        """The vector that the emulator raised, or -1."""
        return -1 if self.fault is None else self.fault.vector

    @property
    def expected_vector(self) -> int:
        """The vector that hardware raises, or -1."""
        return -1 if self.expected_fault is None else self.expected_fault.vector


def hardware_decode(code: bytes, bits: int) -> Insn:
    """The instruction as the CPU decodes it."""
    return decode16(code) if bits == 16 else decode(code, bits == 64)


def replay(made: Comparison, code: bytes, accesses: list[Access], bus: Replay) -> None:
    """Execute ``code`` in ``made.before`` over the recorded accesses; sets ``expected`` and ``differences``.

    ``made.before`` becomes the expected state.
    """
    made.code = code
    try:
        insn = hardware_decode(code, made.bits)
    except (Unsupported, Truncated):
        made.unmodelled = True
    except Fault as fault:
        made.expected_fault = fault.with_traceback(None)
        _replay(made, None, accesses, bus)
    else:
        _replay(made, insn, accesses, bus)


def _replay(made: Comparison, insn: Insn | None, accesses: list[Access], bus: Replay) -> None:
    made.insn = insn
    made.accesses = accesses
    made.bus = bus
    bus.begin(accesses, made.fault, made.after, made.mode64)
    beyond = False
    if insn is not None:
        try:
            execute(made.before, insn, bus)
        except Unsupported:
            made.unmodelled = True
            return
        except Fault as fault:
            made.expected_fault = fault.with_traceback(None)
        except BeyondTheRecord:
            # A repeated instruction that has left the emulator ends where its accesses do.
            beyond = not made.repeated
    made.expected = made.before
    _compare(made, bus, beyond)


def translated(made: Comparison, insn: Insn, before: Regs, after: Regs, accesses: list[Access]) -> Comparison:
    """The comparison made again, with another instruction, or other states and accesses in which it is the same."""
    other = Comparison(made.decoded, before, after, made.general)
    other.code = made.code
    other.fault = made.fault
    other.tried = made.tried
    _replay(other, insn, accesses, Replay())
    return other


def expecting(made: Comparison, expected: Regs, settled: tuple[str, ...]) -> Comparison:
    """The comparison with registers as they are ``expected``, and without the differences that are ``settled``."""
    other = Comparison(made.decoded, made.expected, made.after, True)
    other.general = made.general
    other.gpr = made.gpr
    other.rflags = made.rflags
    other.shadow = made.shadow
    other.others = made.others
    other.mode64 = made.mode64
    other.user = made.user
    other.start = made.start
    other.bits = made.bits
    other.code = made.code
    other.insn = made.insn
    other.accesses = made.accesses
    other.bus = made.bus
    other.tried = made.tried
    other.fault = made.fault
    other.expected_fault = made.fault if EXCEPTION in settled else made.expected_fault
    other.expected = expected
    other.differences = [found for found in made.differences if found in _OUTSIDE and found not in settled]
    compare_registers(other)
    return other


def _compare(made: Comparison, bus: Replay, beyond: bool) -> None:
    found = made.differences
    if made.emulated_vector != made.expected_vector:
        found.append(EXCEPTION)
    elif made.fault is not None and made.expected_fault is not None:
        if made.fault.error_code != made.expected_fault.error_code:
            found.append(ERROR_CODE)
        if made.fault.vector == VECTOR_PF and made.fault.address != made.expected_fault.address:
            found.append(ADDRESS)
    if beyond:
        found.append(ACCESSES)
    if made.user and not (bus.privilege and bus.same_write_privilege()):
        found.append(PRIVILEGE)
    if made.emulated_vector < 0 or made.repeated:
        if not bus.same_writes():
            found.append(MEMORY)
    elif bus.writes:
        # An instruction that faults has written nothing.
        found.append(MEMORY)
    compare_registers(made)


def compare_registers(made: Comparison) -> None:
    """Append what differs between ``after`` and ``expected``."""
    found = made.differences
    after = made.after
    expected = made.expected
    if after.gpr != expected.gpr and (made.mode64 or not _same_low_halves(after.gpr, expected.gpr)):
        found.append(GPR)
    if after.rip != expected.rip:
        found.append(RIP)
    if (after.rflags ^ expected.rflags) & ~FLAG_RF:
        found.append(FLAGS)
    if after.shadow != expected.shadow and made.emulated_vector < 0 and made.expected_vector < 0:
        # The delivery of an exception ends a shadow.
        found.append(SHADOW)
    if made.general:
        return
    if after.xmm != expected.xmm:
        found.append(VECTORS)
    if after.fpr != expected.fpr or (after.fcw, after.fsw, after.ftw, after.mxcsr) != (
        expected.fcw,
        expected.fsw,
        expected.ftw,
        expected.mxcsr,
    ):
        found.append(X87)
    if not same_segments(after, expected):
        found.append(SEGMENTS)
    if _system(after) != _system(expected):
        found.append(SYSTEM)


def _same_low_halves(left: list[int], right: list[int]) -> bool:
    return all((left[index] ^ right[index]) & _MASK32 == 0 for index in range(8))


def same_segments(left: Regs, right: Regs) -> bool:
    """Segment registers with their hidden parts, and CPL; of an unusable one only the selector counts."""
    if left.cpl != right.cpl:
        return False
    for index in range(8):
        one = left.segments[index]
        two = right.segments[index]
        if one.selector != two.selector or (one.rights ^ two.rights) & 1 << 16:
            return False
        if one.rights & 1 << 16:
            continue
        if (one.base, one.limit, one.rights) != (two.base, two.limit, two.rights):
            return False
    return True


def _system(regs: Regs) -> tuple[int, ...]:
    return (
        *(regs.cr0, regs.cr2, regs.cr3, regs.cr4, regs.cr8, regs.efer, regs.xcr0, regs.pkru),
        *(regs.gdt_base, regs.gdt_limit, regs.idt_base, regs.idt_limit),
        *regs.dr,
        *(regs.msr[number] for number in sorted(regs.msr)),
    )
