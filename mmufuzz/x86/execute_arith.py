"""Arithmetic, logic and bits on general registers and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.x86 import alu, alu_wide
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    RAX,
    RBX,
    RCX,
    RDX,
    advance,
    bit_offset,
    check_vex,
    condition,
    linear,
    load_operand,
    operand_address,
    read_reg,
    store_operand,
    write_reg,
)
from mmufuzz.x86.insn import MEM, Insn
from mmufuzz.x86.opcodes import MAP_VEX, MNEMONICS
from mmufuzz.x86.state import FLAG_CF, FLAG_OF, FLAG_ZF, VECTOR_BR, VECTOR_DE, VECTOR_GP, Fault, Regs

_Binary = Callable[[int, int, int, int], tuple[int, int]]
_Unary = Callable[[int, int, int], tuple[int, int]]

# By ``Insn.operation``.
_BINARY: Final[list[_Binary]] = [alu.BINARY.get(name, alu.add) for name in MNEMONICS]
_UNARY: Final[list[_Unary]] = [alu.UNARY.get(name, alu.inc) for name in MNEMONICS]
_SOURCE_ONLY: Final[dict[str, _Binary]] = alu_wide.SOURCE_ONLY
_SOURCE: Final[list[_Binary]] = [_SOURCE_ONLY.get(name, alu.add) for name in MNEMONICS]
_GROUP1: Final[list[int]] = [alu.GROUP1.index(name) if name in alu.GROUP1 else -1 for name in MNEMONICS]
_BT: Final = MNEMONICS.index("bt")
_INC: Final = MNEMONICS.index("inc")
_DEC: Final = MNEMONICS.index("dec")
_CMP: Final = MNEMONICS.index("cmp")


def binary(regs: Regs, insn: Insn, bus: Bus) -> None:
    """ADD, OR, ADC, SBB, AND, SUB, XOR, shifts and rotates."""
    dst = insn.operands[0]
    locked = insn.lock
    old = load_operand(regs, insn, bus, dst, True, locked)
    source = load_operand(regs, insn, bus, insn.operands[1])
    number = _GROUP1[insn.operation]
    if number >= 0:
        result, flags = alu.group1(number, dst.size, old, source, regs.rflags)
    else:
        result, flags = _BINARY[insn.operation](dst.size, old, source, regs.rflags)
    store_operand(regs, insn, bus, dst, result, locked)
    regs.rflags = flags
    advance(regs, insn)


def compare(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CMP and TEST."""
    dst = insn.operands[0]
    left = load_operand(regs, insn, bus, dst)
    right = load_operand(regs, insn, bus, insn.operands[1])
    if insn.operation == _CMP:
        regs.rflags = alu.cmp(dst.size, left, right, regs.rflags)[1]
    else:
        regs.rflags = alu.test(dst.size, left, right, regs.rflags)[1]
    advance(regs, insn)


def unary(regs: Regs, insn: Insn, bus: Bus) -> None:
    """INC, DEC, NEG, NOT."""
    dst = insn.operands[0]
    old = load_operand(regs, insn, bus, dst, True, insn.lock)
    if insn.operation == _INC:
        result, flags = alu.inc(dst.size, old, regs.rflags)
    elif insn.operation == _DEC:
        result, flags = alu.dec(dst.size, old, regs.rflags)
    else:
        result, flags = _UNARY[insn.operation](dst.size, old, regs.rflags)
    store_operand(regs, insn, bus, dst, result, insn.lock)
    regs.rflags = flags
    advance(regs, insn)


def source_only(regs: Regs, insn: Insn, bus: Bus) -> None:
    """BSF, BSR, TZCNT, LZCNT, POPCNT, BLSR, BLSMSK, BLSI, and ADCX and ADOX: a register from itself and a source."""
    if insn.opcode_map >= MAP_VEX:
        check_vex(regs)
    dst = insn.operands[0]
    source = load_operand(regs, insn, bus, insn.operands[1])
    old = read_reg(regs, dst.index, dst.size)
    result, flags = _SOURCE[insn.operation](dst.size, old, source, regs.rflags)
    regs.rflags = flags
    write_reg(regs, dst.index, dst.size, result)
    advance(regs, insn)


