"""The kernel's structures: struct kvm, kvm_vcpu, kvm_mmu, kvm_mmu_page, kvm_memory_slot (kvm_host.h, mmu_internal.h).

State that is only touched under mmu_lock is plain attributes. State that is read or written without it lives in
host memory, at an address kept here, and is accessed through the running thread's CPU.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.model import NPT4, Options
from mmufuzz.case.model import Vcpu as VcpuSpec
from mmufuzz.host.lock import Lock
from mmufuzz.host.memory import PAGE_SHIFT, Memory
from mmufuzz.host.sched import Host
from mmufuzz.host.sites import MMU_LOCK, MMU_UNLOCK, SLOTS_LOCK, SLOTS_UNLOCK
from mmufuzz.host.thread import Thread
from mmufuzz.kvm.counters import DIRECT, INDIRECT, NESTED, PAGE_BLOCK, RETRY_BLOCK, Counters
from mmufuzz.kvm.emulate_ctxt import X86EmulateCtxt
from mmufuzz.kvm.io import Device, Mmio, Pio
from mmufuzz.kvm.observer import Observer
from mmufuzz.kvm.role import ROLE_DIRECT, ROLE_PASSTHROUGH, role_level
from mmufuzz.kvm.switches import Fixes
from mmufuzz.x86.paging import PagingConfig, paging_config
from mmufuzz.x86.state import FIRST_INTERRUPT, FLAG_AC, Regs
from mmufuzz.x86.tlb import Tlb

FIRST_GUEST_PFN: Final = 1 << 12
"""gfn 0 is backed by this pfn: no gfn equals the pfn behind it, so mistaking one for the other shows."""

FIRST_SHADOW_PFN: Final = 1 << 20
KERNEL_DATA: Final = 1 << 44
"""Addresses of kernel variables; host memory from here on is invisible to guests."""
WRITE_TRACK_BASE: Final = KERNEL_DATA + (1 << 30)
ROLE_INVALID_BASE: Final = KERNEL_DATA + (1 << 36)
FLOODING_OFFSET: Final = 1 << 36

# vcpu->mode
OUTSIDE_GUEST_MODE: Final = 0
IN_GUEST_MODE: Final = 1
EXITING_GUEST_MODE: Final = 2
READING_SHADOW_PAGE_TABLES: Final = 3

# kvm_init_shadow_npt_mmu gets only CR0.PG: CR0.WP counts as clear, which user accesses do not notice.
_NESTED_PAGING: Final = PagingConfig(4, cr0_wp=False, efer_nx=True)

INVALID_GPA: Final = -1
INVALID_PFN: Final = -1


def vcpu_address(index: int) -> int:
    """Where the words of a vCPU lie that other threads reach without a lock: 256 bytes."""
    return KERNEL_DATA + 0x1000 + (index << 8)


class MemSlot:
    """struct kvm_memory_slot. ``rmap[level - 1][gfn]``: addresses of the leaf SPTEs that map gfn at that level."""

    def __init__(self, base_gfn: int, npages: int, readonly: bool) -> None:
        self.base_gfn = base_gfn
        self.npages = npages
        self.readonly = readonly
        self.rmap: list[dict[int, list[int]]] = [{}, {}, {}]
        self.disallow_lpage: list[dict[int, int]] = [{}, {}]
        """Reasons against a huge mapping, by level - 2 and huge frame number."""


class ShadowPage:
    """struct kvm_mmu_page."""

    def __init__(self, pfn: int, gfn: int, role: int, valid_gen: int) -> None:
        self.pfn = pfn
        self.gfn = gfn
        self.role = role
        self.invalid = False
        """role.invalid; its lockless readers go through memory at ``invalid_address``."""
        self.invalid_address = ROLE_INVALID_BASE + (pfn - FIRST_SHADOW_PFN << 3)
        self.mmu_valid_gen = valid_gen
        self.root_count = 0
        self.flooding_address = self.invalid_address + FLOODING_OFFSET
        """write_flooding_count, which lockless walks reset."""
        self.used: dict[int, bool] = {}
        """Indices whose SPTE was ever set: the others need no look."""
        self.parent_ptes: list[int] = []
        self.shadowed_gfn: dict[int, int] = {}
        """gfn each present leaf SPTE maps, by index; only for pages that shadow gPTEs."""
        self.unsync = False
        self.active = True

    def spte_address(self, index: int) -> int:
        """Host physical address of SPTE ``index`` (0..511)."""
        return self.pfn << PAGE_SHIFT | index << 3


class Mmu:
    """struct kvm_mmu of a vCPU: the one root this vCPU runs on, and what was asked for it."""

    def __init__(self) -> None:
        self.root_pfn = INVALID_PFN
        self.root_sp: ShadowPage | None = None
        """None for a special root: the PAE root of a direct MMU, or the dummy root."""
        self.root_dummy = False
        self.cpu_role = 0
        self.root_role = 0
        self.direct = False
        self.pae_root_pfn = INVALID_PFN
        self.pae_roots: list[ShadowPage] = []


class QueuedException:
    """struct kvm_queued_exception, without the flags.

    ``error_code``: -1 for none. ``payload``: CR2 for #PF, bits of DR6 for #DB. ``soft_length``: bytes of the INT n,
    INT3 or INTO that raises it, 0 for what is no software event.
    """

    def __init__(self, vector: int, error_code: int, payload: int, soft_length: int = 0) -> None:
        self.vector = vector
        self.error_code = error_code
        self.payload = payload
        self.soft_length = soft_length

    @property
    def is_external(self) -> bool:
        """True for an interrupt that does not come from an instruction."""
        return self.vector >= FIRST_INTERRUPT and self.soft_length == 0


IRQCHIP_OFFSET: Final = 0x40


class Irqchip:
    """The interrupt controller that the modelled userspace has for one vCPU, and the vCPU's fields of struct kvm_run.

    ``irr_address``: four words with a bit for each vector that is pending. ``signal_address``: not 0 while a signal is
    pending for the vCPU's thread.
    """

    def __init__(self, base: int) -> None:
        self.irr_address = base
        self.signal_address = base + 0x20
        self.ready_for_interrupt_injection = False
        self.request_interrupt_window = False
        self.window_exiting = False
        """CPU_BASED_INTR_WINDOW_EXITING: the CPU exits as soon as an interrupt could be taken."""
        self.halted = False
        """The last exit was KVM_EXIT_HLT."""

    def state(self, memory: Memory) -> list[int]:
        """Everything as numbers: equal lists mean equal states."""
        flags = self.ready_for_interrupt_injection | self.request_interrupt_window << 1
        state = [flags | self.window_exiting << 2 | self.halted << 3]
        for address in range(self.irr_address, self.signal_address + 8, 8):
            state.append(memory.read(address, 8))
        return state


class Vcpu:
    """struct kvm_vcpu, with the logical CPU it is pinned to."""

    def __init__(self, kvm: Kvm, index: int, spec: VcpuSpec) -> None:
        self.kvm = kvm
        self.index = index
        self.spec = spec
        self.regs = Regs()
        self.mmu = Mmu()
        self.tlb = Tlb()
        self.guest_mode = spec.mode == NPT4
        """is_guest_mode: an L2 guest runs, and what KVM shadows is L1's nested page table."""
        base = vcpu_address(index)
        self.mode_address = base
        self.requests_address = base + 8
        self.ipi_address = base + 16
        self.irqs_disabled = False
        self.in_guest = False
        self.last_retry_eip = 0
        self.last_retry_addr = 0
        self.reexecuting_gfn = -1
        """gfn of a write that is retried without an unprotect because the count was zero; only marks look at it."""
        self.mmio_gva = 0
        """Page of the last MMIO access; 0 for none, so KVM caches nothing for page 0."""
        self.mmio_gfn = 0
        self.mmio_access = 0
        """ACC_* bits of that page's translation."""
        self.exception: QueuedException | None = None
        """vcpu->arch.exception: what is queued for the guest."""
        self.exception_injected = False
        self.pending_debug = 0
        """B0 to B3 of DR6 for data breakpoints that a load of SS hit (VMCS: pending debug exceptions)."""
        """Its delivery has begun, and exited."""
        self.interrupt: QueuedException | None = None
        """vcpu->arch.interrupt: what userspace has handed over, or an INT n or interrupt whose delivery exited."""
        self.irqchip: Irqchip | None = None
        """None for a vCPU that nobody interrupts."""
        self.emulate_ctxt = X86EmulateCtxt(self.regs, kvm.fixes)
        self.mmio = Mmio()
        self.pio = Pio()
        self.halt_request = False
        self.instruction_done = False
        """The emulator completed the instruction of this exit."""
        self.skip_step = False
        """Userspace makes the guest go on at its next step."""
        self.exceptions: list[tuple[int, int, int, int]] = []
        """What the guest was delivered, interrupts too: vector, error code, CR2 (0 but for #PF), RIP."""
        self.userspace_exits: list[str] = []
        self._paging = paging_config(self.regs)
        self._paging_cr0 = 0
        self._paging_cr4 = 0
        self._paging_efer = 0
        self._paging_ac = 0
        """The registers that ``_paging`` was made for."""
        self.progress = 0
        """Instructions retired, exceptions delivered and steps that userspace ended: what must grow."""
        self.retired = 0
        self.finished = False

    @property
    def paging(self) -> PagingConfig:
        """The paging that the shadowed tables implement: the guest's own, or nested paging with 4 levels."""
        if self.guest_mode:
            return _NESTED_PAGING
        regs = self.regs
        if (
            regs.cr0 != self._paging_cr0
            or regs.cr4 != self._paging_cr4
            or regs.efer != self._paging_efer
            or regs.rflags & FLAG_AC != self._paging_ac
        ):
            self._paging_cr0 = regs.cr0
            self._paging_cr4 = regs.cr4
            self._paging_efer = regs.efer
            self._paging_ac = regs.rflags & FLAG_AC
            self._paging = paging_config(regs)
        return self._paging

    @property
    def kind(self) -> int:
        """Which of ``kvm.counters.ROLES``."""
        return NESTED if self.guest_mode else DIRECT if self.mmu.direct else INDIRECT

    @property
    def thread(self) -> Thread:
        """The thread that runs this vCPU."""
        return self.kvm.host.threads[self.index]


