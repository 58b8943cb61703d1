"""The x87: loads, stores and control words. Its arithmetic is not modelled.

The last instruction, its operand and its opcode (FIP, FDP, FOP) are not tracked and read as zero.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import floats
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    RAX,
    advance,
    effective_address,
    linear,
    load_operand,
    operand_address,
    store_operand,
    write_reg,
)
from mmufuzz.x86.insn import MEM, STI, Insn
from mmufuzz.x86.state import CR0_EM, CR0_MP, CR0_TS, FCW_RESET, VECTOR_MF, VECTOR_NM, Fault, Regs

STACK_FAULT: Final = 1 << 6
SUMMARY: Final = 1 << 7
C1: Final = 1 << 9
_CONDITIONS: Final = 0x4700
_TOP: Final = 7 << 11
_BUSY: Final = 1 << 15
_EXCEPTIONS: Final = 0x3F
_POPPING: Final = ("fstp", "fistp", "fisttp", "fbstp")

# FLD1, FLDL2T, FLDL2E, FLDPI, FLDLG2, FLDLN2, FLDZ: the value cut off, and whether the nearest one is above it.
_CONSTANTS: Final[list[tuple[int, bool]]] = [
    (0x3FFF8000000000000000, False),
    (0x4000D49A784BCD1B8AFE, False),
    (0x3FFFB8AA3B295C17F0BB, True),
    (0x4000C90FDAA22168C234, True),
    (0x3FFD9A209A84FBCFF798, True),
    (0x3FFEB17217F7D1CF79AB, True),
    (0, False),
]


def _check(regs: Regs, waits: bool = True) -> None:
    """#NM with CR0.EM or CR0.TS; #MF for an unmasked exception that an earlier instruction left pending."""
    if regs.cr0 & (CR0_EM | CR0_TS):
        raise Fault(VECTOR_NM)
    if waits and regs.fsw & SUMMARY:
        raise Fault(VECTOR_MF)


def _top(regs: Regs) -> int:
    return regs.fsw >> 11 & 7


def _physical(regs: Regs, index: int) -> int:
    """The physical register of ST(``index``)."""
    return (regs.fsw >> 11) + index & 7


def _set_top(regs: Regs, top: int) -> None:
    regs.fsw = regs.fsw & ~_TOP | (top & 7) << 11


def _raise(regs: Regs, flags: int) -> bool:
    """Record exceptions, and C1 among ``flags``; True if one of them is unmasked and stops the instruction."""
    regs.fsw = regs.fsw & ~C1 | flags & (C1 | STACK_FAULT | _EXCEPTIONS)
    return summarize(regs, flags)


def summarize(regs: Regs, flags: int) -> bool:
    """Bring ES and B up to date with FCW; True if an exception among ``flags`` is unmasked."""
    if regs.fsw & ~regs.fcw & _EXCEPTIONS:
        regs.fsw |= SUMMARY | _BUSY
    else:
        regs.fsw &= ~(SUMMARY | _BUSY)
    return flags & ~regs.fcw & _EXCEPTIONS != 0


def _push(regs: Regs, value: int, flags: int) -> None:
    """Push a value, or the default NaN onto a full stack."""
    place = _top(regs) - 1 & 7
    if regs.ftw >> place & 1:
        value = floats.DEFAULT_NAN
        flags = floats.INVALID | STACK_FAULT | C1
    if _raise(regs, flags) and flags & (floats.INVALID | floats.DENORMAL):
        return
    _set_top(regs, place)
    regs.fpr[place] = value
    regs.ftw |= 1 << place


def _pop(regs: Regs) -> None:
    top = _top(regs)
    regs.ftw &= ~(1 << top)
    _set_top(regs, top + 1)


