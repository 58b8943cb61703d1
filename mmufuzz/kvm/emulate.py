"""KVM's instruction emulator (emulate.c): decoding, and the bus by which the shared executor runs an instruction.

Instruction semantics and the ALU are shared with the hardware side; what is KVM's own is which opcodes it knows and how
it reaches memory (``kvm.emulator_access``).
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SIZE
from mmufuzz.kvm.emulator_access import (
    EmulationFailed,
    emulator_cmpxchg_emulated,
    emulator_read_emulated,
    emulator_write_emulated,
    kvm_fetch_guest_virt,
    set_cr,
    set_efer,
)
from mmufuzz.kvm.opcode_table import as_emulated, can_decode
from mmufuzz.kvm.root import kvm_mmu_invalidate_addr
from mmufuzz.kvm.structs import Vcpu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.state import VECTOR_GP, Fault, Regs

MAX_FETCH: Final = 15


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


class EmulatorBus(Bus):
    """The emulator's view of memory and control registers (x86.c:emulate_ops).

    Without ``complete`` the instruction fails once it has read its operand.
    """

    def __init__(self, vcpu: Vcpu, complete: bool = True) -> None:
        self.vcpu = vcpu
        self.complete = complete
        self.expected = -1
        """What the last locked load read: the comparand of the cmpxchg that will write back."""
        self.cmpxchg_failed = False
        """X86EMUL_CMPXCHG_FAILED: somebody else changed the operand."""

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """x86.c:emulator_read_emulated. A #PF of a read-modify-write carries W (emulate.c:x86_emulate_insn)."""
        value = emulator_read_emulated(self.vcpu, gva, size, rmw)
        if not self.complete:
            raise EmulationFailed
        if locked:
            self.expected = value
        return value

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """emulate.c:writeback: a plain store, or emulator_cmpxchg_emulated after a locked load."""
        if not locked:
            emulator_write_emulated(self.vcpu, gva, size, value)
        elif not emulator_cmpxchg_emulated(self.vcpu, gva, size, self.expected, value):
            self.cmpxchg_failed = True

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
        self.vcpu.progress += 1
