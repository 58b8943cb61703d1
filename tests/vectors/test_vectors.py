"""The reader of other people's test vectors, on small files of both formats written here."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest

from mmufuzz.vectors.__main__ import main
from mmufuzz.vectors.reader import read

REGS16 = "ax bx cx dx cs ss ds es sp bp si di ip flags".split()  # noqa: SIM905 (names in the order of the format)
START = {name: 0 for name in REGS16} | {"cs": 0x100, "ss": 0x200, "sp": 0x80, "flags": 2}


def regs(**changed: int) -> dict[str, int]:
    return START | changed


def code(text: str) -> list[list[int]]:
    """Bytes at CS:0, and HLT behind them."""
    return [[0x1000 + place, byte] for place, byte in enumerate(bytes.fromhex(text) + b"\xf4")]


def addition(ax: int) -> dict[str, object]:
    """ADD AX, BX of 0xFFFF and 1; ``ax`` is what the file expects."""
    return {
        "name": "add ax, bx",
        "initial": {"regs": regs(ax=0xFFFF, bx=1), "ram": code("01d8")},
        "final": {"regs": {"ax": ax, "ip": 3, "flags": 0x57}, "ram": []},
    }


# DIV BL by zero: the frame lies below 0200:0080, and vector 0 points to 0300:0000.
DIVISION = {
    "name": "div bl",
    "initial": {"regs": regs(ax=5), "ram": [*code("f6f3"), [2, 0], [3, 3], [0x3000, 0xF4]]},
    "final": {
        "regs": {"cs": 0x300, "ip": 1, "sp": 0x7A},
        "ram": [[0x207A, 0], [0x207B, 0], [0x207C, 0], [0x207D, 1], [0x207E, 2], [0x207F, 0]],
    },
}


def write(path: Path, tests: object) -> Path:
    path.write_text(json.dumps(tests))
    return path


def test_a_file_that_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "01.json", [addition(0), DIVISION]))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 tests, 0 failed, 0 unsupported"


def test_a_difference_is_shown_with_both_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write(tmp_path / "01.json", [addition(7)]))]) == 1
    assert "01.json: add ax, bx: ax: expected 0x7, got 0x0" in capsys.readouterr().out


def test_undefined_flags_are_not_compared(tmp_path: Path) -> None:
    # AND leaves AF undefined: 0x46 has ZF and PF, 0x56 AF besides.
    tests = [
        {
            "initial": {"regs": regs(ax=1, bx=2), "ram": code("21d8")},
            "final": {"regs": {"ax": 0, "ip": 3, "flags": flags}, "ram": []},
        }
        for flags in (0x46, 0x56)
    ]
    assert main([str(write(tmp_path / "21.json", tests))]) == 0


def test_a_test_may_be_of_64_bit_code(tmp_path: Path) -> None:
    test = {
        "mode": 64,
        "initial": {"regs": {"rip": 0x1000, "rax": 1 << 63, "rcx": 1 << 63}, "ram": code("4801c8")},
        "final": {"regs": {"rip": 0x1004, "rax": 0, "rflags": 0x847}, "ram": []},
    }
    assert main([str(write(tmp_path / "asm.json", [test]))]) == 0


def test_a_directory_is_searched_and_gzip_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "01.json.gz").write_bytes(gzip.compress(json.dumps([addition(0)]).encode()))
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("01.json.gz: 1 tests")


def chunk(kind: str, payload: bytes) -> bytes:
    return kind.encode() + struct.pack("<I", len(payload)) + payload


def registers(kind: str, values: dict[str, int]) -> bytes:
    mask = sum(1 << REGS16.index(name) for name in values)
    ordered = [values[name] for name in REGS16 if name in values]
    return chunk(kind, struct.pack(f"<H{len(ordered)}H", mask, *ordered))


def ram(entries: list[list[int]]) -> bytes:
    return chunk("RAM ", struct.pack("<I", len(entries)) + b"".join(struct.pack("<IB", *entry) for entry in entries))


def moo(flags: int) -> bytes:
    """The addition as a MOO file, with AF masked out and chunks that a reader has to skip."""
    test = struct.pack("<I", 0) + chunk("NAME", struct.pack("<I", 3) + b"add") + chunk("BYTS", b"\2\0\0\0\x01\xd8")
    test += chunk("INIT", registers("REGS", regs(ax=0xFFFF, bx=1)) + ram(code("01d8")) + chunk("QUEU", b"\0\0\0\0"))
    final = registers("REGS", {"ax": 0, "ip": 3, "flags": flags}) + registers("RMSK", {"flags": 0xFFEF}) + ram([])
    test += chunk("FINA", final) + chunk("HASH", bytes(20))
    header = struct.pack("<BBHI4s", 1, 1, 0, 1, b"C286")
    return chunk("MOO ", header) + chunk("META", bytes(32)) + chunk("TEST", test)


@pytest.mark.parametrize(("flags", "status"), [(0x57, 0), (0x47, 0), (0x56, 1)])
def test_moo_files_and_their_masks(tmp_path: Path, flags: int, status: int) -> None:
    path = tmp_path / "01.MOO"
    path.write_bytes(moo(flags))
    assert [vector.name for vector in read(path)] == ["test 0: add"]
    assert main([str(path)]) == status


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}", "expected a list of tests"),
        (b"nonsense", "expected JSON or a MOO file"),
        (b'[{"initial": {}}]', 'test 0: expected an object with "initial" and "final"'),
        (b'[{"initial": {"ram": [[1]]}, "final": {}}]', "test 0: initial.ram: expected [address, byte], got [1]"),
        (b'[{"initial": {"regs": {"xx": 1}}, "final": {}}]', "register 'xx': 16-bit code has no such register"),
        (b"MOO \xff\0\0\0", "byte 0x0: chunk 'MOO ' is longer than what is left"),
        (moo(0x57)[:-10], "is longer than what is left"),
        (b"\x1f\x8bnonsense", "expected a gzip file"),
    ],
)
def test_bad_files_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file_and_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.endswith("none.json: No such file or directory\n")
    assert main([]) == 2


# Valgrind's format; the tests are written here.

DEF = """\
### addb imm8[1] al.ub[2] => 1.ub[4]
adcb rflags[0x1,0x1] : imm8[12] r8.ub[34] => 1.ub[47]
cmpw m16.uw[2] r16.uw[3] => rflags[0x8d5,0x000]
movsbl m8.sb[-2] r32.ud[0] => 1.sd[-2]
mulb al.ub[3] : r8.ub[100] => ax.uw[300]
shll m32.ud[0x80000001] => 0.ud[2]
shldq cl.ub[8] r64.uq[0xff00000000000000] m64.uq[1] => 2.uq[0x1ff]
xchgw ax.uw[1] bx.uw[2] => 0.uw[2] 1.uw[1]
lahf rflags[0xff,0xff] : => ah.ub[0xd7]
"""


def run_def(path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    path.write_text(text)
    return main([str(path)]), capsys.readouterr().out.splitlines()


def test_valgrinds_tests_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run_def(tmp_path / "insn_basic.def", DEF, capsys)
    assert (status, lines[-1]) == (0, "8 tests, 0 failed, 0 unsupported")


@pytest.mark.parametrize(
    ("line", "difference"),
    [
        ("addb imm8[1] r8.ub[2] => 1.ub[4]", "rbx: expected 0x4, got 0x3"),
        ("addb imm8[1] m8.ub[2] => 1.ub[4]", "memory 0x2040: expected 0x04, got 0x03"),
        ("cmpb imm8[1] al.ub[1] => rflags[0x040,0x000]", "rflags: expected 0x0, got 0x46"),
        ("addw imm8[1] r16.uw[0xffff] => 1.uw[0] rflags[0x001,0x000]", "rflags: expected 0x0, got 0x57"),
        ("xchgw ax.uw[1] bx.uw[2] => 0.uw[2]", "rbx: expected 0x2, got 0x1"),
    ],
)
def test_a_wrong_result_in_valgrinds_format_is_shown(
    line: str, difference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "amd64").mkdir()
    status, lines = run_def(tmp_path / "amd64" / "x.def", line + "\n", capsys)
    assert status == 1
    assert lines[0] == f"x.def: line 1: {line}: {difference}"


def test_a_file_that_does_not_name_rflags_is_of_32_bit_code(tmp_path: Path) -> None:
    (tmp_path / "x.def").write_text("decl eax.ud[0] => 0.ud[0xffffffff]\n")
    (vector,) = read(tmp_path / "x.def")
    assert vector.mode == 32 and vector.initial.ram[0x1000] == 0x48


def test_instructions_that_are_not_read_are_unsupported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "fabs st0.ps[-1.0] : => st0.ps[1.0]\naddps xmm.ps[1,2,3,4] xmm.ps[1,2,3,4] => 1.ps[2,4,6,8]\n"
    assert run_def(tmp_path / "x.def", text, capsys) == (0, [
        "x.def: 2 tests, 0 failed, 2 unsupported", "2 tests, 0 failed, 2 unsupported",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("addb imm8 al.ub[2] => 1.ub[4]", "line 1: expected name.type[value], got 'imm8'"),
        ("addb imm8[1] al.ub[x] => 1.ub[4]", "line 1: expected a number, got 'x'"),
        ("addb imm8[1] al.ub[2] => 7.ub[4]", "line 1: expected a result of an operand or a register, got '7'"),
        ("addb imm8[1] imm8[2] => 1.ub[4]", "line 1: add 2, 1:"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.def").write_text(line + "\n")
    assert main([str(tmp_path / "x.def")]) == 2
    assert message in capsys.readouterr().err