class Kvm:
    """struct kvm."""

    def __init__(self, host: Host, options: Options, behaviours: frozenset[str]) -> None:
        self.host = host
        self.memory: Memory = host.memory
        self.options = options
        self.fixes = Fixes(behaviours)
        self.observer = Observer()
        self.counters = Counters()
        self.exits: dict[str, int] = {}
        self.device = Device(0)
        self.ports = Device(0xFF)
        self.slots: list[MemSlot] = []
        self.vcpus: list[Vcpu] = []
        self.vcpu_count = 0
        """Threads from this index on are host threads."""
        # The ranks follow Documentation/virt/kvm/locking.rst: slots_lock outside, mmu_lock innermost.
        self.slots_lock = Lock(host, "slots_lock", 1, KERNEL_DATA + 0x108, SLOTS_LOCK, SLOTS_UNLOCK)
        self.mmu_lock = Lock(host, "mmu_lock", 2, KERNEL_DATA + 0x100, MMU_LOCK, MMU_UNLOCK)
        self.indirect_shadow_pages = KERNEL_DATA + 0x110
        """Address of the counter; plain accesses under mmu_lock, lockless reads elsewhere."""
        self.mmu_valid_gen_address = KERNEL_DATA + 0x118
        self.mmu_valid_gen = 0
        self.mmu_page_hash: dict[int, list[ShadowPage]] = {}
        """gfn to bucket; the newest page first."""
        self.active_mmu_pages: list[ShadowPage] = []
        """Newest first; the oldest is reclaimed first."""
        self.zapped_obsolete_pages: list[ShadowPage] = []
        self.n_used_mmu_pages = 0
        self.by_pfn: dict[int, ShadowPage] = {}
        self.next_pfn = FIRST_SHADOW_PFN
        self.dummy_root_pfn = INVALID_PFN

    def mark(self, name: str) -> None:
        """Count that the current thread passed the named point (``kvm.marks.MARKS``)."""
        marks = self.host.current.marks
        marks[name] = marks.get(name, 0) + 1

    @property
    def marks(self) -> dict[str, int]:
        """How often all threads together passed each named point."""
        total: dict[str, int] = {}
        for thread in self.host.threads:
            for name, count in thread.marks.items():
                total[name] = total.get(name, 0) + count
        return total

    def count_page(self, event: int, role: int) -> None:
        """Count what became of a shadow page (``kvm.counters.PAGE_EVENTS``)."""
        kind = 2 if role & ROLE_PASSTHROUGH else 0 if role & ROLE_DIRECT else 1
        self.counters.hit(PAGE_BLOCK.at(event, kind, role_level(role)))

    def count_retry(self, reason: int) -> None:
        """Count a decision of the block "retry" (``kvm.counters.RETRIES``), with the state of mmu_lock."""
        lock = self.mmu_lock
        state = 0
        if lock.owner >= 0:
            state = 2 if lock.owner == self.host.current.index else 1
            for thread in self.host.threads:
                if thread.waiting is lock:
                    state = 3
        self.counters.hit(RETRY_BLOCK.at(reason, state))

    def warn_on(self, condition: bool, site: str, text: str) -> bool:
        """WARN_ON_ONCE: reports ``text`` from kernel function ``site`` if ``condition`` holds, and answers it."""
        if condition:
            self.observer.warn(site, text)
        return condition

    def alloc_frame(self) -> int:
        """A zeroed host frame; pfns are never reused."""
        pfn = self.next_pfn
        self.next_pfn = pfn + 1
        return pfn

