"""The TOML form: lossless, readable, and precise about what is wrong with a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases

from mmufuzz.case.error import CaseError
from mmufuzz.case.model import Case, Expect, Slot, Vcpu, Word
from mmufuzz.case.toml import dumps, load, loads, save
from mmufuzz.case.toml_dump import entry_text
from mmufuzz.host.deviation import HOLD, Deviation
from mmufuzz.host.sites import EMUL_STORE, GPTE_LOAD, label
from mmufuzz.x86.asm import assemble

CASE = Case(
    comment="Seen first\nby \"hand\" with \\ and '''",
    slots=(Slot(0, 32), Slot(0x100, 2, True)),
    memory=(Word(8, 1, 0x9027), Word(9, 0, 0x8000_0000_0000_0000), Word(9, 1, 0x12345)),
    vcpus=(
        Vcpu("flat32", code_gva=0x1000, code_gfn=1, regs=((0, 0x10),), program=(bytes.fromhex("0f0b6b766d8907"),)),
        Vcpu("long4", cr3=8, code_gva=0x2000, code_gfn=2, regs=((3, 1 << 63),), program=(b"\xf3\x0f\x11\x07",)),
    ),
    schedule=(Deviation(HOLD, label(0, 0, EMUL_STORE, 1), 0, label(1, 0, GPTE_LOAD, 2)),),
    expect=Expect("finding", "coherence", "coherence: stale spte", ("fetch",)),
)

TEXT = """format = 1
slots = [
  { base_gfn = 0, npages = 32 },
]
schedule = [
  # a race
  "hold vcpu0@0.emul.store 1",
]
memory = [
  { gfn = 8, index = 0, entry = "0x9 P W U" },
  { gfn = 9, index = 0, value = 0 },
]

[options]
fep = true

[[vcpu]]
mode = "flat32"
code_gfn = 1
program = ["90"]

[[vcpu]]
mode = "long4"
cr3 = 8
code_gva = 0x2000
code_gfn = 2
regs = { rax = 1 }
program = [
  "asm:mov [rbx], rax",
  "f4",
]

[[host]]
ops = ["zap_all_fast"]

