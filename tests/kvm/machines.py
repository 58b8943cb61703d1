"""Small machines for the tests of the KVM model: guest tables, vCPUs and cases in a few lines, and a look inside.

The usual guest: frames 0..63 are memory; code of the first vCPU lies in frame 1, of the second in frame 2; frames 4..15
are data; the tables are frames 0x10 (root) to 0x13 (level 1). Everything is mapped where it lies, tables included, so
the gPTE of page n is at gva 0x13000 + 8 * n.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmufuzz.case.model import FLAT32, LONG4, NPT4, TSO, Case, HostThread, Options, Slot, Word
from mmufuzz.case.model import Vcpu as VcpuSpec
from mmufuzz.case.text import parse_deviation, thread_names
from mmufuzz.host.deviation import Deviation
from mmufuzz.host.lock import LockWatcher
from mmufuzz.host.memory import Memory
from mmufuzz.host.sched import Host
from mmufuzz.host.sites import SITE_NAMES, label_site, label_step, label_thread
from mmufuzz.host.trace import NOTE
from mmufuzz.kvm.memslots import gpa_to_hpa
from mmufuzz.kvm.observer import Observer
from mmufuzz.kvm.role import role_level
from mmufuzz.kvm.spte import is_last_spte, is_shadow_present, spte_pfn
from mmufuzz.kvm.structs import Kvm, ShadowPage, Vcpu
from mmufuzz.kvm.vm import build
from mmufuzz.x86.asm import assemble
from mmufuzz.x86.paging import PTE_A, PTE_D, PTE_NX, PTE_P, PTE_PS, PTE_U, PTE_W, table_index

P, W, U, A, D, PS, NX = PTE_P, PTE_W, PTE_U, PTE_A, PTE_D, PTE_PS, PTE_NX
TABLE = P | W | U | A
PAGE = P | W | U | A | D

ROOT, L3, L2, L1 = 0x10, 0x11, 0x12, 0x13
CODE, CODE2, DATA, DATA2 = 1, 2, 4, 5
NOWHERE = 0x100
"""A gfn without memory."""

REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")

SEEN: dict[str, int] = {}
"""Marks passed by all machines that have run in this process."""


def gva(gfn: int, index: int = 0) -> int:
    """Address of word ``index`` of frame ``gfn``, which is mapped where it lies."""
    return gfn << 12 | index << 3


class Tables:
    """Guest tables as initial memory. Tables are taken from ``root`` on, one frame after the other."""

    def __init__(self, root: int = ROOT, table_flags: int = TABLE) -> None:
        self.root = root
        self.table_flags = table_flags
        self.next = root + 1
        self.words: dict[tuple[int, int], int] = {}

    def set(self, gfn: int, index: int, value: int) -> Tables:
        """One word."""
        self.words[gfn, index] = value
        return self

    def map(self, address: int, gfn: int, flags: int = PAGE, level: int = 1) -> Tables:
        """Map a page of ``level`` at ``address``, with new tables on the way where there are none."""
        table = self.root
        for at in range(4, level, -1):
            index = table_index(address, at)
            if (table, index) not in self.words:
                self.words[table, index] = self.next << 12 | self.table_flags
                self.next += 1
            table = self.words[table, index] >> 12 & 0xFFFFF
        large = PS if level > 1 else 0
        return self.set(table, table_index(address, level), gfn << 12 | flags | large)

    def identity(self, gfns: Sequence[int], flags: int = PAGE) -> Tables:
        """Map frames where they lie."""
        for gfn in gfns:
            self.map(gfn << 12, gfn, flags)
        return self

    def memory(self) -> tuple[Word, ...]:
        """As initial memory of a Case."""
        return tuple(Word(gfn, index, value) for (gfn, index), value in sorted(self.words.items()))


def usual() -> Tables:
    """The tables of the usual guest."""
    return Tables().identity([CODE, CODE2, 3, *range(4, 16), ROOT, L3, L2, L1])


def program(steps: Sequence[str | bytes], mode64: bool) -> tuple[bytes, ...]:
    """Assembled steps; one step may hold several instructions, separated by semicolons."""
    code: list[bytes] = []
    for step in steps:
        if isinstance(step, str):
            code.append(b"".join(assemble(text, mode64) for text in step.split(";")))
        else:
            code.append(step)
    return tuple(code)


def vcpu(
    mode: str, steps: Sequence[str | bytes], root: int, code: int, cpl: int, flags: str, regs: dict[str, int]
) -> VcpuSpec:
    """A vCPU that runs ``steps`` at the frame ``code``, mapped where it lies."""
    numbered = tuple((REGISTERS.index(name), value) for name, value in regs.items())
    lines = program(steps, mode == LONG4)
    return VcpuSpec(mode, cpl, root, tuple(flags.split()), code << 12, code, numbered, lines)


def long4(
    *steps: str | bytes, root: int = ROOT, code: int = CODE, cpl: int = 0, flags: str = "wp nx", **regs: int
) -> VcpuSpec:
    """64-bit code behind shadowed tables."""
    return vcpu(LONG4, steps, root, code, cpl, flags, regs)


def flat32(*steps: str | bytes, code: int = CODE2, cpl: int = 0, flags: str = "wp nx", **regs: int) -> VcpuSpec:
    """32-bit code without paging: a direct MMU."""
    return vcpu(FLAT32, steps, 0, code, cpl, flags, regs)


def npt4(*steps: str | bytes, root: int = ROOT, code: int = CODE, flags: str = "wp nx", **regs: int) -> VcpuSpec:
    """32-bit L2 code behind a shadowed nested page table."""
    return vcpu(NPT4, steps, root, code, 0, flags, regs)


class Log(Observer):
    """Keeps what the model tells its observer."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.invalidated: list[tuple[int, int]] = []
        self.faults: list[tuple[int, int, int]] = []

    def warn(self, site: str, text: str) -> None:
        self.warnings.append(f"{site}: {text}")

    def guest_invalidated(self, vcpu: int, gva: int) -> None:
        self.invalidated.append((vcpu, gva))

    def guest_fault(self, vcpu: int, gva: int, error_code: int) -> None:
        self.faults.append((vcpu, gva, error_code))


