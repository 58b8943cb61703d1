"""User code with alignment checks, here and on bochscpu: run as a program, this prints bochscpu's vectors as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from mmufuzz.x86 import execute
from mmufuzz.x86.state import CR0_AM, CR0_PE, FLAG_AC

AREA = 0x3400
ADDRESSES = range(AREA, AREA + 16)
CR4_OSFXSR = 1 << 9
INSTRUCTIONS = {
    "mov al, m8": "8a03",
    "mov ax, m16": "668b03",
    "mov eax, m32": "8b03",
    "mov m32, eax": "8903",
    "xchg m16, ax": "668703",
    "lock add m32, eax": "f00103",
    "bts m32, imm8": "0fba2b03",
    "bts m16, ax": "660fab03",
    "cmpxchg8b m64": "0fc70b",
    "movq mm0, m64": "0f6f03",
    "movq m64, mm0": "0f7f03",
    "movups xmm0, m128": "0f1003",
    "movdqu m128, xmm0": "f30f7f03",
    "movd xmm0, m32": "660f6e03",
    "movlps xmm0, m64": "0f1203",
    "movnti m32, eax": "0fc303",
    "stmxcsr m32": "0fae1b",
    "fld m32": "d903",
    "fld m64": "dd03",
    "fld m80": "db2b",
    "fbld m80": "df23",
    "fbstp m80": "df33",
    "fild m16": "df03",
    "fild m64": "df2b",
    "fnstcw m16": "d93b",
    "fnstenv m28": "d933",
    "fnstenv m14": "66d933",
    "fnsave m108": "dd33",
    "frstor m94": "66dd23",
    "les eax, m48": "c403",
    "les ax, m32": "66c403",
    "sgdt m48": "0f0103",
    "bound eax, m64": "6203",
    "movsd": "a5",
    "scasw": "66af",
    "push eax": "50",
    "pop ax": "6658",
    "popa": "61",
    "leave": "c9",
    "enter 0, 0": "c8000000",
}
"""32-bit code, by what it does. EBX, ESI, EDI, ESP and EBP hold the address."""

DIVERGENT = ("fnsave m108", "frstor m94")
"""Bochs asks for fields of 80 bits that are aligned to 8, which those of an image never all are.

SDM vol. 3, table 6-7: such an area is aligned to 4 or 2, by the operand size."""


def registers(address: int) -> dict[str, int]:
    pointers = {name: address for name in ("ebx", "esi", "edi", "esp", "ebp")}
    control = {"cpl": 3, "cr0": CR0_PE | CR0_AM, "cr4": CR4_OSFXSR, "eflags": 2 | FLAG_AC}
    return pointers | control


def ours(name: str, address: int) -> int:
    """The vector of the exception, 0 for none."""
    made = execute(
        bytes.fromhex(INSTRUCTIONS[name]),
        mode=32,
        registers=registers(address),
        memory={AREA - 0x100: bytes(0x300)},
        max_instructions=1,
    )
    assert made.stop in ("end", "limit", "exception"), made.stop
    return made.vector if made.stop == "exception" else 0


def main() -> int:
    """0, or 77 with the reason where bochscpu does not run."""
    from walk_cases import READ, WalkCase  # noqa: PLC0415 - imports bochscpu's engine
    from walk_engines import BochsEngine, Unavailable  # noqa: PLC0415 - the same

    try:
        engine = BochsEngine("32-bit")
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 77
    executed = [0]

    def after_execution(session: Any, _cpu: int, _instruction: int) -> None:
        executed[0] += 1
        if executed[0] == 3:
            session.stop()

    engine.hook.after_execution = after_execution
    found: dict[str, list[int]] = {}
    # Bochs keeps what it has decoded, so that each instruction needs a place of its own.
    for rip, (name, code) in zip(range(0x1000, 0x3000, 0x20), INSTRUCTIONS.items(), strict=False):
        # Only an instruction that sets AC makes Bochs look at it: popf; mov esp, ebp.
        engine.poke(rip, bytes.fromhex("9d89ec" + code))
        found[name] = []
        for address in ADDRESSES:
            values = registers(address)
            for register in ("rsi", "rdi", "rbp"):
                setattr(engine.state, register, address)
            engine.state.rsp = AREA - 4
            engine.poke(AREA - 4, values["eflags"].to_bytes(4, "little"))
            case = WalkCase("32-bit", READ, address, 0, values["cr0"], 0, values["cr4"], 0, 2, values["cpl"], 0)
            engine.poke(AREA, bytes(0x100))
            executed[0] = 0
            engine.start(case, rip, case.cr0, case.cpl)
            found[name].append(engine.vector)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # bochscpu crashes in its finalizers
