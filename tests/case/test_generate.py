"""Generated and mutated Cases are valid, small, repeatable, and often enough of the delicate shapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from mmufuzz.case.generate import CAMPAIGN, INTERRUPT, SHAPES, GenerateOptions, generate, generate_shape
from mmufuzz.case.generate_insn import FEP, PLAIN, RMW, UNEMULATED, Program
from mmufuzz.case.model import Case, Vcpu
from mmufuzz.case.mutate import mutate, splice, tables_of
from mmufuzz.case.rng import Rng
from mmufuzz.case.tables import PAGE, TableBuilder
from mmufuzz.case.validate import in_slots, validate
from mmufuzz.x86.decode import decode
from mmufuzz.x86.insn import MEM
from mmufuzz.x86.page_walk import PageTableReader, walk_tables
from mmufuzz.x86.paging import PagingConfig
from mmufuzz.x86.state import Fault

SEEDS = st.integers(0, (1 << 64) - 1)
N = 1500


@settings(derandomize=True, deadline=None, max_examples=150)
@given(SEEDS)
def test_generated_cases_are_valid_and_repeatable(seed: int) -> None:
    case = generate(Rng(seed))
    validate(case)
    assert generate(Rng(seed)) == case


@settings(derandomize=True, deadline=None, max_examples=150)
@given(SEEDS, cases())
def test_mutants_of_any_case_are_valid_and_repeatable(seed: int, case: Case) -> None:
    mutant = mutate(Rng(seed), case)
    validate(mutant)
    assert mutate(Rng(seed), case) == mutant


@settings(derandomize=True, deadline=None, max_examples=100)
@given(SEEDS, cases())
def test_splices_are_valid_and_repeatable(seed: int, case: Case) -> None:
    other = generate(Rng(seed))
    for first, second in ((case, other), (other, case)):
        spliced = splice(Rng(seed), first, second)
        validate(spliced)
        assert splice(Rng(seed), first, second) == spliced


def test_chains_of_mutations_stay_small_and_change_something() -> None:
    rng = Rng(1)
    case = generate(rng)
    changed = 0
    for _ in range(1500):
        mutant = mutate(rng, case)
        validate(mutant)
        changed += mutant != case
        case = mutant
    assert changed > 1200
    assert len(case.vcpus) <= 4
    assert all(len(vcpu.program) < 40 for vcpu in case.vcpus)


def test_options_are_kept() -> None:
    options = GenerateOptions("v6.1", ("a",), ("b",), max_vcpus=1, fep=False, host=False, sc=False, nested=False)
    made = [generate(Rng(seed), options) for seed in range(300)]
    assert {(case.kernel, case.revert, case.apply, case.memory_model) for case in made} == {
        ("v6.1", ("a",), ("b",), "tso")
    }
    assert not any(case.options.fep or case.host for case in made)
    assert {vcpu.mode for case in made for vcpu in case.vcpus} == {"long4", "flat32"}


def test_cases_are_small() -> None:
    for seed in range(500):
        case = generate(Rng(seed))
        assert 1 <= len(case.vcpus) <= 3
        assert sum(len(vcpu.program) for vcpu in case.vcpus) <= 60
        assert len(case.memory) <= 60


@pytest.mark.parametrize("shape", [INTERRUPT, *[shape for shape, _ in SHAPES]])
def test_every_shape_is_valid_with_every_option(shape: str) -> None:
    for seed in range(60):
        validate(generate_shape(Rng(seed), shape))
        validate(generate_shape(Rng(seed), shape, GenerateOptions(max_vcpus=1, fep=False)))


def test_cases_have_interrupts_only_if_asked_for() -> None:
    plain = [op for seed in range(200) for thread in generate(Rng(seed)).host for op in thread.ops]
    asked = [op for seed in range(200) for thread in generate(Rng(seed), CAMPAIGN).host for op in thread.ops]
    assert not any(op.startswith("interrupt") for op in plain)
    assert any(op.startswith("interrupt") for op in asked)


def test_weights_are_parts_of_a_hundred() -> None:
    assert sum(weight for _, weight in SHAPES) == 100


# Shapes, recognised in the Case and not by the name of what made it.

KERNEL_CANNOT_EMULATE = ("cmpxchg16b", "fstp", "movss", "vmovdqu")
READ_MODIFY_WRITE = ("xadd", "add", "cmpxchg", "or", "and", "inc", "bts", "btr")


class Words(PageTableReader):
    def __init__(self, case: Case) -> None:
        self.case = case
        self.values = {word.gfn << 12 | word.index << 3: word.value for word in case.memory}

    def read_entry(self, gpa: int) -> int:
        return self.values.get(gpa, 0) if in_slots(self.case.slots, gpa >> 12) else -1


def stores(case: Case, vcpu: Vcpu) -> list[tuple[str, bool, int]]:
    """(mnemonic, forced, gfn) of the accesses through initial registers whose first operand is memory."""
    regs = dict(vcpu.regs)
    found = []
    for step in vcpu.program:
        try:
            insn = decode(step, vcpu.mode == "long4", True)
        except Fault:
            continue
        if not insn.operands or insn.operands[0].kind != MEM or insn.mnemonic == "invlpg" or insn.base not in regs:
            continue
        gva = regs[insn.base]
        if vcpu.mode == "flat32":
            found.append((insn.mnemonic, insn.fep, gva >> 12))
            continue
        result = walk_tables(PagingConfig(4), vcpu.cr3, gva, 0, Words(case))
        if not result.fault:
            found.append((insn.mnemonic, insn.fep, result.gfn))
    return found


def shapes_of(case: Case) -> set[str]:
    roots = [vcpu.cr3 for vcpu in case.vcpus if vcpu.mode != "flat32"]
    tables = tables_of(case)
    found = set()
    for vcpu in case.vcpus:
        own = tables_of(Case(memory=case.memory, vcpus=(vcpu,)))
        for mnemonic, forced, gfn in stores(case, vcpu):
            stuck = mnemonic in KERNEL_CANNOT_EMULATE
            rmw = mnemonic in READ_MODIFY_WRITE
            if vcpu.mode == "flat32":
                if forced and mnemonic == "mov" and gfn in roots:
                    found.add("forced store to another's root")
                if forced and mnemonic == "mov" and gfn in tables and gfn not in roots:
                    found.add("forced store to another's lower table")
                if stuck and gfn in tables:
                    found.add("stuck store to another's table")
            elif stuck and gfn in own:
                found.add("stuck store to its own root" if gfn == vcpu.cr3 else "stuck store to its own lower table")
            elif rmw and gfn in own:
                found.add("read-modify-write of its own table")
            if stuck and not in_slots(case.slots, gfn):
                found.add("stuck access outside the slots")
            if gfn in case.options.write_track:
                if stuck:
                    found.add("stuck store to a tracked frame")
                if rmw:
                    found.add("read-modify-write of a tracked frame")
    return found


def test_delicate_shapes_are_frequent() -> None:
    counts: dict[str, int] = {}
    nested = 0
    for seed in range(N):
        case = generate(Rng(seed))
        nested += any(vcpu.mode == "npt4" for vcpu in case.vcpus)
        for shape in shapes_of(case):
            counts[shape] = counts.get(shape, 0) + 1
    assert len(counts) == 9
    assert {shape: count for shape, count in counts.items() if count < N * 2 // 100} == {}
    assert nested > N * 5 // 100


# Encodings, checked against the decoder.

MNEMONICS = {
    "fstp4": "fstp",
    "fstp8": "fstp",
    "fstp10": "fstp",
    "vmovdqu16": "vmovdqu",
    "vmovdqu32": "vmovdqu",
    "mov imm": "mov",
}


@pytest.mark.parametrize("mode64", [True, False])
@pytest.mark.parametrize("kind", PLAIN + RMW + UNEMULATED)
def test_stores_encode_what_they_say(kind: str, mode64: bool) -> None:
    # Enough stores to different places that every address register has its turn.
    program = Program(mode64)
    for place in range(12):
        before = len(program.steps)
        program.store(kind, 0x1000 * place, 0x21, 0x20, 0, place % 2 == 1)
        insn = decode(program.steps[-1], mode64, True)
        name = kind.removeprefix("lock ")
        expected = MNEMONICS.get(name, name)
        if name == "cmpxchg16b" and not mode64:
            expected = "cmpxchg8b"
        assert insn.mnemonic == expected
        assert insn.fep == (place % 2 == 1)
        assert insn.length == len(program.steps[-1])
        assert insn.operands[0].kind == MEM
        assert program.holds[insn.base] == 0x1000 * place
        assert len(program.steps) > before


def test_an_initial_register_is_used_before_a_mov_step() -> None:
    program = Program(True)
    program.store("mov", 0x5000, 7, 0)
    assert program.steps == [bytes.fromhex("48891f")]
    assert program.initial == {7: 0x5000, 3: 7}


def test_a_prefix_that_does_not_fit_is_left_out() -> None:
    program = Program(True)
    program.emit(bytes(11), True)
    program.emit(bytes(10), True)
    assert program.steps == [bytes(11), FEP + bytes(10)]


def test_tables_in_use_are_what_the_roots_lead_to() -> None:
    case = generate_shape(Rng(3), "root-race", GenerateOptions(nested=False))
    tables = tables_of(case)
    root = case.vcpus[1].cr3
    assert root in tables
    assert {word.value >> 12 & 0xFFFF for word in case.memory if word.gfn == root and word.value & 1} <= set(tables)


def test_without_a_free_frame_a_table_gets_a_second_role() -> None:
    builder = TableBuilder([5, 6])
    root = builder.table(4)
    # Levels 3 and 1 share frame 6, by turns with the root.
    builder.map(root, 3 << 39 | 1 << 30 | 2 << 21 | 4 << 12, 9, PAGE)
    assert builder.levels == {5: 4, 6: 3}
    assert {key >> 9 for key in builder.words} <= {5, 6}
    assert builder.path(root, 3 << 39 | 1 << 30 | 2 << 21 | 4 << 12)[-1][1:] == (1, 4)
    assert [case_word.value >> 12 for case_word in builder.memory()][-1] == 9


def test_mutants_do_not_repeat_string_instructions_for_long() -> None:
    program = Program(True)
    program.string(False, 0x5000, 0, 3, False)
    case = Case(vcpus=(Vcpu("long4", regs=((1, 1 << 40 | 7), (7, 0x5000)), program=tuple(program.steps)),))
    for seed in range(50):
        for changed in (mutate(Rng(seed), case), splice(Rng(seed), case, case)):
            for vcpu in changed.vcpus:
                repeated = any(b"\xf3\x48\xab" in step for step in vcpu.program)
                assert not repeated or dict(vcpu.regs).get(1, 0) < 256


def test_half_of_the_root_races_are_on_a_nested_page_table() -> None:
    made = [generate_shape(Rng(seed), "root-race") for seed in range(200)]
    nested = sum(any(vcpu.mode == "npt4" for vcpu in case.vcpus) for case in made)
    assert 70 < nested < 130
