"""Alignment checks (#AC) of user code, by hand and by bochscpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from alignment_cases import ADDRESSES, AREA, DIVERGENT, INSTRUCTIONS, ours

from mmufuzz.x86 import execute
from mmufuzz.x86.state import CR0_AM, CR0_PE, FLAG_AC, VECTOR_AC, VECTOR_GP

REQUIRED = os.environ.get("MMUFUZZ_REQUIRE", "").split()


def refused(name: str) -> list[int]:
    """Addresses from 0 to 15 at which the instruction raises #AC."""
    return [address - AREA for address in ADDRESSES if ours(name, address) == VECTOR_AC]


@pytest.mark.parametrize(
    ("name", "boundary"),
    [("mov al, m8", 1), ("mov ax, m16", 2), ("mov eax, m32", 4), ("movq mm0, m64", 8), ("fld m80", 8)],
)
def test_an_access_is_aligned_to_its_size_an_x87_one_to_8_bytes_at_most(name: str, boundary: int) -> None:
    assert refused(name) == [address for address in range(16) if address % boundary]


def test_unaligned_vectors_are_not_checked() -> None:
    assert refused("movups xmm0, m128") == []


def test_an_x87_image_is_aligned_to_its_words() -> None:
    assert refused("fnsave m108") == [address for address in range(16) if address % 4]


def test_a_table_register_is_stored_at_an_odd_word() -> None:
    """SDM vol. 3, 3.5.1: an aligned word, then an aligned doubleword."""
    assert [address for address in range(16) if address not in refused("sgdt m48")] == [2, 6, 10, 14]


@pytest.mark.parametrize(
    "changed", [{"cpl": 0}, {"cr0": CR0_PE}, {"eflags": 2}], ids=["supervisor", "AM clear", "AC clear"]
)
def test_nothing_is_checked_unless_all_three_ask_for_it(changed: dict[str, int]) -> None:
    registers = {"cpl": 3, "cr0": CR0_PE | CR0_AM, "eflags": 2 | FLAG_AC, "ebx": AREA + 1}
    code = bytes.fromhex("8b03")
    checked = execute(code, mode=32, registers=registers, memory={AREA: bytes(16)})
    assert (checked.stop, checked.vector, checked.error_code) == ("exception", VECTOR_AC, 0)
    assert execute(code, mode=32, registers=registers | changed, memory={AREA: bytes(16)}).stop == "end"


def test_a_descriptor_is_read_as_a_supervisor() -> None:
    registers = {"cpl": 3, "cr0": CR0_PE | CR0_AM, "eflags": 2 | FLAG_AC, "eax": 11, "gdt_base": AREA + 1}
    data = bytes(9) + bytes.fromhex("ffff000000f3cf00")
    loaded = execute(b"\x8e\xd8", mode=32, registers={**registers, "gdt_limit": 15}, memory={AREA: data})
    assert (loaded.stop, loaded.registers["ds"]) == ("end", 11)


def test_the_segment_is_checked_first() -> None:
    registers = {"cpl": 3, "cr0": CR0_PE | CR0_AM, "rflags": 2 | FLAG_AC, "rbx": (1 << 47) + 1}
    assert execute(bytes.fromhex("8b03"), registers=registers).vector == VECTOR_GP


@pytest.mark.oracle
def test_bochs_raises_it_at_the_same_addresses() -> None:
    command = [sys.executable, str(Path(__file__).with_name("alignment_cases.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 77), done.stderr
    if done.returncode == 77:
        if "bochscpu" in REQUIRED:
            pytest.fail(done.stderr)
        pytest.skip(done.stderr)
    theirs = json.loads(done.stdout)
    for name in DIVERGENT:
        assert theirs.pop(name) == [VECTOR_AC] * 16
    compared = [name for name in INSTRUCTIONS if name not in DIVERGENT]
    assert theirs == {name: [ours(name, address) for address in ADDRESSES] for name in compared}
