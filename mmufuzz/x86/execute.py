"""Execution of one decoded instruction, as hardware does it.

Each mnemonic has a handler. Handlers make every access through the ``Bus`` first and commit registers, flags
and RIP afterwards, so that a ``Fault``, or an exception with which the bus ends the instruction (a VM exit), leaves
the registers untouched. Repeated string instructions commit after each element instead.

Not modelled: segment limits and bases, RFLAGS.TF and RF, debug registers, alignment checks (#AC).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86 import execute_flow as flow
from mmufuzz.x86 import execute_vector as vector
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    RAX,
    RBX,
    RCX,
    RDX,
    advance,
    bit_address,
    check_canonical,
    condition,
    effective_address,
    is_canonical,
    load_operand,
    operand_address,
    read_reg,
    require_cpl0,
    store_operand,
    uses_stack_segment,
    write_reg,
)
from mmufuzz.x86.execute_string import string
from mmufuzz.x86.insn import CR, MEM, Insn
from mmufuzz.x86.state import FLAG_CF, FLAG_DF, FLAG_ZF, VECTOR_GP, VECTOR_UD, Fault, Regs

__all__ = [
    "bit_address",
    "condition",
    "effective_address",
    "execute",
    "is_canonical",
    "operand_address",
    "read_reg",
    "supported",
    "uses_stack_segment",
    "write_reg",
]


def execute(regs: Regs, insn: Insn, bus: Bus) -> None:
    """Execute ``insn``, which lies at ``regs.rip``, and advance RIP.

    Raises ``Fault`` for architectural exceptions; whatever ``bus`` raises passes through. Behind the
    forced-emulation prefix hardware sees only its UD2.
    """
    if insn.fep:
        raise Fault(VECTOR_UD)
    _HANDLERS[insn.mnemonic](regs, insn, bus)


def supported(mnemonic: str) -> bool:
    """True if ``execute`` has a handler for ``mnemonic``."""
    return mnemonic in _HANDLERS


# Data movement.


def _mov(regs: Regs, insn: Insn, bus: Bus) -> None:
    store_operand(regs, insn, bus, insn.operands[0], load_operand(regs, insn, bus, insn.operands[1]))
    advance(regs, insn)


def _movsx(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    src = insn.operands[1]
    value = alu.sign_extend(load_operand(regs, insn, bus, src), src.size, dst.size)
    store_operand(regs, insn, bus, dst, value)
    advance(regs, insn)


def _lea(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    write_reg(regs, dst.index, dst.size, effective_address(regs, insn) & alu.mask(dst.size))
    advance(regs, insn)


def _xchg(regs: Regs, insn: Insn, bus: Bus) -> None:
    first = insn.operands[0]
    second = insn.operands[1]
    # With memory it locks, prefix or not.
    old = load_operand(regs, insn, bus, first, True, True)
    store_operand(regs, insn, bus, first, load_operand(regs, insn, bus, second), True)
    store_operand(regs, insn, bus, second, old)
    advance(regs, insn)


def _setcc(regs: Regs, insn: Insn, bus: Bus) -> None:
    store_operand(regs, insn, bus, insn.operands[0], 1 if condition(regs.rflags, insn.condition) else 0)
    advance(regs, insn)


def _cmovcc(regs: Regs, insn: Insn, bus: Bus) -> None:
    # The source is read, and a 32-bit destination zero-extended, whatever the condition.
    dst = insn.operands[0]
    value = load_operand(regs, insn, bus, insn.operands[1])
    if not condition(regs.rflags, insn.condition):
        value = read_reg(regs, dst.index, dst.size)
    write_reg(regs, dst.index, dst.size, value)
    advance(regs, insn)


# Arithmetic and logic.


def _binary(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    old = load_operand(regs, insn, bus, dst, True, insn.lock)
    source = load_operand(regs, insn, bus, insn.operands[1])
    result, flags = alu.BINARY[insn.mnemonic](dst.size, old, source, regs.rflags)
    store_operand(regs, insn, bus, dst, result, insn.lock)
    regs.rflags = flags
    advance(regs, insn)


def _compare(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CMP and TEST."""
    dst = insn.operands[0]
    left = load_operand(regs, insn, bus, dst)
    right = load_operand(regs, insn, bus, insn.operands[1])
    regs.rflags = alu.BINARY[insn.mnemonic](dst.size, left, right, regs.rflags)[1]
    advance(regs, insn)