def load(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FLD of memory or of a stack register."""
    _check(regs)
    src = insn.operands[0]
    flags = 0
    if src.kind == STI:
        place = _physical(regs, src.index)
        value = regs.fpr[place]
        if not regs.ftw >> place & 1:
            value = floats.DEFAULT_NAN
            flags = floats.INVALID | STACK_FAULT
    else:
        value = load_operand(regs, insn, bus, src)
        if src.size == 4:
            value, flags = floats.widen(value, 8, 23)
        elif src.size == 8:
            value, flags = floats.widen(value, 11, 52)
    _push(regs, value, flags)
    advance(regs, insn)


def load_integer(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FILD and FBLD."""
    _check(regs)
    src = insn.operands[0]
    image = load_operand(regs, insn, bus, src)
    value = floats.from_decimal(image) if insn.mnemonic == "fbld" else floats.from_integer(image, src.size)
    _push(regs, value, 0)
    advance(regs, insn)


def load_constant(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FLD1 and the other constants, rounded as FCW says."""
    _check(regs)
    place = insn.modrm - 0xE8
    value, nearest_above = _CONSTANTS[place]
    rounding = regs.fcw >> 10 & 3
    exact = place in (0, 6)
    if (rounding == 0 and nearest_above) or (rounding == 2 and not exact):
        value += 1
    _push(regs, value, 0)
    advance(regs, insn)


def store(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FST, FSTP, FIST, FISTP, FISTTP, FBSTP, to memory or to a stack register.

    An unmasked exception stores nothing.
    """
    _check(regs)
    dst = insn.operands[0]
    name = insn.mnemonic
    top = _top(regs)
    value = regs.fpr[top]
    flags = 0
    if not regs.ftw >> top & 1:
        value = floats.DEFAULT_NAN
        flags = floats.INVALID | STACK_FAULT
    if dst.kind == STI:
        if not _raise(regs, flags):
            place = _physical(regs, dst.index)
            regs.fpr[place] = value
            regs.ftw |= 1 << place
    else:
        result, more = _convert(value, dst.size, regs.fcw >> 10 & 3, name)
        flags = flags or more
        if flags & ~regs.fcw & _EXCEPTIONS & ~floats.INEXACT:
            _raise(regs, flags & ~floats.ROUNDED_UP)
            advance(regs, insn)
            return
        store_operand(regs, insn, bus, dst, result)
        _raise(regs, flags)
    if name in _POPPING and not (flags & ~regs.fcw & _EXCEPTIONS & ~floats.INEXACT):
        _pop(regs)
    advance(regs, insn)


def _convert(value: int, size: int, rounding: int, name: str) -> tuple[int, int]:
    """The value in its memory format, and the flags that raises."""
    if name == "fisttp":
        result, flags = floats.to_integer(value, size, 3)
        return result, flags & ~floats.ROUNDED_UP
    if name in ("fist", "fistp"):
        return floats.to_integer(value, size, rounding)
    if name == "fbstp":
        return floats.to_decimal(value, rounding)
    if size == 4:
        return floats.narrow(value, 8, 23, rounding)
    if size == 8:
        return floats.narrow(value, 11, 52, rounding)
    return value, 0


def exchange(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FXCH: an empty register counts as the default NaN."""
    _check(regs)
    top = _top(regs)
    other = _physical(regs, insn.operands[0].index)
    flags = 0
    values = [regs.fpr[top], regs.fpr[other]]
    for number, place in enumerate((top, other)):
        if not regs.ftw >> place & 1:
            values[number] = floats.DEFAULT_NAN
            flags = floats.INVALID | STACK_FAULT
    if not _raise(regs, flags):
        regs.fpr[top] = values[1]
        regs.fpr[other] = values[0]
        regs.ftw |= 1 << top | 1 << other
    advance(regs, insn)


def change_sign(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FCHS and FABS."""
    _check(regs)
    top = _top(regs)
    if not regs.ftw >> top & 1:
        if not _raise(regs, floats.INVALID | STACK_FAULT):
            regs.fpr[top] = floats.DEFAULT_NAN
            regs.ftw |= 1 << top
    else:
        sign = 1 << 79
        regs.fpr[top] = regs.fpr[top] ^ sign if insn.mnemonic == "fchs" else regs.fpr[top] & ~sign
        regs.fsw &= ~C1
    advance(regs, insn)


def move_top(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FDECSTP, FINCSTP, FFREE, FNOP."""
    _check(regs)
    if insn.mnemonic == "ffree":
        regs.ftw &= ~(1 << _physical(regs, insn.operands[0].index))
    elif insn.mnemonic != "fnop":
        _set_top(regs, _top(regs) + (1 if insn.mnemonic == "fincstp" else -1))
        regs.fsw &= ~C1
    advance(regs, insn)


def wait(regs: Regs, insn: Insn, bus: Bus) -> None:
    """WAIT: #NM if both CR0.MP and CR0.TS are set."""
    if regs.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS:
        raise Fault(VECTOR_NM)
    if regs.fsw & SUMMARY:
        raise Fault(VECTOR_MF)
    advance(regs, insn)


# Control.


def reset(regs: Regs) -> None:
    """What FNINIT leaves; the registers' contents stay."""
    regs.fcw = FCW_RESET
    regs.fsw = 0
    regs.ftw = 0


def control_word(value: int) -> int:
    """FCW when ``value`` is loaded: bit 6 reads as one, the other reserved bits as zero (SDM vol. 1, 8.1.5)."""
    return value & 0x1F7F | 0x40


def control(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FNINIT, FNCLEX, FLDCW, FNSTCW, FNSTSW."""
    name = insn.mnemonic
    _check(regs, name == "fldcw")
    if name == "fninit":
        reset(regs)
    elif name == "fnclex":
        regs.fsw &= ~(_EXCEPTIONS | STACK_FAULT | SUMMARY | _BUSY)
    elif name == "fldcw":
        regs.fcw = control_word(load_operand(regs, insn, bus, insn.operands[0]))
        summarize(regs, 0)
    elif name == "fnstcw":
        store_operand(regs, insn, bus, insn.operands[0], regs.fcw)
    elif insn.operands[0].kind == MEM:
        store_operand(regs, insn, bus, insn.operands[0], regs.fsw)
    else:
        write_reg(regs, RAX, 2, regs.fsw)
    advance(regs, insn)


def full_tags(regs: Regs) -> int:
    """The 16-bit tag word: valid, zero, special or empty for each physical register (SDM vol. 1, 8.1.7)."""
    tags = 0
    for place in range(8):
        exponent = regs.fpr[place] >> 64 & 0x7FFF
        significand = regs.fpr[place] & (1 << 64) - 1
        if not regs.ftw >> place & 1:
            tag = 3
        elif exponent == 0 and significand == 0:
            tag = 1
        elif exponent in (0, 0x7FFF) or significand >> 63 == 0:
            tag = 2
        else:
            tag = 0
        tags |= tag << 2 * place
    return tags


def _environment_size(insn: Insn) -> int:
    """Bytes of each of the seven fields (SDM vol. 1, 8.1.10)."""
    return 2 if insn.size == 2 else 4


def store_environment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FNSTENV and FNSAVE. The first masks all exceptions, the second initializes the x87."""
    _check(regs, False)
    size = _environment_size(insn)
    saves = insn.mnemonic == "fnsave"
    total = 7 * size + (80 if saves else 0)
    operand_address(regs, insn, total, True)
    # Unused upper halves are written as ones.
    ones = 0xFFFF0000 if size == 4 else 0
    fields = [regs.fcw | ones, regs.fsw | ones, full_tags(regs) | ones, 0, 0, 0, ones]
    offset = effective_address(regs, insn)
    wrap = (1 << 8 * insn.asize) - 1
    for place in range(7):
        at = linear(regs, insn.segment, offset + place * size & wrap, size, True)
        bus.store(regs, at, size, fields[place], False)
    if saves:
        for place in range(8):
            at = linear(regs, insn.segment, offset + 7 * size + 10 * place & wrap, 10, True)
            bus.store(regs, at, 10, regs.fpr[_physical(regs, place)], False)
        reset(regs)
    else:
        regs.fcw |= _EXCEPTIONS
        summarize(regs, 0)
    advance(regs, insn)


def load_environment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FLDENV and FRSTOR."""
    _check(regs)
    size = _environment_size(insn)
    restores = insn.mnemonic == "frstor"
    operand_address(regs, insn, 7 * size + (80 if restores else 0))
    offset = effective_address(regs, insn)
    wrap = (1 << 8 * insn.asize) - 1
    fields = []
    for place in range(7):
        at = linear(regs, insn.segment, offset + place * size & wrap, size, False)
        fields.append(bus.load(regs, at, size, False, False) & 0xFFFF)
    values = []
    if restores:
        for place in range(8):
            at = linear(regs, insn.segment, offset + 7 * size + 10 * place & wrap, 10, False)
            values.append(bus.load(regs, at, 10, False, False))
    regs.fcw = control_word(fields[0])
    regs.fsw = fields[1]
    regs.ftw = 0
    for place in range(8):
        if fields[2] >> 2 * place & 3 != 3:
            regs.ftw |= 1 << place
    for place in range(len(values)):
        regs.fpr[_physical(regs, place)] = values[place]
    summarize(regs, 0)
    advance(regs, insn)
