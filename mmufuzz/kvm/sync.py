"""Unsync shadow pages: the place for them (mmu.c). Every gSP is kept in sync: a guest table is never writable."""

from __future__ import annotations

from mmufuzz.host.sites import WRITE_TRACK_LOAD
from mmufuzz.kvm.structs import Kvm
from mmufuzz.kvm.write_track import write_track_address
from mmufuzz.kvm.zap import gsps_at


def mmu_try_to_unsync_pages(kvm: Kvm, gfn: int) -> bool:
    """mmu.c:mmu_try_to_unsync_pages: whether ``gfn`` may be mapped writable. Under mmu_lock.

    KVM would let a level-1 gSP go out of sync instead of refusing; here it is refused, as KVM does while
    can_unsync is false.
    """
    if kvm.host.current.load(WRITE_TRACK_LOAD, write_track_address(gfn)):
        return False
    return not gsps_at(kvm, gfn)
