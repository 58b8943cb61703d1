"""The assembler against iced-x86, which disassembles what it made, and against the decoder."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmufuzz.case.encodings import encode
from mmufuzz.case.rng import Rng
from mmufuzz.x86.asm import AsmError, assemble, disassemble
from mmufuzz.x86.decode import FEP, Truncated, decode
from mmufuzz.x86.insn import REP_NONE, Insn
from mmufuzz.x86.opcodes import FORMS, MNEMONICS
from mmufuzz.x86.state import Fault

# Each is written as the disassembler writes it, so it must come back unchanged.
CANONICAL = """
mov qword [rax+8], rbx          mov rax, qword [rbx]             mov byte [r12], r13b        mov spl, al
mov ah, dl                      mov eax, dword [rip+0x10]        mov dword [rsp+r13], eax    mov word [rbp], 0x1234
mov qword [rax], 0xffffffffffffffff    mov rax, 0x8000000000000067    mov r9d, 1      mov byte [rax*4+0x10], 0xff
mov al, byte [0x1122334455667788]      mov dword [0x1122334455667788], eax    mov eax, dword [0x1000]
mov dword [r13+r12*8-0x80], edx        mov dword [eax+0x100], edx
add byte [rcx], 1               or qword [rcx], 0x40             adc rax, 0x12345678         sbb ecx, dword [rdx]
and qword [rdi], 0x7f           sub rsp, 8                       xor eax, eax                cmp byte [rsi], r8b
test qword [rax], rcx           test al, 1                       xchg rbx, qword [rax]       xchg r8, rax
lock xadd dword [rcx], edx      lock cmpxchg qword [rdi], rsi    lock cmpxchg8b [rdi]        cmpxchg16b [rsi]
inc dword [rax]                 dec r15b                         lock not word [rax]         neg rcx
rol byte [rax], 1               ror eax, 5                       rcl qword [rax], cl         rcr bx, 1
shl rax, 0xc                    shr qword [rax], 1               sar r10, cl
bt dword [rax], 5               lock bts qword [rax], 0x3f       btr word [rax], cx          btc qword [rax], r9
push rax                        push r12                         push 0x10                   push 0xfffffffffffffe00
push qword [rax]                push word [rax]                  pop rbp                     pop qword [rsp+8]
call 0x1000                     call rax                         call qword [rax]            ret
ret 0x10                        jmp -2                           jmp 4096                    jmp r11
jne 5                           jg -300                          lea rax, [rbx+rcx*4-8]      lea r8d, [rip-1]
movzx eax, byte [rax]           movzx eax, ah                    movsx rax, word [rdx]       movsxd rax, dword [rbx]
movsb                           rep movsq                        rep stosb                   repne stosd
invlpg [rax]                    mov cr3, rax                     mov r8, cr4                 mov cr0, rdx
mov rcx, cr2                    hlt                              nop                         pause
nop dword [rax]                 ud2                              mfence                      lfence
sfence                          movss dword [rdi], xmm1          movss xmm9, dword [rdi]     movaps oword [rax], xmm0
movaps xmm15, oword [r8]        movups oword [rax], xmm0         movdqu xmm2, oword [rax]    movdqa oword [rax+r9], xmm3
fstp dword [rax]                fstp qword [rax]                 fstp tword [rax]            vmovdqu yword [rax], ymm0
vmovdqu xmm1, oword [r9]        clc                              stc                         cmc
cld                             std                              sete byte [rax]             setl r9b
invpcid rcx, oword [rax]
cmova rax, qword [rbx]          cmovns cx, dx                    fep mov dword [rax], ebx    fep lock inc qword [rbx]
"""
TEXTS = [text for line in CANONICAL.strip().splitlines() for text in line.split("   ") if text]
TEXTS = [text.strip() for text in TEXTS]
HEX_BRANCHES = {"call 0x1000": "call 4096"}


def decodes_to(code: bytes, mode64: bool = True) -> Insn:
    insn = decode(code, mode64, fep=True)
    assert insn.length == len(code)
    return insn


def meaning(insn: Insn) -> tuple[object, ...]:
    """What an instruction does, whatever its encoding."""
    operands = [(operand.kind, operand.size, operand.index, operand.value) for operand in insn.operands]
    place = (insn.base, insn.index, insn.scale, insn.displacement, insn.asize) if insn.has_memory else None
    return (insn.mnemonic, insn.condition, insn.lock, insn.rep, operands, place)


@pytest.mark.parametrize("text", TEXTS)
def test_iced_disassembles_what_was_assembled(text: str) -> None:
    assert disassemble(assemble(text), True) == HEX_BRANCHES.get(text, text)


@pytest.mark.parametrize("text", TEXTS)
def test_the_decoder_takes_exactly_the_assembled_bytes(text: str) -> None:
    insn = decodes_to(assemble(text))
    assert insn.fep == text.startswith("fep")


# Direct far pointers and SMSW and its kin in registers have no text that says all of their encoding.
WITHOUT_TEXT = {"arpl", "lldt", "lmsw", "ltr", "nop", "verr", "verw", "xchg"}


def test_every_mnemonic_of_the_tables_survives_text() -> None:
    survived = set(WITHOUT_TEXT)
    for number, form in enumerate(FORMS):
        rng = Rng(number)
        for trial in range(24):
            mode64 = trial % 2 == 0
            code = encode(rng, form, mode64)
            try:
                insn = decode(code, mode64)
            except (Fault, Truncated):
                continue
            text = disassemble(code, mode64)
            # 66 and 48 on ENTER and far pointers in memory: the text does not show them.
            if _comparable(insn, text) and insn.mnemonic not in ("enter", "callf", "jmpf"):
                again = assemble(text, mode64)
                assert meaning(decodes_to(again, mode64)) == meaning(insn), text
                assert len(again) <= insn.length, text
                survived.add(insn.mnemonic)
    assert sorted(set(MNEMONICS) - survived) == ["callf", "enter", "jmpf"]


def _comparable(insn: Insn, text: str) -> bool:
    """False for what the assembler's text leaves out: redundant prefixes, 16-bit code, segments, forms of NOP."""
    if insn.rep != REP_NONE and insn.mnemonic not in ("movs", "stos"):
        return False
    if insn.asize == 2 or (insn.size == 2 and insn.mnemonic in ("push", "call", "jmp", "jcc", "ret")):
        return False
    # iced-x86 writes the registers of XCHG in the other order.
    if insn.mnemonic in ("nop", "xchg"):
        return False
    # The text says nothing of an operand size of which only 16 bits count.
    if insn.mnemonic in ("arpl", "lldt", "ltr", "verr", "verw", "lmsw"):
        return False
    unnamed_address = insn.has_memory and insn.asize == 4 and insn.base == insn.index
    overrides = ("a32 ", "ds ", "es ", "cs ", "ss ", "fs ", "gs ")
    return not unnamed_address and ":" not in text and not text.startswith(overrides)


