"""String instructions. With REP they commit RCX, RSI and RDI after each element (SDM vol. 2, REP)."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    RAX,
    RCX,
    RDI,
    RDX,
    RSI,
    advance,
    check_io,
    linear,
    read_reg,
    write_reg,
)
from mmufuzz.x86.insn import ES, REP_F3, REP_NONE, Insn
from mmufuzz.x86.state import FLAG_DF, FLAG_ZF, Regs

# The even opcodes of the string instructions.
_MOVS: Final = 0xA4
_CMPS: Final = 0xA6
_STOS: Final = 0xAA
_LODS: Final = 0xAC
_SCAS: Final = 0xAE
_INS: Final = 0x6C
_OUTS: Final = 0x6E


def _size(insn: Insn) -> int:
    """Bytes of an element: INS and OUTS have at most 4."""
    return 4 if insn.size == 8 and insn.opcode <= _OUTS + 1 else insn.size


def _step(regs: Regs, insn: Insn, index: int) -> None:
    """Move a string pointer past one element, in the direction of RFLAGS.DF."""
    size = _size(insn)
    delta = -size if regs.rflags & FLAG_DF else size
    write_reg(regs, index, insn.asize, regs.gpr[index] + delta & alu.mask(insn.asize))


def _load_source(regs: Regs, insn: Insn, bus: Bus) -> int:
    size = _size(insn)
    address = linear(regs, insn.segment, read_reg(regs, RSI, insn.asize), size, False)
    return bus.load(regs, address, size, False, False)


def _load_destination(regs: Regs, insn: Insn, bus: Bus) -> int:
    # No prefix overrides ES.
    address = linear(regs, ES, read_reg(regs, RDI, insn.asize), insn.size, False)
    return bus.load(regs, address, insn.size, False, False)


def _store(regs: Regs, insn: Insn, bus: Bus, value: int) -> None:
    size = _size(insn)
    address = linear(regs, ES, read_reg(regs, RDI, insn.asize), size, True)
    bus.store(regs, address, size, value, False)


def _element(regs: Regs, insn: Insn, bus: Bus, kind: int) -> None:
    """One element of the instruction with the even opcode ``kind``."""
    size = _size(insn)
    if kind == _MOVS:
        _store(regs, insn, bus, _load_source(regs, insn, bus))
        _step(regs, insn, RSI)
        _step(regs, insn, RDI)
    elif kind == _STOS:
        _store(regs, insn, bus, read_reg(regs, RAX, size))
        _step(regs, insn, RDI)
    elif kind == _LODS:
        write_reg(regs, RAX, size, _load_source(regs, insn, bus))
        _step(regs, insn, RSI)
    elif kind == _SCAS:
        element = _load_destination(regs, insn, bus)
        regs.rflags = alu.cmp(size, read_reg(regs, RAX, size), element, regs.rflags)[1]
        _step(regs, insn, RDI)
    elif kind == _CMPS:
        left = _load_source(regs, insn, bus)
        regs.rflags = alu.cmp(size, left, _load_destination(regs, insn, bus), regs.rflags)[1]
        _step(regs, insn, RSI)
        _step(regs, insn, RDI)
    elif kind == _INS:
        _store(regs, insn, bus, bus.port_in(regs, regs.gpr[RDX] & 0xFFFF, size))
        _step(regs, insn, RDI)
    else:
        assert kind == _OUTS
        bus.port_out(regs, regs.gpr[RDX] & 0xFFFF, size, _load_source(regs, insn, bus))
        _step(regs, insn, RSI)


def _clear_upper_halves(regs: Regs, kind: int) -> None:
    """A repetition of ECX = 0 times, on Intel CPUs: RCX, and the pointers of MOVS and STOS, lose their upper halves.

    Not in the SDM; observed by the author of Linux commit 428e3d08574b. Other CPUs leave them alone.
    """
    write_reg(regs, RCX, 4, 0)
    if kind in (_MOVS, _STOS):
        write_reg(regs, RDI, 4, read_reg(regs, RDI, 4))
    if kind == _MOVS:
        write_reg(regs, RSI, 4, read_reg(regs, RSI, 4))


def string(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVS, STOS, LODS, CMPS, SCAS, INS and OUTS; REPNE repeats all but CMPS and SCAS as REP does.

    A fault in one element leaves RIP at the instruction and the registers as the elements before it
    left them, so that re-execution goes on where it stopped.
    """
    kind = insn.opcode & 0xFE
    repeated = insn.rep != REP_NONE
    asize = insn.asize
    if kind <= _OUTS:
        check_io(regs, bus, regs.gpr[RDX] & 0xFFFF, _size(insn))
    if not repeated:
        _element(regs, insn, bus, kind)
        advance(regs, insn)
        return
    compares = kind in (_CMPS, _SCAS)
    wanted = FLAG_ZF if insn.rep == REP_F3 else 0
    if asize == 4 and read_reg(regs, RCX, 4) == 0:
        _clear_upper_halves(regs, kind)
    while read_reg(regs, RCX, asize) != 0:
        _element(regs, insn, bus, kind)
        write_reg(regs, RCX, asize, read_reg(regs, RCX, asize) - 1)
        if compares and regs.rflags & FLAG_ZF != wanted:
            break
    advance(regs, insn)