def three(regs: Regs, insn: Insn, bus: Bus) -> None:
    """ANDN, BZHI, BEXTR, SHLX, SHRX, SARX, PEXT, PDEP, RORX: a register from two sources."""
    check_vex(regs)
    dst = insn.operands[0]
    first = load_operand(regs, insn, bus, insn.operands[1])
    second = load_operand(regs, insn, bus, insn.operands[2])
    result, regs.rflags = alu_wide.three(insn.mnemonic, dst.size, first, second, regs.rflags)
    write_reg(regs, dst.index, dst.size, result)
    advance(regs, insn)


def bit(regs: Regs, insn: Insn, bus: Bus) -> None:
    """BT, BTS, BTR, BTC."""
    dst = insn.operands[0]
    offset = load_operand(regs, insn, bus, insn.operands[1])
    function = _BINARY[insn.operation]
    writes = insn.operation != _BT
    size = dst.size
    if dst.kind == MEM:
        address = linear(regs, insn.segment, bit_offset(regs, insn), size, writes)
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


def double_shift(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SHLD and SHRD. A count of 0 writes nothing to memory, but reads it as a destination."""
    dst = insn.operands[0]
    size = dst.size
    old = load_operand(regs, insn, bus, dst, True)
    source = load_operand(regs, insn, bus, insn.operands[1])
    count = load_operand(regs, insn, bus, insn.operands[2])
    result, flags = alu_wide.double_shift(insn.mnemonic == "shld", size, old, source, count, regs.rflags)
    store_operand(regs, insn, bus, dst, result)
    regs.rflags = flags
    advance(regs, insn)


def multiply(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MUL, and IMUL with one operand: the accumulator times the source into rDX:rAX, or AX."""
    src = insn.operands[0]
    size = src.size
    source = load_operand(regs, insn, bus, src)
    low, high, flags = alu_wide.multiply(insn.mnemonic == "imul", size, read_reg(regs, RAX, size), source, regs.rflags)
    _write_pair(regs, size, low, high)
    regs.rflags = flags
    advance(regs, insn)


def _write_pair(regs: Regs, size: int, low: int, high: int) -> None:
    if size == 1:
        write_reg(regs, RAX, 2, high << 8 | low)
    else:
        write_reg(regs, RAX, size, low)
        write_reg(regs, RDX, size, high)


def signed_multiply(regs: Regs, insn: Insn, bus: Bus) -> None:
    """IMUL in its three forms."""
    operands = insn.operands
    if len(operands) == 1:
        multiply(regs, insn, bus)
        return
    dst = operands[0]
    size = dst.size
    left = load_operand(regs, insn, bus, operands[len(operands) - 2])
    right = load_operand(regs, insn, bus, operands[len(operands) - 1])
    low, _, flags = alu_wide.multiply(True, size, left, right, regs.rflags)
    write_reg(regs, dst.index, size, low)
    regs.rflags = flags
    advance(regs, insn)


def multiply_without_flags(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MULX: rDX times the source; the high half wins if the two destinations are one register."""
    check_vex(regs)
    high = insn.operands[0]
    low = insn.operands[1]
    size = high.size
    product = read_reg(regs, RDX, size) * load_operand(regs, insn, bus, insn.operands[2])
    write_reg(regs, low.index, size, product & alu.mask(size))
    write_reg(regs, high.index, size, product >> 8 * size)
    advance(regs, insn)


def divide(regs: Regs, insn: Insn, bus: Bus) -> None:
    """DIV and IDIV of rDX:rAX, or AX. #DE for a zero divisor and a quotient that does not fit. Flags are left alone."""
    src = insn.operands[0]
    size = src.size
    divisor = load_operand(regs, insn, bus, src)
    bits = 8 * size
    if size == 1:
        dividend = read_reg(regs, RAX, 2)
    else:
        dividend = read_reg(regs, RDX, size) << bits | read_reg(regs, RAX, size)
    quotient, remainder = alu_wide.divide(insn.mnemonic == "idiv", size, dividend, divisor)
    _write_pair(regs, size, quotient, remainder)
    advance(regs, insn)


def xadd(regs: Regs, insn: Insn, bus: Bus) -> None:
    """XADD."""
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


def cmpxchg(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CMPXCHG."""
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


def cmpxchg_pair(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CMPXCHG8B and CMPXCHG16B."""
    dst = insn.operands[0]
    half = dst.size // 2
    bits = 8 * half
    address = operand_address(regs, insn, dst.size, True)
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


def byte_swap(regs: Regs, insn: Insn, bus: Bus) -> None:
    """BSWAP. A 16-bit operand, which the SDM leaves undefined, becomes zero as on current CPUs."""
    dst = insn.operands[0]
    size = dst.size
    value = alu_wide.swap_bytes(read_reg(regs, dst.index, size), size) if size > 2 else 0
    write_reg(regs, dst.index, size, value)
    advance(regs, insn)


def move_swapped(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOVBE."""
    dst = insn.operands[0]
    value = load_operand(regs, insn, bus, insn.operands[1])
    store_operand(regs, insn, bus, dst, alu_wide.swap_bytes(value, dst.size))
    advance(regs, insn)


def crc32(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CRC32, of the polynomial 11EDC6F41."""
    dst = insn.operands[0]
    src = insn.operands[1]
    value = alu_wide.crc32(regs.gpr[dst.index] & 0xFFFFFFFF, load_operand(regs, insn, bus, src), src.size)
    write_reg(regs, dst.index, dst.size, value)
    advance(regs, insn)


def extend_accumulator(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CBW, CWDE, CDQE."""
    half = insn.size // 2
    write_reg(regs, RAX, insn.size, alu.sign_extend(read_reg(regs, RAX, half), half, insn.size))
    advance(regs, insn)


def extend_into_rdx(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CWD, CDQ, CQO."""
    size = insn.size
    negative = read_reg(regs, RAX, size) >> (8 * size - 1)
    write_reg(regs, RDX, size, alu.mask(size) if negative else 0)
    advance(regs, insn)


def setcc(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SETcc."""
    store_operand(regs, insn, bus, insn.operands[0], 1 if condition(regs.rflags, insn.condition) else 0)
    advance(regs, insn)


def cmovcc(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CMOVcc: the source is read, and a 32-bit destination zero-extended, whatever the condition."""
    dst = insn.operands[0]
    value = load_operand(regs, insn, bus, insn.operands[1])
    if not condition(regs.rflags, insn.condition):
        value = read_reg(regs, dst.index, dst.size)
    write_reg(regs, dst.index, dst.size, value)
    advance(regs, insn)


def decimal(regs: Regs, insn: Insn, bus: Bus) -> None:
    """DAA, DAS, AAA, AAS, AAM, AAD: the BCD adjustments of AL and AX."""
    operand = insn.operands[0].value if insn.operands else 0
    if insn.mnemonic == "aam" and operand == 0:
        raise Fault(VECTOR_DE)
    ax, regs.rflags = alu_wide.decimal(insn.mnemonic, read_reg(regs, RAX, 2), operand, regs.rflags)
    write_reg(regs, RAX, 2, ax)
    advance(regs, insn)


def set_al_on_carry(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SALC."""
    write_reg(regs, RAX, 1, 0xFF if regs.rflags & FLAG_CF else 0)
    advance(regs, insn)


def bound(regs: Regs, insn: Insn, bus: Bus) -> None:
    """BOUND: #BR unless the index lies between the two signed bounds."""
    size = insn.operands[0].size
    address = operand_address(regs, insn, 2 * size)
    lower = alu.signed(bus.load(regs, address, size, False, False), size)
    upper = alu.signed(bus.load(regs, address + size, size, False, False), size)
    index = alu.signed(read_reg(regs, insn.operands[0].index, size), size)
    if not lower <= index <= upper:
        raise Fault(VECTOR_BR)
    advance(regs, insn)


def load_flags_into_ah(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LAHF."""
    write_reg(regs, RAX, 1, regs.rflags & 0xFF, True)
    advance(regs, insn)


def store_ah_into_flags(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SAHF."""
    ah = read_reg(regs, RAX, 1, True)
    kept = ~(alu.ARITHMETIC_FLAGS & ~FLAG_OF)
    regs.rflags = regs.rflags & kept | ah & (alu.ARITHMETIC_FLAGS & ~FLAG_OF)
    advance(regs, insn)