@settings(derandomize=True, deadline=None, max_examples=2000)
@given(
    st.lists(st.sampled_from([0x66, 0x67, 0xF0, 0xF3, *range(0x40, 0x50)]), max_size=2),
    st.sampled_from([b"", b"\x0f", b"\xc5\xfe", b"\xc4\xc1\x7a"]),
    st.binary(min_size=2, max_size=12),
    st.booleans(),
)
def test_disassembled_text_assembles_to_the_same_meaning(
    prefixes: list[int], escape: bytes, tail: bytes, mode64: bool
) -> None:
    code = bytes(prefixes) + escape + tail
    assume(not code.startswith(FEP))
    try:
        insn = decode(code, mode64)
    except (Fault, Truncated):
        return
    text = disassemble(code, mode64)
    assume(_comparable(insn, text))
    again = assemble(text, mode64)
    assert meaning(decodes_to(again, mode64)) == meaning(insn)
    assert len(again) <= insn.length


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("lock xadd [rcx], edx", "f00fc111"),
        ("MOV QWORD PTR [RAX + 8], RBX", "48895808"),
        ("xchg rbx, [rax]", "488718"),
        ("sal eax, 1", "d1e0"),
        ("jnz 5", "7505"),
        ("jecxz 5", "67e305"),
        ("call far dword [rax]", "ff18"),
        ("callf fword [rax]", "ff18"),
        ("jmp far word [rax]", "66ff28"),
        ("jmp far qword [rax]", "48ff28"),
        ("fstp tbyte [rax]", "db38"),
        ("mov eax, [8*rcx + rdx]", "8b04ca"),
        ("mov eax, [rcx + rsp]", "8b040c"),
        ("mov eax, [-16]", "8b0425f0ffffff"),
        ("jmp short -2", "ebfe"),
        ("rep stosb", "f3aa"),
    ],
)
def test_other_spellings(text: str, code: str) -> None:
    assert assemble(text).hex() == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("inc eax", "40"),
        ("mov eax, [0x1000]", "a100100000"),
        ("mov dword [0x1000], 5", "c7050010000005000000"),
        ("mov cr3, eax", "0f22d8"),
        ("push 5", "6a05"),
        ("mov [esp+4], ax", "6689442404"),
    ],
)
def test_32_bit_code(text: str, code: str) -> None:
    assert assemble(text, False).hex() == code


