"""The target of the instruction harness: what it reaches, and that its checks fire."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmufuzz.campaign import insn_emulator, insn_inputs
from mmufuzz.campaign.insn_inputs import MOST_INSTRUCTIONS, any_encoding, crossed, decoded, mutated, steps
from mmufuzz.campaign.insn_states import HEADER, MODES, UNUSUAL, USER, absent_pages, bits_of, registers
from mmufuzz.campaign.insn_target import EchoBus, run, step
from mmufuzz.campaign.opcode_reach import OpcodeReach, reach_of
from mmufuzz.case.rng import Rng
from mmufuzz.x86.asm import assemble
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.insn import DS, SS, TR, Insn
from mmufuzz.x86.opcodes import FORMS, entries
from mmufuzz.x86.paging import CR4_LA57
from mmufuzz.x86.state import RIGHTS_UNUSABLE, Fault, Regs

SEEDS = Path(__file__).parents[2] / "corpus" / "seeds" / "atheris_insn"

INPUTS = st.binary(min_size=HEADER, max_size=80)


def told(data: bytes) -> list[tuple[int, int, int]]:
    """The steps of an input as numbers."""
    return [(-1 if made.insn is None else made.insn.form, made.bits, made.vector) for made in run(data)]


def test_the_committed_seeds_reach_every_entry_in_every_mode() -> None:
    reach = reach_of([SEEDS])
    for bits in MODES:
        assert reach.missing(bits) == []
        assert len(reach.retired[bits]) > 0.75 * len(entries(bits))


def test_the_emulator_is_sent_what_hardware_lacks() -> None:
    # VMLOAD.
    (made,) = run(bytes(HEADER) + b"\x0f\x01\xda")
    assert made.insn is None and made.entry is not None and made.entry.line.startswith("01=DA")


def test_an_instruction_that_raises_an_exception_is_executed_but_does_not_retire() -> None:
    reach = OpcodeReach()
    reach.add(bytes(HEADER) + assemble("ud2") + assemble("nop"))
    names = [{FORMS[number].mnemonic for number in of[64]} for of in (reach.executed, reach.retired)]
    assert names == [{"ud2", "nop"}, {"nop"}]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(INPUTS)
def test_any_input_runs_and_twice_alike(data: bytes) -> None:
    assert told(data) == told(data)
    assert len(run(data)) <= MOST_INSTRUCTIONS


@settings(derandomize=True, deadline=None, max_examples=200)
@given(INPUTS, st.integers(0, 1 << 32))
def test_a_mutation_keeps_the_mode_and_the_size(data: bytes, seed: int) -> None:
    changed = mutated(data, 64, Rng(seed), lambda raw, size: raw[:size])
    assert len(changed) <= 64
    assert bits_of(changed) == bits_of(data)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(INPUTS, INPUTS, st.integers(0, 1 << 32))
def test_a_crossover_is_made_of_instructions_of_both(one: bytes, other: bytes, seed: int) -> None:
    changed = crossed(one, other, 64, Rng(seed))
    assert changed[:HEADER] == one[:HEADER] and len(changed) <= 64
    if bits_of(one) == bits_of(other):
        assert set(steps(changed)[:-1]) <= {*steps(one), *steps(other)}


def test_mutations_alone_reach_most_of_a_table() -> None:
    rng = Rng(1)
    reach = OpcodeReach()
    data = bytes(HEADER)
    for _ in range(4000):
        data = mutated(data, 1000, rng, lambda raw, size: raw)
        reach.add(data)
    assert len(reach.executed[64]) > 0.7 * len(entries(64))


PREFIXES = bytes.fromhex("666764652e36263ef0f2f3")
DESCRIPTORS = [
    *(0x00CF9B000000FFFF, 0x00AF9B000000FFFF, 0x00409A000000FFFF, 0x00CFFB000000FFFF, 0x00CF9F000000FFFF),
    *(0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00CF97000000FFFF, 0x00CF13000000FFFF, 0x00CF1B000000FFFF),
    *(0x00008B0030000067, 0x0000890030000067, 0x00008100300000FF, 0x0000820030000FFF, 0x0000EE0000083000),
    *(0x00008C0000080000, 0),
]
"""Of code, data, tables, tasks and gates."""


def unusual_input(rng: Rng) -> bytes:
    """A few instructions with more prefixes than they need, and descriptors, in an unusual state."""
    mode = rng.below(len(MODES))
    data = bytes((UNUSUAL | rng.below(4) << 2 | mode,)) + rng.bytes(HEADER - 1)
    for _ in range(1 + rng.below(4)):
        while rng.below(4) == 0:
            data += PREFIXES[rng.below(len(PREFIXES)) :][:1]
        if MODES[mode] == 64 and rng.below(3) == 0:
            data += bytes((0x40 | rng.below(16),))
        data += any_encoding(rng, MODES[mode])
    for _ in range(rng.below(12)):
        data += DESCRIPTORS[rng.below(len(DESCRIPTORS))].to_bytes(8, "little")
    return data


def judge_unusual_inputs(seed: int, count: int) -> list[str]:
    """What fails of ``count`` inputs."""
    rng = Rng(seed)
    failures = []
    for _ in range(count):
        data = unusual_input(rng)
        try:
            run(data)
        except AssertionError as error:
            failures.append(f"{data.hex()}: {error}")
    return failures


def test_unusual_states_show_listed_deviations_only() -> None:
    assert judge_unusual_inputs(1, 1500) == []


@pytest.mark.oracle
def test_many_unusual_states_show_listed_deviations_only() -> None:
    assert judge_unusual_inputs(2, 300_000) == []


def test_unusual_states_are_of_many_kinds() -> None:
    rng = Rng(1)
    seen: set[str] = set()
    for _ in range(300):
        data = unusual_input(rng)
        regs = registers(data)
        seen |= {"57 bits"} if regs.cr4 & CR4_LA57 else set()
        seen |= {"compatibility mode"} if regs.compatibility else set()
        seen |= {"null SS"} if regs.long_mode and regs.segments[SS].rights & RIGHTS_UNUSABLE else set()
        seen |= {"a segment that grows down"} if regs.segments[DS].rights & 0xC == 4 else set()
        seen |= {"a TSS"} if regs.segments[TR].limit else set()
        seen |= {"absent pages"} if absent_pages(data) else set()
        seen |= {"the end of the low half"} if any(0 < (1 << 56) - value < 16 for value in regs.gpr) else set()
    assert len(seen) == 7


def test_a_usual_state_has_all_pages() -> None:
    assert absent_pages(bytes(HEADER)) == []


def test_an_access_to_an_absent_page_faults_with_its_first_byte_there() -> None:
    bus = EchoBus(b"\0", [3])
    regs = registers(bytes((USER, 0, 0, 0)))
    with pytest.raises(Fault) as caught:
        bus.store(regs, 0x2FFE, 4, 0, False)
    assert (caught.value.vector, caught.value.error_code, caught.value.address) == (14, 6, 0x3000)


def test_steps_are_the_instructions_of_an_input() -> None:
    lines = [assemble(line, False) for line in ("mov eax, dword [ebx]", "nop", "ret")]
    assert steps(b"\1\0\0\0" + b"".join(lines)) == lines


# The checks fire.


def test_a_fault_that_changes_registers_is_noticed() -> None:
    class Leaky(EchoBus):
        def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
            regs.gpr[5] ^= 1
            raise Fault(14, 0, gva)

    with pytest.raises(AssertionError, match="mov faults and changes registers"):
        step(registers(bytes(HEADER)), decode(assemble("mov rax, [rbx]"), True), Leaky(b"\0", []))


def test_a_register_out_of_range_is_noticed() -> None:
    class Wide(EchoBus):
        def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
            return 1 << 8 * size

    with pytest.raises(AssertionError, match="a register out of range"):
        step(registers(bytes(HEADER)), decode(assemble("mov rax, [rbx]"), True), Wide(b"\0", []))


def test_a_deviation_of_the_emulator_that_is_not_listed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(HEADER) + assemble("tzcnt eax, ebx")
    assert len(run(data)) == 1
    monkeypatch.setattr(insn_emulator, "explain", lambda made: "")
    with pytest.raises(AssertionError, match="the emulator differs from hardware: f30fbcc3 in 64-bit code: bsf: flags"):
        run(data)
    reach = OpcodeReach()
    reach.add(data)
    assert len(reach.differing) == 1 and not reach.executed[64]


@pytest.mark.parametrize(("length", "what"), [(2, "bytes behind"), (0, "impossible length")])
def test_a_wrong_length_is_noticed(length: int, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(code: bytes, bits: int) -> Insn:
        # MOV with a ModRM byte, said to end before or behind it.
        if len(code) < 2:
            raise Truncated
        insn = decode(b"\x89\xc0", True)
        made = Insn(insn.mnemonic, length, insn.size, insn.asize)
        made.form = insn.form if len(code) > length else 0
        return made

    monkeypatch.setattr(insn_inputs, "_decode", wrong)
    with pytest.raises(AssertionError, match=what):
        decoded(b"\x89\xc0\x90", 64)


def test_an_instruction_that_needs_fewer_bytes_than_its_length_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(code: bytes, bits: int) -> Insn:
        insn = decode(b"\x89\xc0", True)
        made = Insn(insn.mnemonic, 3, insn.size, insn.asize)
        made.form = insn.form
        return made

    monkeypatch.setattr(insn_inputs, "_decode", short)
    with pytest.raises(AssertionError, match="goes on behind its end"):
        decoded(b"\x89\xc0\x90", 64)


@pytest.mark.parametrize(
    "data",
    [
        # MOVNTI with F2, a REX without effect, and 66.
        "9f790000f24a660fb575c3f24a664a660fc3",
        # FXRSTOR with a REX without effect, and F3.
        "13740000f2b7230f01f30f01f3520f846c8c747200090004000fadacc081b70babebeaffe1e1e17171524bf30fae09e1b4f20f33",
        # STR of a user under UMIP, whose operand faults with #SS.
        "870f0000f30f008dd2f6bb64",
    ],
)
def test_inputs_that_once_differed_are_explained(data: str) -> None:
    assert run(bytes.fromhex(data))
