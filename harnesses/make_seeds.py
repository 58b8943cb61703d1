"""Writes ``corpus/seeds`` anew: ``python harnesses/make_seeds.py``.

``atheris_cases``: a few generated Cases of every shape, in bytes form; the random engine starts from them too.
``atheris_insn``: an instruction of every form the assembler knows a line for. The Hypothesis harnesses draw their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from mmufuzz.case import bytes as case_bytes
from mmufuzz.case.generate import SHAPES, generate_shape
from mmufuzz.case.rng import Rng
from mmufuzz.outcome import OK
from mmufuzz.run import run
from mmufuzz.x86.asm import assemble

ROOT: Final = Path(__file__).resolve().parents[1] / "corpus" / "seeds"
PER_SHAPE: Final = 3

LINES: Final = (
    "mov rax, qword [rbx]", "mov dword [rdi+8], ecx", "mov byte [rsi], 5", "add qword [rbx], rax",
    "lock add dword [rbx], 3", "and eax, ecx", "xor rdx, rdx", "cmp byte [rax], 1", "xchg qword [rbx], rax",
    "lock cmpxchg qword [rbx], rcx", "lock cmpxchg8b qword [rbx]", "cmpxchg16b oword [rbx]",
    "lock xadd dword [rdi], eax",
    "inc qword [rax]", "dec dword [rax]", "not rcx", "neg byte [rbx]", "shl qword [rbx], 3", "sar eax, cl",
    "lock bts qword [rbx], 5", "btr eax, ecx", "btc dword [rdi], 1", "bt rax, 3", "push rax",
    "pop rbx", "lea rax, [rbx+rcx*4]",
    "movzx eax, byte [rbx]", "movsx rax, word [rbx]", "rep movsb", "rep stosq", "invlpg [rax]", "mov cr3, rax",
    "mov rax, cr0", "hlt", "nop", "ud2", "mfence", "movss dword [rax], xmm0", "fstp tbyte [rbx]",
)  # fmt: skip


def main() -> None:
    """Write all seeds; Cases with a finding on the default kernel are no seeds."""
    cases = ROOT / "atheris_cases"
    cases.mkdir(parents=True, exist_ok=True)
    for shape, _ in SHAPES:
        written = 0
        number = 0
        while written < PER_SHAPE:
            case = generate_shape(Rng(number), shape)
            number += 1
            if run(case).verdict == OK:
                written += 1
                (cases / f"{shape}-{written}.case").write_bytes(case_bytes.encode(case))
    instructions = ROOT / "atheris_insn"
    instructions.mkdir(parents=True, exist_ok=True)
    for line in LINES:
        name = "".join(letter if letter.isalnum() else "-" for letter in line)
        for mode64 in (True, False):
            try:
                code = assemble(line, mode64)
            except ValueError:
                continue
            (instructions / f"{name}-{64 if mode64 else 32}.bin").write_bytes(bytes([not mode64]) + code)


if __name__ == "__main__":
    main()
