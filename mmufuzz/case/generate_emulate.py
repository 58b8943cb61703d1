"""Any instruction at all behind the forced-emulation prefix, on registers that aim at memory or at the edges of it."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.encodings import edge_value, encode
from mmufuzz.case.generate_insn import FEP, RCX
from mmufuzz.case.generate_vm import MMIO, Machine, Machines
from mmufuzz.case.model import MAX_STEP_BYTES
from mmufuzz.case.rng import Rng
from mmufuzz.case.tables import A, P, W
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.opcodes import FORMS, MAP_VEX, METHOD_SREG, ONLY32, ONLY64, Form
from mmufuzz.x86.state import Fault

_PREFIXES: Final = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3"


def _forms(absent: int) -> list[Form]:
    """What may be emulated: VEX cannot."""
    return [form for form in FORMS if not form.flags & absent and form.opcode_map < MAP_VEX]


_FORMS64: Final[list[Form]] = _forms(ONLY32)
_FORMS32: Final[list[Form]] = _forms(ONLY64)


_DELICATE: Final = frozenset(
    (
        *("jmp", "call", "ret", "jmpf", "callf", "retf", "lss", "lds", "lfs", "movs", "stos", "cmps", "sgdt", "sidt"),
        *("fxsave", "fxrstor", "sysenter", "sysexit", "syscall", "xchg", "cmpxchg", "xadd", "add", "bts"),
    )
)
"""What the emulator has been wrong about: branches, segments, repetitions, save areas, locks."""


def _delicate(forms: list[Form]) -> list[Form]:
    return [form for form in forms if form.mnemonic in _DELICATE or METHOD_SREG in form.methods]


_DELICATE64: Final[list[Form]] = _delicate(_FORMS64)
_DELICATE32: Final[list[Form]] = _delicate(_FORMS32)


def random_instruction(rng: Rng, mode64: bool, room: int) -> bytes:
    """An instruction of at most ``room`` bytes, 3 at least, sometimes with a prefix that it has no use for."""
    if rng.chance(2, 5):
        forms = _DELICATE64 if mode64 else _DELICATE32
    else:
        forms = _FORMS64 if mode64 else _FORMS32
    while True:
        code = encode(rng, forms[rng.below(len(forms))], mode64)
        try:
            code = code[: decode(code[:15], mode64).length]
        except (Fault, Truncated):
            continue
        if rng.chance(1, 10):
            code = _PREFIXES[rng.below(len(_PREFIXES)) :][:1] + code
        if len(code) <= room:
            return code


def emulate_scene(vm: Machines) -> None:
    """One vCPU, of any privilege, that has a few instructions emulated."""
    machine = vm.paged() if vm.percent(70) else vm.flat()
    vm.fep = vm.options.fep
    if vm.percent(40) and not vm.nested and "smep" not in machine.flags:
        machine.cpl = 3
    targets = _targets(vm, machine)
    program = machine.program
    for number in range(8):
        if vm.percent(85 if number == RCX else 15):
            # Few of anything: a selector, a count, the upper half of one.
            value = vm.rng.below(4) << vm.pick((0, 0, 32))
        elif vm.percent(35):
            value = edge_value(vm.rng)
        else:
            value = vm.pick(targets) + 8 * vm.rng.below(0x200) - 4 * vm.rng.below(2)
        program.need(number, value & (1 << 64) - 1)
    for _ in range(1 + vm.rng.below(4)):
        code = random_instruction(vm.rng, program.mode64, MAX_STEP_BYTES - len(FEP))
        program.emit(code, vm.fep and vm.percent(85))


def _targets(vm: Machines, machine: Machine) -> list[int]:
    """Pages worth an access: data, one that is the supervisor's, MMIO, and one that is not there."""
    if not machine.paged:
        return [gfn << 12 for gfn in vm.data_gfns] + [vm.pick(MMIO) << 12]
    pages = [gva for gva, _ in machine.data]
    pages.append(machine.free_page())
    vm.map_data(machine, pages[len(pages) - 1])
    supervisor = machine.free_page()
    vm.tables.map(machine.root, supervisor, vm.pick(vm.data_gfns), P | W | A)
    device = machine.free_page()
    vm.map_data(machine, device, vm.pick(MMIO))
    return [*pages, supervisor, device, machine.free_page()]
