"""Programs of ``toy`` as guests would run them, with a code fetch before each operation, under ``search.orders``."""

from __future__ import annotations

from toy import BASE, Op, Programs

from mmufuzz.host.memory import Memory
from mmufuzz.host.sched import ENDED, STOPPED, Host
from mmufuzz.host.sites import (
    GUEST_ATOMIC,
    GUEST_FENCE,
    GUEST_FETCH,
    GUEST_LOAD,
    GUEST_STORE,
    VCPU_EXIT,
)
from mmufuzz.host.thread import Body
from mmufuzz.search.order_strategy import ATOMIC, END, FENCE, LOAD, STORE, Access, OrderStrategy, Plan, strays
from mmufuzz.search.orders import Orders

KINDS = {"ld": LOAD, "st": STORE, "xchg": ATOMIC, "mf": FENCE}


def plan(program: tuple[Op, ...]) -> Plan:
    """Step 0 is the thread's start, where the host asks nothing."""
    accesses = [Access(KINDS[op.kind], 0 if op.kind == "mf" else 1 << op.word) for op in program]
    return Plan(1, [*accesses, Access(END)])


class FetchingBody(Body):
    def __init__(self, host: Host, program: tuple[Op, ...]) -> None:
        self.host = host
        self.program = program
        self.reads: list[int] = []

    def run(self) -> None:
        thread = self.host.current
        for step, op in enumerate(self.program, 1):
            thread.step = step
            self.host.point(GUEST_FETCH)
            address = BASE + 8 * op.word
            if op.kind == "ld":
                self.reads.append(thread.load(GUEST_LOAD, address))
            elif op.kind == "st":
                thread.store(GUEST_STORE, address, op.value)
            elif op.kind == "xchg":
                self.reads.append(thread.xchg(GUEST_ATOMIC, address, op.value))
            else:
                thread.fence(GUEST_FENCE)
        thread.step = len(self.program) + 1
        self.host.point(GUEST_FETCH)
        self.host.point(VCPU_EXIT)
        thread.drain()


State = tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]
"""What each thread read, and four words of memory at the end."""


def order_states(programs: Programs) -> tuple[set[State], int]:
    """The final states of every order, and the number of runs."""
    search = Orders()
    plans = [plan(program) for program in programs]
    states = set()
    runs = 0
    while True:
        memory = Memory()
        host = Host(memory, True, 2000)
        bodies = [FetchingBody(host, program) for program in programs]
        for index, body in enumerate(bodies):
            host.spawn(f"thread{index}", body)
        strategy = OrderStrategy(plans, search)
        host.decide_with(strategy)
        host.run()
        runs += 1
        assert host.status in (ENDED, STOPPED)
        assert strays(plans, host.trace.entries()) == 0
        if strategy.complete:
            words = tuple(memory.words.get(BASE // 8 + word, 0) for word in range(4))
            states.add((tuple(tuple(body.reads) for body in bodies), words))
        if not search.advance():
            return states, runs


def order_outcomes(programs: Programs) -> set[str]:
    """The final states in the text form of ``toy.model_outcomes``."""
    return {repr((reads, words, ())) for reads, words in order_states(programs)[0]}
