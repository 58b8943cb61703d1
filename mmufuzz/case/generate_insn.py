"""Writes guest programs: encodings of the instructions the generators use, and the registers they need."""

from __future__ import annotations

from typing import Final

FEP: Final = b"\x0f\x0bkvm"
"""The forced-emulation prefix (x86.c:handle_ud)."""

# Kinds of stores. KVM's emulator knows the first two groups; the third is the way into reexecute_instruction
# (emulate.c: no VEX, no x87 stores, MOVSS not in the table, CMPXCHG16B refused by em_cmpxchg8b).
PLAIN: Final = ("mov", "mov", "mov imm", "xchg")
RMW: Final = ("xadd", "lock xadd", "add", "lock add", "cmpxchg", "lock cmpxchg", "or", "lock and", "inc", "lock bts")
UNEMULATED: Final = ("cmpxchg16b", "movss", "fstp4", "fstp8", "fstp10", "vmovdqu16", "vmovdqu32")
VECTOR: Final = ("movss", "vmovdqu16", "vmovdqu32")

RAX: Final = 0
RCX: Final = 1
RDX: Final = 2
RBX: Final = 3
RBP: Final = 5
RSI: Final = 6
RDI: Final = 7

_ADDRESSES64: Final = (7, 6, 8, 9, 10, 11, 12, 13, 14, 15)
_ADDRESSES32: Final = (7, 6)
_VALUES: Final = (3, 1, 2)
_MAX_STEP: Final = 15

_SIMPLE: Final[dict[str, bytes]] = {
    "mov": b"\x89",
    "xchg": b"\x87",
    "add": b"\x01",
    "or": b"\x09",
    "and": b"\x21",
    "xadd": b"\x0f\xc1",
    "cmpxchg": b"\x0f\xb1",
}
_FSTP: Final[dict[str, tuple[bytes, int]]] = {"fstp4": (b"\xd9", 3), "fstp8": (b"\xdd", 3), "fstp10": (b"\xdb", 7)}


def memory_form(opcode: bytes, reg: int, base: int, mode64: bool, wide: bool = False, prefix: bytes = b"") -> bytes:
    """An instruction with the ModRM operands ``reg`` and [``base``]; ``wide`` asks for REX.W (64-bit code only)."""
    rex = (8 if wide else 0) | (4 if reg >= 8 else 0) | (1 if base >= 8 else 0)
    code = prefix
    if mode64 and rex:
        code += bytes((0x40 | rex,))
    modrm = (reg & 7) << 3 | base & 7
    if base & 7 == 4:
        return code + opcode + bytes((modrm, 0x24))
    if base & 7 == 5:
        return code + opcode + bytes((0x40 | modrm, 0))
    return code + opcode + bytes((modrm,))


def vmovdqu_store(base: int, size: int) -> bytes:
    """VMOVDQU [base], xmm0 or ymm0, by ``size`` 16 or 32."""
    length = 4 if size == 32 else 0
    if base < 8:
        return memory_form(bytes((0xC5, 0xFA | length, 0x7F)), 0, base, False)
    return memory_form(bytes((0xC4, 0xC1, 0x7A | length, 0x7F)), 0, base, False)


def load_immediate(reg: int, value: int, mode64: bool) -> bytes:
    """MOV reg, value; 32-bit code takes the low half."""
    low = value & 0xFFFFFFFF
    if not mode64 or value == low:
        prefix = b"\x41" if mode64 and reg >= 8 else b""
        return prefix + bytes((0xB8 | reg & 7,)) + low.to_bytes(4, "little")
    prefix = b"\x49" if reg >= 8 else b"\x48"
    return prefix + bytes((0xB8 | reg & 7,)) + value.to_bytes(8, "little")


