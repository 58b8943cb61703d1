"""String instructions. With REP they commit RCX, RSI and RDI after each element (SDM vol. 2, REP)."""

from __future__ import annotations

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import RAX, RCX, RDI, RSI, advance, check_canonical, read_reg, write_reg
from mmufuzz.x86.insn import REP_NONE, Insn
from mmufuzz.x86.state import FLAG_DF, Regs


def _step(regs: Regs, insn: Insn, index: int) -> None:
    """Move a string pointer past one element, in the direction of RFLAGS.DF."""
    delta = -insn.size if regs.rflags & FLAG_DF else insn.size
    write_reg(regs, index, insn.asize, regs.gpr[index] + delta & alu.mask(insn.asize))


def _store(regs: Regs, insn: Insn, bus: Bus, value: int) -> None:
    address = read_reg(regs, RDI, insn.asize)
    check_canonical(regs, address, insn.size, False)
    bus.store(regs, address, insn.size, value, False)


def _movs(regs: Regs, insn: Insn, bus: Bus) -> None:
    address = read_reg(regs, RSI, insn.asize)
    check_canonical(regs, address, insn.size, False)
    _store(regs, insn, bus, bus.load(regs, address, insn.size, False, False))
    _step(regs, insn, RSI)
    _step(regs, insn, RDI)


def _stos(regs: Regs, insn: Insn, bus: Bus) -> None:
    _store(regs, insn, bus, read_reg(regs, RAX, insn.size))
    _step(regs, insn, RDI)


def string(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVS and STOS; REPNE repeats them as REP does.

    A fault in one element leaves RIP at the instruction and the registers as the elements before it
    left them, so that re-execution goes on where it stopped.
    """
    moves = insn.mnemonic == "movs"
    repeated = insn.rep != REP_NONE
    asize = insn.asize
    while True:
        if repeated and read_reg(regs, RCX, asize) == 0:
            break
        if moves:
            _movs(regs, insn, bus)
        else:
            _stos(regs, insn, bus)
        if not repeated:
            break
        write_reg(regs, RCX, asize, read_reg(regs, RCX, asize) - 1)
    advance(regs, insn)