[expect]
verdict = "ok"
"""


@settings(derandomize=True, deadline=None, max_examples=150)
@given(cases())
def test_every_valid_case_survives_writing(case: Case) -> None:
    assert loads(dumps(case), "file") == case


def test_code_and_entries_are_explained() -> None:
    text = dumps(CASE)
    assert '"0f 0b 6b 76 6d 89 07",  # fep mov dword [edi], eax' in text
    assert '"f3 0f 11 07",  # movss dword [rdi], xmm0' in text
    assert '{ gfn = 0x8, index = 1, entry = "0x9 P W U A" },  # vcpu1 L4 0x8000000000-0xffffffffff' in text
    assert '{ gfn = 0x9, index = 0, value = "0x8000000000000000" },  # vcpu1 L3 0x8000000000-0x803fffffff' in text
    assert '"hold vcpu0@0.emul.store 1 until vcpu1@0.gpte.load 2",' in text


def test_a_self_mapped_root_is_described_with_all_its_levels() -> None:
    case = replace(CASE, memory=(Word(8, 256, 0x8003),))
    assert "# vcpu1 L4 0xffff800000000000-0xffff807fffffffff, vcpu1 L3 0xffffc0" not in dumps(case)
    assert "# vcpu1 L4 0xffff800000000000-0xffff807fffffffff, vcpu1 L3 0xffff804000000000-" in dumps(case)


def test_options_appear_only_when_they_are_not_the_default() -> None:
    assert "[options]" not in dumps(CASE)
    assert "fep = true\n" in dumps(replace(CASE, options=replace(CASE.options, fep=True)))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, (1 << 64) - 1) | st.integers(0, 1 << 20))
def test_an_entry_is_named_only_when_no_bit_is_lost(value: int) -> None:
    case = replace(CASE, memory=(Word(8, 0, value),))
    assert loads(dumps(case), "file").memory == case.memory
    assert (entry_text(value) == "") == (value & 1 == 0 or value & 0x7FF0_0000_0000_0E00 != 0)


def test_hand_written_text_may_leave_defaults_out_and_hold_assembly() -> None:
    case = loads(TEXT, "file")
    assert case.vcpus[0].code_gva == 0x1000
    assert case.vcpus[1].program == (assemble("mov [rbx], rax", True), b"\xf4")
    assert case.memory[0].value == 0x9007


@pytest.mark.parametrize(
    ("old", "new", "place", "expected"),
    [
        ("format = 1", "format = 2", "f:1: format", "expected at most 1, got 2"),
        ("format = 1\n", "", "f: format", "expected a number, got nothing"),
        ("format = 1", "format = 0", "f:1: format", "expected 1"),
        ("format = 1", 'format = 1\nkernal = "v6.1"', "f:2: kernal", "unknown key; expected one of format"),
        ("format = 1", "format = 1\nkernel = 6.1", "f:2: kernel", "expected a string, got 6.1"),
        ("format = 1", 'format = 1\nkernel = "V6"', "f:2: kernel", "expected a kernel profile"),
        ("format = 1", 'format = 1\nmemory_model = "pso"', "f:2: memory_model", "expected 'tso' or 'sc'"),
        ("format = 1", 'format = 1\nrevert = ["a", 1]', "f:2: revert[1]", "expected a string, got 1"),
        ("npages = 32", "npages = true", "f:3: slots[0].npages", "expected a number, got true"),
        ("npages = 32", "pages = 32", "f:3: slots[0].npages", "expected a number, got nothing"),
        ("npages = 32 }", "npages = 32, x = 1 }", "f:3: slots[0].x", "unknown key"),
        ("npages = 32 },", "npages = 32 },\n  { base_gfn = 31, npages = 1 },", "f:4: slots[1]", "slots[0] overlaps"),
        ("hold vcpu0", "hold vcpu9", "f:7: schedule[0]", "expected a thread of this case (vcpu0, vcpu1, host0)"),
        ("emul.store 1", "emul.store 0", "f:7: schedule[0]", "expected an occurrence in 1..65535"),
        ("emul.store 1", "emul.push 1", "f:7: schedule[0]", "expected the name of a site"),
        ("emul.store 1", "emul.load 1", "f:7: schedule[0]", "expected the label of a store to hold"),
        ('"0x9 P W U"', '"0x9 P WU"', "f:10: memory[0].entry", "expected flags among P W U PWT"),
        ('"0x9 P W U"', '"P W U"', "f:10: memory[0].entry", "expected a 64-bit value"),
        ('"0x9 P W U"', '"0x10000000000 P"', "f:10: memory[0].entry", "expected the gfn of a frame and flags"),
        ('"0x9 P W U"', '" "', "f:10: memory[0].entry", "and flags, got ' '"),
        (", value = 0 }", " }", "f:11: memory[1]", "expected either entry"),
        ("value = 0 }", "value = -1 }", "f:11: memory[1].value", "expected a 64-bit value"),
        ("value = 0 }", 'value = "1x" }', "f:11: memory[1].value", "expected a 64-bit value"),
        ("gfn = 9, index = 0", "gfn = 9, index = 512", "f:11: memory[1].index", "0..511"),
        ("gfn = 9, index = 0", "gfn = 8, index = 0", "f:11: memory[1]", "comes twice"),
        ("gfn = 9, index = 0", "gfn = 99, index = 0", "f:11: memory[1].gfn", "expected a gfn inside a slot"),
        ("fep = true", 'fep = "yes"', "f:15: options.fep", "expected true or false, got 'yes'"),
        ("fep = true", "n_max_mmu_pages = 0", "f:15: options.n_max_mmu_pages", "20..65535, got 0"),
        ("fep = true", "write_track = [40]", "f:15: options.write_track[0]", "expected a gfn inside a slot"),
        ("fep = true", 'write_track = [4, "5"]', "f:15: options.write_track[1]", "expected a gfn, got '5'"),
        ("fep = true", "write_track = [true]", "f:15: options.write_track[0]", "expected a gfn, got true"),
        ("{ base_gfn = 0, npages = 32 }", "7", "f:3: slots[0]", "expected a table, got 7"),
        ('  "f4",', '\n  # halt\n  "f",', "f:32: vcpu[1].program[1]", "expected hex bytes"),
        ('  "f4",', '  "f4", "f4", "f",', "f:28: vcpu[1].program[3]", "expected hex bytes"),
        ("fep = true", "write_track = 4", "f:15: options.write_track", "expected an array, got 4"),
        ('mode = "flat32"\n', "", "f:17: vcpu[0].mode", "expected a string, got nothing"),
        ('"flat32"', '"pae"', "f:18: vcpu[0].mode", "expected one of long4, flat32, npt4"),
        ('"90"', '"9"', "f:20: vcpu[0].program[0]", "expected hex bytes"),
        ('"90"', '""', "f:20: vcpu[0].program[0]", "expected 1..15 bytes, got 0"),
        ("cr3 = 8", "cr3 = 0x10000", "f:24: vcpu[1].cr3", "expected the gfn of a root table"),
        ("cr3 = 8", "cpl = 1", "f:24: vcpu[1].cpl", "expected 0 or 3"),
        ("cr3 = 8", 'flags = ["pge"]', "f:24: vcpu[1].flags", "expected flags among wp, smep, smap, nx"),
        ("code_gva = 0x2000", "code_gva = 0x800000000000", "f:25: vcpu[1].code_gva", "canonical"),
        ("code_gva = 0x2000", "code_gva = 0x2001", "f:25: vcpu[1].code_gva", "page-aligned"),
        ("code_gfn = 2", "code_gfn = 32", "f:26: vcpu[1].code_gfn", "0x20 is in none"),
        ("code_gfn = 1", "code_gfn = 1\ncode_gva = 0", "f:20: vcpu[0].code_gva", "code_gfn * 4096 = 0x1000"),
        ("rax = 1", "eax = 1", "f:27: vcpu[1].regs.eax", "expected the name of a register"),
        ("rax = 1", "rax = []", "f:27: vcpu[1].regs.rax", "expected a 64-bit value"),
        ("mov [rbx], rax", "mov [rbx], xmm0", "f:29: vcpu[1].program[0]", "expected an instruction"),
        ('"zap_all_fast"', '"zap"', "f:34: host[0].ops[0]", "expected zap_all_fast or 'interrupt vcpuN"),
        ('"ok"', '"maybe"', "f:37: expect.verdict", "expected 'ok' or 'finding'"),
        ('"ok"', '"ok"\nkind = "livelock"', "f:37: expect.verdict", "expected 'finding', since"),
        ("[expect]", "[expected]", "f:36: expected", "unknown key"),
        ("[expect]", "[expect", "f", "expected TOML"),
        ("[[host]]", "[host]", "f:33: host", "expected an array, got a table"),
        (TEXT[TEXT.index("\n[[vcpu]]\n") : TEXT.index("[[host]]")], "", "f: vcpu", "expected 1..16 vCPUs, got 0"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(old: str, new: str, place: str, expected: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    if place == "f: vcpu":
        text = text.replace('  "hold vcpu0@0.emul.store 1",\n', "")
    with pytest.raises(CaseError) as error:
        loads(text, "f")
    assert error.value.place == place
    assert expected in error.value.expected


@pytest.mark.parametrize("name", ["a.toml", "a.case"])
def test_files_of_both_forms_are_written_whole_and_read_back(tmp_path: Path, name: str) -> None:
    save(CASE, tmp_path / name)
    assert load(tmp_path / name) == CASE
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_form_of_a_file_is_told_by_its_contents(tmp_path: Path) -> None:
    save(CASE, tmp_path / "a.case")
    (tmp_path / "a.case").rename(tmp_path / "crash-1234")
    assert load(tmp_path / "crash-1234") == CASE


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "a.toml"
    for attempt in (lambda: load(missing), lambda: save(CASE, missing)):
        with pytest.raises(CaseError, match="No such file") as error:
            attempt()
        assert error.value.place == str(missing)
    with pytest.raises(CaseError, match=r"\.toml or \.case"):
        save(CASE, tmp_path / "a.txt")
    (tmp_path / "a.toml").write_bytes(b"format = 1\n\xff")
    with pytest.raises(CaseError, match="expected UTF-8 text, got byte 0xff at 11"):
        load(tmp_path / "a.toml")
