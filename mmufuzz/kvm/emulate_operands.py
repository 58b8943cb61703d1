"""The operands of a decoded instruction, with the registers as they are (emulate.c:decode_operand)."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import (
    IMM,
    MEM,
    MM,
    NONE,
    REG,
    XMM,
    Operand,
    X86EmulateCtxt,
    address_mask,
    effective_address,
)
from mmufuzz.kvm.emulate_decode import RIP, Decoded
from mmufuzz.kvm.opcode_table import (
    BIT_OP,
    BYTE_OP,
    INC_SP,
    MEM_ABS,
    MMX,
    MODRM,
    OP_ACC,
    OP_ACC_HI,
    OP_ACC_LO,
    OP_CL,
    OP_DI,
    OP_DX,
    OP_ES,
    OP_IMM,
    OP_MEM,
    OP_MEM8,
    OP_MEM16,
    OP_MEM32,
    OP_MEM64,
    OP_MEM_FAR,
    OP_NONE,
    OP_ONE,
    OP_REG,
    OP_SI,
    OP_XLAT,
    SSE,
)
from mmufuzz.x86 import alu
from mmufuzz.x86.execute_operands import MASK64, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from mmufuzz.x86.insn import ES

_LOW128: Final = (1 << 128) - 1


def set_operands(ctxt: X86EmulateCtxt, insn: Decoded) -> None:
    """emulate.c:decode_operand of the source, the second source and the destination."""
    ctxt.insn = insn
    ctxt.d = insn.d
    ctxt.op_bytes = insn.op_bytes
    ctxt.lock_prefix = insn.lock
    following = ctxt.eip + insn.length
    ctxt.next_eip = following if following < alu.SHORT else following & MASK64
    entry = insn.entry
    decode_operand(ctxt, ctxt.src, entry.src, insn.imm)
    if entry.src2 == OP_NONE:
        ctxt.src2.type = NONE
    else:
        decode_operand(ctxt, ctxt.src2, entry.src2, insn.imm2)
    decode_operand(ctxt, ctxt.dst, entry.dst, insn.imm2)
    if insn.base == RIP:
        _add_rip(ctxt, insn)


def _add_rip(ctxt: X86EmulateCtxt, insn: Decoded) -> None:
    """RIP-relative: RIP behind the immediates. The last operand that is the memory operand gets it, if there is one."""
    entry = insn.entry
    for operand, kind in ((ctxt.dst, entry.dst), (ctxt.src2, entry.src2), (ctxt.src, entry.src)):
        if OP_MEM <= kind <= OP_MEM_FAR:
            operand.ea = address_mask(insn, operand.ea + ctxt.next_eip)
            return
    if not ctxt.fixes.memopp_check:
        ctxt.ops.bug("x86_decode_insn", "NULL pointer dereference: a RIP-relative address without a memory operand")


def decode_operand(ctxt: X86EmulateCtxt, operand: Operand, kind: int, imm: int) -> None:
    """emulate.c:decode_operand: ``kind`` is an ``OP_`` of the tables, ``imm`` the immediate if it is one."""
    insn = ctxt.insn
    if kind == OP_NONE:
        operand.type = NONE
    elif kind == OP_REG:
        number = insn.modrm_reg if insn.d & MODRM else insn.b & 7 | (8 if insn.rex & 1 else 0)
        _register(ctxt, operand, number)
    elif OP_MEM <= kind <= OP_MEM_FAR:
        _memory(ctxt, operand, kind)
    elif kind in (OP_DI, OP_SI, OP_XLAT):
        _string_operand(ctxt, operand, kind)
    elif kind >= OP_ES:
        operand.type = IMM
        operand.val = kind - OP_ES
    elif kind >= OP_IMM or kind in (OP_CL, OP_ONE):
        operand.type = IMM
        operand.bytes = 1 if kind < OP_IMM or insn.d & BYTE_OP else insn.op_bytes
        operand.val = imm if kind >= OP_IMM else 1 if kind == OP_ONE else ctxt.gpr[RCX] & 0xFF
        operand.orig_val = operand.val
    else:
        _accumulator(ctxt, operand, kind)


def _register(ctxt: X86EmulateCtxt, operand: Operand, number: int) -> None:
    """emulate.c:decode_register_operand, and decode_modrm for a register."""
    d = ctxt.insn.d
    if d & (SSE | MMX):
        if d & SSE:
            operand.type = XMM
            operand.bytes = 16
            operand.reg = number
            operand.val = ctxt.regs.xmm[number] & _LOW128
        else:
            operand.type = MM
            operand.bytes = 8
            operand.reg = number & 7
        return
    operand.type = REG
    size = 1 if d & BYTE_OP else ctxt.insn.op_bytes
    _set_register(ctxt, operand, number, size)


def _set_register(ctxt: X86EmulateCtxt, operand: Operand, number: int, size: int) -> None:
    """emulate.c:decode_register, fetch_register_operand."""
    operand.bytes = size
    operand.high8 = size == 1 and 4 <= number < 8 and ctxt.insn.rex == 0
    if operand.high8:
        number -= 4
        operand.val = ctxt.gpr[number] >> 8 & 0xFF
    else:
        value = ctxt.gpr[number]
        operand.val = value if size == 8 else value & alu.mask(size)
    operand.reg = number
    operand.orig_val = operand.val


def _memory(ctxt: X86EmulateCtxt, operand: Operand, kind: int) -> None:
    """The ModRM operand, in memory or a register (emulate.c:decode_operand:mem_common)."""
    insn = ctxt.insn
    if kind == OP_MEM:
        size = 1 if insn.d & BYTE_OP else insn.op_bytes
    elif kind == OP_MEM8:
        size = 1
    elif kind == OP_MEM16:
        size = 2
    elif kind == OP_MEM32:
        size = 4
    elif kind == OP_MEM64:
        size = 16 if insn.op_bytes == 8 else 8
    else:
        size = insn.op_bytes + 2
    if not insn.in_memory:
        if kind == OP_MEM:
            _register(ctxt, operand, insn.modrm_rm)
        else:
            operand.type = REG
            _set_register(ctxt, operand, insn.modrm_rm, size if size <= 8 else insn.op_bytes)
        return
    operand.type = MEM
    operand.bytes = size
    operand.segment = insn.segment
    operand.ea = insn.displacement if insn.d & MEM_ABS else effective_address(ctxt, insn)
    operand.val = 0
    operand.count = 1
    if insn.d & (BIT_OP | INC_SP):
        if insn.d & INC_SP and insn.base == RSP:
            operand.ea = address_mask(insn, operand.ea + insn.op_bytes)
        if insn.d & BIT_OP and ctxt.src.type == REG:
            operand.ea = address_mask(insn, operand.ea + alu.bit_displacement(size, ctxt.src.val))


def _string_operand(ctxt: X86EmulateCtxt, operand: Operand, kind: int) -> None:
    """OpDI, OpSI, OpXLat. No prefix overrides ES."""
    insn = ctxt.insn
    operand.type = MEM
    operand.bytes = 1 if insn.d & BYTE_OP else insn.op_bytes
    operand.segment = ES if kind == OP_DI else insn.segment
    operand.val = 0
    operand.count = 1
    if kind == OP_XLAT:
        operand.ea = address_mask(insn, ctxt.gpr[RBX] + (ctxt.gpr[RAX] & 0xFF))
    else:
        operand.ea = address_mask(insn, ctxt.gpr[RDI if kind == OP_DI else RSI])


def _accumulator(ctxt: X86EmulateCtxt, operand: Operand, kind: int) -> None:
    """OpAcc, OpAccLo, OpAccHi, OpDX."""
    insn = ctxt.insn
    byte = insn.d & BYTE_OP != 0
    operand.type = REG
    operand.high8 = False
    if kind == OP_ACC:
        operand.reg = RAX
        operand.bytes = 1 if byte else insn.op_bytes
    elif kind == OP_ACC_LO:
        operand.reg = RAX
        operand.bytes = 2 if byte else insn.op_bytes
    elif kind == OP_ACC_HI:
        if byte:
            operand.type = NONE
            return
        operand.reg = RDX
        operand.bytes = insn.op_bytes
    else:
        assert kind == OP_DX
        operand.reg = RDX
        operand.bytes = 2
    operand.val = ctxt.gpr[operand.reg] & alu.mask(operand.bytes)
    operand.orig_val = operand.val
