"""What KVM's emulator is expected to leave where it deviates: results, stack, encodings, strings.

One function for each deviation, here and in ``emulator_expected_system``, ``_segments`` and ``_far``, answers the
comparison with the deviation made good: with what KVM leaves in place of what hardware leaves (``expecting``), or with
states or an instruction of which hardware makes the same as KVM of the real ones (``translated``). None if the
deviation has nothing to do with the instruction. What still differs then is something else.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import PORT, READ, SYSTEM, WRITE, Access
from mmufuzz.kvm.opcode_table import MMX
from mmufuzz.oracle.emulator_compare import (
    ADDRESS,
    ERROR_CODE,
    FAULT,
    MEMORY,
    Comparison,
    expecting,
    hardware_decode,
    translated,
)
from mmufuzz.x86 import alu
from mmufuzz.x86.decode import Truncated, Unsupported
from mmufuzz.x86.execute_operands import MASK32, MASK64, RAX, RCX, RDI, RDX, RSP, linear
from mmufuzz.x86.execute_vector import enter_mmx
from mmufuzz.x86.insn import ES, IMM, TR, Insn, Operand, renamed
from mmufuzz.x86.opcodes import MNEMONICS
from mmufuzz.x86.paging import CR4_LA57
from mmufuzz.x86.state import (
    FLAG_DF,
    FLAG_IF,
    FLAG_ZF,
    SHADOW_STI,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
    Fault,
    Segment,
)

_R8: Final = 8
_TSS_LIMIT: Final = 0x67
"""Of the smallest TSS of 32 or 64 bits."""


def segment_fault(made: Comparison) -> bool:
    """The emulator raised #GP(0) or #SS(0)."""
    fault = made.fault
    return fault is not None and fault.vector in (VECTOR_GP, VECTOR_SS) and fault.error_code == 0


def operand_fault(made: Comparison) -> bool:
    """The emulator may have found no more than that its memory operand cannot be accessed."""
    return made.decoded.in_memory and (made.emulated_vector == VECTOR_PF or segment_fault(made))


def low_half_end(made: Comparison) -> int:
    """The first address that is not canonical in 64-bit code."""
    return 1 << (56 if made.after.cr4 & CR4_LA57 else 47)


def again(made: Comparison, insn: Insn) -> Comparison:
    return translated(made, insn, made.origin(), made.after, made.accesses)


def without(made: Comparison, insn: Insn, cr0: int = 0, cr4: int = 0, efer: int = 0) -> Comparison:
    """The comparison made again with these bits of the control registers clear, before and after."""
    regs = made.origin()
    after = made.after.copy()
    for each in (regs, after):
        each.cr0 &= ~cr0
        each.cr4 &= ~cr4
        each.efer &= ~efer
    return translated(made, insn, regs, after, made.accesses)


def resized(insn: Insn, size: int, place: int = 0) -> Insn:
    """``insn`` with an operand of ``size`` bytes, the one at ``place``."""
    other = renamed(insn, insn.mnemonic, insn.operation)
    operand = insn.operands[place]
    other.operands = insn.operands[:]
    other.operands[place] = Operand(operand.kind, size, operand.index, operand.value)
    return other


# Results.


def tzcnt(made: Comparison) -> Comparison | None:
    """TZCNT and LZCNT as BSF and BSR."""
    insn = made.insn
    if insn is None or insn.mnemonic not in ("tzcnt", "lzcnt"):
        return None
    name = "bsf" if insn.mnemonic == "tzcnt" else "bsr"
    return again(made, renamed(insn, name, MNEMONICS.index(name)))


def bsf_zero(made: Comparison) -> Comparison | None:
    """BSF and BSR of zero: the general registers as they were."""
    insn = made.insn
    if insn is None or insn.mnemonic not in ("bsf", "bsr") or not made.expected.rflags & FLAG_ZF:
        return None
    regs = made.expected.copy()
    regs.gpr = made.gpr[:]
    return expecting(made, regs, ())


def rep_end(made: Comparison) -> Comparison | None:
    """A repetition that neither side ends with a fault: RIP as it was, and no interrupt shadow any more."""
    if not made.repeated or made.emulated_vector >= 0 or made.expected_vector >= 0:
        return None
    regs = made.expected.copy()
    regs.rip = made.start
    regs.shadow = 0
    return expecting(made, regs, ())


def rep_flags(made: Comparison) -> Comparison | None:
    """REP CMPS and SCAS that fault: RFLAGS as they were."""
    if not made.repeated or made.decoded.name not in ("cmps", "scas") or made.emulated_vector < 0:
        return None
    regs = made.expected.copy()
    regs.rflags = made.rflags
    return expecting(made, regs, ())


def cmpxchg_register(made: Comparison) -> Comparison | None:
    """CMPXCHG of a 32-bit register: its upper half is zero."""
    insn = made.decoded
    if insn.name != "cmpxchg" or insn.in_memory or insn.op_bytes != 4:
        return None
    regs = made.expected.copy()
    regs.gpr[insn.modrm_rm] &= MASK32
    return expecting(made, regs, ())


