"""What the harness of decoder, executor and emulator does with an input.

At most ``MOST_INSTRUCTIONS`` are executed, one behind the other wherever they branch to: after an exception the next
one follows, as in the model's guests. Memory is everywhere and holds the instructions over and over, so that whoever
changes the input changes descriptors, gates and stacks too.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.campaign.insn_emulator import emulate
from mmufuzz.campaign.insn_inputs import MOST_INSTRUCTIONS, decoded
from mmufuzz.campaign.insn_states import HEADER, absent_pages, registers
from mmufuzz.kvm.opcode_table import Opcode
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import MAX_LENGTH, Unsupported
from mmufuzz.x86.event import TripleFault, deliver_exception
from mmufuzz.x86.execute_operands import RCX
from mmufuzz.x86.executor import execute
from mmufuzz.x86.insn import REP_NONE, Insn
from mmufuzz.x86.state import CR0_PG, PFERR_USER, PFERR_WRITE, VECTOR_GP, VECTOR_PF, Fault, Regs

ORIGIN: Final = 0x1000

_BEHIND_FAULTS: Final = frozenset(("movdr",))
"""Instructions that change something and fault: general detect clears DR7.GD (SDM vol. 3, 18.2.4)."""


class EchoBus(Bus):
    """Memory that holds ``fill`` over and over until it is written to, on all pages but those of ``absent``.

    Code is apart from it: what is fetched at RIP is ``code``, wherever the code segment begins.
    """

    def __init__(self, fill: bytes, absent: list[int]) -> None:
        self.fill = fill
        self.absent = absent
        self.memory: dict[int, int] = {}
        self.code = b""
        self.code_at = -1

    def copy(self, code: bytes) -> EchoBus:
        """The same memory, with ``code`` to fetch."""
        other = EchoBus(self.fill, self.absent)
        other.memory = self.memory.copy()
        other.code = code
        return other

    def _check(self, regs: Regs, gva: int, size: int, write: bool) -> None:
        if not self.absent:
            return
        for at in (gva, gva + size - 1 & ~0xFFF):
            if at >> 12 in self.absent:
                user = regs.cpl == 3 and not self.system
                raise Fault(VECTOR_PF, (PFERR_WRITE if write else 0) | (PFERR_USER if user else 0), at)

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """See ``Bus``."""
        self._check(regs, gva, size, rmw)
        fill = self.fill
        value = 0
        for place in range(size):
            at = gva + place
            value |= self.memory.get(at, fill[at % len(fill)]) << (8 * place)
        return value

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """See ``Bus``."""
        assert 0 <= value < 1 << (8 * size), "a store wider than its size"
        self._check(regs, gva, size, True)
        for place in range(size):
            self.memory[gva + place] = value >> (8 * place) & 0xFF

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """See ``Bus``. The first fetch is at RIP."""
        if self.code_at < 0:
            self.code_at = gva
        offset = gva - self.code_at
        return self.code[offset : offset + size]

    def fence(self, regs: Regs) -> None:
        """See ``Bus``."""

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """Paging stays off, and with it the mode of the code."""
        if number == 0:
            if (value ^ regs.cr0) & (1 | CR0_PG) or value >> 32:
                raise Fault(VECTOR_GP, 0)
            regs.cr0 = value
        elif number == 3:
            regs.cr3 = value
        else:
            regs.cr4 = value

    def invlpg(self, regs: Regs, gva: int) -> None:
        """See ``Bus``."""

    def halt(self, regs: Regs) -> None:
        """See ``Bus``."""


class Step:
    """One instruction of an input, as code of ``bits``.

    ``insn`` is what hardware executed, with the vector of the exception it raised, or -1; ``entry`` what the emulator
    did. Either may be None, but not both.
    """

    def __init__(self, bits: int, insn: Insn | None, vector: int, entry: Opcode | None) -> None:
        self.bits = bits
        self.insn = insn
        self.vector = vector
        self.entry = entry


def step(regs: Regs, insn: Insn, bus: EchoBus) -> int:
    """Execute: the vector of the exception, or -1. An exception leaves the registers alone."""
    before = regs.words()
    vector = -1
    try:
        execute(regs, insn, bus)
    except TripleFault:
        vector = 8
    except Fault as fault:
        vector = fault.vector
        assert 0 <= vector < 256, "an impossible vector"
        partial = insn.rep != REP_NONE or insn.mnemonic in _BEHIND_FAULTS
        assert partial or regs.words() == before, f"{insn.mnemonic} faults and changes registers"
        if regs.idt_limit and not isinstance(fault, Unsupported):
            handle(regs, bus, fault)
    check(regs)
    return vector


def handle(regs: Regs, bus: EchoBus, fault: Fault) -> None:
    """Deliver an exception through the IDT; a triple fault and what the model lacks leave it undelivered."""
    try:
        deliver_exception(regs, bus, fault)
    except (TripleFault, Unsupported):
        return


def check(regs: Regs) -> None:
    """Registers are within their widths."""
    for value in regs.gpr:
        assert 0 <= value < 1 << 64, "a register out of range"
    for value in regs.xmm:
        assert 0 <= value < 1 << 256, "a vector register out of range"
    for value in regs.fpr:
        assert 0 <= value < 1 << 80, "an x87 register out of range"
    assert 0 <= regs.rip < 1 << 64, "RIP out of range"
    assert 0 <= regs.rflags < 1 << 32 and regs.rflags & 2, "RFLAGS out of range"
    assert 0 <= regs.fsw < 1 << 16 and 0 <= regs.ftw < 1 << 8, "x87 status out of range"


def run(data: bytes) -> list[Step]:
    """Execute an input, each instruction by the emulator first. Raises ``AssertionError`` for what must not be."""
    done: list[Step] = []
    if len(data) <= HEADER:
        return done
    regs = registers(data)
    bus = EchoBus(data[HEADER:], absent_pages(data))
    offset = HEADER
    while len(done) < MOST_INSTRUCTIONS and offset < len(data):
        # A far transfer may have changed it.
        bits = 64 if regs.long_mode else 16 if regs.code16 else 32
        code = data[offset : offset + MAX_LENGTH].ljust(MAX_LENGTH, b"\0")
        regs.rip = ORIGIN + offset
        if 0xF2 in code or 0xF3 in code:
            # A repetition is to end soon.
            regs.gpr[RCX] &= 0xF
        entry, length = emulate(regs, bus.copy(code))
        insn = decoded(code, bits)
        if insn is not None:
            done.append(Step(bits, insn, step(regs, insn, bus), entry))
            offset += insn.length
        elif entry is not None:
            done.append(Step(bits, None, -1, entry))
            offset += length
        else:
            offset += 1
    return done
