"""A litmus test as a Case: one vCPU per thread, in 64-bit mode behind shadow paging or in flat 32-bit mode.

Each thread counts itself in, with the locked increment that also faults the page of the locations in, and goes round
in a loop until all are there. Then follow the instructions of the test, one to a step, and a step that does nothing.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.model import CODE_SLOT, FLAT32, LONG4, Case, Slot, Vcpu, Word
from mmufuzz.case.tables import PAGE, TableBuilder
from mmufuzz.host.memory import PAGE_SHIFT
from mmufuzz.kvm.memslots import gpa_to_hpa
from mmufuzz.litmus.model import DATA, MAX_LOCATIONS, SPACING, X86_64, LitmusTest, Location, Thread
from mmufuzz.search.order_strategy import END, Access, Plan
from mmufuzz.x86.asm import assemble

ROOT: Final = 0x10
"""gfn of the root table; the tables below it follow."""
CODE: Final = 0x40
"""gfn of the first thread's program; the others follow, one frame each."""
COUNTER: Final = DATA + SPACING * MAX_LOCATIONS
"""How many threads have arrived; in the page of the locations."""

WAIT: Final = 1
"""The step at which a thread waits."""
FIRST: Final = 3
"""The step of the first instruction of the test."""


def build(test: LitmusTest) -> tuple[Case, list[Plan]]:
    """The Case, and what the search must know of its threads."""
    long = test.arch == X86_64
    # A lone thread gets a companion that does nothing: a host with one thread has no choice to offer.
    threads = test.threads if len(test.threads) > 1 else [*test.threads, Thread()]
    memory: list[Word] = []
    if long:
        tables = TableBuilder(list(range(ROOT + 1, ROOT + 16)))
        for gfn in (DATA >> PAGE_SHIFT, *range(CODE, CODE + len(threads))):
            tables.map(ROOT, gfn << PAGE_SHIFT, gfn, PAGE)
        memory.extend(tables.memory())
    memory.extend(Word(DATA >> PAGE_SHIFT, _word(location), _initial(location)) for location in test.locations.values())
    vcpus = tuple(_vcpu(thread, index, len(threads), long) for index, thread in enumerate(threads))
    case = Case(slots=(Slot(0, CODE + len(threads)),), memory=tuple(memory), vcpus=vcpus, comment=f"litmus {test.name}")
    return case, [_plan(thread) for thread in threads]


def final_word(words: dict[int, int], location: Location) -> int:
    """The value of ``location`` in ``Outcome.words``."""
    return words.get(gpa_to_hpa(location.address) >> 3, 0) & (1 << 8 * location.size) - 1


def _word(location: Location) -> int:
    return (location.address & (1 << PAGE_SHIFT) - 1) >> 3


def _initial(location: Location) -> int:
    return location.initial & (1 << 8 * location.size) - 1


def _vcpu(thread: Thread, index: int, count: int, long: bool) -> Vcpu:
    texts = [f"lock inc dword [{COUNTER:#x}]", f"cmp dword [{COUNTER:#x}], {count}", "jne 0"]
    program = [assemble(text, long) for text in texts]
    back = (FIRST - 1 - WAIT) * CODE_SLOT + len(program[-1])
    program[-1] = assemble(f"jne {-back}", long)
    program.extend(assemble(insn.text, long) for insn in thread.program)
    program.append(assemble("nop", long))
    gfn = CODE + index
    return Vcpu(
        LONG4 if long else FLAT32,
        cr3=ROOT if long else 0,
        code_gva=gfn << PAGE_SHIFT,
        code_gfn=gfn,
        regs=tuple(sorted(thread.registers.items())),
        program=tuple(program),
    )


def _plan(thread: Thread) -> Plan:
    return Plan(FIRST, [*(Access(insn.kind, insn.location) for insn in thread.program), Access(END)], WAIT)
