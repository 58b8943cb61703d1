"""The text side of the assembler: registers, numbers and memory operands as NASM writes them."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.insn import CR, DR, HIGH8, IMM, MEM, MMX, NO_REG, REG, RIP, SREG, STI, XMM

_SIZES: Final[dict[str, int]] = {
    "byte": 1,
    "word": 2,
    "dword": 4,
    "fword": 6,
    "qword": 8,
    "tbyte": 10,
    "tword": 10,
    "oword": 16,
    "xmmword": 16,
    "yword": 32,
    "ymmword": 32,
}
_LEGACY: Final = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"]


@mypyc_attr(native_class=False)
class AsmError(ValueError):
    """The text is not one instruction that the assembler knows."""


class Argument:
    """One operand of the text. ``size`` is 0 for an immediate and for memory without a size keyword."""

    def __init__(self, kind: int, size: int, index: int = 0, value: int = 0) -> None:
        self.kind = kind
        self.size = size
        self.index = index
        self.value = value
        # SPL, BPL, SIL, DIL and R8 up cannot be written without REX.
        self.needs_rex = False
        self.base = NO_REG
        self.index_register = NO_REG
        self.scale = 1
        self.address_size = 0


def _registers() -> dict[str, Argument]:
    table: dict[str, Argument] = {"rip": Argument(REG, 8, RIP), "eip": Argument(REG, 4, RIP)}
    for index, name in enumerate(_LEGACY):
        table[name] = Argument(REG, 2, index)
        table["e" + name] = Argument(REG, 4, index)
        table["r" + name] = Argument(REG, 8, index)
        table[name[0] + "l" if index < 4 else name + "l"] = Argument(REG, 1, index)
        if index < 4:
            table[name[0] + "h"] = Argument(HIGH8, 1, index)
        else:
            table[name + "l"].needs_rex = True
    for index in range(8, 16):
        for suffix, size in (("", 8), ("d", 4), ("w", 2), ("b", 1)):
            table[f"r{index}{suffix}"] = Argument(REG, size, index)
    for index in range(16):
        table[f"xmm{index}"] = Argument(XMM, 16, index)
        table[f"ymm{index}"] = Argument(XMM, 32, index)
    for index in (0, 2, 3, 4, 8):
        table[f"cr{index}"] = Argument(CR, 0, index)
    for index in range(8):
        table[f"dr{index}"] = Argument(DR, 0, index)
        table[f"mm{index}"] = Argument(MMX, 8, index)
        table[f"st{index}"] = Argument(STI, 10, index)
    for index, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs")):
        table[name] = Argument(SREG, 2, index)
    return table


_REGISTERS: Final[dict[str, Argument]] = _registers()


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise AsmError(f"neither a register nor a number: {text!r}") from None


def _register(name: str, mode64: bool) -> Argument | None:
    register = _REGISTERS.get(name)
    if register is not None and not mode64:
        if (register.kind == REG and register.size == 8) or register.index >= 8 or register.needs_rex:
            raise AsmError(f"{name} exists only in 64-bit code")
    return register


def parse_argument(text: str, mode64: bool) -> Argument:
    """One operand, for 64-bit or 32-bit code. Raises ``AsmError``."""
    words = text.split()
    if words[0] in ("short", "near") and len(words) == 2:
        # Encodings are chosen by length, so the hint says nothing.
        return Argument(IMM, 0, 0, _number(words[1]))
    size = 0
    if words[0] in _SIZES:
        size = _SIZES[words.pop(0)]
        if words and words[0] == "ptr":
            words.pop(0)
    rest = "".join(words)
    if rest.startswith("[") and rest.endswith("]"):
        return _memory(rest[1:-1], size, mode64)
    if size:
        raise AsmError(f"{text!r} is no memory operand")
    register = _register(rest, mode64)
    if register is None:
        return Argument(IMM, 0, 0, _number(rest))
    if register.index == RIP:
        raise AsmError(f"{rest} stands only in an address")
    return register


def _memory(text: str, size: int, mode64: bool) -> Argument:
    """The operand ``[text]``: a sum of at most two registers, one of them scaled, and numbers."""
    memory = Argument(MEM, size)
    if not text:
        raise AsmError("[] names no address")
    for term in text.replace("-", "+-").split("+"):
        if not term:
            continue
        name, scale = term, 0
        if "*" in term:
            left, right = term.split("*", 1)
            name, scale = (left, _number(right)) if left in _REGISTERS else (right, _number(left))
            if scale not in (1, 2, 4, 8):
                raise AsmError(f"scale {scale} in [{text}]")
        register = _register(name, mode64)
        if register is None:
            memory.value += _number(term)
            continue
        if register.kind != REG or register.size not in ((4, 8) if mode64 else (4,)):
            raise AsmError(f"{name} cannot stand in an address")
        if memory.address_size not in (0, register.size):
            raise AsmError(f"registers of two sizes in [{text}]")
        memory.address_size = register.size
        if scale == 0 and memory.base == NO_REG:
            memory.base = register.index
        elif memory.index_register == NO_REG:
            memory.index_register = register.index
            memory.scale = max(scale, 1)
        else:
            raise AsmError(f"too many registers in [{text}]")
    if memory.index_register == 4 and memory.scale == 1 and memory.base != NO_REG:
        # RSP cannot be an index; unscaled, the two may change places.
        memory.base, memory.index_register = 4, memory.base
    if memory.index_register in (4, RIP) or (memory.base == RIP and memory.index_register != NO_REG):
        raise AsmError(f"[{text}] has no encoding")
    if memory.address_size == 0:
        memory.address_size = 8 if mode64 else 4
    bits = 8 * memory.address_size
    if not -(1 << (bits - 1)) <= memory.value < 1 << bits:
        raise AsmError(f"displacement of [{text}] is out of range")
    memory.value = signed(memory.value, memory.address_size)
    return memory


def signed(value: int, size: int) -> int:
    """The low ``size`` bytes of ``value`` as a two's complement number."""
    bits = 8 * size
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
