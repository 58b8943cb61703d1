"""Any instruction at all behind the forced-emulation prefix, on registers that aim at memory or at the edges of it."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.encodings import edge_value, encode
from mmufuzz.case.generate_insn import FEP, RAX, RBX, RCX, RDI, RDX, RSI
from mmufuzz.case.generate_vm import MMIO, Machine, Machines
from mmufuzz.case.model import CODE_SLOT, MAX_STEP_BYTES
from mmufuzz.case.rng import Rng
from mmufuzz.case.tables import A, P, W
from mmufuzz.x86.decode import Truncated, decode
from mmufuzz.x86.opcodes import FORMS, MAP_VEX, METHOD_MOFFS, METHOD_SREG, ONLY32, ONLY64, REG_ONLY, STRING, Form
from mmufuzz.x86.state import Fault

_RSP: Final = 4
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


def _memory(form: Form) -> bool:
    """True if ModRM says where in memory an operand is, or can."""
    return form.needs_modrm and form.modrm < 0 and not form.flags & REG_ONLY and METHOD_MOFFS not in form.methods


_MEMORY64: Final[list[Form]] = [form for form in _FORMS64 if _memory(form)]
_MEMORY32: Final[list[Form]] = [form for form in _FORMS32 if _memory(form)]
_STRINGS: Final[list[Form]] = [form for form in _FORMS64 if form.flags & STRING]

_SAVES: Final[list[Form]] = [
    form for form in _FORMS64 if form.mnemonic in ("sgdt", "sidt", "lgdt", "lidt", "fxsave", "fxrstor")
]
"""What the emulator accesses by segmented_read_std() and segmented_write_std()."""


def _incomplete_groups() -> list[Form]:
    """A form of each group that leaves extensions undefined. Its bytes are as long as those of the undefined ones."""
    groups: dict[int, list[Form]] = {}
    for form in _FORMS64:
        if form.reg >= 0 and not 0xD8 <= form.opcode <= 0xDF:
            groups.setdefault(form.opcode_map << 8 | form.opcode, []).append(form)
    found: list[Form] = []
    for group in groups.values():
        forms = [form for form in group if _memory(form)]
        if forms and len({form.reg for form in group}) < 8:
            found.append(forms[0])
    return found


_INCOMPLETE: Final[list[Form]] = _incomplete_groups()

_BASES: Final = (RAX, RDX, RBX, RSI, RDI)
"""Registers that an operand is addressed by: those ModRM alone can name. RCX is for counts, as big ones take long."""


class _Scene:
    """The vCPU, and where it may go: ``pages`` as for ``_targets``."""

    def __init__(self, vm: Machines, machine: Machine) -> None:
        self.vm = vm
        self.rng = vm.rng
        self.machine = machine
        self.program = machine.program
        self.mode64 = machine.program.mode64
        self.pages = _targets(vm, machine)

    def place(self) -> int:
        """An address in one of the pages."""
        rng = self.rng
        return self.pages[rng.below(len(self.pages))] + 8 * rng.below(0x200) - 4 * rng.below(2)

    def load(self, reg: int, value: int) -> None:
        """Let ``reg`` hold ``value``, whatever was emulated before."""
        if self.program.used >> reg & 1:
            self.program.forget(reg)
        self.program.need(reg, value & (1 << 64) - 1)

    def emit(self, code: bytes) -> None:
        """Mostly by the emulator."""
        self.program.emit(code, self.vm.fep and self.vm.percent(85))


def emulate_scene(vm: Machines) -> None:
    """One vCPU, of any privilege, that has several instructions emulated."""
    machine = vm.paged() if vm.percent(80) else vm.flat()
    vm.fep = vm.options.fep
    if machine.paged and vm.percent(50) and not vm.nested and "smep" not in machine.flags:
        machine.cpl = 3
    scene = _Scene(vm, machine)
    program = machine.program
    for number in range(8):
        if vm.percent(85 if number == RCX else 15):
            # Few of anything: a selector, a count, the upper half of one.
            value = vm.rng.below(4) << vm.pick((0, 0, 32))
        elif vm.percent(35):
            value = edge_value(vm.rng)
        else:
            value = scene.place()
        program.need(number, value & (1 << 64) - 1)
    for _ in range(4 + vm.rng.below(9)):
        choice = vm.rng.below(20)
        if choice < 6:
            scene.emit(random_instruction(vm.rng, program.mode64, MAX_STEP_BYTES - len(FEP)))
        elif choice < 8:
            _branch(scene)
        elif choice < 12:
            _string(scene)
        elif choice < 15:
            _access(scene, _SAVES[vm.rng.below(len(_SAVES))])
        elif choice < 18:
            _access(scene, _INCOMPLETE[vm.rng.below(len(_INCOMPLETE))], True)
        else:
            forms = _MEMORY64 if program.mode64 else _MEMORY32
            _access(scene, forms[vm.rng.below(len(forms))])


def _branch(scene: _Scene) -> None:
    """A near branch to what a register or memory holds: an address of any kind, often one that is not canonical."""
    vm = scene.vm
    program = scene.program
    reg = _BASES[vm.rng.below(len(_BASES))]
    target = edge_value(vm.rng)
    if vm.percent(25):
        # The step behind it, or one further on.
        target = scene.machine.code_gva + CODE_SLOT * (len(program.steps) + 3 + vm.rng.below(2))
    elif vm.percent(10):
        target = scene.place()
    prefix = b"\x66" if vm.percent(10) else b""
    # /2 is CALL, /4 is JMP.
    operand = reg | (2 << 3 if vm.percent(50) else 4 << 3)
    choice = vm.rng.below(3)
    if choice == 0 or not scene.machine.data:
        scene.load(reg, target)
        scene.emit(prefix + bytes((0xFF, 0xC0 | operand)))
        return
    gva, gfn = vm.place(scene.machine.data)
    word = vm.rng.below(0x200)
    vm.tables.set(gfn, word, target)
    if choice == 1:
        scene.load(reg, gva + 8 * word)
        scene.emit(prefix + bytes((0xFF, operand)))
    else:
        scene.load(_RSP, gva + 8 * word)
        # RET, or RET imm16.
        scene.emit(prefix + (b"\xc3" if vm.percent(70) else b"\xc2" + vm.rng.bytes(2)))


def _string(scene: _Scene) -> None:
    """A string instruction with a small count, zero included, and upper halves that its address size ignores."""
    vm = scene.vm
    mode64 = scene.mode64
    code = b"\x67" if vm.percent(50) else b""
    code += bytes((0xF2 + vm.rng.below(2),)) if vm.percent(75) else b""
    form = _STRINGS[vm.rng.below(len(_STRINGS))]
    if mode64 and vm.percent(30):
        code += b"\x48"
    code += bytes((form.opcode,))
    for reg in (RCX, RSI, RDI):
        value = vm.pick((0, 0, 1, 2, 3)) if reg == RCX else scene.place()
        if vm.percent(60 if code[:1] == b"\x67" else 5):
            value = value & 0xFFFFFFFF | edge_value(vm.rng) << 32
        scene.load(reg, value)
    scene.emit(code)


def _access(scene: _Scene, form: Form, any_extension: bool = False) -> None:
    """``form``, or with ``any_extension`` a neighbour in its group, with an operand in one of the pages.

    Its address is in a register, with or without a small displacement, or relative to RIP.
    """
    rng = scene.rng
    mode64 = scene.mode64
    reg = _BASES[rng.below(len(_BASES))]
    extension = rng.below(8) if any_extension else -1
    relative = rng.chance(2, 5)
    while True:
        code = encode(rng, form, mode64, False)
        # ModRM, then 12 bytes for whatever follows.
        at = len(code) - 13
        modrm = code[at] & 0x38
        if relative:
            # RIP-relative in 64-bit code, absolute in other.
            tail = bytes((modrm | 5,)) + (rng.below(0x2000)).to_bytes(4, "little")
        elif rng.chance(1, 2):
            tail = bytes((modrm | reg,))
        else:
            tail = bytes((modrm | 0x40 | reg,)) + rng.bytes(1)
        code = code[:at] + tail + code[at + len(tail) :]
        try:
            code = code[: decode(code[:15], mode64).length]
        except (Fault, Truncated):
            continue
        if len(code) <= MAX_STEP_BYTES - len(FEP):
            break
    if extension >= 0:
        code = code[:at] + bytes((code[at] & ~0x38 | extension << 3,)) + code[at + 1 :]
    if not relative:
        scene.load(reg, scene.place())
    scene.emit(code)


def _targets(vm: Machines, machine: Machine) -> list[int]:
    """Pages worth an access: data, the supervisor's, mostly if this is the user, MMIO, and one that is not there."""
    if not machine.paged:
        return [gfn << 12 for gfn in vm.data_gfns] + [vm.pick(MMIO) << 12]
    pages = [gva for gva, _ in machine.data]
    pages.append(machine.free_page())
    vm.map_data(machine, pages[len(pages) - 1])
    supervisor = machine.free_page()
    vm.tables.map(machine.root, supervisor, vm.pick(vm.data_gfns), P | W | A)
    device = machine.free_page()
    vm.map_data(machine, device, vm.pick(MMIO))
    machine.data.pop()
    pages += [supervisor] * (4 if machine.cpl == 3 else 1)
    return [*pages, device, machine.free_page()]
