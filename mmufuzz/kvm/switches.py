"""The behaviours that differ between kernels: their names, and as the model asks for them."""

from __future__ import annotations

from typing import Final

REEXECUTE_LOCKLESS: Final = "reexecute-lockless"
REEXECUTE_ONE_PATH: Final = "reexecute-one-path"
REEXECUTE_FLAG_ONLY: Final = "reexecute-flag-only"
BARRIER_EMULATOR: Final = "track-write-barrier.emulator"
BARRIER_ACCOUNT: Final = "track-write-barrier.account"
RETRY_REWRITE: Final = "retry-rewrite"
RETRY_CHECK: Final = "retry-guard.check"
RETRY_RECORD_FAULT: Final = "retry-guard.fault"
RETRY_RECORD_FAILURE: Final = "retry-guard.failure"
UNPROTECT_IFF_ZAPPED: Final = "skip-emulation-iff-unprotected"
WRITE_PF_TO_SP: Final = "write-pf-to-sp"
REEXECUTE_OPT_IN: Final = "reexecute-opt-in"
SELF_CHANGE_IN_FETCH: Final = "self-change-in-fetch"
TRACK_DIRECT_CALL: Final = "page-track-direct-call"
DUMMY_ROOT: Final = "dummy-root"
USER_FAILURE_IS_UD: Final = "user-failure-is-ud"
BREAKPOINT_BEFORE_DECODE: Final = "breakpoint-before-decode"
NO_SINGLESTEP_ON_FAULT: Final = "no-singlestep-on-fault"
MMIO_SCRATCH: Final = "mmio-scratch"
SKIP_FAILS_ON_EXCEPTION: Final = "skip-fails-on-exception"
MEMOPP_CHECK: Final = "emulator.memopp-check"
EIP_CHECK: Final = "emulator.eip-check"
NULL_SS: Final = "emulator.null-ss"
STD_USER_ACCESS: Final = "emulator.std-user-access"
SYSENTER_CS: Final = "emulator.sysenter-cs"
LOCKED_ATOMIC: Final = "emulator.locked-atomic"
REP_ZERO_QUIRK: Final = "emulator.rep-zero-quirk"
MOVBE66: Final = "emulator.movbe66"
SEGMENT_PRIVILEGE: Final = "emulator.segment-privilege"
POP_SS_SHADOW: Final = "emulator.pop-ss-shadow"


class Fixes:
    """``Kvm.has``, with one attribute per behaviour so that asking costs nothing."""

    def __init__(self, behaviours: frozenset[str]) -> None:
        self.reexecute_lockless = REEXECUTE_LOCKLESS in behaviours
        self.reexecute_one_path = REEXECUTE_ONE_PATH in behaviours
        self.reexecute_flag_only = REEXECUTE_FLAG_ONLY in behaviours
        self.barrier_emulator = BARRIER_EMULATOR in behaviours
        self.barrier_account = BARRIER_ACCOUNT in behaviours
        self.retry_rewrite = RETRY_REWRITE in behaviours
        self.retry_check = RETRY_CHECK in behaviours
        self.retry_record_fault = RETRY_RECORD_FAULT in behaviours
        self.retry_record_failure = RETRY_RECORD_FAILURE in behaviours
        self.unprotect_iff_zapped = UNPROTECT_IFF_ZAPPED in behaviours
        self.write_pf_to_sp = WRITE_PF_TO_SP in behaviours
        self.reexecute_opt_in = REEXECUTE_OPT_IN in behaviours
        self.self_change_in_fetch = SELF_CHANGE_IN_FETCH in behaviours
        self.track_direct_call = TRACK_DIRECT_CALL in behaviours
        self.dummy_root = DUMMY_ROOT in behaviours
        self.user_failure_is_ud = USER_FAILURE_IS_UD in behaviours
        self.breakpoint_before_decode = BREAKPOINT_BEFORE_DECODE in behaviours
        self.no_singlestep_on_fault = NO_SINGLESTEP_ON_FAULT in behaviours
        self.mmio_scratch = MMIO_SCRATCH in behaviours
        self.skip_fails_on_exception = SKIP_FAILS_ON_EXCEPTION in behaviours
        self.memopp_check = MEMOPP_CHECK in behaviours
        self.eip_check = EIP_CHECK in behaviours
        self.null_ss = NULL_SS in behaviours
        self.std_user_access = STD_USER_ACCESS in behaviours
        self.sysenter_cs = SYSENTER_CS in behaviours
        self.locked_atomic = LOCKED_ATOMIC in behaviours
        self.rep_zero_quirk = REP_ZERO_QUIRK in behaviours
        self.movbe66 = MOVBE66 in behaviours
        self.segment_privilege = SEGMENT_PRIVILEGE in behaviours
        self.pop_ss_shadow = POP_SS_SHADOW in behaviours