class Misuse(LockWatcher):
    """Collects complaints about locks."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def lock_misused(self, text: str) -> None:
        self.texts.append(text)


class Machine:
    """A machine that has run."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.names = thread_names(case)
        self.host = Host(Memory(), case.memory_model == TSO, case.options.event_limit)
        self.kvm: Kvm = build(case, self.host)
        self.log = Log()
        self.kvm.observer = self.log
        self.host.follow(list(case.schedule))

    def run(self) -> Machine:
        """To the end."""
        self.host.run()
        for name, count in self.kvm.marks.items():
            SEEN[name] = SEEN.get(name, 0) + count
        return self

    @property
    def marks(self) -> dict[str, int]:
        return self.kvm.marks

    def passed(self, mark: str) -> int:
        """How often."""
        return self.kvm.marks.get(mark, 0)

    def vcpu(self, index: int = 0) -> Vcpu:
        return self.kvm.vcpus[index]

    def reg(self, name: str, index: int = 0) -> int:
        """A register of a vCPU."""
        return self.kvm.vcpus[index].regs.gpr[REGISTERS.index(name)]

    def word(self, gfn: int, index: int = 0) -> int:
        """A word of guest memory."""
        return self.host.memory.read(gpa_to_hpa(gfn << 12 | index << 3), 8)

    def pages(self, gfn: int) -> list[ShadowPage]:
        """Valid shadow pages of ``gfn``, the newest first."""
        return [sp for sp in self.kvm.mmu_page_hash.get(gfn, []) if not sp.invalid]

    def page(self, gfn: int) -> ShadowPage:
        """The one shadow page of ``gfn``."""
        (sp,) = self.pages(gfn)
        return sp

    def entry(self, sp: ShadowPage, index: int) -> int:
        """An SPTE."""
        return self.host.memory.words.get(sp.spte_address(index) >> 3, 0)

    def present(self, sp: ShadowPage) -> list[int]:
        """Indices of its present SPTEs."""
        return [index for index in sorted(sp.used) if is_shadow_present(self.entry(sp, index))]

    def spte(self, address: int, index: int = 0) -> int:
        """The SPTE at which the walk of ``address`` through the tables of a vCPU ends."""
        mmu = self.kvm.vcpus[index].mmu
        sp = mmu.pae_roots[address >> 30] if mmu.direct else mmu.root_sp
        while sp is not None:
            level = role_level(sp.role)
            spte = self.entry(sp, table_index(address, level))
            if not is_shadow_present(spte) or is_last_spte(spte, level):
                return spte
            sp = self.kvm.by_pfn[spte_pfn(spte)]
        return 0

    def count(self) -> int:
        """indirect_shadow_pages."""
        return self.host.memory.read(self.kvm.indirect_shadow_pages, 8)

    def sites(self, index: int = 0, step: int | None = None) -> list[str]:
        """Names of a thread's visible operations."""
        found = []
        for packed, _, _ in self.host.trace.entries():
            if packed != NOTE and label_thread(packed) == index and step in (None, label_step(packed)):
                found.append(SITE_NAMES[label_site(packed)])
        return found

    def lines(self, index: int = 0) -> list[tuple[str, int]]:
        """A thread's visible operations: site and address."""
        return [
            (SITE_NAMES[label_site(packed)], address)
            for packed, address, _ in self.host.trace.entries()
            if packed != NOTE and label_thread(packed) == index
        ]

    def values(self, index: int = 0) -> list[tuple[str, int]]:
        """A thread's visible operations: site and value."""
        return [
            (SITE_NAMES[label_site(packed)], value)
            for packed, _, value in self.host.trace.entries()
            if packed != NOTE and label_thread(packed) == index
        ]


def machine(
    tables: Tables | None,
    *vcpus: VcpuSpec,
    kernel: str = "v6.12",
    revert: Sequence[str] = (),
    apply: Sequence[str] = (),
    slots: Sequence[Slot] = (Slot(0, 64),),
    host: Sequence[str] = (),
    schedule: Sequence[str] = (),
    memory_model: str = TSO,
    fep: bool = True,
    max_pages: int = 64,
    write_track: Sequence[int] = (),
    limit: int = 20000,
) -> Machine:
    """A machine that has not run yet. ``host`` are the operations of one host thread; ``schedule`` lines of text."""
    case = Case(
        kernel=kernel,
        revert=tuple(revert),
        apply=tuple(apply),
        memory_model=memory_model,
        options=Options(fep, max_pages, tuple(write_track), limit),
        slots=tuple(slots),
        memory=() if tables is None else tables.memory(),
        vcpus=vcpus,
        host=(HostThread(tuple(host)),) if host else (),
    )
    deviations: list[Deviation] = [parse_deviation(line, thread_names(case)) for line in schedule]
    made = Machine(case)
    made.host.follow(deviations)
    return made


def run(tables: Tables | None, *vcpus: VcpuSpec, **options: object) -> Machine:
    """``machine``, run."""
    return machine(tables, *vcpus, **options).run()  # type: ignore[arg-type]