def movsxd_read(made: Comparison) -> Comparison | None:
    """MOVSXD of 16 bits from memory that cannot be accessed: the fault of 4 bytes."""
    insn = made.insn
    if insn is None or insn.mnemonic != "movsxd" or made.decoded.op_bytes != 2 or not operand_fault(made):
        return None
    return again(made, resized(insn, 4, 1))


def pause_rex(made: Comparison) -> Comparison | None:
    """PAUSE with REX.B: XCHG of R8 and rAX."""
    insn = made.decoded
    if insn.entry.opcode != 0x90 or insn.entry.map != 1 or insn.rep != 0xF3 or not insn.rex & 1:
        return None
    regs = made.expected.copy()
    size = insn.op_bytes
    mask = alu.mask(size)
    kept = 0 if size >= 4 else MASK64 & ~mask
    regs.gpr[RAX] = made.gpr[RAX] & kept | made.gpr[_R8] & mask
    regs.gpr[_R8] = made.gpr[_R8] & kept | made.gpr[RAX] & mask
    return expecting(made, regs, ())


def sti_shadow(made: Comparison) -> Comparison | None:
    """STI with IF set: the shadow of STI."""
    if made.decoded.name != "sti" or made.emulated_vector >= 0 or not made.rflags & FLAG_IF:
        return None
    regs = made.expected.copy()
    regs.shadow = SHADOW_STI & ~made.shadow
    return expecting(made, regs, ())


def mmx_fault(made: Comparison) -> Comparison | None:
    """An MMX store that faults: the x87's state is that of MMX."""
    if not made.decoded.d & MMX or not operand_fault(made):
        return None
    regs = made.expected.copy()
    enter_mmx(regs)
    return expecting(made, regs, ())


# The stack.


def enter_size(made: Comparison) -> Comparison | None:
    """ENTER: operands as wide as the stack."""
    insn = made.insn
    if insn is None or made.decoded.name != "enter":
        return None
    width = _stack_width(made)
    if insn.size == width:
        return None
    other = renamed(insn, insn.mnemonic, insn.operation)
    other.size = width
    return again(made, other)


def _stack_width(made: Comparison) -> int:
    return 8 if made.mode64 else 2 if made.origin().stack16 else 4


def enter_top(made: Comparison) -> Comparison | None:
    """ENTER: as if it reserved nothing, so that only what is pushed must be writable."""
    insn = made.insn
    if insn is None or made.decoded.name != "enter" or made.emulated_vector >= 0:
        return None
    reserved = insn.operands[0].value
    other = renamed(insn, insn.mnemonic, insn.operation)
    other.operands = [Operand(IMM, insn.operands[0].size, 0, 0), *insn.operands[1:]]
    after = made.after.copy()
    mask = alu.mask(_stack_width(made))
    after.gpr[RSP] = after.gpr[RSP] & ~mask | after.gpr[RSP] + reserved & mask
    return translated(made, other, made.origin(), after, made.accesses)


def pusha_stores(made: Comparison) -> Comparison | None:
    """PUSHA that faults: the stores before that one."""
    if made.decoded.name != "pusha" or made.emulated_vector < 0 or not made.bus.same_writes():
        return None
    return expecting(made, made.expected, (MEMORY,))


# Encodings.

_PREFIXES: Final = (0x66, 0xF2, 0xF3)
_OTHER_PREFIXES: Final = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67, 0xF0)


def undefined_prefix(made: Comparison) -> Comparison | None:
    """FXSAVE, FXRSTOR, MOVNTI and XSETBV with 66, F2 or F3: as without."""
    undefined = made.insn is None and made.expected_vector == VECTOR_UD
    if not undefined or made.decoded.name not in ("fxsave", "fxrstor", "movnti", "xsetbv"):
        return None
    kept: list[int] = []
    rex: list[int] = []
    place = 0
    while True:
        byte = made.code[place]
        if made.mode64 and byte & 0xF0 == 0x40:
            rex = [byte]
        elif byte in _PREFIXES or byte in _OTHER_PREFIXES:
            # A REX before another prefix has no effect.
            rex = []
            if byte not in _PREFIXES:
                kept.append(byte)
        else:
            break
        place += 1
    kept += rex
    dropped = place - len(kept)
    try:
        insn = hardware_decode(bytes(kept) + made.code[place:], made.bits)
    except (Fault, Truncated, Unsupported):
        return None
    insn = renamed(insn, insn.mnemonic, insn.operation)
    insn.length += dropped
    return again(made, insn)


# Ports.

_PORT_NAMES: Final = ("in", "ins", "out", "outs")
_IO_BITMAP_PLACE: Final = 0x66
"""Offset in the TSS of the field that says where the I/O bitmap begins."""