def _unary(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    old = load_operand(regs, insn, bus, dst, True, insn.lock)
    result, flags = alu.UNARY[insn.mnemonic](dst.size, old, regs.rflags)
    store_operand(regs, insn, bus, dst, result, insn.lock)
    regs.rflags = flags
    advance(regs, insn)


def _bit(regs: Regs, insn: Insn, bus: Bus) -> None:
    """BT, BTS, BTR, BTC."""
    dst = insn.operands[0]
    offset = load_operand(regs, insn, bus, insn.operands[1])
    function = alu.BINARY[insn.mnemonic]
    writes = insn.mnemonic != "bt"
    size = dst.size
    if dst.kind == MEM:
        address = bit_address(regs, insn)
        check_canonical(regs, address, size, uses_stack_segment(insn))
        old = bus.load(regs, address, size, writes, insn.lock)
        result, flags = function(size, old, offset, regs.rflags)
        if writes:
            bus.store(regs, address, size, result, insn.lock)
    else:
        result, flags = function(size, read_reg(regs, dst.index, size), offset, regs.rflags)
        if writes:
            write_reg(regs, dst.index, size, result)
    regs.rflags = flags
    advance(regs, insn)


def _xadd(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    src = insn.operands[1]
    old = load_operand(regs, insn, bus, dst, True, insn.lock)
    total, flags = alu.add(dst.size, old, load_operand(regs, insn, bus, src), regs.rflags)
    if dst.kind == MEM:
        store_operand(regs, insn, bus, dst, total, insn.lock)
        store_operand(regs, insn, bus, src, old)
    else:
        # XADD of a register with itself leaves the sum.
        store_operand(regs, insn, bus, src, old)
        store_operand(regs, insn, bus, dst, total)
    regs.rflags = flags
    advance(regs, insn)


def _cmpxchg(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    size = dst.size
    old = load_operand(regs, insn, bus, dst, True, insn.lock)
    new = load_operand(regs, insn, bus, insn.operands[1])
    accumulator = read_reg(regs, RAX, size)
    flags = alu.cmp(size, accumulator, old, regs.rflags)[1]
    # Memory is written either way. Of the registers only one is, and the other keeps even its upper half.
    if accumulator == old:
        store_operand(regs, insn, bus, dst, new, insn.lock)
    else:
        if dst.kind == MEM:
            store_operand(regs, insn, bus, dst, old, insn.lock)
        write_reg(regs, RAX, size, old)
    regs.rflags = flags
    advance(regs, insn)


def _cmpxchg_pair(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CMPXCHG8B and CMPXCHG16B."""
    dst = insn.operands[0]
    half = dst.size // 2
    bits = 8 * half
    address = operand_address(regs, insn, dst.size)
    if dst.size == 16 and address % 16 != 0:
        raise Fault(VECTOR_GP, 0)
    old = bus.load(regs, address, dst.size, True, insn.lock)
    expected = read_reg(regs, RDX, half) << bits | read_reg(regs, RAX, half)
    if expected == old:
        new = read_reg(regs, RCX, half) << bits | read_reg(regs, RBX, half)
        bus.store(regs, address, dst.size, new, insn.lock)
        regs.rflags |= FLAG_ZF
    else:
        bus.store(regs, address, dst.size, old, insn.lock)
        regs.rflags &= ~FLAG_ZF
        write_reg(regs, RDX, half, old >> bits)
        write_reg(regs, RAX, half, old & alu.mask(half))
    advance(regs, insn)


# Flags.


def _clc(regs: Regs, insn: Insn, bus: Bus) -> None:
    regs.rflags &= ~FLAG_CF
    advance(regs, insn)


def _stc(regs: Regs, insn: Insn, bus: Bus) -> None:
    regs.rflags |= FLAG_CF
    advance(regs, insn)


def _cmc(regs: Regs, insn: Insn, bus: Bus) -> None:
    regs.rflags ^= FLAG_CF
    advance(regs, insn)


def _cld(regs: Regs, insn: Insn, bus: Bus) -> None:
    regs.rflags &= ~FLAG_DF
    advance(regs, insn)


def _std(regs: Regs, insn: Insn, bus: Bus) -> None:
    regs.rflags |= FLAG_DF
    advance(regs, insn)


# System.


def _nop(regs: Regs, insn: Insn, bus: Bus) -> None:
    """NOP, and LFENCE and SFENCE: under TSO loads and stores are ordered among themselves already."""
    advance(regs, insn)


def _mfence(regs: Regs, insn: Insn, bus: Bus) -> None:
    bus.fence(regs)
    advance(regs, insn)


def _movcr(regs: Regs, insn: Insn, bus: Bus) -> None:
    require_cpl0(regs)
    dst = insn.operands[0]
    src = insn.operands[1]
    if dst.kind != CR:
        write_reg(regs, dst.index, dst.size, _control_register(regs, src.index) & alu.mask(dst.size))
    else:
        value = read_reg(regs, src.index, src.size)
        if dst.index == 2:
            regs.cr2 = value
        else:
            # Serialising: earlier stores are visible before the register changes (SDM vol. 3, 9.3).
            bus.fence(regs)
            bus.write_cr(regs, dst.index, value)
    advance(regs, insn)


def _control_register(regs: Regs, number: int) -> int:
    if number == 0:
        return regs.cr0
    if number == 2:
        return regs.cr2
    if number == 3:
        return regs.cr3
    return regs.cr4


def _invlpg(regs: Regs, insn: Insn, bus: Bus) -> None:
    """A non-canonical address is no fault: the bus gets it as it is (SDM vol. 2, INVLPG)."""
    require_cpl0(regs)
    # Serialising, as MOV to CR is.
    bus.fence(regs)
    bus.invlpg(regs, effective_address(regs, insn))
    advance(regs, insn)


def _hlt(regs: Regs, insn: Insn, bus: Bus) -> None:
    require_cpl0(regs)
    bus.halt(regs)
    advance(regs, insn)


def _ud2(regs: Regs, insn: Insn, bus: Bus) -> None:
    raise Fault(VECTOR_UD)


_HANDLERS: Final[dict[str, Callable[[Regs, Insn, Bus], None]]] = {
    "mov": _mov,
    "movzx": _mov,
    "movsx": _movsx,
    "movsxd": _movsx,
    "lea": _lea,
    "xchg": _xchg,
    "setcc": _setcc,
    "cmovcc": _cmovcc,
    "add": _binary,
    "or": _binary,
    "adc": _binary,
    "sbb": _binary,
    "and": _binary,
    "sub": _binary,
    "xor": _binary,
    "rol": _binary,
    "ror": _binary,
    "rcl": _binary,
    "rcr": _binary,
    "shl": _binary,
    "shr": _binary,
    "sar": _binary,
    "cmp": _compare,
    "test": _compare,
    "inc": _unary,
    "dec": _unary,
    "neg": _unary,
    "not": _unary,
    "bt": _bit,
    "bts": _bit,
    "btr": _bit,
    "btc": _bit,
    "xadd": _xadd,
    "cmpxchg": _cmpxchg,
    "cmpxchg8b": _cmpxchg_pair,
    "cmpxchg16b": _cmpxchg_pair,
    "movs": string,
    "stos": string,
    "jmp": flow.jump,
    "jcc": flow.jump_if,
    "call": flow.call,
    "ret": flow.ret,
    "push": flow.push,
    "pop": flow.pop,
    "movaps": vector.move_aligned,
    "movdqa": vector.move_aligned,
    "movups": vector.move_unaligned,
    "movdqu": vector.move_unaligned,
    "movss": vector.move_single,
    "vmovdqu": vector.vex_move_unaligned,
    "fstp": vector.store_x87,
    "clc": _clc,
    "stc": _stc,
    "cmc": _cmc,
    "cld": _cld,
    "std": _std,
    "nop": _nop,
    "lfence": _nop,
    "sfence": _nop,
    "mfence": _mfence,
    "movcr": _movcr,
    "invlpg": _invlpg,
    "hlt": _hlt,
    "ud2": _ud2,
}
