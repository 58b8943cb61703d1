"""Small random changes of a Case, for searches that grow a corpus."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from mmufuzz.case.generate_insn import FEP, PLAIN, RCX, RMW, UNEMULATED, Program
from mmufuzz.case.host_ops import interrupt_op
from mmufuzz.case.model import (
    CODE_SLOT,
    FLAT32,
    HOST_OPS,
    LONG4,
    MAX_STEP_BYTES,
    SC,
    TSO,
    Case,
    Expect,
    HostThread,
    Vcpu,
    Word,
)
from mmufuzz.case.repair import repair
from mmufuzz.case.rng import Rng
from mmufuzz.case.tables import NX, PS, RESERVED, A, D, G, P, U, W, frame
from mmufuzz.case.validate import FLAGS
from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.sites import (
    BOOT,
    EMUL_STORE,
    GPTE_LOAD,
    GUEST_STORE,
    MAX_OCCURRENCE,
    MAX_STEPS,
    N_SITES,
    SPTE_WALK,
    STORE_SITES,
    label,
    label_occurrence,
    label_site,
    label_step,
    label_thread,
)
from mmufuzz.x86.state import FIRST_INTERRUPT

_FLIPS: Final = (P, W, U, A, D, PS, G, NX, RESERVED)
_COMMON_SITES: Final = (GUEST_STORE, EMUL_STORE, GPTE_LOAD, SPTE_WALK, 19, 20, 21, 22, 33, 34)
_MAX_VCPUS: Final = 4
_MAX_PROGRAM: Final = 12


def mutate(rng: Rng, case: Case) -> Case:
    """A valid Case that differs from ``case`` in one to three small ways. Its expectation and comment are dropped."""
    case = replace(case, expect=Expect(), comment="")
    for _ in range(1 + rng.below(3)):
        case = repair(_change(rng, case))
    return _bound_counts(case)


def splice(rng: Rng, a: Case, b: Case) -> Case:
    """A valid Case with parts of both: memory and limits of ``a``, some vCPUs and deviations of ``b``."""
    vcpus = list(a.vcpus)
    for index in range(len(b.vcpus)):
        choice = rng.below(4)
        donor = b.vcpus[index]
        if choice == 0 and len(vcpus) < _MAX_VCPUS:
            vcpus.append(donor)
        elif choice == 1 and index < len(vcpus):
            vcpus[index] = replace(vcpus[index], program=donor.program, regs=donor.regs)
        elif choice == 2 and index < len(vcpus):
            program = vcpus[index].program
            cut = rng.below(len(program) + 1)
            vcpus[index] = replace(vcpus[index], program=program[:cut] + donor.program[cut:])
    memory = a.memory + b.memory if rng.chance(1, 2) else a.memory
    schedule = a.schedule + b.schedule if rng.chance(1, 2) else a.schedule
    host = b.host if rng.chance(1, 4) else a.host
    spliced = replace(
        a, memory=memory, vcpus=tuple(vcpus), host=host, schedule=schedule, expect=Expect(), comment=""
    )
    return _bound_counts(repair(spliced))


def _bound_counts(case: Case) -> Case:
    """With fewer than 256 in the RCX of programs that repeat a string instruction: more of the same takes only time."""
    for index in range(len(case.vcpus)):
        vcpu = case.vcpus[index]
        if any(_repeats(step) for step in vcpu.program):
            regs = tuple([(number, value & 0xFF if number == RCX else value) for number, value in vcpu.regs])
            case = _with_vcpu(case, index, replace(vcpu, regs=regs))
    return case


def _repeats(step: bytes) -> bool:
    return (b"\xf3" in step or b"\xf2" in step) and any(opcode in step for opcode in (0xA4, 0xA5, 0xAA, 0xAB))


def _change(rng: Rng, case: Case) -> Case:
    choice = rng.below(100)
    if choice < 35:
        return _change_program(rng, case)
    if choice < 50:
        return _change_register(rng, case)
    if choice < 70:
        return replace(case, memory=_change_memory(rng, case))
    if choice < 78:
        return _change_vcpus(rng, case)
    if choice < 84:
        return _change_host(rng, case)
    if choice < 88:
        return _change_options(rng, case)
    return replace(case, schedule=_change_schedule(rng, case))


def _with_vcpu(case: Case, index: int, vcpu: Vcpu) -> Case:
    vcpus = list(case.vcpus)
    vcpus[index] = vcpu
    return replace(case, vcpus=tuple(vcpus))


def tables_of(case: Case) -> list[int]:
    """gfns of the page tables in use: what the roots of the paging vCPUs lead to."""
    found: list[int] = []
    level = [vcpu.cr3 for vcpu in case.vcpus if vcpu.mode != FLAT32]
    entries: dict[int, list[int]] = {}
    for word in case.memory:
        entries.setdefault(word.gfn, []).append(word.value)
    for _ in range(4):
        below: list[int] = []
        for gfn in level:
            if gfn in found:
                continue
            found.append(gfn)
            for value in entries.get(gfn, []):
                if value & P and not value & PS:
                    below.append(frame(value))
        level = below
    return found


def _pick(rng: Rng, items: list[int] | tuple[int, ...]) -> int:
    return items[rng.below(len(items))]


# Programs.


def _change_program(rng: Rng, case: Case) -> Case:
    index = rng.below(len(case.vcpus))
    vcpu = case.vcpus[index]
    program = list(vcpu.program)
    choice = rng.below(10)
    if not program or (choice < 4 and len(program) < _MAX_PROGRAM):
        steps = _new_steps(rng, case, vcpu)
        position = rng.below(len(program) + 1)
        program[position:position] = steps
    elif choice < 6:
        del program[rng.below(len(program))]
    elif choice < 7:
        position = rng.below(len(program))
        program[position : position + 1] = _new_steps(rng, case, vcpu)
    elif choice < 8:
        first = rng.below(len(program))
        second = rng.below(len(program))
        program[first], program[second] = program[second], program[first]
    else:
        position = rng.below(len(program))
        program[position] = _toggle_prefix(rng, program[position])
    return _with_vcpu(case, index, replace(vcpu, program=tuple(program)))


def _toggle_prefix(rng: Rng, step: bytes) -> bytes:
    """Force emulation, or stop forcing it; rarely change a bit of the instruction."""
    if rng.chance(1, 5):
        position = rng.below(len(step))
        return step[:position] + bytes((step[position] ^ 1 << rng.below(8),)) + step[position + 1 :]
    if step.startswith(FEP):
        return step[len(FEP) :]
    if len(FEP) + len(step) <= MAX_STEP_BYTES:
        return FEP + step
    return step


def _new_steps(rng: Rng, case: Case, vcpu: Vcpu) -> list[bytes]:
    """An instruction over the registers as they start out."""
    program = Program(vcpu.mode == LONG4)
    for number, value in vcpu.regs:
        program.initial[number] = value
        program.holds[number] = value
        program.used |= 1 << number
    known = [value for number, value in vcpu.regs if number in (6, 7) or number >= 8]
    # An address the program uses, or one near it.
    gva = _pick(rng, known) if known else _address(rng, case)
    choice = rng.below(10)
    fep = case.options.fep and rng.chance(1, 4)
    if choice < 3:
        program.load(gva, fep)
    elif choice < 7:
        kinds = PLAIN if rng.chance(2, 5) else RMW if rng.chance(1, 2) else UNEMULATED
        value = _pick(rng, [word.value for word in case.memory]) if case.memory else 0
        program.store(kinds[rng.below(len(kinds))], gva, value, 0, 0, fep)
    elif choice < 8:
        program.invlpg(gva)
    elif choice < 9 and vcpu.mode == LONG4:
        program.load_cr3(vcpu.cr3)
    else:
        program.fence()
    return program.steps


def _address(rng: Rng, case: Case) -> int:
    """An address of a word of a table in use, or of any frame with contents."""
    tables = tables_of(case)
    if tables and rng.chance(2, 3):
        gfn = _pick(rng, tables)
    elif case.memory:
        gfn = case.memory[rng.below(len(case.memory))].gfn
    else:
        gfn = case.slots[0].base_gfn
    used = [word.index for word in case.memory if word.gfn == gfn]
    position = _pick(rng, used) if used else rng.below(512)
    return gfn << 12 | position << 3


def _change_register(rng: Rng, case: Case) -> Case:
    """Aim a register somewhere else, or change the value in it."""
    index = rng.below(len(case.vcpus))
    vcpu = case.vcpus[index]
    regs = list(vcpu.regs)
    if not regs:
        regs.append((7, _address(rng, case)))
    position = rng.below(len(regs))
    number, value = regs[position]
    choice = rng.below(6)
    if choice == 0:
        value ^= _pick(rng, _FLIPS)
    elif choice == 1:
        value += _pick(rng, (8, -8, 16, 0x1000, -0x1000))
    elif choice == 2 and case.memory:
        value = case.memory[rng.below(len(case.memory))].value
    elif choice == 3 and case.memory:
        word = case.memory[rng.below(len(case.memory))]
        value = value & ~0xFFF | word.index << 3
    else:
        value = _address(rng, case)
    regs[position] = (number, value)
    return _with_vcpu(case, index, replace(vcpu, regs=tuple(regs)))


# Memory, vCPUs, host, options.


def _change_memory(rng: Rng, case: Case) -> tuple[Word, ...]:
    words = list(case.memory)
    choice = rng.below(6)
    if not words or choice == 0:
        tables = tables_of(case)
        gfn = _pick(rng, tables) if tables else case.slots[0].base_gfn
        value = words[rng.below(len(words))].value if words else 0
        return (*words, Word(gfn, rng.below(512), value))
    position = rng.below(len(words))
    word = words[position]
    if choice == 1:
        del words[position]
        return tuple(words)
    value = word.value
    if choice in (2, 3):
        value ^= _pick(rng, _FLIPS)
    elif choice == 4:
        other = words[rng.below(len(words))].value
        value = value & (0xFFF | NX) | other & ~(0xFFF | NX)
    else:
        tables = tables_of(case)
        target = _pick(rng, tables) if tables else 0
        value = value & (0xFFF | NX) | target << 12
    words[position] = Word(word.gfn, word.index, value)
    return tuple(words)


def _change_vcpus(rng: Rng, case: Case) -> Case:
    vcpus = list(case.vcpus)
    index = rng.below(len(vcpus))
    vcpu = vcpus[index]
    choice = rng.below(5)
    if choice == 0 and len(vcpus) < _MAX_VCPUS:
        if rng.chance(1, 2):
            vcpus.append(vcpu)
        else:
            # What a paging vCPU sees as tables the new one sees as data.
            gfn = vcpu.code_gfn
            flat = Vcpu(FLAT32, code_gva=gfn * CODE_SLOT * 256, code_gfn=gfn, regs=((7, _address(rng, case)),))
            vcpus.append(replace(flat, program=vcpu.program))
    elif choice == 1 and len(vcpus) > 1:
        del vcpus[index]
    elif choice == 2:
        flag = FLAGS[rng.below(len(FLAGS))]
        kept = [known for known in vcpu.flags if known != flag]
        vcpus[index] = replace(vcpu, flags=tuple(kept) if flag in vcpu.flags else (*kept, flag))
    elif choice == 3 and len(vcpus) > 1:
        vcpus[index] = replace(vcpu, cr3=vcpus[rng.below(len(vcpus))].cr3)
    else:
        vcpus[index] = replace(vcpu, cpl=3 if vcpu.cpl == 0 and rng.chance(1, 4) else 0)
    return replace(case, vcpus=tuple(vcpus))


def _change_host(rng: Rng, case: Case) -> Case:
    host = list(case.host)
    op = HOST_OPS[rng.below(len(HOST_OPS))]
    if rng.chance(1, 3):
        op = interrupt_op(rng.below(len(case.vcpus)), FIRST_INTERRUPT)
    if not host:
        return replace(case, host=(HostThread((op,)),))
    index = rng.below(len(host))
    if rng.chance(1, 2) or not host[index].ops:
        host[index] = HostThread((*host[index].ops, op))
    elif rng.chance(1, 2):
        host[index] = HostThread(host[index].ops[1:])
    else:
        del host[index]
    return replace(case, host=tuple(host))


def _change_options(rng: Rng, case: Case) -> Case:
    options = case.options
    choice = rng.below(4)
    if choice == 0:
        return replace(case, memory_model=SC if case.memory_model == TSO else TSO)
    if choice == 1:
        return replace(case, options=replace(options, n_max_mmu_pages=_pick(rng, (20, 24, 64, 64))))
    if choice == 2:
        if rng.chance(1, 4):
            return replace(case, options=replace(options, decode_to_skip=not options.decode_to_skip))
        return replace(case, options=replace(options, fep=not options.fep))
    tracked: list[int] = []
    if not options.write_track:
        tables = tables_of(case)
        tracked = [_pick(rng, tables) if tables and rng.chance(1, 2) else _address(rng, case) >> 12]
    return replace(case, options=replace(options, write_track=tuple(tracked)))


# Schedules.


def _random_label(rng: Rng, case: Case, sites: tuple[int, ...]) -> int:
    thread = rng.below(len(case.vcpus) + len(case.host))
    steps = len(case.vcpus[thread].program) if thread < len(case.vcpus) else 1
    occurrence = 1 + rng.below(1 << rng.below(4))
    return label(thread, rng.below(steps + 1), sites[rng.below(len(sites))], occurrence)


def random_deviation(rng: Rng, case: Case) -> Deviation:
    """A deviation at an event that a run of ``case`` may well have."""
    choice = rng.below(10)
    threads = len(case.vcpus) + len(case.host)
    sites = _COMMON_SITES if rng.chance(2, 3) else tuple(range(N_SITES))
    if choice < 5:
        return Deviation(RUN, _random_label(rng, case, sites), rng.below(threads))
    if choice < 8:
        at = _random_label(rng, case, STORE_SITES if rng.chance(1, 2) else (GUEST_STORE, EMUL_STORE))
        until = _random_label(rng, case, sites) if rng.chance(1, 2) else BOOT
        return Deviation(HOLD, at, label_thread(at), until)
    kind = EVICT if choice == 8 else FILL
    vcpu = rng.below(len(case.vcpus))
    regs = case.vcpus[vcpu].regs
    address = regs[rng.below(len(regs))][1] if regs else case.vcpus[vcpu].code_gva
    return Deviation(kind, _random_label(rng, case, sites), vcpu, BOOT, address)


def _change_schedule(rng: Rng, case: Case) -> tuple[Deviation, ...]:
    schedule = list(case.schedule)
    choice = rng.below(4)
    if not schedule or choice == 0:
        return (*schedule, random_deviation(rng, case))
    position = rng.below(len(schedule))
    if choice == 1:
        del schedule[position]
        return tuple(schedule)
    deviation = schedule[position]
    if choice == 2 and deviation.at != BOOT:
        schedule[position] = replace(deviation, at=_near(rng, deviation.at))
    else:
        threads = len(case.vcpus) + len(case.host)
        schedule[position] = replace(deviation, actor=rng.below(threads))
    return tuple(schedule)


def _near(rng: Rng, at: int) -> int:
    """The event before or after ``at``, or the same event of the step before or after."""
    change = 1 if rng.chance(1, 2) else -1
    step = label_step(at)
    occurrence = label_occurrence(at)
    if rng.chance(2, 3):
        occurrence = min(max(1, occurrence + change), MAX_OCCURRENCE)
    else:
        step = min(max(0, step + change), MAX_STEPS - 1)
    return label(label_thread(at), step, label_site(at), occurrence)
