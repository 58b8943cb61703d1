"""Host operations with arguments: one text each, in every form of a Case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmufuzz.case import bytes as bytes_form
from mmufuzz.case.host_ops import NO_INTERRUPT, interrupt_of, interrupt_op
from mmufuzz.case.model import Case, HostThread, Slot, Vcpu
from mmufuzz.case.mutate import mutate
from mmufuzz.case.repair import repair
from mmufuzz.case.rng import Rng

VCPU = Vcpu("flat32", code_gva=0x1000, code_gfn=1, program=(b"\x90",))
CASE = Case(slots=(Slot(0, 16),), vcpus=(VCPU, VCPU), host=(HostThread(("interrupt vcpu1 0xff", "zap_all_fast")),))


def test_an_interrupt_says_which_vcpu_and_which_vector() -> None:
    assert interrupt_op(3, 0x20) == "interrupt vcpu3 0x20"
    assert interrupt_of("interrupt vcpu3 0x20") == (3, 0x20)


@pytest.mark.parametrize(
    "text",
    ["", "zap_all_fast", "interrupt", "interrupt vcpu0", "interrupt vcpu0 0x1f", "interrupt vcpu0 0x100",
     "interrupt vcpu16 0x20", "interrupt vcpu00 0x20", "interrupt vcpu0 32", "interrupt vcpu0  0x20",
     "interrupt vcpu0 0x2A", "interrupt vcpux 0x20", "interrupt vcpu-1 0x20"],
)  # fmt: skip
def test_every_other_text_is_none(text: str) -> None:
    assert interrupt_of(text) == NO_INTERRUPT


def test_the_bytes_form_keeps_vcpu_and_vector() -> None:
    assert bytes_form.decode(bytes_form.encode(CASE)) == CASE


def test_an_interrupt_of_a_vcpu_that_is_not_there_goes_to_another() -> None:
    made = repair(replace(CASE, host=(HostThread(("interrupt vcpu5 0x20",)),)))
    assert made.host == (HostThread(("interrupt vcpu1 0x20",)),)


def test_an_interrupt_of_an_l2_guest_goes() -> None:
    l2 = Vcpu("npt4", code_gva=0x1000, code_gfn=1, program=(b"\x90",))
    assert repair(replace(CASE, vcpus=(VCPU, l2))).host == (HostThread(("zap_all_fast",)),)


def test_mutations_raise_interrupts() -> None:
    made = [mutate(Rng(seed), CASE) for seed in range(200)]
    assert any("interrupt vcpu0 0x20" in thread.ops for case in made for thread in case.host)
