"""Guest mode: one logical CPU executing guest code through its TLB and the shadow tables."""

from __future__ import annotations

from typing import Final

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
from mmufuzz.kvm.exits import (
    EXIT_AC,
    EXIT_CR,
    EXIT_DB,
    EXIT_DONE,
    EXIT_HLT,
    EXIT_INTERRUPT,
    EXIT_INTERRUPT_WINDOW,
    EXIT_INVLPG,
    EXIT_INVPCID,
    EXIT_PF,
    EXIT_UD,
    Intercepted,
    VmExit,
)
from mmufuzz.kvm.guest_events import deliver, deliver_event, has_idt, inject_event, settle_rip, software_event
from mmufuzz.kvm.intercepts import INTERCEPTED, intercept
from mmufuzz.kvm.interrupts import vmx_interrupt_blocked
from mmufuzz.kvm.role import role_level
from mmufuzz.kvm.structs import QueuedException, Vcpu
from mmufuzz.x86.breakpoints import DR7_ENABLED, WatchedBus, code_breakpoint
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.decode import Truncated, decode, decode16
from mmufuzz.x86.executor import execute
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.mmu import HardwareMmu, HostPhys
from mmufuzz.x86.paging import (
    ACCESS_FETCH,
    ACCESS_USER,
    ACCESS_WRITE,
    INVPCID_ADDRESS,
    INVPCID_ALL_GLOBAL,
    PagingConfig,
)
from mmufuzz.x86.state import (
    CR0_PG,
    CR4_SMAP,
    CR4_SMEP,
    DR6_BS,
    FLAG_AC,
    FLAG_RF,
    FLAG_TF,
    SHADOW_MOV_SS,
    VECTOR_AC,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_UD,
    Fault,
    Regs,
)

MAX_INSN: Final = 15


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

    def write_efer(self, regs: Regs, value: int) -> None:
        """WRMSR exits before, but that of an L2 guest; see ``set_efer``."""
        set_efer(self.vcpu, value)

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

    def invpcid(self, regs: Regs, kind: int, pcid: int, gva: int) -> None:
        """INVPCID, as INVLPG. The CPU has read and checked the descriptor, which KVM does for itself."""
        if self.vcpu.guest_mode:
            if kind == INVPCID_ADDRESS:
                self.vcpu.tlb.invalidate_address(gva)
            else:
                self.vcpu.tlb.flush_all(keep_global=kind != INVPCID_ALL_GLOBAL)
            return
        raise Intercepted(VmExit(EXIT_INVPCID, kind, gva))

    def halt(self, regs: Regs) -> None:
        """HLT exits."""
        raise Intercepted(VmExit(EXIT_HLT))


def _config(key: int) -> PagingConfig:
    return PagingConfig(
        4, cr0_wp=True, efer_nx=True, smep=key & 1 != 0, smap=key & 2 != 0, rflags_ac=key & 4 != 0
    )


_CONFIGS: Final = [_config(key) for key in range(8)]


def run_guest(vcpu: Vcpu, bus: GuestBus) -> VmExit:
    """Execute guest code until something exits. Exceptions that KVM does not intercept are delivered natively."""
    regs = vcpu.regs
    if vcpu.exception is not None or vcpu.interrupt is not None:
        vmexit = inject_event(vcpu, bus)
        if vmexit is not None:
            return vmexit
    if vcpu.pending_debug and not regs.shadow & SHADOW_MOV_SS:
        return pending_debug(vcpu, 0)
    irqchip = vcpu.irqchip
    if irqchip is not None:
        vcpu.kvm.observer.vm_entered(vcpu.index)
    while True:
        if vcpu.thread.peek(vcpu.ipi_address):
            return VmExit(EXIT_INTERRUPT)
        if vcpu.finished:
            return VmExit(EXIT_DONE)
        if irqchip is not None and irqchip.window_exiting and not vmx_interrupt_blocked(vcpu):
            return VmExit(EXIT_INTERRUPT_WINDOW)
        if regs.dr[7] & DR7_ENABLED:
            hit = code_breakpoint(regs)
            if hit:
                return VmExit(EXIT_DB, hit)
        flags = regs.rflags
        insn: Insn | None = None
        try:
            insn = fetch_insn(vcpu, bus)
            if insn is None:
                return VmExit(EXIT_PF, bus.fetch_gva, bus.mmu.error_code)
            if INTERCEPTED[insn.operation]:
                intercepted = intercept(vcpu, bus, insn)
                if intercepted is not None:
                    return intercepted
            if regs.dr[7] & DR7_ENABLED:
                execute_watched(vcpu, insn, bus)
            else:
                execute(regs, insn, bus)
        except Intercepted as exited:
            assert insn is not None
            exited.vmexit.length = insn.length
            return exited.vmexit
        except Fault as fault:
            faulted = on_fault(vcpu, bus, insn, fault)
            if faulted is not None:
                return faulted
            continue
        vcpu.retired += 1
        vcpu.progress += 1
        if flags & FLAG_RF and insn.mnemonic != "iret":
            regs.rflags &= ~FLAG_RF
        settle_rip(vcpu)
        if (flags & FLAG_TF or vcpu.pending_debug) and not regs.shadow & SHADOW_MOV_SS:
            return pending_debug(vcpu, DR6_BS if flags & FLAG_TF else 0)


def execute_watched(vcpu: Vcpu, insn: Insn, bus: GuestBus) -> None:
    """Execute ``insn`` under the data breakpoints in DR7. What it hits is pending behind it."""
    watched = WatchedBus(bus, vcpu.regs)
    execute(vcpu.regs, insn, watched)
    vcpu.pending_debug |= watched.hit


def pending_debug(vcpu: Vcpu, more: int) -> VmExit:
    """#DB, a trap, with what is pending and ``more``. A load of SS puts it off (SDM vol. 3, 6.8.3)."""
    payload = vcpu.pending_debug | more
    vcpu.pending_debug = 0
    return VmExit(EXIT_DB, payload)


def on_fault(vcpu: Vcpu, bus: GuestBus, insn: Insn | None, fault: Fault) -> VmExit | None:
    """An exception of ``insn`` (None: of its fetch): an exit if KVM intercepts it or delivery exits, else delivered."""
    if fault.vector == VECTOR_PF:
        vmexit = VmExit(EXIT_PF, fault.address, fault.error_code)
        if insn is not None:
            vmexit.event = software_event(insn)
        return vmexit
    if fault.vector == VECTOR_UD:
        return VmExit(EXIT_UD)
    if fault.vector == VECTOR_AC:
        return VmExit(EXIT_AC, fault.error_code)
    exception = QueuedException(fault.vector, fault.error_code, 0)
    if has_idt(vcpu):
        return deliver_event(vcpu, bus, exception, False)
    deliver(vcpu, exception)
    return None


def decode_code(code: bytes, regs: Regs) -> Insn:
    """The instruction at the start of ``code`` in the code segment's size."""
    return decode16(code) if regs.code16 else decode(code, regs.long_mode)


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
        return decode_code(code, regs)
    except Truncated:
        bus.fetch_gva = regs.rip + in_page
        rest = bus.code(bus.fetch_gva, MAX_INSN - in_page)
        return None if rest is None else decode_code(code + rest, regs)
