"""The scene of emulated instructions has what the emulator was wrong about, and shows each fix that is taken away."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from watched import Watched

from mmufuzz.case import generate_emulate
from mmufuzz.case.encodings import encode
from mmufuzz.case.generate import CAMPAIGN, EMULATE, EXITS, generate_shape
from mmufuzz.case.generate_insn import FEP
from mmufuzz.case.model import MAX_STEP_BYTES, Case
from mmufuzz.case.rng import Rng
from mmufuzz.kvm.emulate_decode import RIP
from mmufuzz.kvm.opcode_table import STRING
from mmufuzz.run import run
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.execute_operands import MASK32, RCX, RDI, RSI
from mmufuzz.x86.state import Fault

N = 150
FORMS_OF_BOTH = (*generate_emulate._SAVES, *generate_emulate._INCOMPLETE)
PRESENT_USER = 5
"""Bits of a #PF's error code."""


def made(seed: int, shape: str = EMULATE) -> Case:
    """The scene as a campaign has it."""
    return generate_shape(Rng(seed), shape, CAMPAIGN)


class Emulated(Watched):
    """What the emulator executes, by name, and how, and the page faults that the guest has of it."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.last = ""
        self.strings: Counter[tuple[str, bool, bool]] = Counter()
        self.relative: Counter[tuple[int, int]] = Counter()
        self.general_protection: Counter[tuple[str, int]] = Counter()
        self.denied: Counter[str] = Counter()

    def emulation_begins(self, vcpu: int) -> None:
        ctxt = self.kvm.vcpus[vcpu].emulate_ctxt
        insn = ctxt.insn
        self.last = insn.name
        if insn.base == RIP:
            self.relative[insn.b, insn.modrm_reg & 7] += 1
        if insn.d & STRING and insn.rep and insn.ad_bytes == 4 and ctxt.bits == 64:
            upper = any(ctxt.gpr[reg] > MASK32 for reg in (RCX, RSI, RDI))
            self.strings[insn.name, ctxt.gpr[RCX] & MASK32 == 0, upper] += 1

    def guest_fault(self, vcpu: int, gva: int, error_code: int) -> None:
        if error_code & PRESENT_USER == PRESENT_USER:
            self.denied[self.last] += 1

    def guest_exception(self, vcpu: int, vector: int) -> None:
        if vector == 13:
            self.general_protection[self.last, self.kvm.vcpus[vcpu].regs.cpl] += 1


class Sums:
    """Over N Cases."""

    def __init__(self) -> None:
        self.strings: Counter[tuple[str, bool, bool]] = Counter()
        self.relative: Counter[tuple[int, int]] = Counter()
        self.general_protection: Counter[tuple[str, int]] = Counter()
        self.denied: Counter[str] = Counter()
        for seed in range(N):
            watched = Emulated(made(seed))
            watched.run()
            self.strings += watched.strings
            self.relative += watched.relative
            self.general_protection += watched.general_protection
            self.denied += watched.denied


@pytest.fixture(scope="module")
def sums() -> Sums:
    return Sums()


def test_repeated_strings_with_short_addresses_have_upper_halves_and_counts_of_zero_and_more(sums: Sums) -> None:
    names = {name for name, zero, upper in sums.strings if zero and upper}
    assert names >= {"movs", "stos", "cmps", "scas", "lods"}
    assert {(zero, upper) for _, zero, upper in sums.strings} == {(a, b) for a in (False, True) for b in (False, True)}


def test_undefined_extensions_have_addresses_relative_to_rip(sums: Sums) -> None:
    # MOV Eb, Ib and MOV Ev, Iv are /0, and the others undefined.
    assert len({extension for opcode, extension in sums.relative if opcode in (0xC6, 0xC7) and extension}) > 4


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", ["jmp.abs", "call.abs", "ret"])
def test_near_branches_go_where_they_may_not(sums: Sums, name: str, cpl: int) -> None:
    assert sums.general_protection[name, cpl] > 0


def test_the_user_stores_table_registers_to_pages_of_the_supervisor(sums: Sums) -> None:
    assert sums.denied["sgdt"] > 0
    assert sums.denied["sidt"] > 0


@pytest.mark.parametrize("mode64", [True, False], ids=["64", "32"])
def test_every_form_with_an_address_of_five_bytes_fits_behind_the_forced_emulation_prefix(mode64: bool) -> None:
    # What does not would be drawn again for ever.
    rng = Rng(3)
    for form in [*(generate_emulate._MEMORY64 if mode64 else generate_emulate._MEMORY32), *FORMS_OF_BOTH]:
        lengths = []
        for _ in range(100):
            code = encode(rng, form, mode64, False)
            place = len(code) - 13
            code = code[:place] + bytes((code[place] & 0x38 | 5,)) + code[place + 1 :]
            with suppress(Fault, Truncated):
                lengths.append(decode(code[:15], mode64).length)
        assert min(lengths) <= MAX_STEP_BYTES - len(FEP), form.mnemonic


SHOWN = {EMULATE: 60, EXITS: 200}
"""Cases of a campaign of one scene alone. Their seeds are fixed, and with them what is found: of many Cases one in 25
shows the rarest of the fixes.
"""

FIXES = {
    "emulate-eip": (EMULATE, "emulator", ("jmp:", "call:", "ret:")),
    "emulate-memopp": (EMULATE, "warn", ("x86_decode_insn: NULL pointer dereference",)),
    "emulate-rep-zero": (EMULATE, "emulator", ("movs:", "stos:", "cmps:", "scas:", "lods:", "ins:", "outs:")),
    "emulate-std-access": (EMULATE, "emulator", ("sgdt: privilege", "sidt: privilege", "fxsave:", "fxrstor:")),
    "mmio-scratch": (EXITS, "lifetime", ("complete_emulated_mmio reads a local variable",)),
    "no-singlestep-on-fault": (EXITS, "livelock", ("emulate.fault",)),
}


@pytest.mark.parametrize("fix", FIXES)
def test_a_small_campaign_finds_what_a_fix_of_the_emulator_fixed(fix: str) -> None:
    shape, kind, fingerprints = FIXES[fix]
    found: list[str] = []
    for seed in range(SHOWN[shape]):
        case = made(seed, shape)
        known = {finding.fingerprint for finding in run(case).findings}
        for finding in run(replace(case, revert=(fix,))).findings:
            if finding.kind == kind and finding.fingerprint not in known:
                found.append(finding.fingerprint)
    assert found
    assert all(fingerprint.startswith(fingerprints) for fingerprint in found)


@pytest.mark.parametrize("shape", [EMULATE, EXITS])
def test_the_same_campaign_finds_only_known_loops_on_the_kernel_as_it_is(shape: str) -> None:
    findings = [finding for seed in range(SHOWN[shape]) for finding in run(made(seed, shape)).findings]
    # A table register outside memory; an exit while an event is delivered; guest code that goes on and on.
    known = ("emulate.io_needed", "emulate.fault,event.delivery_exited,event.dropped", "event limit")
    assert [finding for finding in findings if not finding.fingerprint.startswith(known)] == []
