"""The state of the machine with everything taken out that only ever grows: equal tuples go on alike."""

from __future__ import annotations

from mmufuzz.host.lock import Lock
from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.thread import Thread
from mmufuzz.kvm.interrupts import Halted
from mmufuzz.kvm.spte import is_last_spte, is_shadow_present, spte_pfn
from mmufuzz.kvm.structs import FIRST_SHADOW_PFN, INVALID_PFN, Kvm, ShadowPage, Vcpu

_GONE = -2
_OFFSET = (1 << PAGE_SHIFT) - 1


class Names:
    """Shadow frames by what they are instead of by their numbers, which grow: position among the live pages."""

    def __init__(self, kvm: Kvm) -> None:
        self.pages: list[ShadowPage] = list(kvm.active_mmu_pages)
        for sp in kvm.by_pfn.values():
            if not sp.active:
                self.pages.append(sp)
        self._of: dict[int, int] = {}
        for position in range(len(self.pages)):
            self._of[self.pages[position].pfn] = FIRST_SHADOW_PFN + position
        # Frames that are allocated once need names that no page can have.
        if kvm.dummy_root_pfn != INVALID_PFN:
            self._of[kvm.dummy_root_pfn] = -3
        for vcpu in kvm.vcpus:
            if vcpu.mmu.pae_root_pfn != INVALID_PFN:
                self._of[vcpu.mmu.pae_root_pfn] = -4 - vcpu.index

    def frame(self, pfn: int) -> int:
        """Name of ``pfn``; guest frames and INVALID_PFN name themselves, freed shadow pages are all alike."""
        return pfn if pfn < FIRST_SHADOW_PFN else self._of.get(pfn, _GONE)

    def address(self, hpa: int) -> int:
        """Name of an address."""
        pfn = hpa >> PAGE_SHIFT
        if pfn not in self._of and pfn < FIRST_SHADOW_PFN:
            return hpa
        return self.frame(pfn) << PAGE_SHIFT | hpa & _OFFSET

    def kernel_or_shadow(self, hpa: int, top: int) -> int:
        """Name of an address that may also be a kernel variable, which lie above frame ``top``."""
        return hpa if hpa >> PAGE_SHIFT >= top else self.address(hpa)


