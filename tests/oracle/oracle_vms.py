"""Small machines for the tests of the oracles: one layout of tables, programs by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmufuzz.case.model import FLAT32, LONG4, TSO, Case, HostThread, Options, Slot, Vcpu, Word
from mmufuzz.host.memory import Memory
from mmufuzz.host.sched import Host
from mmufuzz.kvm.memslots import gfn_to_pfn
from mmufuzz.kvm.structs import Kvm, ShadowPage
from mmufuzz.kvm.vm import build
from mmufuzz.oracle.oracles import Oracles
from mmufuzz.x86.paging import PTE_A, PTE_D, PTE_NX, PTE_P, PTE_PS, PTE_U, PTE_W

# Frames.
CODE = 1
PML4, PDPT, PD, PT = 4, 5, 6, 7
OTHER_PT = 8
FLAT_CODE = 9
DATA, READONLY, OTHER_DATA = 16, 17, 18
HUGE = 512
FRAMES = 1024

# Virtual pages.
CODE_GVA = 0x10000
DATA_GVA = 0x20000
READONLY_GVA = 0x21000
ALIAS_GVA = 0x22000
PT_GVA = 0x30000
MMIO_GVA = 0x31000
HUGE_GVA = 0x200000

TABLE = PTE_P | PTE_W | PTE_U | PTE_A
LEAF = TABLE | PTE_D


def entry(gfn: int, flags: int) -> int:
    """A paging-structure entry."""
    return gfn << 12 | flags


def tables() -> tuple[Word, ...]:
    """Page tables that map the virtual pages above."""
    leaves = {
        CODE_GVA: entry(CODE, LEAF),
        DATA_GVA: entry(DATA, LEAF | PTE_NX),
        READONLY_GVA: entry(READONLY, LEAF & ~PTE_W),
        ALIAS_GVA: entry(DATA, LEAF & ~PTE_U),
        PT_GVA: entry(PT, LEAF),
        MMIO_GVA: entry(FRAMES + 5, LEAF),
    }
    words = [
        Word(PML4, 0, entry(PDPT, TABLE)),
        Word(PDPT, 0, entry(PD, TABLE)),
        Word(PD, 0, entry(PT, TABLE)),
        Word(PD, 1, entry(HUGE, LEAF | PTE_PS)),
    ]
    words += [Word(PT, gva >> 12 & 511, value) for gva, value in leaves.items()]
    return tuple(words)


def load(gva: int) -> bytes:
    """mov rax, [gva]."""
    return b"\x48\x8b\x04\x25" + gva.to_bytes(4, "little")


def store(gva: int) -> bytes:
    """mov [gva], rax."""
    return b"\x48\x89\x04\x25" + gva.to_bytes(4, "little")


def fstp(gva: int) -> bytes:
    """fstp tbyte [gva], which KVM cannot emulate."""
    return b"\xdb\x3c\x25" + gva.to_bytes(4, "little")


def forced_store32(gpa: int) -> bytes:
    """mov [gpa], eax in 32-bit code, with the forced-emulation prefix."""
    return b"\x0f\x0bkvm\xa3" + gpa.to_bytes(4, "little")


RELOAD_CR3 = b"\x0f\x20\xd8\x0f\x22\xd8"  # mov rax, cr3; mov cr3, rax
SPIN = b"\xeb\xfe"


def long4(*program: bytes, flags: tuple[str, ...] = ("wp", "nx"), cpl: int = 0) -> Vcpu:
    """A vCPU on these tables."""
    return Vcpu(LONG4, cpl, PML4, flags, CODE_GVA, CODE, (), program)


def flat32(*program: bytes, eax: int = 0) -> Vcpu:
    """A vCPU without paging."""
    return Vcpu(FLAT32, 0, 0, ("wp",), FLAT_CODE << 12, FLAT_CODE, ((0, eax),), program)


def case(*vcpus: Vcpu, host: Sequence[HostThread] = (), **changes: object) -> Case:
    """A Case with the tables above."""
    options = Options(fep=True, event_limit=6000)
    plain = Case(options=options, slots=(Slot(0, FRAMES),), memory=tables(), vcpus=vcpus, host=tuple(host))
    return replace(plain, **changes)  # type: ignore[arg-type]


class Machine:
    """A VM with its oracles."""

    def __init__(self, what: Case) -> None:
        self.host = Host(Memory(), what.memory_model == TSO, what.options.event_limit)
        self.kvm: Kvm = build(what, self.host)
        self.oracles = Oracles(self.kvm)
        self.host.follow(list(what.schedule))

    def run(self) -> Machine:
        """To the end, quiescent checks included."""
        self.host.run()
        self.oracles.at_end(self.host.status)
        return self

    @property
    def found(self) -> list[tuple[str, str]]:
        """Kind and fingerprint of each finding."""
        return [(finding.kind, finding.fingerprint) for finding in self.oracles.findings]

    def page(self, gfn: int, direct: bool = False) -> ShadowPage:
        """The shadow page of ``gfn``."""
        for sp in self.kvm.by_pfn.values():
            if sp.gfn == gfn and bool(sp.role & 1 << 7) == direct:
                return sp
        raise LookupError(gfn)

    def poke(self, address: int, value: int) -> None:
        """Change a word behind everybody's back."""
        self.kvm.memory.words[address >> 3] = value

    def peek(self, address: int) -> int:
        """A word."""
        return self.kvm.memory.words.get(address >> 3, 0)


def word_hpa(gfn: int, index: int) -> int:
    """Host physical address of a word of guest memory."""
    return gfn_to_pfn(gfn) << 12 | index << 3


def ran(*program: bytes) -> Machine:
    """One vCPU that has run ``program``, by default one that touches every kind of page."""
    program = program or (load(DATA_GVA), store(DATA_GVA), load(READONLY_GVA), store(HUGE_GVA), load(MMIO_GVA))
    return Machine(case(long4(*program))).run()