def io_bitmap(made: Comparison) -> Comparison | None:
    """An I/O bitmap of a 16-bit TSS, or whose last byte is the TSS's last: as in a 32-bit TSS of a byte more."""
    insn = made.insn
    tss = made.after.segments[TR]
    if insn is None or made.decoded.name not in _PORT_NAMES or tss.limit < _TSS_LIMIT:
        return None
    if made.expected_vector != VECTOR_GP or made.emulated_vector == VECTOR_GP:
        return None
    regs = made.origin()
    after = made.after.copy()
    regs.segments[TR] = Segment(tss.selector, tss.base, tss.limit + 1, tss.rights | 8)
    after.segments[TR] = regs.segments[TR].copy()
    return translated(made, insn, regs, after, made.accesses)


def io_bitmap_fault(made: Comparison) -> Comparison | None:
    """An I/O bitmap, or its place in the TSS, that was asked for and cannot be read: #GP(0)."""
    if made.decoded.name not in _PORT_NAMES or made.emulated_vector != VECTOR_GP or made.expected_vector >= 0:
        return None
    read = made.accesses
    count = len(read)
    if not 0 < count <= 2 or not segment_fault(made) or read[count - 1].kind != READ | SYSTEM:
        return None
    place = _IO_BITMAP_PLACE if count == 1 else read[0].value + (_port(made) >> 3)
    failed = read[count - 1]
    if failed.value >= 0 or failed.gva != made.after.segments[TR].base + place or failed.size != 2:
        return None
    return expecting(made, made.origin(), FAULT)


def _port(made: Comparison) -> int:
    immediate = made.decoded.entry.opcode in (0xE4, 0xE5, 0xE6, 0xE7)
    return made.decoded.imm & 0xFF if immediate else made.gpr[RDX] & 0xFFFF


def read_ahead(made: Comparison) -> Comparison | None:
    """REP INS that has read several elements: they are stored in one piece or not at all, and in a row."""
    insn = made.decoded
    if not made.repeated or insn.name != "ins" or made.rflags & FLAG_DF:
        return None
    return _piece_fault(made) if made.emulated_vector >= 0 else _piece_wraps(made)


def _read_from_port(made: Comparison) -> list[Access]:
    return [access for access in made.accesses if access.kind == PORT]


def _piece_fault(made: Comparison) -> Comparison | None:
    """Hardware stores some elements of the piece that faults. One that does not fault ends the emulation."""
    mask = alu.mask(made.decoded.ad_bytes)
    ports = _read_from_port(made)
    if not ports or made.bus.writes or made.emulated_vector not in (VECTOR_PF, VECTOR_GP, VECTOR_SS):
        return None
    size = ports[0].size
    ahead = made.after.gpr[RCX] - made.expected.gpr[RCX] & mask
    if not ahead and _beyond_the_segment(made, len(ports) * size):
        return expecting(made, made.expected, FAULT)
    if not 0 < ahead <= len(ports):
        return None
    regs = made.expected.copy()
    for index, by in ((RCX, ahead), (RDI, -ahead * size)):
        regs.gpr[index] = regs.gpr[index] & ~mask | regs.gpr[index] + by & mask
    if _has_an_end(made, regs.gpr[RDI] & mask, len(ports) * size):
        return expecting(made, regs, (*FAULT, MEMORY))
    return expecting(made, regs, (MEMORY, ERROR_CODE, ADDRESS))


def _has_an_end(made: Comparison, start: int, size: int) -> bool:
    """A piece runs past the width of the address, where elements go on at the beginning, or where none may be."""
    ends = (alu.mask(made.decoded.ad_bytes) + 1, low_half_end(made))
    return any(start < end < start + size for end in ends)


def _beyond_the_segment(made: Comparison, size: int) -> bool:
    """ES ends within the piece, which is refused before any of it is stored; hardware stores the first element."""
    regs = made.expected
    try:
        linear(regs, ES, regs.gpr[RDI] & alu.mask(made.decoded.ad_bytes), size, True)
    except Fault:
        return segment_fault(made) and made.expected_vector < 0
    return False


def _piece_wraps(made: Comparison) -> Comparison | None:
    """Hardware does not store the elements in a row."""
    insn = made.decoded
    mask = alu.mask(insn.ad_bytes)
    ports = _read_from_port(made)
    values = [access.value for access in ports]
    size = ports[0].size if ports else 0
    regs = made.origin()
    base = 0 if made.mode64 else regs.segments[ES].base
    wraps = MASK64 if made.mode64 else MASK32
    start = regs.gpr[RDI] & mask
    if not _has_an_end(made, start, len(values) * size):
        return None
    stored = {}
    for access in made.accesses:
        if access.kind == WRITE:
            if access.size % size:
                return None
            for place in range(access.size // size):
                stored[access.gva + place * size & wraps] = access.value >> 8 * size * place & alu.mask(size)
    if stored != {base + start + place * size & wraps: value for place, value in enumerate(values)}:
        return None
    for index, by in ((RCX, -len(values)), (RDI, len(values) * size)):
        moved = regs.gpr[index] + by & mask
        regs.gpr[index] = moved if insn.ad_bytes >= 4 else regs.gpr[index] & ~mask | moved
    regs.shadow = 0
    return expecting(made, regs, (*FAULT, MEMORY))
