"""Guest mode: one logical CPU executing guest code through its TLB and the shadow tables."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.case.model import CODE_SLOT
from mmufuzz.host.memory import PAGE_SIZE
from mmufuzz.host.sites import (
    GUEST_ATOMIC,
    GUEST_FENCE,
    GUEST_FETCH,
    GUEST_LOAD,
    GUEST_STORE,
    SPTE_ATOMIC,
    SPTE_WALK,
)
from mmufuzz.kvm.emulator_access import pages, set_efer, words
from mmufuzz.kvm.role import role_level
from mmufuzz.kvm.structs import Vcpu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.executor import execute
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.mmu import HardwareMmu, HostPhys
from mmufuzz.x86.paging import ACCESS_FETCH, ACCESS_USER, ACCESS_WRITE, PagingConfig
from mmufuzz.x86.state import CR0_PG, CR4_SMAP, CR4_SMEP, FLAG_AC, VECTOR_GP, VECTOR_PF, VECTOR_UD, Fault, Regs

# Exit reasons.
EXIT_INTERRUPT: Final = "external-interrupt"
EXIT_PF: Final = "page-fault"
EXIT_UD: Final = "invalid-opcode"
EXIT_CR: Final = "cr-access"
EXIT_INVLPG: Final = "invlpg"
EXIT_HLT: Final = "hlt"
EXIT_DONE: Final = "program-end"

MAX_INSN: Final = 15
SVM_EXIT_NPF: Final = 0x400


class VmExit:
    """Why guest mode was left. ``a`` and ``b`` qualify it: CR number and value, or address."""

    def __init__(self, reason: str, a: int = 0, b: int = 0) -> None:
        self.reason = reason
        self.a = a
        self.b = b
        self.length = 0
        """Bytes of the instruction that exited, where it completes by being skipped."""


@mypyc_attr(native_class=False)
class Intercepted(Exception):
    """The instruction exits before it completes."""

    def __init__(self, vmexit: VmExit) -> None:
        super().__init__(vmexit.reason)
        self.vmexit = vmexit


class ShadowTables(HostPhys):
    """The hardware walker's path to the shadow tables. Other CPUs' buffered stores are invisible to it."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    def load_entry(self, hpa: int) -> int:
        """One level of a hardware walk."""
        return self.vcpu.thread.load(SPTE_WALK, hpa)

    def set_entry_bits(self, hpa: int, expected: int, bits: int) -> bool:
        """A locked A/D update."""
        return self.vcpu.thread.cmpxchg(SPTE_ATOMIC, hpa, expected, expected | bits) == expected


