"""Nothing touches a shadow page after KVM freed it, nor a local variable of a function that has returned."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.host.sites import SITE_NAMES, SPTE_ATOMIC, SPTE_LOAD, SPTE_STORE, SPTE_WALK, label_site
from mmufuzz.kvm.structs import Kvm
from mmufuzz.oracle.sink import Sink

_BY_SITE: Final = (SPTE_WALK, SPTE_LOAD, SPTE_STORE, SPTE_ATOMIC)


class Lifetime:
    """Frames are never handed out again, so every access to a freed one is a use after free."""

    def __init__(self, kvm: Kvm, sink: Sink) -> None:
        self.kvm = kvm
        self.sink = sink

    def freed_frame_accessed(self, address: int, write: bool) -> None:
        """``MemoryWatcher.freed_frame_accessed``."""
        thread = self.kvm.host.current
        site = label_site(thread.last)
        vcpus = self.kvm.vcpus
        if site in (SPTE_WALK, SPTE_ATOMIC) and thread.index < len(vcpus) and vcpus[thread.index].in_guest:
            who = "a hardware walk"
        elif self.kvm.mmu_lock.held_by_current():
            who = "KVM under mmu_lock"
        elif site in _BY_SITE:
            who = f"KVM ({SITE_NAMES[site]})"
        else:
            # Only speculative walks and draining buffers act between the events of a thread.
            who = "a buffered store" if write else "a speculative walk"
        what = f"freed shadow page {'written' if write else 'read'} by {who}"
        self.sink.violated(
            "lifetime", what, f"{thread.name} at {SITE_NAMES[site]}: {address:#x} in frame {address >> PAGE_SHIFT:#x}"
        )

    def temporary_used(self, vcpu: int, site: str) -> None:
        """``Observer.temporary_used``."""
        what = f"{site} reads a local variable of the emulator, which has returned"
        self.sink.violated("lifetime", what, self.kvm.vcpus[vcpu].thread.name)
