"""Turns any ``Case`` into a valid one, changing as little as it can.

The byte decoder and the mutations put together Cases without looking; this makes them fit to run. A valid Case
comes back equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mmufuzz.case.host_ops import interrupt_of, interrupt_op
from mmufuzz.case.model import (
    FINDING,
    FLAT32,
    HOST_OPS,
    LONG4,
    MAX_GFN,
    MAX_HOST_THREADS,
    MAX_STEP_BYTES,
    MAX_STEPS_PER_VCPU,
    MAX_VCPUS,
    NPT4,
    OK,
    SC,
    TSO,
    Case,
    Expect,
    HostThread,
    Options,
    Slot,
    Vcpu,
    Word,
)
from mmufuzz.case.validate import (
    FLAGS,
    MAX_COMMENT,
    MAX_DEVIATIONS,
    MAX_EVENTS,
    MAX_ID,
    MAX_IDS,
    MAX_LINE,
    MAX_MMU_PAGES,
    MAX_OPS,
    MAX_SLOTS,
    MAX_WORDS,
    MAX_WRITE_TRACK,
    PAGE,
    STEPS_PER_PAGE,
    U64,
    canonical,
    code_pages,
    in_slots,
    is_id,
    is_line,
    is_mark,
    is_text,
    least_mmu_pages,
    paging_mode,
)
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import (
    BOOT,
    MAX_STEPS,
    N_SITES,
    STORE_SITES,
    label,
    label_occurrence,
    label_site,
    label_step,
    label_thread,
)

DEFAULT_SLOTS: Final = (Slot(0, 32),)
DEFAULT_KERNEL: Final = "v6.12"

_CODE_LIMIT: Final = 1 << 47


def repair(case: Case) -> Case:
    """A valid Case; the same one if ``case`` is valid. Total over Cases whose fields have their declared types.

    Overlapping slots and doubled words go, as do unknown names; numbers are reduced into their ranges; frames outside
    the slots are folded into them; a missing slot or vCPU is supplied.
    """
    slots = repair_slots(case.slots)
    vcpus = repair_vcpus(case.vcpus, slots)
    host = repair_host(case.host, vcpus)
    return Case(
        kernel=case.kernel if is_id(case.kernel) else DEFAULT_KERNEL,
        revert=_ids(case.revert),
        apply=_ids(case.apply),
        memory_model=case.memory_model if case.memory_model in (TSO, SC) else TSO,
        options=repair_options(case.options, slots, len(vcpus)),
        slots=slots,
        memory=repair_memory(case.memory, slots),
        vcpus=vcpus,
        host=host,
        schedule=repair_schedule(case.schedule, len(vcpus), len(host)),
        expect=repair_expect(case.expect),
        comment=case.comment if is_text(case.comment) else _clean_text(case.comment),
    )


def fold_gfn(slots: Sequence[Slot], gfn: int) -> int:
    """``gfn`` if a slot holds it, else a frame of the slots that depends on ``gfn`` alone."""
    if in_slots(slots, gfn):
        return gfn
    total = 0
    for slot in slots:
        total += slot.npages
    rest = gfn % total
    for slot in slots:
        if rest < slot.npages:
            return slot.base_gfn + rest
        rest -= slot.npages
    return slots[0].base_gfn


def repair_slots(slots: Sequence[Slot]) -> tuple[Slot, ...]:
    """Slots in range that do not overlap; of two that do the first stays."""
    kept: list[Slot] = []
    for slot in slots:
        base = slot.base_gfn % MAX_GFN
        npages = min(max(1, slot.npages), MAX_GFN - base)
        free = len(kept) < MAX_SLOTS
        for other in kept:
            if base < other.base_gfn + other.npages and other.base_gfn < base + npages:
                free = False
        if not free:
            continue
        if base != slot.base_gfn or npages != slot.npages:
            slot = Slot(base, npages, slot.readonly)
        kept.append(slot)
    return tuple(kept) if kept else DEFAULT_SLOTS


def repair_memory(memory: Sequence[Word], slots: Sequence[Slot]) -> tuple[Word, ...]:
    """Words inside the slots; of two for one place the first stays."""
    kept: list[Word] = []
    seen: set[int] = set()
    for word in memory:
        gfn = fold_gfn(slots, word.gfn)
        index = word.index % 512
        value = word.value & U64
        if gfn << 9 | index in seen or len(kept) >= MAX_WORDS:
            continue
        seen.add(gfn << 9 | index)
        if gfn != word.gfn or index != word.index or value != word.value:
            word = Word(gfn, index, value)
        kept.append(word)
    return tuple(kept)


def repair_options(options: Options, slots: Sequence[Slot], vcpus: int) -> Options:
    """Limits in range (0 means the default), tracked gfns inside the slots and once each."""
    tracked: list[int] = []
    for gfn in options.write_track:
        if in_slots(slots, gfn) and gfn not in tracked and len(tracked) < MAX_WRITE_TRACK:
            tracked.append(gfn)
    default = Options()
    pages = options.n_max_mmu_pages
    least = least_mmu_pages(vcpus)
    if not least <= pages <= MAX_MMU_PAGES:
        pages = max(least, pages % (MAX_MMU_PAGES + 1)) if pages else default.n_max_mmu_pages
    limit = options.event_limit
    if not 1 <= limit <= MAX_EVENTS:
        limit = limit % (MAX_EVENTS + 1) or default.event_limit
    return Options(options.fep, pages, tuple(tracked), limit, options.decode_to_skip, options.tsc & U64)


def repair_vcpus(vcpus: Sequence[Vcpu], slots: Sequence[Slot]) -> tuple[Vcpu, ...]:
    """At least one vCPU, each in range."""
    if not vcpus:
        gfn = slots[0].base_gfn
        return (Vcpu(FLAT32, code_gva=gfn * PAGE, code_gfn=gfn),)
    paging = NPT4 if paging_mode(vcpus[:MAX_VCPUS]) == NPT4 else LONG4
    return tuple([repair_vcpu(vcpu, slots, paging) for vcpu in vcpus[:MAX_VCPUS]])


def repair_vcpu(vcpu: Vcpu, slots: Sequence[Slot], paging: str = LONG4) -> Vcpu:
    """The vCPU with its code inside the slots, known flags, and each register once; its mode FLAT32 or ``paging``."""
    flags: list[str] = []
    for flag in vcpu.flags:
        if flag in FLAGS and flag not in flags:
            flags.append(flag)
    regs: list[tuple[int, int]] = []
    numbers = 0
    for number, value in vcpu.regs:
        number &= 15
        if not numbers >> number & 1:
            numbers |= 1 << number
            regs.append((number, value & U64))
    steps: list[bytes] = []
    for step in vcpu.program[:MAX_STEPS_PER_VCPU]:
        if step:
            steps.append(step[:MAX_STEP_BYTES])
    mode = paging if vcpu.mode in (LONG4, NPT4) else FLAT32
    code_gfn = fold_gfn(slots, vcpu.code_gfn)
    pages = 1
    while pages < code_pages(len(steps)):
        if not in_slots(slots, code_gfn + pages):
            steps = steps[: pages * STEPS_PER_PAGE]
            break
        pages += 1
    return Vcpu(
        mode=mode,
        cpl=0 if vcpu.cpl == 0 else 3,
        cr3=vcpu.cr3 % MAX_GFN,
        flags=tuple(flags),
        code_gva=code_gfn * PAGE if mode == FLAT32 else _code_gva(vcpu.code_gva, pages, mode == LONG4),
        code_gfn=code_gfn,
        regs=tuple(regs),
        program=tuple(steps),
    )


def _code_gva(gva: int, pages: int, mode64: bool) -> int:
    """A page-aligned canonical or 32-bit address with room for the program before the addresses end."""
    gva &= U64 - (PAGE - 1)
    if not mode64:
        return min(gva & 0xFFFFFFFF, (1 << 32) - pages * PAGE)
    if not canonical(gva):
        gva &= (_CODE_LIMIT << 1) - 1
        if gva & _CODE_LIMIT:
            gva |= U64 - (_CODE_LIMIT - 1)
    end = U64 + 1 if gva >= _CODE_LIMIT else _CODE_LIMIT
    return min(gva, end - pages * PAGE)


def repair_host(host: Sequence[HostThread], vcpus: Sequence[Vcpu]) -> tuple[HostThread, ...]:
    """Host threads with known operations only; none interrupts an L2 guest."""
    kept: list[HostThread] = []
    for thread in host[:MAX_HOST_THREADS]:
        ops: list[str] = []
        for op in thread.ops:
            vcpu, vector = interrupt_of(op)
            if vcpu >= 0:
                vcpu %= len(vcpus)
                op = interrupt_op(vcpu, vector)
            if (op in HOST_OPS or (vcpu >= 0 and vcpus[vcpu].mode != NPT4)) and len(ops) < MAX_OPS:
                ops.append(op)
        kept.append(HostThread(tuple(ops)))
    return tuple(kept)


def repair_schedule(schedule: Sequence[Deviation], vcpus: int, host: int) -> tuple[Deviation, ...]:
    """Deviations of existing threads. A hold of nothing goes."""
    kept: list[Deviation] = []
    for deviation in schedule[:MAX_DEVIATIONS]:
        threads = vcpus + host
        at = _label(deviation.at, threads)
        kind = deviation.kind & 3
        if kind == RUN:
            kept.append(Deviation(RUN, at, deviation.actor % threads))
        elif kind == HOLD:
            if at == BOOT:
                continue
            site = label_site(at)
            if site not in STORE_SITES:
                at += (STORE_SITES[site % len(STORE_SITES)] - site) << 16
            kept.append(Deviation(HOLD, at, label_thread(at), _label(deviation.until, threads)))
        else:
            kept.append(Deviation(kind, at, deviation.actor % vcpus, BOOT, deviation.address & U64))
    return tuple(kept)


def _label(packed: int, threads: int) -> int:
    if packed == BOOT:
        return BOOT
    packed = abs(packed)
    return label(
        label_thread(packed) % threads,
        label_step(packed) % MAX_STEPS,
        label_site(packed) % N_SITES,
        label_occurrence(packed) or 1,
    )


def repair_expect(expect: Expect) -> Expect:
    """An expectation whose parts fit together."""
    reach: list[str] = []
    for mark in expect.reach:
        if is_mark(mark) and len(reach) < MAX_IDS:
            reach.append(mark)
    if expect.verdict != FINDING:
        return Expect(OK, "", "", tuple(reach))
    kind = expect.kind if is_id(expect.kind) else ""
    fingerprint = expect.fingerprint
    if not is_line(fingerprint):
        fingerprint = _clean_line(fingerprint)
    return Expect(FINDING, kind, fingerprint, tuple(reach))




def _ids(ids: Sequence[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for text in ids:
        if is_id(text[:MAX_ID]) and len(kept) < MAX_IDS:
            kept.append(text[:MAX_ID])
    return tuple(kept)


def _clean_line(text: str) -> str:
    kept = ""
    for character in text[:MAX_LINE]:
        if is_line(character):
            kept += character
    return kept


def _clean_text(text: str) -> str:
    return text[:MAX_COMMENT].encode("utf-8", "replace").decode("utf-8")