class SpeculativeTables(HostPhys):
    """The same without scheduling points: a speculative walk is part of the event it is attached to."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    def load_entry(self, hpa: int) -> int:
        """One level of a hardware walk."""
        return self.vcpu.kvm.memory.read(hpa, 8)

    def set_entry_bits(self, hpa: int, expected: int, bits: int) -> bool:
        """A locked A/D update."""
        self.vcpu.kvm.memory.write(hpa, 8, expected | bits)
        return True


class GuestBus(Bus):
    """What guest code reaches: memory through the shadow tables; control registers by VM exit."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.mmu = HardwareMmu(vcpu.tlb, ShadowTables(vcpu))
        self.system = False
        """The access under way is a supervisor's whatever CPL is."""
        self.fetch_gva = 0
        """Where the last fetch was."""
        self.locked: list[tuple[int, int]] = []
        """What the last locked load translated to; the store that completes the operation goes there."""

    def hardware_config(self) -> PagingConfig:
        """Paging as KVM runs the guest on VMX (vmx.c:vmx_set_cr0, vmx_set_cr4).

        CR0.WP and EFER.NX are forced on; SMEP and SMAP are the guest's while it pages.
        """
        regs = self.vcpu.regs
        paging = regs.cr0 & CR0_PG != 0
        key = 0
        if paging and regs.cr4 & CR4_SMEP:
            key |= 1
        if paging and regs.cr4 & CR4_SMAP:
            key |= 2
        if regs.rflags & FLAG_AC:
            key |= 4
        return _CONFIGS[key]

    def translate(self, gva: int, access: int) -> int:
        """hpa of ``gva``; raises Fault for a #PF, which is always intercepted."""
        hpa = self._translation(gva, access)
        if hpa < 0:
            raise Fault(VECTOR_PF, self.mmu.error_code, gva)
        return hpa

    def _translation(self, gva: int, access: int) -> int:
        """hpa of ``gva``, or -1 for a #PF with the error code in ``mmu``."""
        vcpu = self.vcpu
        if (vcpu.regs.cpl == 3 and not self.system) or vcpu.guest_mode:
            access |= ACCESS_USER
        mmu = vcpu.mmu
        hpa = self.mmu.translation(self.hardware_config(), mmu.root_pfn, role_level(mmu.root_role), gva, access)
        if hpa >= 0:
            vcpu.kvm.observer.guest_access(vcpu.index, gva, hpa, access, False)
        return hpa

    def fill(self, gva: int) -> None:
        """A speculative translation (SDM 4.10.2.3), attached to some other event."""
        vcpu = self.vcpu
        walker = HardwareMmu(vcpu.tlb, SpeculativeTables(vcpu))
        access = ACCESS_USER if vcpu.regs.cpl == 3 or vcpu.guest_mode else 0
        walker.fill(self.hardware_config(), vcpu.mmu.root_pfn, role_level(vcpu.mmu.root_role), gva, access)

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """A guest load. All pages are translated before anything is read, as hardware does."""
        access = ACCESS_WRITE if rmw else 0
        thread = self.vcpu.thread
        pieces = [(self.translate(at, access), count) for at, count in pages(gva, size, regs.long_mode)]
        if locked:
            self.locked = pieces
            return self._load_locked(pieces)
        value = 0
        done = 0
        for hpa, length in pieces:
            for at, count in words(hpa, length):
                value |= thread.load(GUEST_LOAD, at, count) << (done << 3)
                done += count
        return value

    def _load_locked(self, pieces: list[tuple[int, int]]) -> int:
        """The read half of a locked operation; a split lock is atomic too, so it is one visible operation."""
        thread = self.vcpu.thread
        value = 0
        done = 0
        for hpa, length in pieces:
            for at, count in words(hpa, length):
                if done == 0:
                    part = thread.atomic_load(GUEST_ATOMIC, at, count)
                else:
                    part = thread.peek(at, count)
                value |= part << (done << 3)
                done += count
        return value

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """A guest store; a locked one completes the operation its load began, with no point between."""
        thread = self.vcpu.thread
        if locked:
            pieces = self.locked
        else:
            pieces = [(self.translate(at, ACCESS_WRITE), count) for at, count in pages(gva, size, regs.long_mode)]
        done = 0
        for hpa, length in pieces:
            for at, count in words(hpa, length):
                part = value >> (done << 3) & (1 << (count << 3)) - 1
                if locked:
                    thread.store_now(at, part, count)
                else:
                    thread.store(GUEST_STORE, at, part, count)
                done += count

    def code(self, gva: int, size: int) -> bytes | None:
        """Code bytes; None for a #PF, with the error code in ``mmu``: too common an end of a fetch for an exception."""
        hpa = self._translation(gva, ACCESS_FETCH)
        if hpa < 0:
            return None
        thread = self.vcpu.thread
        thread.host.point(GUEST_FETCH)
        return thread.peek_bytes(hpa, size).to_bytes(size, "little")

    def load_system(self, regs: Regs, gva: int, size: int) -> int:
        """A descriptor, gate or TSS field."""
        self.system = True
        try:
            return self.load(regs, gva, size, False, False)
        finally:
            self.system = False

    def store_system(self, regs: Regs, gva: int, size: int, value: int) -> None:
        """An accessed bit, or the stack of a handler."""
        self.system = True
        try:
            self.store(regs, gva, size, value, False)
        finally:
            self.system = False

    def write_efer(self, regs: Regs, value: int) -> None:
        """WRMSR exits; see ``set_efer``."""
        set_efer(regs, value)

    def fence(self, regs: Regs) -> None:
        """MFENCE; a serialising instruction that exits drains by the exit."""
        self.vcpu.thread.fence(GUEST_FENCE)

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """CR0, CR3 and CR4 writes exit with shadow paging. An L1 that lets L2 page is not modelled: #GP."""
        if self.vcpu.guest_mode:
            raise Fault(VECTOR_GP, 0)
        raise Intercepted(VmExit(EXIT_CR, number, value))

    def invlpg(self, regs: Regs, gva: int) -> None:
        """INVLPG exits with shadow paging; with nested paging it drops the combined translation."""
        if self.vcpu.guest_mode:
            self.vcpu.tlb.invalidate(gva >> 12)
            return
        raise Intercepted(VmExit(EXIT_INVLPG, gva))

    def halt(self, regs: Regs) -> None:
        """HLT exits."""
        raise Intercepted(VmExit(EXIT_HLT))