def test_the_shortest_encoding_is_chosen() -> None:
    lengths = [len(assemble(f"add rax, {value}")) for value in (0x7F, 0x80, -0x80, -0x81)]
    assert lengths == [4, 6, 4, 6]


def test_xchg_eax_eax_is_not_nop_because_it_clears_the_upper_half() -> None:
    assert decodes_to(assemble("xchg eax, eax")).mnemonic == "xchg"


@pytest.mark.parametrize(
    "text",
    [
        "", "fep", "mov eax,", "mov 5, 5", "frobnicate eax", "movcr cr3, rax", "jcc 5", "add eax, cr3",
        "inc [rax]", "push [rax]", "movzx eax, [rax]", "shl [rax], cl",
        "mov eax, rbx", "mov [rax], [rbx]", "mov word [rax], eax", "lea eax, ebx", "byte 5",
        "mov ah, sil", "movzx r8d, ah", "mov rip, rax", "mov eax, [rip+rcx]", "mov eax, [rsp*2]", "mov eax, [rax*3]",
        "mov eax, [rax+ecx]", "mov eax, [ax]", "mov eax, [rax+rbx+rcx]", "mov eax, [cr3]", "mov [rax+0x80000000], ecx",
        "mov al, 300", "mov al, -129", "add rax, 0x80000000", "jmp 0x80000000", "mov eax, [1 << 70]",
        "mov eax, [0x10000000000000000]", "mov cr9, rax", "mov cr1, rax",
        "mov eax, dword", "mov eax, []",
        "jcxz 5", "call far [rax]", "mov cs, ax", "pop cs",
        "lock mov [rax], ecx", "lock add eax, [rbx]", "lock inc eax", "rep inc eax", "stosd xmm0, [rax]",
    ],
)  # fmt: skip
def test_what_has_no_encoding_is_an_error(text: str) -> None:
    with pytest.raises(AsmError):
        assemble(text)


@pytest.mark.parametrize(
    "text", ["mov rax, 1", "jrcxz 5", "mov r8d, 1", "mov [rax], ecx", "stosq", "mov sil, 1", "cmpxchg16b [eax]"]
)
def test_64_bit_operands_are_errors_in_32_bit_code(text: str) -> None:
    with pytest.raises(AsmError):
        assemble(text, False)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.text("abdersxilmov [],+-*0123456789", max_size=24))
def test_any_text_gives_bytes_or_an_error(text: str) -> None:
    try:
        code = assemble(text)
    except AsmError as error:
        assert str(error)
    else:
        assert decodes_to(code).length == len(code)


def test_undecodable_bytes_are_shown_as_bad() -> None:
    assert disassemble(b"", True) == "(bad)"
    assert disassemble(b"\x48", True) == "(bad)"
    assert disassemble(FEP + b"\x06", True) == "fep (bad)"


def test_instructions_that_the_decoder_lacks_are_shown_all_the_same() -> None:
    assert disassemble(bytes.fromhex("0fa2"), True) == "cpuid"
