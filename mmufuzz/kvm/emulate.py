"""KVM's instruction emulator (emulate.c) and its memory accesses (x86.c:emulator_read_write and below).

Instruction semantics and the ALU are shared with the hardware side; what is KVM's own is which opcodes it knows, how it
translates, and what a store sets off.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.host.memory import ALL_ONES, PAGE_SHIFT, PAGE_SIZE
from mmufuzz.host.sites import EMUL_ATOMIC, EMUL_FETCH, EMUL_LOAD, EMUL_STORE
from mmufuzz.kvm.memslots import gfn_to_memslot, gpa_to_hpa
from mmufuzz.kvm.opcode_table import as_emulated, can_decode
from mmufuzz.kvm.role import ACC_USER_MASK, ACC_WRITE_MASK
from mmufuzz.kvm.root import kvm_mmu_invalidate_addr, kvm_set_cr0, kvm_set_cr3, kvm_set_cr4
from mmufuzz.kvm.structs import INVALID_GPA, Vcpu
from mmufuzz.kvm.track import kvm_mmu_track_write
from mmufuzz.kvm.walker import gva_to_gpa, vcpu_match_mmio_gva
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.paging import ACCESS_FETCH, ACCESS_USER, ACCESS_WRITE, permitted
from mmufuzz.x86.state import CR4_SMEP, EFER_SCE, PFERR_WRITE, VECTOR_GP, VECTOR_PF, Fault, Regs

CACHE_LINE: Final = 64
MAX_FETCH: Final = 15

@mypyc_attr(native_class=False)
class EmulationFailed(Exception):
    """EMULATION_FAILED: the emulator does not know the instruction."""


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
    bus = EmulatorBus(vcpu)
    in_page = PAGE_SIZE - (regs.rip & PAGE_SIZE - 1)
    code = bus.fetch(regs, regs.rip, min(MAX_FETCH, in_page))
    try:
        insn = _decode_or_fail(code, regs)
    except Truncated:
        code += bus.fetch(regs, regs.rip + in_page, MAX_FETCH - in_page)
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
        value = 0
        done = 0
        for at, count in pages(gva, size, regs.long_mode):
            gpa = self._mmio_gva_to_gpa(at, 0, PFERR_WRITE if rmw else 0)
            value |= self._read_page(gpa, count) << (done << 3)
            done += count
        if not self.complete:
            raise EmulationFailed
        if locked:
            self.expected = value
        return value

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """emulate.c:writeback: a plain store, or emulator_cmpxchg_emulated after a locked load."""
        if locked and self._cmpxchg(gva, size, value):
            return
        done = 0
        for at, count in pages(gva, size, regs.long_mode):
            part = value >> (done << 3) & (1 << (count << 3)) - 1
            gpa = self._mmio_gva_to_gpa(at, ACCESS_WRITE, 0)
            self._write_page(gpa, count, part)
            done += count

    def fetch(self, regs: Regs, gva: int, size: int) -> bytes:
        """x86.c:kvm_fetch_guest_virt."""
        return self._read_code(self._translate(gva, ACCESS_FETCH, 0), size)

    def read_std(self, regs: Regs, gva: int, size: int) -> bytes:
        """x86.c:kvm_read_guest_virt: bytes as data, page by page."""
        code = b""
        for at, count in pages(gva, size, regs.long_mode):
            code += self._read_code(self._translate(at, 0, 0), count)
        return code

    def _read_code(self, gpa: int, size: int) -> bytes:
        if gfn_to_memslot(self.vcpu.kvm, gpa >> PAGE_SHIFT) is None:
            raise EmulationFailed
        thread = self.vcpu.kvm.host.current
        thread.host.point(EMUL_FETCH)
        return thread.peek_bytes(gpa_to_hpa(gpa), size).to_bytes(size, "little")

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

    def _mmio_gva_to_gpa(self, gva: int, access: int, extra_error: int) -> int:
        """x86.c:vcpu_mmio_gva_to_gpa: the page of the last MMIO access needs no walk; raises the guest's #PF."""
        vcpu = self.vcpu
        if vcpu_match_mmio_gva(vcpu, gva):
            cached = vcpu.mmio_access
            user = ACCESS_USER if vcpu.regs.cpl == 3 else 0
            writable = cached & ACC_WRITE_MASK != 0
            if permitted(vcpu.paging, writable, cached & ACC_USER_MASK != 0, False, access | user):
                return vcpu.mmio_gfn << PAGE_SHIFT | gva & PAGE_SIZE - 1
        return self._translate(gva, access, extra_error)

    def _translate(self, gva: int, access: int, extra_error: int) -> int:
        """mmu->gva_to_gpa of walk_mmu; raises the guest's #PF."""
        vcpu = self.vcpu
        if vcpu.regs.cpl == 3:
            access |= ACCESS_USER
        gpa, error_code = gva_to_gpa(vcpu, gva, access)
        if gpa == INVALID_GPA:
            raise Fault(VECTOR_PF, error_code | extra_error, gva)
        if gfn_to_memslot(vcpu.kvm, gpa >> PAGE_SHIFT) is not None:
            vcpu.kvm.observer.guest_access(vcpu.index, gva, gpa_to_hpa(gpa), access, True)
        return gpa

    def _read_page(self, gpa: int, size: int) -> int:
        """x86.c:emulator_read_write_onepage, reading: no slot means MMIO, which reads as zero here."""
        if gfn_to_memslot(self.vcpu.kvm, gpa >> PAGE_SHIFT) is None:
            self._mmio_exit("read", gpa)
            return 0
        thread = self.vcpu.kvm.host.current
        value = 0
        done = 0
        for at, count in words(gpa_to_hpa(gpa), size):
            value |= thread.load(EMUL_LOAD, at, count) << (done << 3)
            done += count
        return value

    def _write_page(self, gpa: int, size: int, value: int) -> None:
        """x86.c:emulator_write_phys: store, then tell the shadow MMU. No slot, or a read-only one: an MMIO exit."""
        kvm = self.vcpu.kvm
        slot = gfn_to_memslot(kvm, gpa >> PAGE_SHIFT)
        if slot is None or slot.readonly:
            self._mmio_exit("write", gpa)
            return
        thread = kvm.host.current
        done = 0
        for at, count in words(gpa_to_hpa(gpa), size):
            thread.store(EMUL_STORE, at, value >> (done << 3) & (1 << (count << 3)) - 1, count)
            done += count
        kvm_mmu_track_write(self.vcpu, gpa, size)

    def _cmpxchg(self, gva: int, size: int, value: int) -> bool:
        """x86.c:emulator_cmpxchg_emulated; False where KVM falls back to a plain write.

        One reason is a cache line crossed: the host has split-lock detection, so the access would raise #AC there.
        """
        kvm = self.vcpu.kvm
        if size > 8 or size & (size - 1):
            return False
        gpa, _ = gva_to_gpa(self.vcpu, gva, ACCESS_WRITE | (ACCESS_USER if self.vcpu.regs.cpl == 3 else 0))
        if gpa == INVALID_GPA or (gpa & CACHE_LINE - 1) + size > CACHE_LINE:
            return False
        slot = gfn_to_memslot(kvm, gpa >> PAGE_SHIFT)
        if slot is None or slot.readonly:
            return False
        kvm.mark("emulate.cmpxchg")
        if self._locked_cmpxchg(gpa_to_hpa(gpa), size, value):
            kvm_mmu_track_write(self.vcpu, gpa, size)
        else:
            kvm.mark("emulate.cmpxchg_failed")
            self.cmpxchg_failed = True
        return True

    def _locked_cmpxchg(self, hpa: int, size: int, value: int) -> bool:
        """LOCK CMPXCHG by the host, on one or two words; one visible operation."""
        thread = self.vcpu.kvm.host.current
        pieces = words(hpa, size)
        found = thread.atomic_load(EMUL_ATOMIC, pieces[0][0], pieces[0][1])
        done = pieces[0][1]
        for at, count in pieces[1:]:
            found |= thread.peek(at, count) << (done << 3)
            done += count
        if found != self.expected:
            return False
        done = 0
        for at, count in pieces:
            thread.store_now(at, value >> (done << 3) & (1 << (count << 3)) - 1, count)
            done += count
        return True

    def _mmio_exit(self, what: str, gpa: int) -> None:
        """KVM_EXIT_MMIO; the modelled userspace has no device there.

        The access is a visible operation like one to memory, so that a REP instruction on MMIO meets the event limit.
        """
        self.vcpu.kvm.host.point(EMUL_STORE if what == "write" else EMUL_LOAD)
        self.vcpu.userspace_exits.append(f"mmio {what} {gpa:#x}")
        self.vcpu.kvm.mark("exit_userspace.mmio")


