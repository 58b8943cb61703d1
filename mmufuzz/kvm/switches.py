"""The behaviours of ``kvm.fixes`` as the model asks for them."""

from __future__ import annotations

from mmufuzz.kvm.fixes import (
    BARRIER_ACCOUNT,
    BARRIER_EMULATOR,
    BREAKPOINT_BEFORE_DECODE,
    DUMMY_ROOT,
    EIP_CHECK,
    LOCKED_ATOMIC,
    MEMOPP_CHECK,
    MMIO_SCRATCH,
    MOVBE66,
    NO_SINGLESTEP_ON_FAULT,
    NULL_SS,
    POP_SS_SHADOW,
    REEXECUTE_FLAG_ONLY,
    REEXECUTE_LOCKLESS,
    REEXECUTE_ONE_PATH,
    REEXECUTE_OPT_IN,
    REP_ZERO_QUIRK,
    RETRY_CHECK,
    RETRY_RECORD_FAILURE,
    RETRY_RECORD_FAULT,
    RETRY_REWRITE,
    SEGMENT_PRIVILEGE,
    SELF_CHANGE_IN_FETCH,
    SKIP_FAILS_ON_EXCEPTION,
    STD_USER_ACCESS,
    SYSENTER_CS,
    TRACK_DIRECT_CALL,
    UNPROTECT_IFF_ZAPPED,
    USER_FAILURE_IS_UD,
    WRITE_PF_TO_SP,
)


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