class Program:
    """A program under construction: its steps, the registers it starts with, and what they hold at its end.

    Addresses and values are put into the initial registers while there are any left, into MOV steps then.
    """

    def __init__(self, mode64: bool) -> None:
        self.mode64 = mode64
        self.steps: list[bytes] = []
        self.initial: dict[int, int] = {}
        self.holds: dict[int, int] = {}
        self.used = 0

    def emit(self, code: bytes, fep: bool = False) -> None:
        """Append a step, behind the forced-emulation prefix if that is wanted and fits."""
        if fep and len(FEP) + len(code) <= _MAX_STEP:
            code = FEP + code
        self.steps.append(code)

    def need(self, reg: int, value: int) -> None:
        """Let ``reg`` hold ``value``."""
        if not self.mode64:
            value &= 0xFFFFFFFF
        if self.holds.get(reg, -1) == value:
            return
        if self.used >> reg & 1:
            self.emit(load_immediate(reg, value, self.mode64))
        else:
            self.initial[reg] = value
        self.used |= 1 << reg
        self.holds[reg] = value

    def forget(self, reg: int) -> None:
        """The last step left something unknown in ``reg``."""
        self.used |= 1 << reg
        self.holds[reg] = -1

    def _any(self, pool: tuple[int, ...], value: int) -> int:
        for reg in pool:
            if self.holds.get(reg, -1) == value:
                return reg
        for reg in pool:
            if not self.used >> reg & 1:
                self.need(reg, value)
                return reg
        self.need(pool[0], value)
        return pool[0]

    def address(self, gva: int) -> int:
        """A register that holds ``gva``."""
        return self._any(_ADDRESSES64 if self.mode64 else _ADDRESSES32, gva)

    def value(self, value: int) -> int:
        """A register that holds ``value``."""
        return self._any(_VALUES, value if self.mode64 else value & 0xFFFFFFFF)

    def load(self, gva: int, fep: bool = False) -> None:
        """MOV rbp, [gva]."""
        self.emit(memory_form(b"\x8b", RBP, self.address(gva), self.mode64, self.mode64), fep)
        self.forget(RBP)

    def load_unemulated(self, gva: int) -> None:
        """MOVSS xmm1, [gva]."""
        self.emit(memory_form(b"\x0f\x10", 1, self.address(gva), self.mode64, False, b"\xf3"))

    def vector(self, gva: int) -> None:
        """MOVUPS xmm0, [gva]: what the next vector store stores."""
        self.emit(memory_form(b"\x0f\x10", 0, self.address(gva), self.mode64))

    def store(self, kind: str, gva: int, value: int, old: int, other: int = 0, fep: bool = False) -> None:
        """A store of ``kind`` that leaves ``value`` at ``gva`` if ``old`` is there.

        Vector and x87 stores store what their registers hold. ``other`` is the neighbour of ``gva`` in its aligned
        16 bytes, for CMPXCHG16B; 32-bit code gets CMPXCHG8B in its place.
        """
        mode64 = self.mode64
        mask = (1 << 64) - 1 if mode64 else 0xFFFFFFFF
        lock = b"\xf0" if kind.startswith("lock ") else b""
        name = kind.removeprefix("lock ")
        if name == "cmpxchg16b":
            self._compare_pair(gva, value, old, other, fep)
        elif name == "movss":
            self.emit(memory_form(b"\x0f\x11", 0, self.address(gva), mode64, False, b"\xf3"), fep)
        elif name in _FSTP:
            opcode, extension = _FSTP[name]
            self.emit(memory_form(opcode, extension, self.address(gva), mode64), fep)
        elif name in VECTOR:
            self.emit(vmovdqu_store(self.address(gva), 32 if name == "vmovdqu32" else 16), fep)
        elif name == "mov imm":
            low = (value & 0xFFFFFFFF).to_bytes(4, "little")
            self.emit(memory_form(b"\xc7", 0, self.address(gva), mode64, mode64) + low, fep)
        elif name == "inc":
            self.emit(memory_form(b"\xff", 0, self.address(gva), mode64, mode64, lock), fep)
        elif name == "bts":
            # The lowest bit that the store would change: P, W, U, …
            changed = (value ^ old) & 0xFFFFFFFF
            bit = (changed & -changed).bit_length() - 1 if changed else 5
            setting = 5 if value >> bit & 1 else 6
            code = memory_form(b"\x0f\xba", setting, self.address(gva), mode64, mode64, lock)
            self.emit(code + bytes((bit,)), fep)
        else:
            base = self.address(gva)
            if name == "cmpxchg":
                self.need(RAX, old)
            operand = value
            if name in ("add", "xadd"):
                operand = (value - old) & mask
            reg = self.value(operand)
            self.emit(memory_form(_SIMPLE[name], reg, base, mode64, mode64, lock), fep)
            if name in ("xadd", "xchg"):
                self.forget(reg)

    def _compare_pair(self, gva: int, value: int, old: int, other: int, fep: bool) -> None:
        if self.mode64:
            high = gva & 8 != 0
            gva &= ~15
        else:
            high = False
            other = old >> 32
            old &= 0xFFFFFFFF
        self.need(RAX, other if high else old)
        self.need(RDX, old if high else other)
        self.need(RBX, other if high else value)
        self.need(RCX, value if high else other)
        self.emit(memory_form(b"\x0f\xc7", 1, self.address(gva), self.mode64, self.mode64, b"\xf0"), fep)

    def invlpg(self, gva: int) -> None:
        """INVLPG [gva]."""
        self.emit(memory_form(b"\x0f\x01", 7, self.address(gva), self.mode64))

    def load_cr3(self, gfn: int) -> None:
        """MOV CR3, gfn << 12: loads a root, and flushes the TLB."""
        self.need(RAX, gfn << 12)
        self.emit(b"\x0f\x22\xd8")

    def string(self, move: bool, destination: int, source: int, count: int, fep: bool) -> None:
        """REP MOVS or REP STOS of ``count`` words of the native size; STOS stores what RAX holds."""
        self.need(RDI, destination)
        if move:
            self.need(RSI, source)
        code = b"\xa5" if move else b"\xab"
        if self.mode64:
            code = b"\x48" + code
        if count != 1:
            self.need(RCX, count)
            code = b"\xf3" + code
        self.emit(code, fep)
        self.forget(RDI)
        if move:
            self.forget(RSI)
        if count != 1:
            self.forget(RCX)

    def fence(self) -> None:
        """MFENCE."""
        self.emit(b"\x0f\xae\xf0")

    def halt(self) -> None:
        """HLT."""
        self.emit(b"\xf4")

    def undefined(self) -> None:
        """UD2."""
        self.emit(b"\x0f\x0b")
