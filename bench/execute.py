"""Instructions a second of ``mmufuzz.x86.execute`` and of Unicorn single-stepped from Python, as JSON.

    python bench/execute.py [SECONDS]

Both run the same loops, in turns within one process, and processor time is counted, so that another load on the
machine touches both alike. Needs the ``oracle`` extra.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import unicorn
import unicorn.x86_const as uc_x86

import mmufuzz.x86.executor
from mmufuzz.x86 import execute
from mmufuzz.x86.asm import assemble

ORIGIN = 0x1000
DATA = 0x8000
# Branches are relative to the next instruction.
LOOPS = {
    "integer": ("add rax, rcx", "mov [rbx+8], rax", "xor rdx, [rbx+8]", "lea rsi, [rax+rdx]", "shr rsi, 3", "inc ecx"),
    "stack and branches": ("push rax", "call 0", "pop rdx", "pop rdx", "cmp rdx, rax", "setz dl", "cmovz rsi, rax"),
    "locked": ("lock xadd [rbx], rax", "lock inc qword [rbx+8]", "bts dword [rbx+16], 5", "dec ecx"),
}
ROUNDS = 5


def program(lines: tuple[str, ...]) -> bytes:
    """The lines in an endless loop."""
    body = b"".join(assemble(line) for line in lines)
    return body + assemble(f"jmp {-len(body) - 2}")


def model(code: bytes, count: int) -> int:
    """Instructions that retired."""
    registers = {"rbx": DATA, "rsp": DATA + 0x800, "rcx": 1 << 20}
    memory = {DATA: bytes(0x1000)}
    return execute(code, registers=registers, memory=memory, origin=ORIGIN, max_instructions=count).instructions


def stepper(code: bytes) -> Callable[[int], int]:
    """Unicorn on the same code, one ``emu_start`` an instruction."""
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0, 0x10000)
    uc.mem_write(ORIGIN, code)
    for register, value in ((uc_x86.UC_X86_REG_RBX, DATA), (uc_x86.UC_X86_REG_RSP, DATA + 0x800)):
        uc.reg_write(register, value)
    uc.reg_write(uc_x86.UC_X86_REG_RCX, 1 << 20)
    state = [ORIGIN]

    def run(count: int) -> int:
        for _ in range(count):
            uc.emu_start(state[0], 1 << 40, count=1)
            state[0] = uc.reg_read(uc_x86.UC_X86_REG_RIP)
        return count

    return run


def rate(run: Callable[[int], int], seconds: float) -> float:
    """Instructions a second of processor time."""
    count = 1000
    while True:
        started = time.process_time()
        done = run(count)
        elapsed = time.process_time() - started
        assert done == count, "the loop left its memory"
        if elapsed >= seconds:
            return done / elapsed
        count *= 2


def main() -> None:
    """Print the figures."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    loops: dict[str, dict[str, float]] = {}
    for name, lines in LOOPS.items():
        code = program(lines)
        step = stepper(code)
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(ROUNDS):
            ours.append(rate(lambda count, code=code: model(code, count), seconds))
            theirs.append(rate(step, seconds))
        ours.sort()
        theirs.sort()
        middle = ROUNDS // 2
        loops[name] = {
            "execute_instructions_per_second": round(ours[middle]),
            "unicorn_instructions_per_second": round(theirs[middle]),
            "ratio": round(ours[middle] / theirs[middle], 1),
        }
    compiled = not mmufuzz.x86.executor.__file__.endswith(".py")
    print(json.dumps({"compiled": compiled, "loops": loops}, indent=1))


if __name__ == "__main__":
    main()
