"""Pure edits of Cases that keep what a schedule's labels mean, and the order that says which Case is smaller."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mmufuzz.case.host_ops import interrupt_of, interrupt_op
from mmufuzz.case.model import FLAT32, Case, HostThread, Options, Vcpu, Word
from mmufuzz.case.tables import PS, P, frame
from mmufuzz.host.deviation import HOLD, RUN, Deviation
from mmufuzz.host.sites import BOOT, label, label_occurrence, label_site, label_step, label_thread

GONE: Final = -1
_FRAME: Final = (1 << 52) - (1 << 12)

Key = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]


def thread_count(case: Case) -> int:
    """vCPUs come first, then host threads; this is how labels number them."""
    return len(case.vcpus) + len(case.host)


def step_count(case: Case, thread: int) -> int:
    """Guest instructions of a vCPU, operations of a host thread."""
    if thread < len(case.vcpus):
        return len(case.vcpus[thread].program)
    return len(case.host[thread - len(case.vcpus)].ops)


def _position(packed: int) -> tuple[int, ...]:
    return (label_step(packed), label_occurrence(packed), label_site(packed), label_thread(packed))


def _deviation_key(deviation: Deviation) -> tuple[int, ...]:
    until = (0, 0, 0, 0, 0) if deviation.until == BOOT else (1, *_position(deviation.until))
    return (*until, *_position(deviation.at), deviation.actor, deviation.kind, deviation.address)


def _option_distance(options: Options) -> int:
    default = Options()
    distance = len(options.write_track)
    distance += int(options.fep != default.fep) + int(options.n_max_mmu_pages != default.n_max_mmu_pages)
    distance += int(options.decode_to_skip != default.decode_to_skip) + int(options.tsc != default.tsc)
    return distance + int(options.event_limit != default.event_limit)


def _vcpu_values(vcpu: Vcpu) -> int:
    total = vcpu.cpl
    for _, value in vcpu.regs:
        total += value.bit_count()
    for step in vcpu.program:
        total += len(step)
        for byte in step:
            total += byte
    return total


def key(case: Case) -> Key:
    """The one total order of reduction, smaller first; lexicographic.

    Guest instructions and host operations, memory words, threads, holds, preemptions, TLB events; then registers, CPU
    flags, slots, options away from their defaults, fix changes, values; then where deviations stand.
    """
    steps = 0
    for thread in range(thread_count(case)):
        steps += step_count(case, thread)
    holds = 0
    runs = 0
    for deviation in case.schedule:
        holds += deviation.kind == HOLD
        runs += deviation.kind == RUN
    registers = 0
    flags = 0
    values = 0
    for vcpu in case.vcpus:
        registers += len(vcpu.regs)
        flags += len(vcpu.flags)
        values += _vcpu_values(vcpu)
    for word in case.memory:
        values += word.value.bit_count()
    pages = 0
    for slot in case.slots:
        pages += slot.npages + slot.readonly
    counts = (
        steps,
        len(case.memory),
        thread_count(case),
        holds,
        runs,
        len(case.schedule) - holds - runs,
        registers,
        flags,
        len(case.slots),
        _option_distance(case.options),
        len(case.revert) + len(case.apply),
        values,
        pages,
    )
    return counts, tuple(_deviation_key(deviation) for deviation in case.schedule)


def _relabel(schedule: tuple[Deviation, ...], thread: int, first: int, last: int) -> tuple[Deviation, ...]:
    """The schedule without steps ``first``..``last`` - 1 of ``thread``, or without the thread if ``first`` is GONE."""
    kept = []
    for deviation in schedule:
        at = _move(deviation.at, thread, first, last)
        until = _move(deviation.until, thread, first, last)
        if at == GONE:
            continue
        actor = deviation.actor
        if deviation.kind == HOLD:
            actor = label_thread(at)
        elif first == GONE:
            if actor == thread:
                continue
            actor -= actor > thread
        kept.append(Deviation(deviation.kind, at, actor, BOOT if until == GONE else until, deviation.address))
    return tuple(kept)


def _move(packed: int, thread: int, first: int, last: int) -> int:
    if packed == BOOT:
        return BOOT
    owner = label_thread(packed)
    step = label_step(packed)
    if first == GONE:
        if owner == thread:
            return GONE
        owner -= owner > thread
    elif owner == thread:
        if first <= step < last:
            return GONE
        if step >= last:
            step -= last - first
    return label(owner, step, label_site(packed), label_occurrence(packed))


def drop_thread(case: Case, thread: int) -> Case:
    """Without a vCPU and its interrupts, or a host thread; the schedule's actors and labels are renumbered."""
    if thread < len(case.vcpus):
        case = _without_interrupts(case, thread)
        vcpus = case.vcpus[:thread] + case.vcpus[thread + 1 :]
        numbers = [index - (index > thread) for index in range(len(case.vcpus))]
        schedule = _relabel(case.schedule, thread, GONE, GONE)
        return replace(case, vcpus=vcpus, host=_redirected(case.host, numbers), schedule=schedule)
    schedule = _relabel(case.schedule, thread, GONE, GONE)
    index = thread - len(case.vcpus)
    return replace(case, host=case.host[:index] + case.host[index + 1 :], schedule=schedule)