class MachineState:
    """What repeated looks at one machine share."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self._rest: list[tuple[int, ...]] = [() for _ in kvm.vcpus]
        """``Regs.rest`` of each vCPU, as it was when the vCPU had made the progress in ``_at``."""
        self._at: list[int] = [-1 for _ in kvm.vcpus]

    def state(self, changed: list[int]) -> tuple[object, ...]:
        """The machine as a tuple of ints, and of tuples of ints that one state shares with the next.

        ``changed`` are the addresses of the guest words that ever changed. Meant for moments when no thread is inside
        an operation: of a waiting thread only what it waits for is seen.
        """
        kvm = self.kvm
        words = kvm.memory.words
        names = Names(kvm)
        state: list[object] = [len(changed)]
        for address in changed:
            state.append(words.get(address >> 3, 0))
        state.append(words.get(kvm.indirect_shadow_pages >> 3, 0))
        state.append(words.get(kvm.mmu_valid_gen_address >> 3, 0))
        state.append(words.get(kvm.mmu_lock.address >> 3, 0))
        state.append(words.get(kvm.slots_lock.address >> 3, 0))
        state.append(kvm.mmu_valid_gen)
        state.append(kvm.n_used_mmu_pages)
        state.append(len(kvm.active_mmu_pages))
        state.append(len(kvm.zapped_obsolete_pages))
        for sp in names.pages:
            _add_page(state, kvm, sp, names)
        for vcpu in kvm.vcpus:
            self._add_registers(state, vcpu)
            _add_vcpu(state, vcpu, names)
        state += kvm.device.state()
        state += kvm.ports.state()
        for thread in kvm.host.threads:
            _add_thread(state, kvm, thread, names)
        return tuple(state)

    def _add_registers(self, state: list[object], vcpu: Vcpu) -> None:
        """An instruction that did not end may have changed general registers (REP), but no others."""
        if self._at[vcpu.index] != vcpu.progress:
            self._at[vcpu.index] = vcpu.progress
            self._rest[vcpu.index] = tuple(vcpu.regs.rest())
        state.extend(vcpu.regs.gpr)
        state.append(vcpu.regs.rip)
        state.append(vcpu.regs.rflags)
        state.append(vcpu.regs.shadow)
        state.append(self._rest[vcpu.index])


def _add_page(state: list[object], kvm: Kvm, sp: ShadowPage, names: Names) -> None:
    words = kvm.memory.words
    state.append(sp.gfn)
    state.append(sp.role)
    state.append(sp.invalid | sp.unsync << 1 | (sp.mmu_valid_gen == kvm.mmu_valid_gen) << 2)
    state.append(sp.root_count)
    state.append(words.get(sp.invalid_address >> 3, 0))
    state.append(words.get(sp.flooding_address >> 3, 0))
    for index in sorted(sp.used):
        spte = words.get(sp.spte_address(index) >> 3, 0)
        if not spte:
            continue
        state.append(index)
        if is_shadow_present(spte) and not is_last_spte(spte, sp.role & 15):
            state.append(names.frame(spte_pfn(spte)))
            state.append(spte & _OFFSET)
        else:
            state.append(spte)
    state.append(-1)


def _add_vcpu(state: list[object], vcpu: Vcpu, names: Names) -> None:
    words = vcpu.kvm.memory.words
    state.append(words.get(vcpu.mode_address >> 3, 0))
    state.append(words.get(vcpu.requests_address >> 3, 0))
    state.append(words.get(vcpu.ipi_address >> 3, 0))
    flags = vcpu.irqs_disabled | vcpu.instruction_done << 1 | vcpu.skip_step << 2 | vcpu.finished << 3
    state.append(flags | vcpu.pending_debug << 4)
    state.append(vcpu.last_retry_eip)
    state.append(vcpu.last_retry_addr)
    state.append(vcpu.mmio_gfn)
    state.append(vcpu.mmio_gva)
    state.append(vcpu.mmio_access)
    exception = vcpu.exception
    if exception is None:
        state.append(-1)
    else:
        state += [exception.vector, exception.error_code, exception.payload, vcpu.exception_injected]
    if vcpu.interrupt is None:
        state.append(-1)
    else:
        state += [vcpu.interrupt.vector, vcpu.interrupt.soft_length]
    if vcpu.irqchip is not None:
        state += vcpu.irqchip.state(vcpu.kvm.memory)
    state += vcpu.mmio.state()
    state += vcpu.pio.state()
    mmu = vcpu.mmu
    state.append(names.frame(mmu.root_pfn))
    state.append(mmu.cpu_role)
    state.append(mmu.root_role)
    state.append(mmu.root_dummy | mmu.direct << 1)
    for root in mmu.pae_roots:
        state.append(names.frame(root.pfn))
    state.append(-1)
    pages, tables = vcpu.tlb.canonical()
    for page in pages:
        state.append(page[0])
        state.append(names.frame(page[1]))
        state.append(page[2])
        state.append(names.address(page[3]))
    state.append(-1)
    for table in tables:
        state.append(table[0])
        state.append(table[1])
        state.append(names.frame(table[2]))
        state.append(table[3])
    state.append(-1)




def _add_thread(state: list[object], kvm: Kvm, thread: Thread, names: Names) -> None:
    state.append(thread.step)
    state.append(thread.done)
    waiting = thread.waiting
    if waiting is None:
        state.append(0)
    else:
        # A lock by its address, any other condition (HLT, or an acknowledgement) as one kind.
        state.append(waiting.address if isinstance(waiting, Lock) else 2 if isinstance(waiting, Halted) else 1)
    for entry in thread.buffer.pending:
        state.append(names.kernel_or_shadow(entry.address, kvm.indirect_shadow_pages >> PAGE_SHIFT))
        state.append(entry.size)
        state.append(entry.value)
        state.append(entry.held | entry.aged << 1)
    state.append(-1)
