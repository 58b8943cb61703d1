"""Reading herd's files: what is understood, and what is refused with a line and a hint."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.case.error import CaseError
from mmufuzz.litmus.model import Insn, Item, LitmusTest, Shown
from mmufuzz.litmus.reader import read
from mmufuzz.search.order_strategy import ATOMIC, FENCE, LOAD, NONE, STORE

SB = r"""X86 SB
"PodWR Fre PodWR Fre"
Generator=diyone7
{ x=0; y=0; }
 P0          | P1          ;
 MOV [x],$1  | MOV [y],$1  ;
 MOV EAX,[y] | MOV EAX,[x] ;
exists (0:EAX=0 /\ 1:EAX=0)
"""


def one(line: str, state: str = "", arch: str = "X86") -> LitmusTest:
    """A test of one thread with one instruction."""
    return read("t.litmus", f"{arch} t\n{{ {state} }}\n P0 ;\n {line} ;\nforall (true)\n")


def insn(line: str, state: str = "", arch: str = "X86") -> Insn:
    return one(line, state, arch).threads[0].program[0]


def test_a_test_as_diy_prints_it() -> None:
    test = read("SB.litmus", SB)
    assert (test.arch, test.name, test.quantifier) == ("X86", "SB", "exists")
    assert [location.name for location in test.locations.values()] == ["x", "y"]
    assert test.threads[0].program == [
        Insn("mov dword [0x30000], 1", STORE, 1),
        Insn("mov eax, dword [0x30040]", LOAD, 2),
    ]
    assert test.observed == [Item(0, "EAX"), Item(1, "EAX")]
    assert str(test.condition) == r"0:EAX=0 /\ 1:EAX=0"


@pytest.mark.parametrize(
    "line, arch, kind, text",
    [
        ("MOV [x],EBX", "X86", STORE, "mov dword [0x30000], ebx"),
        ("mov eax,[x]", "X86", LOAD, "mov eax, dword [0x30000]"),
        ("MOV EAX,EBX", "X86", NONE, "mov eax, ebx"),
        ("MOV EAX,5", "X86", NONE, "mov eax, 5"),
        ("MOVB [x],$-1", "X86", STORE, "mov byte [0x30000], -1"),
        ("XCHG EAX,[x]", "X86", ATOMIC, "xchg dword [0x30000], eax"),
        ("XCHG [x],EAX", "X86", ATOMIC, "xchg dword [0x30000], eax"),
        ("LOCK XCHG [x],EAX", "X86", ATOMIC, "lock xchg dword [0x30000], eax"),
        ("LOCK INC [x]", "X86", ATOMIC, "lock inc dword [0x30000]"),
        ("LOCK ADD [x],$0x10", "X86", ATOMIC, "lock add dword [0x30000], 16"),
        ("LOCK XADD [x],ECX", "X86", ATOMIC, "lock xadd dword [0x30000], ecx"),
        ("LOCK CMPXCHG [x],ECX", "X86", ATOMIC, "lock cmpxchg dword [0x30000], ecx"),
        ("ADD EAX,[x]", "X86", LOAD, "add eax, dword [0x30000]"),
        ("XOR EAX,EAX", "X86", NONE, "xor eax, eax"),
        ("MFENCE", "X86", FENCE, "mfence"),
        ("SFENCE", "X86", FENCE, "sfence"),
        ("movq $1,(x)", "X86_64", STORE, "mov qword [0x30000], 1"),
        ("movl (x),%eax", "X86_64", LOAD, "mov eax, dword [0x30000]"),
        ("movq %rax,%r9", "X86_64", NONE, "mov r9, rax"),
        ("movb %sil,[x]", "X86_64", STORE, "mov byte [0x30000], sil"),
        ("xchgl %ebx,(x)", "X86_64", ATOMIC, "xchg dword [0x30000], ebx"),
        ("lock addq $2,(x)", "X86_64", ATOMIC, "lock add qword [0x30000], 2"),
        ("lock cmpxchgl %ebx,(x)", "X86_64", ATOMIC, "lock cmpxchg dword [0x30000], ebx"),
        ("lock decl (x)", "X86_64", ATOMIC, "lock dec dword [0x30000]"),
    ],
)
def test_an_instruction_is_what_the_assembler_calls_it(line: str, arch: str, kind: int, text: str) -> None:
    assert insn(line, "", arch) == Insn(text, kind, 0 if kind in (NONE, FENCE) else 1)


def test_a_register_that_holds_an_address_from_the_start_addresses_memory() -> None:
    assert insn("movl (%rsi),%eax", "x=1; 0:rsi=y", "X86_64") == Insn("mov eax, dword [rsi]", LOAD, 2)
    assert insn("MOV [EBX],$1", "0:EBX=x") == Insn("mov dword [ebx], 1", STORE, 1)


def test_types_tell_sizes_and_signs() -> None:
    test = read("t", "X86_64 t\n{ uint64_t x=-1; int8_t y=0x80; int16_t 0:rax=5; }\n P0 ;\n movb $1,(y) ;\n"
                "exists (0:rax=5 /\\ [x]=-1 /\\ y=1)")  # fmt: skip
    assert {name: (location.size, location.signed) for name, location in test.locations.items()} == {
        "x": (8, False), "y": (1, True)
    }  # fmt: skip
    assert [test.shown[item] for item in test.observed] == [Shown(2, True), Shown(8, False), Shown(1, True)]
    assert test.threads[0].registers == {0: 5}


def test_a_location_without_a_declaration_has_the_size_of_its_first_access() -> None:
    assert one("movw $1,(x)", "", "X86_64").locations["x"].size == 2


def test_locations_are_observed_too() -> None:
    test = read("t", SB.replace("exists", "locations [x; 1:EBX;]\nexists"))
    assert [str(item) for item in test.observed] == ["0:EAX", "1:EAX", "1:EBX", "[x]"]


def condition(text: str) -> LitmusTest:
    return read("t", SB.split("exists", maxsplit=1)[0] + text)


@pytest.mark.parametrize(
    "text, shown, true_for",
    [
        (r"exists (0:EAX=0 /\ 1:EAX=0)", r"0:EAX=0 /\ 1:EAX=0", {(0, 0)}),
        (r"~exists 0:EAX=0 /\ 1:EAX=0 \/ 0:EAX=1", r"(0:EAX=0 /\ 1:EAX=0) \/ 0:EAX=1", {(0, 0), (1, 0), (1, 1)}),
        (r"not exists (0:EAX=1 /\ (1:EAX=0 \/ 1:EAX=1))", r"0:EAX=1 /\ (1:EAX=0 \/ 1:EAX=1)", {(1, 0), (1, 1)}),
        (r"forall (0:EAX=1 => 1:EAX=1)", r"(0:EAX=1) => (1:EAX=1)", {(0, 0), (0, 1), (1, 1)}),
        (r"forall (0:EAX=1 /\ 0:EAX=0 => 1:EAX=1)", r"0:EAX=1 /\ ((0:EAX=0) => (1:EAX=1))", {(1, 0), (1, 1)}),
        (r"exists (~(0:EAX=1) /\ 1:EAX!=1);", r"not (0:EAX=1) /\ not (1:EAX=1)", {(0, 0)}),
        (r"exists (P0:EAX==-1 \/ 1:EAX=0x1)", r"0:EAX=-1 \/ 1:EAX=0x1", {(0, 1), (1, 1)}),
        (r"exists (0:EAX=0 /\ 1:EAX=0 \/ false /\ true)", r"(0:EAX=0 /\ 1:EAX=0) \/ (false /\ true)", {(0, 0)}),
    ],
)
def test_a_condition_means_what_herd_reads(text: str, shown: str, true_for: set[tuple[int, int]]) -> None:
    test = condition(text)
    assert str(test.condition) == shown
    first, second = Item(0, "EAX"), Item(1, "EAX")
    values = [(a, b) for a in (0, 1) for b in (0, 1)]
    assert {(a, b) for a, b in values if test.condition.holds({first: a, second: b})} == true_for


def test_comments_nest_and_keep_the_lines() -> None:
    with pytest.raises(CaseError, match=r"^t:6: .*'JMP L'"):
        read("t", "X86 t (* one (* two *)\nthree *)\n{ }\n P0 ;\n (* four\n*) JMP L ;\nexists (true)\n")


LONG = "X86 t\n{ }\n P0 ;\n" + " MFENCE ;\n" * 65 + "exists (true)\n"
MANY = "X86 t\n{ " + "; ".join(f"x{number}" for number in range(33)) + " }\n P0 ;\n"
WIDE = "X86 t\n{ }\n" + " | ".join(f"P{number}" for number in range(17)) + " ;\n"

BAD = {
    "another architecture": ("AArch64 SB\n{ }\n", 1, "'X86 NAME' or 'X86_64 NAME'"),
    "an empty file": ("", 1, "'X86 NAME'"),
    "no initial state": ("X86 t\n P0 ;\n", 2, "'{'"),
    "an open initial state": ("X86 t\n{ x=0;\n P0 ;\n", 2, "'}'"),
    "an open comment": ("X86 t\n(* {\n", 2, "'*)'"),
    "an unknown type": ("X86 t\n{ float x; }\n P0 ;\n", 2, "a type among char"),
    "an array": ("X86 t\n{ int t[2]; }\n P0 ;\n", 2, "'LOCATION = VALUE'"),
    "a register of another mode": ("X86 t\n{ 0:rax=1; }\n P0 ;\n", 2, "a register of X86, got 'rax'"),
    "a thread that is not there": ("X86 t\n{\n 3:EAX=1; }\n P0 ;\n", 3, "a thread in 0..0, got 3"),
    "no threads": ("X86 t\n{ }\nexists (x=0)\n", 3, "the row of threads"),
    "threads out of order": ("X86 t\n{ }\n P1 | P0 ;\nexists (x=0)\n", 3, "the row of threads"),
    "a row that is too short": ("X86 t\n{ }\n P0 | P1 ;\n MFENCE ;\nexists (x=0)\n", 4, "2 cells in this row, got 1"),
    "a row without an end": ("X86 t\n{ }\n P0 ;\n MFENCE\nexists (x=0)\n", 4, "';' at the end of each row"),
    "a branch": ("X86 t\n{ }\n P0 ;\n JNE L ;\nexists (x=0)\n", 4, "expected MOV, XCHG, MFENCE"),
    "an unlocked update": ("X86 t\n{ }\n P0 ;\n INC [x] ;\nexists (x=0)\n", 4, "LOCK before INC"),
    "LOCK alone": ("X86 t\n{ }\n P0 ;\n LOCK ;\nexists (x=0)\n", 4, "an instruction behind LOCK"),
    "a locked fence": ("X86 t\n{ }\n P0 ;\n LOCK MFENCE ;\nexists (x=0)\n", 4, "no LOCK before MFENCE"),
    "a locked move": ("X86 t\n{ }\n P0 ;\n LOCK MOV [x],$1 ;\nexists (x=0)\n", 4, "an instruction that exists"),
    "two operands in memory": ("X86 t\n{ }\n P0 ;\n MOV [x],[y] ;\nexists (x=0)\n", 4, "at most one operand in memory"),
    "a missing operand": ("X86 t\n{ }\n P0 ;\n MOV EAX ;\nexists (x=0)\n", 4, "2 operands of MOV, got 1"),
    "an offset": ("X86_64 t\n{ 0:rax=x; }\n P0 ;\n movl 4(%rax),%ebx ;\nexists (x=0)\n", 4, "[LOCATION] or [REGISTER]"),
    "sizes that differ": ("X86_64 t\n{ uint64_t x; }\n P0 ;\n movl $1,(x) ;\nexists (x=0)\n", 4, "got 4 and 8 bytes"),
    "a wild pointer": ("X86 t\n{ }\n P0 ;\n MOV EAX,[EBX] ;\nexists (x=0)\n", 4, "to set 0:EBX to a location"),
    "a pointer that changes": (
        "X86 t\n{ 0:EBX=x; }\n P0 ;\n MOV EAX,[EBX] ;\n MOV EBX,$1 ;\nexists (x=0)\n", 4, "does not write"
    ),
    "a location called like a register": ("X86 t\n{ eax=1; }\n P0 ;\nexists (x=0)\n", 2, "the register 'eax'"),
    "no condition": ("X86 t\n{ x; }\n P0 ;\n MFENCE ;\n", 4, "'exists', '~exists' or 'forall'"),
    "an unknown location": ("X86 t\n{ x; }\n P0 ;\nexists (z=0)\n", 4, "a location of the test"),
    "an unknown register": ("X86 t\n{ x; }\n P0 ;\nexists (0:R1=0)\n", 4, "a register of X86, got 'R1'"),
    "an unknown thread": ("X86 t\n{ x; }\n P0 ;\nexists (7:EAX=0)\n", 4, "a thread in 0..0, got '7'"),
    "an unknown value": ("X86 t\n{ x; }\n P0 ;\nexists (x=y)\n", 4, "a number or the name of a location, got 'y'"),
    "an open parenthesis": ("X86 t\n{ x; }\n P0 ;\nexists (x=0\n", 4, "')'"),
    "text behind the condition": ("X86 t\n{ x; }\n P0 ;\nexists (x=0)\nwith a\n", 5, "the end of the condition"),
    "a filter": ("X86 t\n{ x; }\n P0 ;\nfilter (x=0)\nexists (x=0)\n", 4, "'~exists' or 'forall', got 'filter'"),
    "a forgotten semicolon": ("X86 t\n{ x=1\n y=2; }\n P0 ;\nexists (x=0)\n", 2, "got 'x=1 y=2'"),
    "a value that is too large": ("X86 t\n{ int8_t x=256; }\n P0 ;\nexists (x=0)\n", 2, "fits the 1 bytes of x"),
    "a pointer in a small location": ("X86 t\n{ int8_t x=y; }\n P0 ;\nexists (x=0)\n", 2, "fits the 1 bytes of x"),
    "a register that is too small": ("X86 t\n{ 0:AX=x; }\n P0 ;\nexists (x=0)\n", 2, "fits the 2 bytes of AX"),
    "a comparison that cannot hold": ("X86 t\n{ x; }\n P0 ;\nexists (0:AL=256)\n", 4, "fits the 1 bytes of 0:AL"),
    "a constant that is too large": ("X86 t\n{ }\n P0 ;\n MOV [x],$4294967296 ;\n", 4, "an instruction that exists"),
    "a very long number": (f"X86 t\n{{ x={'9' * 5000}; }}\n P0 ;\nexists (x=0)\n", 2, "a number or a location"),
    "a very long thread": (f"X86 t\n{{ x; }}\n P0 ;\nexists ({'9' * 5000}:EAX=0)\n", 4, "a location of the test"),
    "too many instructions": (LONG, 2, "at most 64 instructions"),
    "too many locations": (MANY, 2, "at most 32 locations"),
    "too many threads": (WIDE, 3, "at most 16 threads"),
}  # fmt: skip


@pytest.mark.parametrize("text, line, expected", BAD.values(), ids=BAD.keys())
def test_what_is_not_understood_is_refused_with_its_line(text: str, line: int, expected: str) -> None:
    with pytest.raises(CaseError) as error:
        read("bad.litmus", text)
    assert str(error.value).startswith(f"bad.litmus:{line}: expected "), error.value
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


CORPUS = sorted((Path(__file__).resolve().parents[2] / "corpus" / "litmus").glob("*.litmus"))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sampled_from(CORPUS), st.integers(0, 400), st.integers(0, 3), st.text("x1P:;|[]()$=/~ \nMO,{}*", max_size=3))
def test_a_damaged_file_is_read_or_refused_but_nothing_else(path: Path, place: int, cut: int, put: str) -> None:
    text = path.read_text()
    try:
        read("damaged", text[:place] + put + text[place + cut :])
    except CaseError as error:
        assert str(error).startswith("damaged:")
        assert "expected" in str(error)
