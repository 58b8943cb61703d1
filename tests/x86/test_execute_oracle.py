"""Random instructions of every form, executed here and by Unicorn (QEMU), end in the same state.

Flags and results that the SDM leaves undefined are not compared. Left out: system instructions, and what
Unicorn lacks (AVX) or has without the state to compare (x87).
"""

from __future__ import annotations

import pytest
from flatbus import FlatBus

from mmufuzz.x86 import alu
from mmufuzz.x86.decode import decode
from mmufuzz.x86.execute import bit_address, effective_address, execute, supported
from mmufuzz.x86.insn import MEM, REG, REP_NONE, RIP, Insn
from mmufuzz.x86.opcodes import (
    FORMS,
    LOCKABLE,
    MAP_0F,
    MAP_VEX,
    METHOD_MOFFS,
    NARROW,
    NEAR,
    ONLY32,
    ONLY64,
    PREFIX_BYTES,
    REG_ONLY,
    WIDE,
    Form,
)
from mmufuzz.x86.state import EFER_LMA, FLAG_AF, FLAG_CF, FLAG_DF, FLAG_FIXED, FLAG_OF, FLAG_PF, FLAG_SF, Fault, Regs

unicorn = pytest.importorskip("unicorn")
x86 = pytest.importorskip("unicorn.x86_const")

SYSTEM = ("movcr", "invlpg", "hlt", "ud2", "fstp", "vmovdqu")
# 16-bit addressing reaches the data, and the code is where no data access goes.
DATA_SIZE = 0x10000
CODE = 0x100000
CODE_SIZE = 0x100000
# Each case gets bytes that Unicorn has not translated yet.
SLOT = 32
MASK64 = (1 << 64) - 1

GPRS = [
    getattr(x86, "UC_X86_REG_" + name)
    for name in ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *[f"R{number}" for number in range(8, 16)])
]
GPRS32 = [getattr(x86, "UC_X86_REG_" + name) for name in ("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI")]
XMMS = [getattr(x86, f"UC_X86_REG_XMM{number}") for number in range(16)]