def set_cr(vcpu: Vcpu, number: int, value: int) -> bool:
    """MOV to CR ``number`` (0, 3 or 4), by exit or emulated; False asks for #GP(0)."""
    if number == 0:
        return kvm_set_cr0(vcpu, value)
    if number == 3:
        done = kvm_set_cr3(vcpu, value)
        flushes = True
    else:
        # Of the changes KVM lets pass, setting SMEP invalidates (SDM vol. 3, 4.10.4.1).
        flushes = value & ~vcpu.regs.cr4 & CR4_SMEP != 0
        done = kvm_set_cr4(vcpu, value)
    if done and flushes:
        vcpu.kvm.observer.guest_invalidated(vcpu.index, -1)
    return done


def set_efer(regs: Regs, value: int) -> None:
    """x86.c:set_efer, of which only EFER.SCE is modelled: what would change the MMU's role is #GP(0)."""
    if (value ^ regs.efer) & ~EFER_SCE:
        raise Fault(VECTOR_GP, 0)
    regs.efer = value


def pages(gva: int, size: int, long_mode: bool) -> list[tuple[int, int]]:
    """The pieces of an access by page: (address, bytes). Addresses wrap at 2^64, outside 64-bit mode at 2^32."""
    first = PAGE_SIZE - (gva & PAGE_SIZE - 1)
    if size <= first:
        return [(gva, size)]
    return [(gva, first), (gva + first & (ALL_ONES if long_mode else 0xFFFF_FFFF), size - first)]


def words(address: int, size: int) -> list[tuple[int, int]]:
    """The pieces of an access by aligned 64-bit word, each of 1, 2, 4 or 8 bytes."""
    if size in (1, 2, 4, 8) and (address & 7) + size <= 8:
        return [(address, size)]
    pieces = []
    while size:
        count = 8
        while count > size or address & (count - 1):
            count >>= 1
        pieces.append((address, count))
        address += count
        size -= count
    return pieces