def _config(key: int) -> PagingConfig:
    return PagingConfig(
        4, cr0_wp=True, efer_nx=True, smep=key & 1 != 0, smap=key & 2 != 0, rflags_ac=key & 4 != 0
    )


_CONFIGS: Final = [_config(key) for key in range(8)]


def program_end(vcpu: Vcpu) -> int:
    """gva behind the last step."""
    return vcpu.spec.code_gva + CODE_SLOT * len(vcpu.spec.program)


def settle_rip(vcpu: Vcpu) -> None:
    """An instruction ended: where the bytes of its step end, the next step begins."""
    offset = vcpu.regs.rip - vcpu.spec.code_gva
    program = vcpu.spec.program
    step = offset // CODE_SLOT
    if 0 <= step < len(program) and offset % CODE_SLOT >= len(program[step]):
        step += 1
        vcpu.regs.rip = vcpu.spec.code_gva + CODE_SLOT * step
    if 0 <= step < len(program):
        vcpu.thread.step = step
    if vcpu.regs.rip == program_end(vcpu):
        vcpu.finished = True


def next_step(vcpu: Vcpu) -> None:
    """Leave the current step: what a test kernel's fixup table does after an exception it expects."""
    step = vcpu.thread.step + 1
    vcpu.regs.rip = vcpu.spec.code_gva + CODE_SLOT * step
    if step < len(vcpu.spec.program):
        vcpu.thread.step = step
    else:
        vcpu.finished = True


def run_guest(vcpu: Vcpu, bus: GuestBus) -> VmExit:
    """Execute guest code until something exits. Exceptions that KVM does not intercept are delivered natively."""
    kvm = vcpu.kvm
    while True:
        if vcpu.thread.peek(vcpu.ipi_address):
            return VmExit(EXIT_INTERRUPT)
        if vcpu.finished:
            return VmExit(EXIT_DONE)
        length = 0
        try:
            insn = fetch_insn(vcpu, bus)
            if insn is None:
                return VmExit(EXIT_PF, bus.fetch_gva, bus.mmu.error_code)
            length = insn.length
            execute(vcpu.regs, insn, bus)
        except Intercepted as intercepted:
            vmexit = intercepted.vmexit
            vmexit.length = length
            return vmexit
        except Fault as fault:
            if fault.vector == VECTOR_PF:
                return VmExit(EXIT_PF, fault.address, fault.error_code)
            if fault.vector == VECTOR_UD and kvm.options.fep:
                return VmExit(EXIT_UD)
            deliver(vcpu, fault.vector, fault.error_code, 0)
            continue
        vcpu.retired += 1
        vcpu.progress += 1
        settle_rip(vcpu)


def fetch_insn(vcpu: Vcpu, bus: GuestBus) -> Insn | None:
    """Fetch and decode at RIP; a second page is fetched only if the instruction reaches it.

    None for a #PF, at ``bus.fetch_gva``.
    """
    regs = vcpu.regs
    in_page = PAGE_SIZE - (regs.rip & PAGE_SIZE - 1)
    bus.fetch_gva = regs.rip
    code = bus.code(regs.rip, min(MAX_INSN, in_page))
    if code is None:
        return None
    try:
        return decode(code, regs.long_mode)
    except Truncated:
        bus.fetch_gva = regs.rip + in_page
        rest = bus.code(bus.fetch_gva, MAX_INSN - in_page)
        return None if rest is None else decode(code + rest, regs.long_mode)


def deliver(vcpu: Vcpu, vector: int, error_code: int, address: int) -> None:
    """The guest takes an exception: it is logged, and the guest goes on at its next step."""
    if vector == VECTOR_PF:
        if vcpu.guest_mode:
            vector = SVM_EXIT_NPF  # the nested page fault goes to L1, which resumes L2 behind the instruction
        else:
            vcpu.regs.cr2 = address
        vcpu.kvm.observer.guest_fault(vcpu.index, address, error_code)
    vcpu.kvm.host.note("guest exception {0} error {1:#x}", vector, error_code)
    vcpu.exceptions.append((vector, error_code, address, vcpu.regs.rip))
    vcpu.progress += 1
    next_step(vcpu)
