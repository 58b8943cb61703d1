"""What a ``Case`` must satisfy before it is run. Kernel profiles and fix ids are looked up by ``kvm/fixes.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mmufuzz.case.error import CaseError
from mmufuzz.case.host_ops import FORM, interrupt_of
from mmufuzz.case.model import (
    CODE_SLOT,
    FINDING,
    FLAT32,
    HOST_OPS,
    LONG4,
    MAX_GFN,
    MAX_HOST_THREADS,
    MAX_STEP_BYTES,
    MAX_STEPS_PER_VCPU,
    MAX_VCPUS,
    MODES,
    NPT4,
    OK,
    SC,
    TSO,
    Case,
    Expect,
    Options,
    Slot,
    Vcpu,
    Word,
)
from mmufuzz.host.deviation import EVICT, FILL, HOLD, RUN, Deviation
from mmufuzz.host.sites import (
    BOOT,
    N_SITES,
    SITE_NAMES,
    STORE_SITES,
    label_occurrence,
    label_site,
    label_step,
    label_thread,
)

FLAGS: Final = ("wp", "smep", "smap", "nx")
CPLS: Final = (0, 3)
U64: Final = (1 << 64) - 1

MAX_SLOTS: Final = 32
MAX_WORDS: Final = 1 << 16
MAX_DEVIATIONS: Final = 1 << 16
MAX_OPS: Final = 256
"""Operations of one host thread."""
MAX_WRITE_TRACK: Final = 64
MIN_MMU_PAGES: Final = 20
MORE_MMU_PAGES: Final = 8
KVM_MIN_ALLOC_MMU_PAGES: Final = 64
"""See ``least_mmu_pages``."""
MAX_MMU_PAGES: Final = (1 << 16) - 1
MAX_EVENTS: Final = 1_000_000
MAX_IDS: Final = 64
"""Fixes reverted, fixes applied, and marks to reach: of each."""
MAX_ID: Final = 100
MAX_LINE: Final = 500
MAX_COMMENT: Final = 1 << 16
PAGE: Final = 4096
STEPS_PER_PAGE: Final = PAGE // CODE_SLOT

_ID_CHARACTERS: Final = "abcdefghijklmnopqrstuvwxyz0123456789._-"


def is_id(text: str) -> bool:
    """True for a name of 1..100 characters of a-z, 0-9, '.', '_' and '-'."""
    if not 1 <= len(text) <= MAX_ID:
        return False
    for character in text:
        if character not in _ID_CHARACTERS:
            return False
    return True


def is_mark(text: str) -> bool:
    """True for 1..100 printable ASCII characters without blanks."""
    if not 1 <= len(text) <= MAX_ID:
        return False
    for character in text:
        if not "!" <= character <= "~":
            return False
    return True


def is_line(text: str) -> bool:
    """True for one line of text without control characters, at most 500 characters; empty counts."""
    if len(text) > MAX_LINE:
        return False
    if text.isascii():
        return text.isprintable()
    for character in text:
        # By code point and not isprintable(): beyond ASCII that changes with the Unicode tables of each Python.
        if character < " " or "\x7f" <= character <= "\x9f" or "\u2028" <= character <= "\u2029":
            return False
    return is_text(text)


def is_text(text: str) -> bool:
    """True for text that UTF-8 can carry (no surrogates), at most 65536 characters."""
    if len(text) > MAX_COMMENT:
        return False
    if text.isascii():
        return True
    for character in text:
        if 0xD800 <= ord(character) <= 0xDFFF:
            return False
    return True


def canonical(gva: int) -> bool:
    """True if a 4-level linear address is canonical (SDM vol. 1, 3.3.7.1)."""
    return gva >> 47 in (0, 0x1FFFF)


def code_pages(steps: int) -> int:
    """Frames that a program of that many steps takes; an empty program takes one."""
    return max(1, (steps + STEPS_PER_PAGE - 1) // STEPS_PER_PAGE)


def paging_mode(vcpus: Sequence[Vcpu]) -> str:
    """LONG4 or NPT4, by the first vCPU that is either: a VM has shadow paging or nested paging, not both."""
    for vcpu in vcpus:
        if vcpu.mode != FLAT32:
            return vcpu.mode
    return FLAT32


def in_slots(slots: Sequence[Slot], gfn: int) -> bool:
    """True if a memslot holds ``gfn``."""
    for slot in slots:
        if slot.base_gfn <= gfn < slot.base_gfn + slot.npages:
            return True
    return False


def validate(case: Case) -> None:
    """Raises ``CaseError`` for the first thing that is out of range; the place is named as in the TOML form."""
    _check_id("kernel", case.kernel, "a kernel profile")
    _check_ids("revert", case.revert)
    _check_ids("apply", case.apply)
    if case.memory_model not in (TSO, SC):
        raise CaseError("memory_model", f"expected 'tso' or 'sc', got '{case.memory_model}'")
    _check_slots(case.slots)
    _check_options(case.options, case.slots, len(case.vcpus))
    _check_memory(case)
    _check_count("vcpu", len(case.vcpus), 1, MAX_VCPUS, "vCPUs")
    for index in range(len(case.vcpus)):
        _check_vcpu(f"vcpu[{index}]", case.vcpus[index], case.slots)
        mode = case.vcpus[index].mode
        if mode not in (FLAT32, paging_mode(case.vcpus)):
            raise CaseError(f"vcpu[{index}].mode", f"expected no {mode} beside {paging_mode(case.vcpus)}")
    _check_host(case)
    _check_count("schedule", len(case.schedule), 0, MAX_DEVIATIONS, "deviations")
    for index in range(len(case.schedule)):
        _check_deviation(f"schedule[{index}]", case.schedule[index], len(case.vcpus), len(case.host))
    _check_expect(case.expect)
    if not is_text(case.comment):
        raise CaseError("comment", f"expected at most {MAX_COMMENT} characters of text without surrogates")


def _check_range(place: str, value: int, low: int, high: int, what: str) -> None:
    if not low <= value <= high:
        limits = f"{low}..{high}" if high <= MAX_EVENTS else f"{low:#x}..{high:#x}"
        raise CaseError(place, f"expected {what} in {limits}, got {value}")


def _check_count(place: str, count: int, low: int, high: int, what: str) -> None:
    if not low <= count <= high:
        raise CaseError(place, f"expected {low}..{high} {what}, got {count}")


def _check_id(place: str, text: str, what: str) -> None:
    if not is_id(text):
        raise CaseError(place, f"expected {what} of 1..{MAX_ID} characters a-z, 0-9, '.', '_', '-', got {text!r}")


def _check_ids(place: str, ids: Sequence[str]) -> None:
    _check_count(place, len(ids), 0, MAX_IDS, "fixes")
    for index in range(len(ids)):
        _check_id(f"{place}[{index}]", ids[index], "the id of a fix")


def _check_slots(slots: Sequence[Slot]) -> None:
    _check_count("slots", len(slots), 1, MAX_SLOTS, "memory slots")
    for index in range(len(slots)):
        slot = slots[index]
        place = f"slots[{index}]"
        _check_range(f"{place}.base_gfn", slot.base_gfn, 0, MAX_GFN - 1, "a gfn")
        _check_range(f"{place}.npages", slot.npages, 1, MAX_GFN - slot.base_gfn, "a number of frames")
        for other in range(index):
            before = slots[other]
            if slot.base_gfn < before.base_gfn + before.npages and before.base_gfn < slot.base_gfn + slot.npages:
                raise CaseError(place, f"expected frames outside the other slots, but slots[{other}] overlaps")


def least_mmu_pages(vcpus: int) -> int:
    """The smallest budget of shadow pages for so many vCPUs: 20 for two, 8 for each more, at most KVM's own least.

    With fewer, one instruction may need more pages than there are, or the vCPUs take them from each other, for ever.
    KVM allows no budget below 64 (mmu.c: KVM_MIN_ALLOC_MMU_PAGES).
    """
    return min(KVM_MIN_ALLOC_MMU_PAGES, MIN_MMU_PAGES + MORE_MMU_PAGES * max(0, vcpus - 2))


def _check_options(options: Options, slots: Sequence[Slot], vcpus: int) -> None:
    pages = options.n_max_mmu_pages
    least = least_mmu_pages(vcpus)
    _check_range("options.n_max_mmu_pages", pages, least, MAX_MMU_PAGES, "a number of shadow pages")
    _check_range("options.event_limit", options.event_limit, 1, MAX_EVENTS, "a number of events")
    _check_range("options.tsc", options.tsc, 0, U64, "a 64-bit value")
    _check_count("options.write_track", len(options.write_track), 0, MAX_WRITE_TRACK, "gfns")
    for index in range(len(options.write_track)):
        gfn = options.write_track[index]
        if not in_slots(slots, gfn):
            raise CaseError(f"options.write_track[{index}]", f"expected a gfn inside a slot, got {gfn:#x}")
        if gfn in options.write_track[:index]:
            raise CaseError(f"options.write_track[{index}]", f"expected each gfn once, got {gfn:#x} again")


def _check_memory(case: Case) -> None:
    _check_count("memory", len(case.memory), 0, MAX_WORDS, "words")
    seen: set[int] = set()
    for position in range(len(case.memory)):
        word = case.memory[position]
        # Every run comes through here: no place is put into words before something is wrong.
        if not (0 <= word.index < 512 and 0 <= word.value <= U64 and in_slots(case.slots, word.gfn)):
            _refuse_word(f"memory[{position}]", word)
        key = word.gfn << 9 | word.index
        if key in seen:
            what = f"word {word.index} of {word.gfn:#x}"
            raise CaseError(f"memory[{position}]", f"expected one value per word, but {what} comes twice")
        seen.add(key)


def _refuse_word(place: str, word: Word) -> None:
    _check_range(f"{place}.index", word.index, 0, 511, "the index of a word in its frame")
    _check_range(f"{place}.value", word.value, 0, U64, "a 64-bit value")
    raise CaseError(f"{place}.gfn", f"expected a gfn inside a slot, got {word.gfn:#x}")


def _check_vcpu(place: str, vcpu: Vcpu, slots: Sequence[Slot]) -> None:
    if vcpu.mode not in MODES:
        raise CaseError(f"{place}.mode", f"expected one of {', '.join(MODES)}, got '{vcpu.mode}'")
    if vcpu.cpl not in CPLS:
        raise CaseError(f"{place}.cpl", f"expected 0 or 3, got {vcpu.cpl}")
    _check_range(f"{place}.cr3", vcpu.cr3, 0, MAX_GFN - 1, "the gfn of a root table")
    for index in range(len(vcpu.flags)):
        flag = vcpu.flags[index]
        if flag not in FLAGS:
            raise CaseError(f"{place}.flags", f"expected flags among {', '.join(FLAGS)}, got '{flag}'")
        if flag in vcpu.flags[:index]:
            raise CaseError(f"{place}.flags", f"expected each flag once, got '{flag}' again")
    _check_regs(place, vcpu)
    _check_count(f"{place}.program", len(vcpu.program), 0, MAX_STEPS_PER_VCPU, "steps")
    for index in range(len(vcpu.program)):
        length = len(vcpu.program[index])
        if not 1 <= length <= MAX_STEP_BYTES:
            raise CaseError(f"{place}.program[{index}]", f"expected 1..{MAX_STEP_BYTES} bytes, got {length}")
    _check_code(place, vcpu, slots)


def _check_regs(place: str, vcpu: Vcpu) -> None:
    numbers: list[int] = []
    for number, value in vcpu.regs:
        _check_range(f"{place}.regs", number, 0, 15, "a register number")
        _check_range(f"{place}.regs", value, 0, U64, "a 64-bit value")
        if number in numbers:
            raise CaseError(f"{place}.regs", f"expected each register once, got number {number} again")
        numbers.append(number)


def _check_code(place: str, vcpu: Vcpu, slots: Sequence[Slot]) -> None:
    gva = vcpu.code_gva
    _check_range(f"{place}.code_gva", gva, 0, U64, "a 64-bit address")
    _check_range(f"{place}.code_gfn", vcpu.code_gfn, 0, MAX_GFN - 1, "a gfn")
    if gva % PAGE:
        raise CaseError(f"{place}.code_gva", f"expected a page-aligned address, got {gva:#x}")
    pages = code_pages(len(vcpu.program))
    for gfn in range(vcpu.code_gfn, vcpu.code_gfn + pages):
        if not in_slots(slots, gfn):
            raise CaseError(f"{place}.code_gfn", f"expected code frames inside the slots, but {gfn:#x} is in none")
    if vcpu.mode == FLAT32 and gva != vcpu.code_gfn * PAGE:
        raise CaseError(f"{place}.code_gva", f"expected code_gfn * 4096 = {vcpu.code_gfn * PAGE:#x}, got {gva:#x}")
    if vcpu.mode == NPT4 and gva + pages * PAGE > 1 << 32:
        raise CaseError(f"{place}.code_gva", f"expected 32-bit addresses for the program, got {gva:#x}")
    if vcpu.mode == LONG4 and not (canonical(gva) and canonical(gva + pages * PAGE - 1)):
        raise CaseError(f"{place}.code_gva", f"expected canonical addresses for the program, got {gva:#x}")


def _check_host(case: Case) -> None:
    _check_count("host", len(case.host), 0, MAX_HOST_THREADS, "host threads")
    for index in range(len(case.host)):
        ops = case.host[index].ops
        _check_count(f"host[{index}].ops", len(ops), 0, MAX_OPS, "operations")
        for position in range(len(ops)):
            if ops[position] not in HOST_OPS:
                _check_interrupt(f"host[{index}].ops[{position}]", ops[position], case.vcpus)


def _check_interrupt(place: str, op: str, vcpus: Sequence[Vcpu]) -> None:
    vcpu, _ = interrupt_of(op)
    if vcpu < 0:
        raise CaseError(place, f"expected {FORM}, got '{op}'")
    if vcpu >= len(vcpus):
        raise CaseError(place, f"expected one of {len(vcpus)} vCPUs, got vcpu{vcpu}")
    if vcpus[vcpu].mode == NPT4:
        raise CaseError(place, f"expected no interrupt for an L2 guest, got '{op}'")


def _check_label(place: str, packed: int, threads: int) -> None:
    if packed == BOOT:
        return
    if packed < 0 or label_thread(packed) >= threads:
        thread = label_thread(packed) if packed >= 0 else packed
        raise CaseError(place, f"expected the label of one of {threads} threads, got thread {thread}")
    if label_site(packed) >= N_SITES:
        raise CaseError(place, f"expected a site below {N_SITES}, got {label_site(packed)}")
    if label_occurrence(packed) == 0:
        raise CaseError(place, f"expected an occurrence from 1 at step {label_step(packed)}, got 0")


def _check_deviation(place: str, deviation: Deviation, vcpus: int, host: int) -> None:
    threads = vcpus + host
    _check_label(place, deviation.at, threads)
    _check_label(place, deviation.until, threads)
    actors = threads
    if deviation.kind == HOLD:
        site = label_site(deviation.at)
        if deviation.at == BOOT or site not in STORE_SITES:
            name = "start" if deviation.at == BOOT else SITE_NAMES[site]
            raise CaseError(place, f"expected the label of a store to hold, got '{name}'")
        if deviation.actor != label_thread(deviation.at):
            raise CaseError(place, f"expected as actor the storing thread, got {deviation.actor}")
    elif deviation.kind in (EVICT, FILL):
        actors = vcpus
        _check_range(place, deviation.address, 0, U64, "a 64-bit address")
    elif deviation.kind != RUN:
        raise CaseError(place, f"expected a kind of deviation in 0..3, got {deviation.kind}")
    if not 0 <= deviation.actor < actors:
        raise CaseError(place, f"expected an actor in 0..{actors - 1}, got {deviation.actor}")
    if deviation.kind != HOLD and deviation.until != BOOT:
        raise CaseError(place, "expected 'until' only in a hold")
    if deviation.kind in (RUN, HOLD) and deviation.address != 0:
        raise CaseError(place, "expected an address only in an evict or a fill")


def _check_expect(expect: Expect) -> None:
    if expect.verdict not in (OK, FINDING):
        raise CaseError("expect.verdict", f"expected 'ok' or 'finding', got '{expect.verdict}'")
    if expect.verdict == OK and (expect.kind or expect.fingerprint):
        raise CaseError("expect.verdict", "expected 'finding', since a kind or a fingerprint is given")
    if expect.kind:
        _check_id("expect.kind", expect.kind, "a kind of finding")
    if not is_line(expect.fingerprint):
        raise CaseError("expect.fingerprint", f"expected one line of at most {MAX_LINE} printable characters")
    _check_count("expect.reach", len(expect.reach), 0, MAX_IDS, "marks")
    for index in range(len(expect.reach)):
        if not is_mark(expect.reach[index]):
            raise CaseError(f"expect.reach[{index}]", f"expected the name of a mark, got {expect.reach[index]!r}")
