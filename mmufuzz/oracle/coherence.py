"""Every access goes through a translation that the architecture allows, and every #PF is one it could raise.

A processor may keep a translation from the moment it walked the tables until it invalidates it (SDM vol. 3, 4.10). So
an access is right if there is a walk, each entry with some value that it held since the vCPU's last
invalidation that covers the address, which permits the access and ends at the frame that was accessed. Values are not
required to be from one moment: paging-structure caches mix. KVM may be stricter than a real TLB, never laxer.

A #PF delivered to the guest counts as no invalidation here, though SDM 4.10.4.1 has it drop the entries of its address:
when within the exit the architectural fault took place is not known, and an invalidation left out only allows more.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.counters import OWN_STORE, STALE_EMULATED, STALE_FAULT, STALE_HARDWARE
from mmufuzz.kvm.memslots import gfn_to_pfn
from mmufuzz.kvm.structs import Kvm, Vcpu
from mmufuzz.oracle.fate import fate_of_last_store
from mmufuzz.oracle.history import ALWAYS, History
from mmufuzz.oracle.sink import Sink
from mmufuzz.oracle.walks import ANY_RIGHTS, Walks, root_gfn
from mmufuzz.x86.paging import (
    ACCESS_FETCH,
    ACCESS_USER,
    ACCESS_WRITE,
    PAGE_SHIFT,
    PTE_A,
    PTE_D,
    PagingConfig,
)

_ACCESS_BITS: Final = 5


class View:
    """What one vCPU was already found to be allowed; nothing takes it away but an invalidation or other registers."""

    def __init__(self) -> None:
        self.config: PagingConfig | None = None
        self.cr3 = -1
        self.passed: dict[int, int] = {}
        """Page number and access to host frame."""


class Coherence:
    """The check of single accesses and faults."""

    def __init__(self, kvm: Kvm, sink: Sink, history: History) -> None:
        self.kvm = kvm
        self.sink = sink
        self.history = history
        self.views = [View() for _ in kvm.vcpus]

    def guest_access(self, index: int, gva: int, hpa: int, access: int, emulated: bool) -> None:
        """``Observer.guest_access``: a finding unless the access is allowed."""
        vcpu = self.kvm.vcpus[index]
        regs = vcpu.regs
        config = vcpu.paging
        if vcpu.guest_mode:
            access |= ACCESS_USER  # every nested walk is a user access (APM vol. 2, 15.25.5)
        view = self.views[index]
        if config is not view.config or regs.cr3 != view.cr3:
            view.config = config
            view.cr3 = regs.cr3
            view.passed = {}
        key = gva >> PAGE_SHIFT << _ACCESS_BITS | access
        pfn = hpa >> PAGE_SHIFT
        if view.passed.get(key, -1) == pfn:
            return
        if config.paging:
            walks = self._walks(vcpu, gva, self.history.invalidations[index].since(gva))
            allowed = walks.reaches(root_gfn(regs.cr3), access, pfn)
            if allowed and self.history.clock:
                self._count_near(vcpu, walks.path, STALE_EMULATED if emulated else STALE_HARDWARE)
        else:
            allowed = pfn == gfn_to_pfn(gva >> PAGE_SHIFT)
        if not allowed:
            self._report_access(vcpu, gva, pfn, access, emulated)
        view.passed[key] = pfn

    def guest_fault(self, index: int, gva: int, error_code: int) -> None:
        """``Observer.guest_fault``: a finding unless some allowed walk raises exactly this #PF."""
        vcpu = self.kvm.vcpus[index]
        config = vcpu.paging
        since = self.history.invalidations[index].since(gva)
        # Without NX and SMEP the error code of a fetch is that of a read, which faults wherever the fetch does.
        access = error_code & (ACCESS_WRITE | ACCESS_USER | ACCESS_FETCH)
        root = root_gfn(vcpu.regs.cr3)
        if config.paging:
            walks = self._walks(vcpu, gva, since)
            if walks.faults(root, access, error_code):
                if self.history.clock:
                    self._count_near(vcpu, walks.path, STALE_FAULT)
                return
        self.sink.violated(
            "coherence",
            f"unjustified #PF: error code {error_code:#x}",
            f"{vcpu.thread.name}: #PF at {gva:#x}, error code {error_code:#x}, which no value of the tables since the "
            f"last invalidation gives",
        )

    def guest_invalidated(self, index: int, gva: int) -> None:
        """``Observer.guest_invalidated``."""
        self.history.invalidated(index, gva)
        self.views[index].passed = {}

    def _count_near(self, vcpu: Vcpu, path: list[tuple[int, int]], which: int) -> None:
        """Count near miss ``which`` if a value on ``path`` is not the one in memory."""
        for hpa, value in path:
            if (self.kvm.memory.words.get(hpa >> 3, 0) ^ value) & ~(PTE_A | PTE_D):
                own = False
                for entry in vcpu.thread.buffer.pending:
                    own = own or entry.address & ~7 == hpa
                self.kvm.counters.near(OWN_STORE if own else which)
                return

    def _walks(self, vcpu: Vcpu, gva: int, since: int) -> Walks:
        return Walks(self.kvm, self.history, vcpu.paging, gva, since, vcpu.thread.buffer)

    # What is said about a violation. Slow is fine: it happens once.

    def _report_access(self, vcpu: Vcpu, gva: int, pfn: int, access: int, emulated: bool) -> None:
        who = "emulated" if emulated else "hardware"
        what = f"{who} {_access_text(access)} "
        detail = f"{vcpu.thread.name}: gva {gva:#x} reaches host frame {pfn:#x}"
        if not vcpu.paging.paging:
            self.sink.violated("coherence", what + "to a frame that is not the one at its gpa", detail)
        root = root_gfn(vcpu.regs.cr3)
        past = self._walks(vcpu, gva, ALWAYS)
        if past.reaches(root, access, pfn):
            hpa = self._forgotten(vcpu, gva, past.path)
            what = f"{who} access through a stale translation: {fate_of_last_store(self.kvm, hpa)}"
            detail += f", which the entry at hpa {hpa:#x} allowed only before the last invalidation"
        elif self._walks(vcpu, gva, ALWAYS).reaches(root, ANY_RIGHTS, pfn):
            what += "without the right: " + self._missing(vcpu, gva, pfn, access)
        elif self._reaches_reserved(vcpu, gva, pfn, access):
            what = f"{who} access through an entry with a reserved bit set"
        else:
            what += "to a frame that the tables never named for it"
        self.sink.violated("coherence", what, detail)

    def _forgotten(self, vcpu: Vcpu, gva: int, path: list[tuple[int, int]]) -> int:
        """The lowest entry of ``path`` with a value that the vCPU may no longer have cached."""
        since = self.history.invalidations[vcpu.index].since(gva)
        lowest = 0
        for hpa, value in path:
            if not _among(value, self.history.values(hpa, since, vcpu.thread.buffer)):
                lowest = hpa
        return lowest

    def _reaches_reserved(self, vcpu: Vcpu, gva: int, pfn: int, access: int) -> bool:
        walks = self._walks(vcpu, gva, ALWAYS)
        walks.mind_reserved = False
        return walks.reaches(root_gfn(vcpu.regs.cr3), access, pfn)

    def _missing(self, vcpu: Vcpu, gva: int, pfn: int, access: int) -> str:
        """The right for want of which ``access`` is forbidden."""
        for bit, name in ((ACCESS_WRITE, "W"), (ACCESS_FETCH, "X"), (ACCESS_USER, "U")):
            if access & bit and self._walks(vcpu, gva, ALWAYS).reaches(root_gfn(vcpu.regs.cr3), access & ~bit, pfn):
                return name
        return "SMAP or SMEP" if not access & ACCESS_USER else "several"


def _among(value: int, values: list[int]) -> bool:
    """True if ``value`` is in ``values`` but for A and D."""
    for other in values:
        if (other ^ value) & ~(PTE_A | PTE_D) == 0:
            return True
    return False


def _access_text(access: int) -> str:
    text = "user " if access & ACCESS_USER else "supervisor "
    if access & ACCESS_FETCH:
        return text + "fetch"
    return text + ("write" if access & ACCESS_WRITE else "read")
