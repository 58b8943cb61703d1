"""KVM's instruction emulator (emulate.c): decoding, and the bus by which the shared executor runs an instruction.

Instruction semantics and the ALU are shared with the hardware side; what is KVM's own is which opcodes it knows and how
it reaches memory (``kvm.emulator_access``).
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SIZE
from mmufuzz.kvm.counters import RETRY_CMPXCHG
from mmufuzz.kvm.emulator_access import (
    EmulationFailed,
    IoNeeded,
    emulator_cmpxchg_emulated,
    emulator_read_emulated,
    emulator_read_std,
    emulator_write_emulated,
    emulator_write_std,
    kvm_fetch_guest_virt,
    set_cr,
    set_efer,
)
from mmufuzz.kvm.opcode_table import as_emulated, can_begin, can_decode, can_execute
from mmufuzz.kvm.root import kvm_mmu_invalidate_addr
from mmufuzz.kvm.structs import QueuedException, Vcpu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.executor import execute
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.state import VECTOR_GP, Fault, Regs

# Results of x86_emulate_insn.
EMULATION_FAILED: Final = -1
EMULATION_OK: Final = 0
EMULATION_RESTART: Final = 1

MAX_FETCH: Final = 15
BATCH: Final = 1024
"""Iterations of a REP instruction in one run of the emulator."""


def x86_page_table_writing_insn(insn: Insn) -> bool:
    """emulate.c:x86_page_table_writing_insn: opcodes taken for updates of page tables (reference section 5.3)."""
    opcode = insn.opcode
    if insn.opcode_map == 0:
        if 0x08 <= opcode <= 0x0D or 0x20 <= opcode <= 0x25:
            return True
        if opcode in (0x80, 0x81, 0x82, 0x83):
            return insn.reg_field in (1, 4)
        return opcode in (0x86, 0x87, 0x88, 0x89, 0x8C, 0xA2, 0xA3, 0xC6, 0xC7)
    if insn.opcode_map == 1:
        if opcode == 0xBA:
            return insn.reg_field in (5, 7)
        if opcode == 0xC7:
            return insn.mnemonic == "cmpxchg8b"
        return opcode in (0xAB, 0xBB, 0xB0, 0xB1)
    return False


def x86_decode_insn(vcpu: Vcpu) -> Insn:
    """emulate.c:x86_decode_insn, __do_insn_fetch_bytes: fetch through the guest's tables as they are at this moment.

    Raises EmulationFailed for an opcode without entry, Fault for a fetch that the guest must see.
    """
    regs = vcpu.regs
    in_page = PAGE_SIZE - (regs.rip & PAGE_SIZE - 1)
    code = kvm_fetch_guest_virt(vcpu, regs.rip, min(MAX_FETCH, in_page))
    try:
        insn = _decode_or_fail(code, regs)
    except Truncated:
        code += kvm_fetch_guest_virt(vcpu, regs.rip + in_page, MAX_FETCH - in_page)
        insn = _decode_or_fail(code, regs)
    if not can_decode(insn):
        raise EmulationFailed
    return as_emulated(insn)


def _decode_or_fail(code: bytes, regs: Regs) -> Insn:
    try:
        return decode(code, regs.long_mode)
    except Fault as fault:
        if fault.vector == VECTOR_GP:
            raise
        raise EmulationFailed from fault


def decoded(vcpu: Vcpu) -> Insn:
    """The instruction that the emulator decoded last."""
    insn = vcpu.emulate_ctxt.insn
    assert insn is not None
    return insn


def x86_emulate_insn(vcpu: Vcpu) -> int:
    """emulate.c:x86_emulate_insn: execute ``decoded(vcpu)``; one of the results above.

    A fault, and whether the instruction came to its end, are in ``Vcpu.emulate_ctxt``. Not to its end and without a
    fault: userspace has to answer first, or the guest executes it again.
    """
    regs = vcpu.regs
    ctxt = vcpu.emulate_ctxt
    insn = decoded(vcpu)
    ctxt.mem_read_pos = 0
    ctxt.exception = None
    ctxt.completed = False
    rip = regs.rip
    gpr = regs.gpr[:]
    bus = EmulatorBus(vcpu, insn)
    try:
        if not can_begin(insn, regs):
            return EMULATION_FAILED
        execute(regs, insn, bus)
    except EmulationFailed:
        return EMULATION_FAILED
    except IoNeeded:
        return EMULATION_OK
    except Fault as fault:
        ctxt.exception = QueuedException(fault.vector, fault.error_code, fault.address)
        return EMULATION_OK
    if bus.cmpxchg_failed:
        # Neither RIP nor registers are written back, so the guest executes the instruction again; RFLAGS are.
        vcpu.kvm.count_retry(RETRY_CMPXCHG)
        regs.rip = rip
        regs.gpr = gpr
    else:
        ctxt.completed = not bus.restart
    return EMULATION_OK


_STD: Final = ("sgdt", "sidt", "lgdt", "lidt", "fxsave", "fxrstor")
"""Instructions whose explicit operands go through emulator_read_std and emulator_write_std."""


class EmulatorBus(Bus):
    """The emulator's view of memory and control registers (x86.c:emulate_ops) while it executes ``insn``."""

    def __init__(self, vcpu: Vcpu, insn: Insn) -> None:
        self.vcpu = vcpu
        self.complete = can_execute(insn)
        """False: the instruction fails once it has read its operand."""
        self.std = insn.mnemonic in _STD
        self.local = insn.mnemonic == "enter"
        """What is stored is a local variable of the emulator (emulate.c:em_enter)."""
        self.expected = -1
        """What the last locked load read: the comparand of the cmpxchg that will write back."""
        self.cmpxchg_failed = False
        """X86EMUL_CMPXCHG_FAILED: somebody else changed the operand."""
        self.restart = False
        """A repeated instruction has left the emulator between two of its elements."""

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """emulate.c:read_emulated. A #PF of a read-modify-write carries W (emulate.c:x86_emulate_insn)."""
        if self.std:
            return emulator_read_std(self.vcpu, gva, size, False)
        ctxt = self.vcpu.emulate_ctxt
        cache = ctxt.mem_read
        if ctxt.mem_read_pos == len(cache):
            cache.append(emulator_read_emulated(self.vcpu, gva, size, rmw))
        value = cache[ctxt.mem_read_pos]
        ctxt.mem_read_pos += 1
        if not self.complete:
            raise EmulationFailed
        if locked:
            self.expected = value
        return value

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """emulate.c:writeback: a plain store, or emulator_cmpxchg_emulated after a locked load."""
        if self.std:
            emulator_write_std(self.vcpu, gva, size, value, False)
        elif not locked:
            emulator_write_emulated(self.vcpu, gva, size, value, self.local)
        elif not emulator_cmpxchg_emulated(self.vcpu, gva, size, self.expected, value):
            self.cmpxchg_failed = True

    def load_system(self, regs: Regs, gva: int, size: int) -> int:
        """emulate.c:linear_read_system."""
        return emulator_read_std(self.vcpu, gva, size, True)

    def store_system(self, regs: Regs, gva: int, size: int, value: int) -> None:
        """emulate.c:linear_write_system."""
        emulator_write_std(self.vcpu, gva, size, value, True)

    def between_elements(self, regs: Regs, count: int) -> bool:
        """emulate.c:x86_emulate_insn: a REP instruction leaves every 1024 iterations, and to let userspace answer."""
        self.restart = self.vcpu.mmio.needed or count & BATCH - 1 == 0
        self.vcpu.emulate_ctxt.mem_read.clear()
        self.vcpu.emulate_ctxt.mem_read_pos = 0
        return self.restart

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """x86.c:kvm_fetch_guest_virt."""
        return kvm_fetch_guest_virt(self.vcpu, gva, size)

    def fence(self, regs: Regs) -> None:
        """Not reached: the emulator has no fences."""

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """emulate.c:em_cr_write."""
        if self.vcpu.guest_mode or not set_cr(self.vcpu, number, value):
            raise Fault(VECTOR_GP, 0)

    def write_efer(self, regs: Regs, value: int) -> None:
        """emulate.c:em_wrmsr: see ``set_efer``."""
        set_efer(regs, value)

    def invlpg(self, regs: Regs, gva: int) -> None:
        """emulate.c:em_invlpg."""
        kvm_mmu_invalidate_addr(self.vcpu, gva)
        self.vcpu.kvm.observer.guest_invalidated(self.vcpu.index, gva)

    def halt(self, regs: Regs) -> None:
        """x86.c:kvm_emulate_halt."""
        self.vcpu.userspace_exits.append("hlt")
        self.vcpu.halt_request = True
