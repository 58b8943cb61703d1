"""The queue of one exception for the guest (x86.c:kvm_multiple_exception and its callers)."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.requests import REQ_TRIPLE_FAULT, kvm_make_request
from mmufuzz.kvm.root import kvm_mmu_invalidate_addr
from mmufuzz.kvm.structs import QueuedException, Vcpu
from mmufuzz.x86.state import (
    NO_ERROR_CODE,
    PFERR_PRESENT,
    PFERR_RSVD,
    VECTOR_DE,
    VECTOR_DF,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_TS,
)

_CONTRIBUTORY: Final = (VECTOR_DE, VECTOR_TS, VECTOR_NP, VECTOR_SS, VECTOR_GP)


def kvm_queue_exception(vcpu: Vcpu, vector: int, error_code: int = NO_ERROR_CODE, payload: int = 0) -> None:
    """x86.c:kvm_queue_exception, _e and _p; see ``QueuedException`` for the arguments."""
    _multiple_exception(vcpu, QueuedException(vector, error_code, payload), False)


def kvm_requeue_exception(vcpu: Vcpu, exception: QueuedException) -> None:
    """x86.c:kvm_requeue_exception: the delivery of ``exception`` exited; it is injected again at the next entry."""
    _multiple_exception(vcpu, exception, True)


def _multiple_exception(vcpu: Vcpu, new: QueuedException, injected: bool) -> None:
    """x86.c:kvm_multiple_exception: two make a #DF, three a triple fault, or the second replaces the first."""
    old = vcpu.exception
    if old is not None:
        if old.vector == VECTOR_DF:
            kvm_make_request(vcpu, REQ_TRIPLE_FAULT)
            return
        contributory = new.vector in _CONTRIBUTORY
        if (old.vector in _CONTRIBUTORY and contributory) or (
            old.vector == VECTOR_PF and (contributory or new.vector == VECTOR_PF)
        ):
            vcpu.kvm.mark("exception.double_fault")
            vcpu.exception = QueuedException(VECTOR_DF, 0, 0)
            vcpu.exception_injected = False
            return
    vcpu.exception = new
    vcpu.exception_injected = injected


def kvm_clear_exception_queue(vcpu: Vcpu) -> None:
    """x86.h:kvm_clear_exception_queue."""
    vcpu.exception = None
    vcpu.exception_injected = False


def kvm_event_needs_reinjection(vcpu: Vcpu) -> bool:
    """x86.h:kvm_event_needs_reinjection: the delivery of an event exited."""
    return vcpu.exception_injected or vcpu.interrupt is not None


def kvm_inject_emulated_page_fault(vcpu: Vcpu, gva: int, error_code: int) -> None:
    """x86.c:kvm_inject_emulated_page_fault: a #PF whose tables say P=1 first forgets what is cached for ``gva``."""
    if error_code & PFERR_PRESENT and not error_code & PFERR_RSVD:
        kvm_mmu_invalidate_addr(vcpu, gva)
    kvm_queue_exception(vcpu, VECTOR_PF, error_code, gva)
