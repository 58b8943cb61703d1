"""``Case``: everything a run depends on, as immutable data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mmufuzz.host.deviation import Deviation

CODE_SLOT: Final = 16
"""Bytes per program step: step i of a vCPU lies at its ``code_gva`` + 16 * i."""

MAX_STEP_BYTES: Final = 15
MAX_STEPS_PER_VCPU: Final = 2048
MAX_VCPUS: Final = 16
MAX_HOST_THREADS: Final = 4
MAX_GFN: Final = 1 << 16
"""Guest frames lie below 256 MiB."""

# Paging modes of a vCPU.
LONG4: Final = "long4"  # 64-bit mode, 4-level paging: shadow paging with an indirect MMU
FLAT32: Final = "flat32"  # 32-bit protected mode, CR0.PG = 0: direct MMU
NPT4: Final = "npt4"  # L2 without paging of its own, behind a 4-level nested page table, on a host with 5 levels
MODES: Final = (LONG4, FLAT32, NPT4)

# Operations of a host thread.
ZAP_ALL_FAST: Final = "zap_all_fast"  # what a memslot update causes
HOST_OPS: Final = (ZAP_ALL_FAST,)

TSO: Final = "tso"
SC: Final = "sc"

OK: Final = "ok"
FINDING: Final = "finding"


@dataclass(frozen=True)
class Slot:
    """A memslot: ``npages`` guest frames from ``base_gfn``."""

    base_gfn: int
    npages: int
    readonly: bool = False


@dataclass(frozen=True)
class Word:
    """Initial contents of one aligned 64-bit word of guest memory; most are page-table entries.

    ``gfn`` names the frame, ``index`` (0..511) the word in it.
    """

    gfn: int
    index: int
    value: int


@dataclass(frozen=True)
class Vcpu:
    """One vCPU: registers it starts with, and its program.

    ``flags``: any of "wp", "smep", "smap", "nx". ``cr3`` is the gfn of the root table (LONG4) or of the nested
    page table's root (NPT4; such a vCPU implies a VM with TDP, so LONG4 vCPUs cannot stand beside it).
    ``code_gva`` (page aligned) is where the program runs, ``code_gfn`` the first frame it is stored in. ``regs`` are
    pairs of register number (0..15, encoding order) and value. Each step of ``program`` holds 1..15 instruction bytes,
    a forced-emulation prefix included. Where a step's bytes end, execution goes on at the next step.
    """

    mode: str
    cpl: int = 0
    cr3: int = 0
    flags: tuple[str, ...] = ("wp", "nx")
    code_gva: int = 0
    code_gfn: int = 0
    regs: tuple[tuple[int, int], ...] = ()
    program: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class HostThread:
    """A host thread and its operations, in order."""

    ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """Knobs of the VM and limits of the run.

    ``fep``: KVM honours the forced-emulation prefix (module parameter force_emulation_prefix). ``n_max_mmu_pages``:
    budget of shadow pages. ``write_track``: gfns that an external user of write tracking protects (as KVMGT does).
    ``event_limit``: visible operations after which the run is cut short with the verdict "suspect". ``decode_to_skip``:
    the CPU does not report the length of an instruction that exits (SVM with the module parameter nrips=0), so KVM
    decodes it to skip it. ``tsc``: the time-stamp counter, at which it stands.
    """

    fep: bool = False
    n_max_mmu_pages: int = 64
    write_track: tuple[int, ...] = ()
    event_limit: int = 20000
    decode_to_skip: bool = False
    tsc: int = 0


@dataclass(frozen=True)
class Expect:
    """What a replay must show.

    ``verdict`` OK or FINDING; for a finding optionally its ``kind`` and ``fingerprint``. ``reach``: names of marks
    that the run must pass.
    """

    verdict: str = OK
    kind: str = ""
    fingerprint: str = ""
    reach: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One run of the model. ``kernel`` is a profile, ``revert`` and ``apply`` hold ids of fixes."""

    kernel: str = "v6.12"
    revert: tuple[str, ...] = ()
    apply: tuple[str, ...] = ()
    memory_model: str = TSO
    options: Options = Options()
    slots: tuple[Slot, ...] = ()
    memory: tuple[Word, ...] = ()
    vcpus: tuple[Vcpu, ...] = ()
    host: tuple[HostThread, ...] = ()
    schedule: tuple[Deviation, ...] = ()
    expect: Expect = Expect()
    comment: str = ""
    """Why the case is kept, for readers."""
