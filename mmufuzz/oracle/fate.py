"""What became of a store to a guest page table: the cause that tells one stale translation from another."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import (
    COUNT_LOAD,
    EMUL_ATOMIC,
    EMUL_STORE,
    GUEST_ATOMIC,
    GUEST_STORE,
    MMU_UNLOCK,
    THREAD_END,
    VCPU_ENTRY,
    label_site,
    label_thread,
)
from mmufuzz.kvm.structs import Kvm

NOBODY: Final = "nobody wrote the entry"
UNTRACKED: Final = "the emulator does not track such a store"
_STORES: Final = (EMUL_STORE, EMUL_ATOMIC, GUEST_STORE, GUEST_ATOMIC)


def fate_of_last_store(kvm: Kvm, hpa: int) -> str:
    """Whether KVM saw the last store to the entry at ``hpa``, by the trace. NOBODY if there was none."""
    trace = kvm.host.trace.entries()
    at = len(trace) - 1
    while at >= 0 and not (trace[at][1] & ~7 == hpa and trace[at][0] > 0 and label_site(trace[at][0]) in _STORES):
        at -= 1
    if at < 0:
        return NOBODY
    if label_site(trace[at][0]) in (GUEST_STORE, GUEST_ATOMIC):
        return "a store by hardware, which KVM cannot see"
    writer = label_thread(trace[at][0])
    counted = False
    for label, address, value in trace[at:]:
        if label > 0 and label_thread(label) == writer:
            if label_site(label) == COUNT_LOAD and address == kvm.indirect_shadow_pages:
                if value == 0:
                    return "the emulated store was not tracked"
                counted = True
            if label_site(label) == MMU_UNLOCK:
                return "the emulated store was tracked in vain" if counted else UNTRACKED
            if label_site(label) in (VCPU_ENTRY, THREAD_END) and not counted:
                return UNTRACKED
    return "the emulated store is not tracked yet"