def _without_interrupts(case: Case, vcpu: int) -> Case:
    """Without the host operations that interrupt this vCPU."""
    for index in range(len(case.host)):
        for step in range(len(case.host[index].ops) - 1, -1, -1):
            if interrupt_of(case.host[index].ops[step])[0] == vcpu:
                case = drop_steps(case, len(case.vcpus) + index, step, step + 1)
    return case


def _redirected(host: tuple[HostThread, ...], numbers: list[int]) -> tuple[HostThread, ...]:
    """With interrupts for vCPU ``numbers[i]`` where they were for vCPU i."""
    threads: list[HostThread] = []
    for thread in host:
        ops: list[str] = []
        for op in thread.ops:
            vcpu, vector = interrupt_of(op)
            ops.append(op if vcpu < 0 else interrupt_op(numbers[vcpu], vector))
        threads.append(HostThread(tuple(ops)))
    return tuple(threads)


def drop_steps(case: Case, thread: int, first: int, last: int) -> Case:
    """Without steps ``first``..``last`` - 1 of a thread; deviations labelled in them go, later labels move down."""
    schedule = _relabel(case.schedule, thread, first, last)
    if thread < len(case.vcpus):
        program = case.vcpus[thread].program
        vcpu = replace(case.vcpus[thread], program=program[:first] + program[last:])
        return replace(with_vcpu(case, thread, vcpu), schedule=schedule)
    index = thread - len(case.vcpus)
    ops = case.host[index].ops
    host = (*case.host[:index], HostThread(ops[:first] + ops[last:]), *case.host[index + 1 :])
    return replace(case, host=host, schedule=schedule)


def vcpu_first(case: Case, first: int) -> Case:
    """With vCPU ``first`` in front of the others; labels and actors follow, and no preemption says which starts."""
    vcpus = (case.vcpus[first], *case.vcpus[:first], *case.vcpus[first + 1 :])
    schedule = []
    for deviation in case.schedule:
        if deviation.kind == RUN and deviation.at == BOOT:
            continue
        at = _to_front(deviation.at, first)
        until = _to_front(deviation.until, first)
        actor = _front_index(deviation.actor, first)
        schedule.append(Deviation(deviation.kind, at, actor, until, deviation.address))
    numbers = [_front_index(index, first) for index in range(len(case.vcpus))]
    return replace(case, vcpus=vcpus, host=_redirected(case.host, numbers), schedule=tuple(schedule))


def _front_index(thread: int, first: int) -> int:
    if thread == first:
        return 0
    return thread + 1 if thread < first else thread


def _to_front(packed: int, first: int) -> int:
    if packed == BOOT:
        return BOOT
    owner = _front_index(label_thread(packed), first)
    return label(owner, label_step(packed), label_site(packed), label_occurrence(packed))


def with_vcpu(case: Case, index: int, vcpu: Vcpu) -> Case:
    """With vCPU ``index`` replaced."""
    return replace(case, vcpus=(*case.vcpus[:index], vcpu, *case.vcpus[index + 1 :]))


def with_deviation(case: Case, index: int, deviation: Deviation) -> Case:
    """With entry ``index`` of the schedule replaced."""
    return replace(case, schedule=(*case.schedule[:index], deviation, *case.schedule[index + 1 :]))


def table_levels(case: Case) -> dict[int, int]:
    """Level, 4 to 1, of each page table that some vCPU reaches, by gfn; the highest if it has several."""
    levels: dict[int, int] = {}
    tables = [vcpu.cr3 for vcpu in case.vcpus if vcpu.mode != FLAT32]
    for level in (4, 3, 2, 1):
        below: list[int] = []
        for gfn in tables:
            if gfn not in levels:
                levels[gfn] = level
                for word in case.memory:
                    if word.gfn == gfn and word.value & P and not word.value & PS:
                        below.append(frame(word.value))
        tables = below
    return levels


def merge_frames(case: Case, gone: int, kept: int) -> Case:
    """With all that is in frame ``gone`` in frame ``kept``, and all that points at the one pointing at the other.

    Where both frames have the same word, the one that comes first stays; if the two are entries that point at different
    frames, these are merged too.
    """
    moved = {gone: kept}
    merging = True
    words: dict[int, Word] = {}
    while merging:
        merging = False
        words = {}
        for word in case.memory:
            gfn = _moved(moved, word.gfn)
            value = word.value
            if value & P:
                value = value & ~_FRAME | _moved(moved, frame(value)) << 12
            place = gfn << 9 | word.index
            if place not in words:
                words[place] = Word(gfn, word.index, value)
            elif value & words[place].value & P and frame(value) != frame(words[place].value):
                moved[frame(value)] = frame(words[place].value)
                merging = True
                break
    vcpus = tuple([replace(vcpu, cr3=_moved(moved, vcpu.cr3)) for vcpu in case.vcpus])
    return replace(case, memory=tuple(words.values()), vcpus=vcpus)


def _moved(moved: dict[int, int], gfn: int) -> int:
    while gfn in moved:
        gfn = moved[gfn]
    return gfn
