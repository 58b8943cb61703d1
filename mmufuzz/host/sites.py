"""Names of the visible operations, and the labels that name one occurrence of them.

A *site* is an operation on a class of objects ("indirect_shadow_pages.load"). A *label* is the n-th
occurrence of a site while a thread works on one of its steps (a guest instruction, a host operation):
``vcpu0@2.guest.store 1``. Labels, not step counts, carry schedules: they keep their meaning
when other steps are deleted and when the model gains or loses operations elsewhere.
"""

from __future__ import annotations

from typing import Final

SITE_NAMES: Final = (
    "thread.start",
    "thread.wait",
    "thread.yield",
    "thread.end",
    "guest.load",  # a guest CPU's own access to guest memory
    "guest.store",
    "guest.atomic",
    "guest.fetch",
    "guest.fence",
    "spte.walk",  # a hardware walk reads an SPTE
    "spte.load",  # KVM reads an SPTE
    "spte.store",
    "spte.atomic",
    "gpte.load",  # KVM reads a guest page-table entry
    "gpte.atomic",
    "emul.load",  # the emulator accesses guest memory
    "emul.store",
    "emul.atomic",
    "emul.fetch",
    "indirect_shadow_pages.load",
    "indirect_shadow_pages.store",
    "mmu_lock.lock",
    "mmu_lock.unlock",
    "slots_lock.lock",
    "slots_lock.unlock",
    "mode.load",
    "mode.store",
    "mode.atomic",
    "requests.load",
    "requests.atomic",
    "ipi.send",
    "thread.wake",
    "mb.fence",
    "vcpu.entry",
    "vcpu.exit",
    "mmu_valid_gen.store",
    "role.load",
    "role.store",
    "write_track.load",
    "write_track.store",
    "lock.lock",  # locks and words of programs that are not KVM (tests of the host itself)
    "lock.unlock",
    "word.load",
    "word.store",
    "word.atomic",
    "mmu_valid_gen.load",
    "irq.load",  # userspace's interrupt controller, and the signal that gets a vCPU's thread to look at it
    "irq.atomic",
)

THREAD_START: Final = 0
THREAD_WAIT: Final = 1
THREAD_YIELD: Final = 2
THREAD_END: Final = 3
GUEST_LOAD: Final = 4
GUEST_STORE: Final = 5
GUEST_ATOMIC: Final = 6
GUEST_FETCH: Final = 7
GUEST_FENCE: Final = 8
SPTE_WALK: Final = 9
SPTE_LOAD: Final = 10
SPTE_STORE: Final = 11
SPTE_ATOMIC: Final = 12
GPTE_LOAD: Final = 13
GPTE_ATOMIC: Final = 14
EMUL_LOAD: Final = 15
EMUL_STORE: Final = 16
EMUL_ATOMIC: Final = 17
EMUL_FETCH: Final = 18
COUNT_LOAD: Final = 19
COUNT_STORE: Final = 20
MMU_LOCK: Final = 21
MMU_UNLOCK: Final = 22
SLOTS_LOCK: Final = 23
SLOTS_UNLOCK: Final = 24
MODE_LOAD: Final = 25
MODE_STORE: Final = 26
MODE_ATOMIC: Final = 27
REQUESTS_LOAD: Final = 28
REQUESTS_ATOMIC: Final = 29
IPI_SEND: Final = 30
THREAD_WAKE: Final = 31
MB: Final = 32
VCPU_ENTRY: Final = 33
VCPU_EXIT: Final = 34
VALID_GEN_STORE: Final = 35
ROLE_LOAD: Final = 36
ROLE_STORE: Final = 37
WRITE_TRACK_LOAD: Final = 38
WRITE_TRACK_STORE: Final = 39
LOCK_LOCK: Final = 40
LOCK_UNLOCK: Final = 41
WORD_LOAD: Final = 42
WORD_STORE: Final = 43
WORD_ATOMIC: Final = 44
VALID_GEN_LOAD: Final = 45
IRQ_LOAD: Final = 46
IRQ_ATOMIC: Final = 47

N_SITES: Final = 48

STORE_SITES: Final = tuple(site for site in range(N_SITES) if SITE_NAMES[site].endswith((".store", ".unlock")))
"""Sites whose stores may be held in the store buffer."""

# A label packs thread (5 bits), step (12), site (8) and occurrence (16, from 1).
MAX_THREADS: Final = 31
MAX_STEPS: Final = 1 << 12
MAX_OCCURRENCE: Final = (1 << 16) - 1
BOOT: Final = 0
"""The label before anything has happened."""


def label(thread: int, step: int, site: int, occurrence: int) -> int:
    """Pack a label. Occurrence starts at 1, so no label equals ``BOOT``."""
    return ((thread << 12 | step) << 8 | site) << 16 | occurrence


def label_thread(packed: int) -> int:
    """The thread's index."""
    return packed >> 36


def label_step(packed: int) -> int:
    """The step of that thread."""
    return packed >> 24 & 0xFFF


def label_site(packed: int) -> int:
    """The site."""
    return packed >> 16 & 0xFF


def label_occurrence(packed: int) -> int:
    """Which occurrence of the site within the step, from 1."""
    return packed & 0xFFFF