class Random:
    """splitmix64."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def word(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK64
        z = self.state
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
        return z ^ z >> 31

    def below(self, bound: int) -> int:
        return self.word() % bound

    def value(self) -> int:
        """A word that is often near a power of two, where flags change."""
        if self.below(2):
            return self.word()
        return ((1 << self.below(65)) + self.below(5) - 2) & MASK64

    def address(self) -> int:
        """Somewhere in the middle of the data, aligned for every instruction."""
        return 0x4000 + self.below(0x800) * 16


def encode(rng: Random, form: Form, mode64: bool, address: int) -> bytes:
    """Random bytes of one form: prefixes, opcode, ModRM and enough of a tail."""
    mod3 = bool(form.flags & REG_ONLY) or rng.below(3) == 0
    code = bytearray()
    if form.prefix > 0:
        code.append(PREFIX_BYTES[form.prefix])
    elif form.prefix < 0:
        # Unicorn takes AMD's side on 66 before near branches in 64-bit mode.
        if rng.below(4) == 0 and not (mode64 and form.flags & NEAR):
            code.append(0x66)
        if form.mnemonic in ("movs", "stos") and rng.below(2):
            code.append(0xF2 + rng.below(2))
    if rng.below(6) == 0:
        code.append(0x67)
    if form.flags & LOCKABLE and not mod3 and rng.below(3) == 0:
        code.append(0xF0)
    if mode64 and (rng.below(2) or form.flags & WIDE):
        rex = 0x40 | rng.below(16) | (8 if form.flags & WIDE else 0)
        if form.flags & NARROW:
            rex &= ~8
        if form.mnemonic == "mov" and form.reg == 0:
            # Unicorn takes REX.R for a part of the opcode extension.
            rex &= ~4
        code.append(rex)
    if form.opcode_map == MAP_0F:
        code.append(0x0F)
    code.append(form.opcode + rng.below(form.low_bits))
    if form.needs_modrm:
        reg = form.reg if form.reg >= 0 else rng.below(8)
        code.append((3 if mod3 else rng.below(3)) << 6 | reg << 3 | rng.below(8))
        modrm = code[-1]
        if modrm >> 6 == 0 and modrm & 7 == 5 and mode64:
            code += (DATA_SIZE // 2 - address & 0xFFFFFFFF).to_bytes(4, "little")
        elif modrm >> 6 == 0 and modrm & 7 == 6:
            code += rng.address().to_bytes(2, "little")
        elif modrm < 0xC0 and modrm & 7 == 4 and rng.below(2):
            code += bytes([rng.below(256)]) + rng.address().to_bytes(4, "little")
    elif METHOD_MOFFS in form.methods:
        code += rng.address().to_bytes(8, "little")
    if form.mnemonic == "ret" and form.sizes:
        code += rng.below(256).to_bytes(2, "little")
    # Small displacements keep branch targets in the code.
    if form.flags & NEAR or rng.below(2):
        code += bytes([rng.below(128), rng.below(64), 0, 0])
    return bytes(code) + rng.word().to_bytes(8, "little") + bytes(8)


def aim(rng: Random, regs: Regs, insn: Insn) -> bool:
    """Move the base register so that the memory operand lies in the data; False if that fails."""
    if not insn.has_memory or insn.mnemonic in ("lea", "nop"):
        return True
    find = bit_address if insn.mnemonic in ("bt", "bts", "btr", "btc") else effective_address
    if 0x1000 <= find(regs, insn) < 0xF000 and not insn.mnemonic.startswith(("mova", "movdqa", "cmpxchg16")):
        return True
    if insn.base < 0 or insn.base == RIP:
        return False
    target = rng.address()
    regs.gpr[insn.base] = (regs.gpr[insn.base] + target - find(regs, insn)) & alu.mask(insn.asize)
    return find(regs, insn) == target


def prepare(rng: Random, insn: Insn, bus: FlatBus, mode64: bool, address: int) -> Regs | None:
    """A random state in which ``insn`` touches only data and goes only to code, or None."""
    regs = Regs()
    regs.efer = EFER_LMA if mode64 else 0
    regs.rip = address
    regs.gpr = [rng.value() if mode64 else rng.value() & 0xFFFFFFFF for _ in range(16)]
    regs.xmm = [rng.word() << 64 | rng.word() for _ in range(16)]
    regs.rflags = FLAG_FIXED | rng.word() & (alu.ARITHMETIC_FLAGS | FLAG_DF)
    target = CODE + rng.below(CODE_SIZE)
    if insn.mnemonic in ("push", "pop", "call", "ret"):
        regs.gpr[4] = rng.address()
    if insn.mnemonic in ("movs", "stos"):
        regs.gpr[6] = rng.address()
        regs.gpr[7] = regs.gpr[6] + rng.below(64)
        if insn.rep != REP_NONE:
            regs.gpr[1] = rng.below(5)
    if not aim(rng, regs, insn):
        return None
    if insn.mnemonic == "ret":
        bus.poke(regs.gpr[4], 8, target)
    elif insn.mnemonic in ("call", "jmp") and insn.operands[0].kind == MEM:
        bus.poke(effective_address(regs, insn), 8, target)
    elif insn.mnemonic in ("call", "jmp") and insn.operands[0].kind == REG:
        regs.gpr[insn.operands[0].index] = target
    if insn.mnemonic in ("push", "pop", "call", "ret") and not 0x1000 <= regs.gpr[4] < 0xF000:
        return None
    if insn.mnemonic.startswith("cmpxchg") and rng.below(2):
        _make_equal(regs, insn, bus)
    return regs


def _make_equal(regs: Regs, insn: Insn, bus: FlatBus) -> None:
    """Let the comparison of a CMPXCHG succeed, unless that would move its operand."""
    dst = insn.operands[0]
    if dst.kind != MEM or insn.base in (0, 2) or insn.index in (0, 2):
        return
    address = effective_address(regs, insn)
    if insn.mnemonic == "cmpxchg":
        bus.poke(address, dst.size, regs.gpr[0] & alu.mask(dst.size))
    else:
        half = dst.size // 2
        bus.poke(address, half, regs.gpr[0] & alu.mask(half))
        bus.poke(address + half, half, regs.gpr[2] & alu.mask(half))


def undefined_flags(insn: Insn, regs: Regs) -> int:
    """The flags that the SDM leaves undefined after ``insn`` in state ``regs``."""
    name = insn.mnemonic
    if name in ("and", "or", "xor", "test"):
        return FLAG_AF
    if name == "neg" and insn.lock:
        # Defined, but wrong in Unicorn: its LOCK NEG takes the flags from the operand, not from the result.
        return alu.ARITHMETIC_FLAGS
    if name in ("bt", "bts", "btr", "btc"):
        return FLAG_OF | FLAG_SF | FLAG_AF | FLAG_PF
    if name in ("shl", "shr", "sar", "rol", "ror", "rcl", "rcr"):
        size = insn.operands[0].size
        source = insn.operands[1]
        count = (regs.gpr[1] if source.kind == REG else source.value) & (63 if size == 8 else 31)
        undefined = 0 if count <= 1 else FLAG_OF
        if name[0] == "s" and count:
            undefined |= FLAG_AF
        if name in ("shl", "shr") and count >= 8 * size:
            undefined |= FLAG_CF
        return undefined
    return 0


class Oracle:
    """Unicorn, with its data equal to ours before every case."""

    def __init__(self, mode64: bool) -> None:
        self.mode64 = mode64
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64 if mode64 else unicorn.UC_MODE_32)
        self.uc.mem_map(0, DATA_SIZE)
        self.uc.mem_map(CODE, CODE_SIZE + 0x10000)
        self.gprs = GPRS if mode64 else GPRS32
        self.xmms = XMMS if mode64 else XMMS[:8]

    def run(self, regs: Regs, code: bytes, memory: bytes, until: int) -> Regs:
        """The state when RIP is ``until``, or after a few instructions that went elsewhere.

        Memory stays in ``self.uc``.
        """
        uc = self.uc
        uc.mem_write(0, memory)
        uc.mem_write(regs.rip, code)
        for place, register in enumerate(self.gprs):
            uc.reg_write(register, regs.gpr[place])
        for place, register in enumerate(self.xmms):
            uc.reg_write(register, regs.xmm[place])
        uc.reg_write(x86.UC_X86_REG_EFLAGS, regs.rflags)
        # A count of 1 does not do: repeated instructions count each element, and branches run into the next one.
        uc.emu_start(regs.rip, until, count=20)
        after = regs.copy()
        for place, register in enumerate(self.gprs):
            after.gpr[place] = uc.reg_read(register)
        for place, register in enumerate(self.xmms):
            after.xmm[place] = uc.reg_read(register)
        after.rip = uc.reg_read(x86.UC_X86_REG_RIP if self.mode64 else x86.UC_X86_REG_EIP)
        after.rflags = uc.reg_read(x86.UC_X86_REG_EFLAGS)
        return after


def normalise(insn: Insn, regs: Regs) -> None:
    """Unicorn zero-extends the register that a 32-bit CMPXCHG leaves alone; CPUs do not."""
    if insn.mnemonic == "cmpxchg" and insn.size == 4:
        regs.gpr[0] &= 0xFFFFFFFF
        if insn.operands[0].kind == REG:
            regs.gpr[insn.operands[0].index] &= 0xFFFFFFFF


def compare(ours: Regs, theirs: Regs, ignored: int) -> list[str]:
    """Differences, as text."""
    found = [f"rip {ours.rip:x} {theirs.rip:x}"] if ours.rip != theirs.rip else []
    for place in range(16):
        if ours.gpr[place] != theirs.gpr[place]:
            found.append(f"gpr {place} {ours.gpr[place]:x} {theirs.gpr[place]:x}")
        if ours.xmm[place] != theirs.xmm[place]:
            found.append(f"xmm {place} {ours.xmm[place]:x} {theirs.xmm[place]:x}")
    if (ours.rflags ^ theirs.rflags) & (alu.ARITHMETIC_FLAGS | FLAG_DF) & ~ignored:
        found.append(f"flags {ours.rflags:x} {theirs.rflags:x} ignored {ignored:x}")
    return found


def left_out(form: Form, mode64: bool) -> bool:
    """Whether the comparison says nothing about ``form``."""
    if form.mnemonic in SYSTEM or form.opcode_map == MAP_VEX or form.flags & (ONLY32 if mode64 else ONLY64):
        return True
    # Unicorn does not know the alias /1 of TEST.
    return (form.mnemonic == "test" and form.reg == 1) or (not mode64 and form.flags & WIDE != 0)


def random_memory() -> FlatBus:
    """A bus over the data."""
    rng = Random(0)
    bus = FlatBus(DATA_SIZE)
    for place in range(0, DATA_SIZE, 8):
        bus.poke(place, 8, rng.word())
    return bus


def sweep(form: Form, oracle: Oracle, bus: FlatBus, cases: int, seed: int) -> int:
    """Compares ``cases`` random cases of ``form``; answers how many were usable."""
    rng = Random(seed)
    used = 0
    for number in range(cases):
        address = CODE + (seed * cases + number) * SLOT % CODE_SIZE
        code = encode(rng, form, oracle.mode64, address)
        try:
            insn = decode(code, oracle.mode64)
        except Fault:
            continue
        regs = prepare(rng, insn, bus, oracle.mode64, address)
        if regs is None:
            continue
        before = bytes(bus.memory)
        ours = regs.copy()
        execute(ours, insn, bus)
        if ours.rip % SLOT == 0:
            # A branch to where a case begins or will begin: Unicorn would keep the translation that stops there.
            continue
        theirs = oracle.run(regs, code, before, ours.rip)
        normalise(insn, ours)
        normalise(insn, theirs)
        found = compare(ours, theirs, undefined_flags(insn, regs))
        assert not found, (insn.mnemonic, code[: insn.length].hex(), found, regs.gpr)
        assert bytes(oracle.uc.mem_read(0, DATA_SIZE)) == bytes(bus.memory), (insn.mnemonic, code.hex())
        used += 1
    return used


@pytest.mark.parametrize("mode64", [True, False], ids=["64-bit", "32-bit"])
def test_every_form_agrees_with_unicorn(mode64: bool) -> None:
    oracle = Oracle(mode64)
    bus = random_memory()
    for number, form in enumerate(FORMS):
        if left_out(form, mode64):
            continue
        used = sweep(form, oracle, bus, 30, number)
        assert used >= 3, form.mnemonic


def test_every_decodable_mnemonic_has_a_handler() -> None:
    assert [form.mnemonic for form in FORMS if not supported(form.mnemonic)] == []
