"""Every behaviour that differs between kernels, as a switch.

A *fix* is what a person names on the command line. It turns one or more *behaviours* of the model on; the model asks
for a behaviour at the one place where it matters. A kernel profile is the set of fixes that kernel has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mmufuzz.case.error import CaseError
from mmufuzz.kvm import switches as on

BENIGN: Final = "benign"

KERNELS: Final = ("v6.1", "v6.8", "v6.9", "v6.12")
LATEST: Final = "v6.12"


@dataclass(frozen=True)
class Fix:
    """``kernel``: first profile that has it. ``shows``: finding kind that reverting it must show, or BENIGN.

    ``behaviours``: what reverting turns off. ``zoo``: entry of the zoo of historical bugs, if it is one.
    """

    id: str
    title: str
    commit: str
    kernel: str
    shows: str
    behaviours: tuple[str, ...]
    citation: str
    zoo: str = ""


FIXES: Final = (
    Fix(
        "reexecute-lockless",
        "KVM: x86/mmu: Don't acquire mmu_lock when using indirect_shadow_pages as a heuristic",
        "474b99ed703b",
        "v6.9",
        BENIGN,
        (on.REEXECUTE_LOCKLESS,),
        "x86.c:reexecute_instruction",
        "I1",
    ),
    Fix(
        "reexecute-one-path",
        "KVM: x86: Drop dedicated logic for direct MMUs in reexecute_instruction()",
        "515c18a64e70",
        "v6.9",
        BENIGN,
        (on.REEXECUTE_ONE_PATH,),
        "x86.c:reexecute_instruction",
    ),
    Fix(
        "reexecute-flag-only",
        "KVM: x86: Drop superfluous check on direct MMU vs. WRITE_PF_TO_SP flag",
        "dfeef3d3f310",
        "v6.9",
        BENIGN,
        (on.REEXECUTE_FLAG_ONLY,),
        "x86.c:reexecute_instruction",
    ),
    Fix(
        "track-write-barrier",
        "KVM: x86/mmu: Fix a largely theoretical race in kvm_mmu_track_write()",
        "226d9b8f1688",
        "v6.12",
        "coherence",
        (on.BARRIER_EMULATOR, on.BARRIER_ACCOUNT),
        "mmu.c:kvm_mmu_track_write, account_shadowed",
        "H1",
    ),
    Fix(
        "track-write-barrier.emulator",
        "the half of track-write-barrier in kvm_mmu_track_write()",
        "226d9b8f1688",
        "v6.12",
        "coherence",
        (on.BARRIER_EMULATOR,),
        "mmu.c:kvm_mmu_track_write",
    ),
    Fix(
        "track-write-barrier.account",
        "the half of track-write-barrier in account_shadowed()",
        "226d9b8f1688",
        "v6.12",
        "coherence",
        (on.BARRIER_ACCOUNT,),
        "mmu.c:account_shadowed",
    ),
    Fix(
        "retry-guard",
        "KVM: x86: retry protection by (last_retry_eip, last_retry_addr) on every unprotect path",
        "01dd4d319207, dabc4ff70c35, 4df685664bed",
        "v6.12",
        "livelock",
        (on.RETRY_CHECK, on.RETRY_RECORD_FAULT, on.RETRY_RECORD_FAILURE),
        "mmu.c:kvm_mmu_write_protect_fault, __kvm_mmu_unprotect_gfn_and_retry",
        "A3",
    ),
    Fix(
        "skip-emulation-iff-unprotected",
        "KVM: x86/mmu: Skip emulation on page fault iff 1+ SPs were unprotected",
        "2fb2b7877b3a",
        "v6.12",
        "livelock",
        (on.UNPROTECT_IFF_ZAPPED, on.RETRY_RECORD_FAULT, on.RETRY_RECORD_FAILURE),
        "mmu.c:kvm_mmu_write_protect_fault; x86.c:x86_emulate_instruction",
        "A2",
    ),
    Fix(
        "write-pf-to-sp",
        "KVM: x86: Check EMULTYPE_WRITE_PF_TO_SP before unprotecting gfn",
        "19ab2c8be070",
        "v6.1",
        "livelock",
        (on.WRITE_PF_TO_SP, on.RETRY_RECORD_FAILURE),
        "x86.c:kvm_unprotect_and_retry_on_failure; paging_tmpl.h:FNAME(fetch)",
        "A4",
    ),
    Fix(
        "reexecute-opt-in",
        "KVM: x86: Invert emulation re-execute behavior to make it opt-in",
        "8065dbd1ee0e",
        "v6.1",
        "livelock",
        (on.REEXECUTE_OPT_IN,),
        "x86.c:kvm_unprotect_and_retry_on_failure",
        "A5",
    ),
    Fix(
        "retry-rewrite",
        "KVM: x86: Fix multiple #PF RO infinite loop bugs (the series; its retry policy as a whole)",
        "4ececec19a09..98a69b96caca",
        "v6.12",
        "livelock",
        (on.RETRY_REWRITE,),
        "mmu.c:kvm_mmu_page_fault; x86.c:x86_emulate_instruction",
    ),
    Fix(
        "self-change-in-fetch",
        "KVM: x86/mmu: Detect write #PF to shadow pages during FNAME(fetch) walk",
        "258d985f6eb3, 39fda5d873eb",
        "v6.8",
        BENIGN,
        (on.SELF_CHANGE_IN_FETCH,),
        "paging_tmpl.h:FNAME(is_self_change_mapping), FNAME(fetch)",
    ),
    Fix(
        "page-track-direct-call",
        "KVM: x86/mmu: call kvm_mmu_track_write() directly instead of through the SRCU notifier list",
        "6.6 page-track overhaul",
        "v6.8",
        BENIGN,
        (on.TRACK_DIRECT_CALL,),
        "page_track.c:kvm_page_track_write; kernel/rcu/srcutree.c:__srcu_read_lock",
    ),
    Fix(
        "dummy-root",
        "KVM: x86/mmu: Use dummy root, backed by zero page, for !visible guest roots",
        "6.6 pull",
        "v6.8",
        BENIGN,
        (on.DUMMY_ROOT,),
        "mmu.c:mmu_alloc_shadow_roots",
    ),
    Fix(
        "user-failure-is-ud",
        "KVM: x86: Don't report guest userspace emulation error to userspace",
        "a2b9e6c1a35a, fc3a9157d314",
        "v6.1",
        "architecture",
        (on.USER_FAILURE_IS_UD,),
        "x86.c:handle_emulation_failure",
        "G5",
    ),
    Fix(
        "breakpoint-before-decode",
        "KVM: x86: avoid calling x86 emulator without a decoded instruction",
        "fee060cd52d6",
        "v6.1",
        "architecture",
        (on.BREAKPOINT_BEFORE_DECODE,),
        "x86.c:x86_emulate_instruction, kvm_vcpu_check_code_breakpoint",
        "G7",
    ),
    Fix(
        "no-singlestep-on-fault",
        "KVM: x86: Don't update RIP or do single-step on faulting emulation",
        "75ee23b30dc7",
        "v6.1",
        "livelock",
        (on.NO_SINGLESTEP_ON_FAULT,),
        "x86.c:x86_emulate_instruction",
        "G8",
    ),
    Fix(
        "mmio-scratch",
        "KVM: x86: Use scratch field in MMIO fragment to hold small write values",
        "b5a02d37eb07",
        "v6.1",
        "lifetime",
        (on.MMIO_SCRATCH,),
        "x86.c:emulator_read_write_onepage, complete_emulated_mmio",
        "G9",
    ),
    Fix(
        "skip-fails-on-exception",
        "KVM: x86: Fail emulation during EMULTYPE_SKIP on any exception",
        "17122c06b86c",
        "v6.1",
        "architecture",
        (on.SKIP_FAILS_ON_EXCEPTION,),
        "x86.c:x86_emulate_instruction",
        "G10",
    ),
    Fix(
        "emulate-memopp",
        "kvm: x86: Check memopp before dereference (CVE-2016-8630)",
        "d9092f52d7e6",
        "v6.1",
        "warn",
        (on.MEMOPP_CHECK,),
        "emulate.c:x86_decode_insn",
        "G1",
    ),
    Fix(
        "emulate-eip",
        "KVM: x86: Emulator fixes for eip canonical checks on near branches",
        "234f3ce485d5",
        "v6.1",
        "emulator",
        (on.EIP_CHECK,),
        "emulate.c:assign_eip_near",
        "G2",
    ),
    Fix(
        "emulate-null-ss",
        'KVM: x86: fix emulation of "MOV SS, null selector"',
        "33ab91103b34",
        "v6.1",
        "emulator",
        (on.NULL_SS,),
        "emulate.c:__load_segment_descriptor, load_segment_descriptor",
        "G3",
    ),
    Fix(
        "emulate-std-access",
        "kvm: x86: use correct privilege level for sgdt/sidt/fxsave/fxrstor access",
        "3c9fa24ca7c9",
        "v6.1",
        "emulator",
        (on.STD_USER_ACCESS,),
        "emulate.c:segmented_read_std, segmented_write_std",
        "G4",
    ),
    Fix(
        "emulate-sysenter",
        "KVM: x86: SYSENTER emulation is broken",
        "f3747379accb",
        "v6.1",
        "emulator",
        (on.SYSENTER_CS,),
        "emulate.c:em_sysenter",
        "G6",
    ),
    Fix(
        "emulate-lock",
        "KVM: Make locked operations truly atomic",
        "daea3e73cb4a",
        "v6.1",
        "emulator",
        (on.LOCKED_ATOMIC,),
        "emulate.c:writeback; x86.c:emulator_cmpxchg_emulated",
        "G11",
    ),
    Fix(
        "emulate-rep-zero",
        "KVM: x86: Fix zero iterations REP-string",
        "428e3d08574b",
        "v6.1",
        "emulator",
        (on.REP_ZERO_QUIRK,),
        "emulate.c:string_registers_quirk",
        "G12",
    ),
    Fix(
        "emulate-movbe66",
        "KVM: x86/emulator: emulate movbe with operand-size prefix",
        "03f6298c7cf6",
        "v6.9",
        BENIGN,
        (on.MOVBE66,),
        "emulate.c:three_byte_0f_38_f0, three_byte_0f_38_f1",
    ),
    Fix(
        "emulate-segment-privilege",
        "KVM: x86/emulator: Fix segment load privilege level validation",
        "0735d1c34e49",
        "v6.8",
        "emulator",
        (on.SEGMENT_PRIVILEGE,),
        "emulate.c:__load_segment_descriptor",
    ),
    Fix(
        "emulate-pop-ss",
        "KVM: x86/emulator: Fix handing of POP SS to correctly set interruptibility",
        "6aa5c47c351b",
        "v6.1",
        "emulator",
        (on.POP_SS_SHADOW,),
        "emulate.c:em_pop_sreg",
    ),
)

_BY_NAME: Final = {name: fix for fix in FIXES for name in (fix.id, fix.zoo.lower()) if name}


def find(name: str) -> Fix:
    """The fix with id (or zoo entry) ``name``; raises CaseError for an unknown one."""
    fix = _BY_NAME.get(name.lower())
    if fix is None:
        raise CaseError(f"fix {name!r}", "expected an id that 'mmufuzz fixes list' prints")
    return fix


_CACHE: Final[dict[tuple[str, tuple[str, ...], tuple[str, ...]], frozenset[str]]] = {}
_CACHE_SIZE: Final = 1000


def behaviours(kernel: str, revert: tuple[str, ...], apply: tuple[str, ...]) -> frozenset[str]:
    """What the model does for profile ``kernel`` with ``revert`` taken away, then ``apply`` added.

    Raises CaseError for an unknown profile or fix.
    """
    key = (kernel, revert, apply)
    found = _CACHE.get(key)
    if found is None:
        found = _behaviours(kernel, revert, apply)
        if len(_CACHE) >= _CACHE_SIZE:
            _CACHE.clear()
        _CACHE[key] = found
    return found


def _behaviours(kernel: str, revert: tuple[str, ...], apply: tuple[str, ...]) -> frozenset[str]:
    if kernel == "latest":
        kernel = LATEST
    if kernel not in KERNELS:
        raise CaseError(f"kernel {kernel!r}", f"expected one of {', '.join(KERNELS)}, latest")
    has: dict[str, bool] = {}
    for fix in FIXES:
        if KERNELS.index(fix.kernel) <= KERNELS.index(kernel):
            for behaviour in fix.behaviours:
                has[behaviour] = True
    # A behaviour that two fixes share belongs to the later kernel only if both name it there.
    for fix in FIXES:
        if KERNELS.index(fix.kernel) > KERNELS.index(kernel):
            for behaviour in fix.behaviours:
                has.pop(behaviour, None)
    for name in revert:
        for behaviour in find(name).behaviours:
            has.pop(behaviour, None)
    for name in apply:
        for behaviour in find(name).behaviours:
            has[behaviour] = True
    return frozenset(has)
