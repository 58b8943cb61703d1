"""KVM's instruction emulator (emulate.c): fetch, operands, and the order in which an instruction is checked, reads,
executes and writes. What executes is in ``emulate_alu``, ``emulate_stack``, ``emulate_far`` and ``emulate_system``.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_checks import check_enabled
from mmufuzz.kvm.emulate_ctxt import (
    IMM,
    MASK32,
    MASK64,
    MEM,
    MEM_STR,
    MM,
    MODE_PROT64,
    NONE,
    RAX,
    RCX,
    RDI,
    RDX,
    REG,
    RSI,
    RSP,
    XMM,
    Operand,
    X86EmulateCtxt,
    address_mask,
    assign_reg,
    code_address,
    code_limit,
    effective_address,
    register_address_increment,
    segmented_cmpxchg,
    segmented_read,
    segmented_write,
)
from mmufuzz.kvm.emulate_decode import RIP, Decoded, NeedsBytes, decode
from mmufuzz.kvm.emulate_handlers import EXECUTE
from mmufuzz.kvm.emulate_ops import CmpxchgFailed, EmulationFailed, IoNeeded
from mmufuzz.kvm.opcode_table import (
    BIT_OP,
    BYTE_OP,
    EMULATE_ON_UD,
    INC_SP,
    LOCK,
    MEM_ABS,
    MMX,
    MODRM,
    MOV,
    MOVBE66,
    NO_ACCESS,
    NO_WRITE,
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
    PAGE_TABLE,
    SRC_WRITE,
    SSE,
    STRING,
    UNUSUAL,
)
from mmufuzz.x86 import alu
from mmufuzz.x86.execute_vector import write_mmx
from mmufuzz.x86.insn import ES
from mmufuzz.x86.state import FLAG_DF, FLAG_RF, FLAG_ZF, PFERR_WRITE, VECTOR_GP, VECTOR_PF, VECTOR_UD, Fault

EMULATION_OK: Final = 0
EMULATION_FAILED: Final = 1
EMULATION_RESTART: Final = 2

MAX_FETCH: Final = 15
PAGE_SIZE: Final = 4096
BATCH_MASK: Final = 0x3FF
"""REP leaves the emulator when these bits of RCX are zero."""

_LOW128: Final = (1 << 128) - 1


def x86_page_table_writing_insn(ctxt: X86EmulateCtxt) -> bool:
    """emulate.c:x86_page_table_writing_insn: opcodes taken for updates of page tables (reference section 5.3)."""
    return ctxt.d & PAGE_TABLE != 0


# Decoding.


def x86_decode_insn(ctxt: X86EmulateCtxt, trap_ud: bool) -> None:
    """emulate.c:x86_decode_insn: fetch at RIP as the tables are at this moment, decode, look at the registers.

    ``trap_ud``: only entries that may be emulated on #UD. Raises EmulationFailed for an opcode without entry, Fault for
    a fetch that the guest must see.
    """
    ctxt.init()
    bits = ctxt.bits
    code = _fetch_bytes(ctxt, 0, 1)
    try:
        insn = decode(code, bits)
    except NeedsBytes:
        while True:
            # One more fetch: the limit of the instruction, or of the segment, has been met otherwise.
            code += _fetch_bytes(ctxt, len(code), 1)
            try:
                insn = decode(code, bits)
                break
            except NeedsBytes:
                continue
    if trap_ud and not insn.d & EMULATE_ON_UD:
        raise EmulationFailed
    if insn.d & MOVBE66 and not ctxt.fixes.movbe66:
        raise EmulationFailed
    ctxt.code = code
    set_operands(ctxt, insn)


def _fetch_bytes(ctxt: X86EmulateCtxt, done: int, wanted: int) -> bytes:
    """emulate.c:__do_insn_fetch_bytes: up to 15 bytes, the end of the page, or of the segment. #GP(0) for fewer."""
    ea = ctxt.eip + done & MASK64
    linear = code_address(ctxt, ea)
    size = min(MAX_FETCH - done, code_limit(ctxt, ea), PAGE_SIZE - (linear & PAGE_SIZE - 1))
    if size < wanted:
        raise Fault(VECTOR_GP, 0)
    return ctxt.ops.fetch(linear, size)


def set_operands(ctxt: X86EmulateCtxt, insn: Decoded) -> None:
    """emulate.c:decode_operand of the source, the second source and the destination."""
    ctxt.insn = insn
    ctxt.d = insn.d
    ctxt.op_bytes = insn.op_bytes
    ctxt.lock_prefix = insn.lock
    ctxt.next_eip = ctxt.eip + insn.length & MASK64
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
        # RBX plus AL.
        operand.ea = address_mask(insn, ctxt.gpr[3] + (ctxt.gpr[RAX] & 0xFF))
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


# Execution.


def x86_emulate_insn(ctxt: X86EmulateCtxt) -> int:
    """emulate.c:x86_emulate_insn: EMULATION_OK, EMULATION_FAILED or EMULATION_RESTART.

    EMULATION_OK says no more than that the emulator is through: see ``have_exception``, ``cmpxchg_failed``,
    ``io_needed`` and ``completed``. Registers are the vCPU's only if none of the first three is set.
    """
    ctxt.mem_read_pos = 0
    try:
        return _emulate(ctxt)
    except Fault as fault:
        ctxt.have_exception = True
        ctxt.exception = fault
    except EmulationFailed:
        return EMULATION_FAILED
    except CmpxchgFailed:
        ctxt.cmpxchg_failed = True
    except IoNeeded:
        ctxt.io_needed = True
    return EMULATION_OK


def _emulate(ctxt: X86EmulateCtxt) -> int:
    """The order of checks and accesses (reference section 5.2)."""
    insn = ctxt.insn
    d = ctxt.d
    dst = ctxt.dst
    if ctxt.lock_prefix and (not d & LOCK or dst.type != MEM):
        raise Fault(VECTOR_UD)
    if insn.entry.src == OP_MEM_FAR and ctxt.src.type != MEM:
        raise Fault(VECTOR_UD)
    repeated = False
    if d & UNUSUAL:
        check_enabled(ctxt)
        repeated = insn.rep != 0 and d & STRING != 0
        if repeated and address_mask(insn, ctxt.gpr[RCX]) == 0:
            string_registers_quirk(ctxt)
            ctxt.eip = ctxt.next_eip
            ctxt.completed = True
            ctxt.eflags &= ~FLAG_RF
            writeback_registers(ctxt)
            return EMULATION_OK
    _read_operands(ctxt)
    dst_type = dst.type
    if repeated:
        ctxt.eflags |= FLAG_RF
    else:
        ctxt.eflags &= ~FLAG_RF
    EXECUTE[insn.entry.operation](ctxt)
    if d & SRC_WRITE:
        writeback(ctxt, ctxt.src)
    if not d & NO_WRITE:
        writeback(ctxt, dst)
    if d & STRING:
        # The operands are used again by the next iteration.
        dst.type = dst_type
        if _next_element(ctxt, repeated):
            return EMULATION_RESTART
        if repeated and not string_insn_completed(ctxt):
            writeback_registers(ctxt)
            return EMULATION_OK
        ctxt.eflags &= ~FLAG_RF
    ctxt.eip = ctxt.next_eip if ctxt.mode == MODE_PROT64 else ctxt.next_eip & MASK32
    ctxt.completed = True
    writeback_registers(ctxt)
    return EMULATION_OK


def _read_operands(ctxt: X86EmulateCtxt) -> None:
    """Sources first, then the destination unless it is only written. A #PF of the latter carries W."""
    d = ctxt.d
    src = ctxt.src
    if src.type == MEM and not d & NO_ACCESS:
        src.val = segmented_read(ctxt, src.segment, src.ea, src.bytes)
        src.orig_val = src.val
    src2 = ctxt.src2
    if src2.type == MEM:
        src2.val = segmented_read(ctxt, src2.segment, src2.ea, src2.bytes)
    dst = ctxt.dst
    if dst.type == MEM and not d & MOV:
        try:
            dst.val = segmented_read(ctxt, dst.segment, dst.ea, dst.bytes)
        except Fault as fault:
            if fault.vector == VECTOR_PF and not d & NO_WRITE:
                fault.error_code |= PFERR_WRITE
            raise
    dst.orig_val = dst.val


def writeback(ctxt: X86EmulateCtxt, operand: Operand) -> None:
    """emulate.c:writeback."""
    kind = operand.type
    if kind == REG:
        if operand.high8:
            value = ctxt.gpr[operand.reg] & ~0xFF00 | (operand.val & 0xFF) << 8
            ctxt.gpr[operand.reg] = value
        else:
            assign_reg(ctxt.gpr, operand.reg, operand.val, operand.bytes)
    elif kind == MEM:
        size = operand.bytes
        operand.val &= (1 << (size << 3)) - 1
        if ctxt.lock_prefix and ctxt.fixes.locked_atomic:
            segmented_cmpxchg(ctxt, operand)
        else:
            segmented_write(ctxt, operand.segment, operand.ea, size, operand.val)
    elif kind == MEM_STR:
        segmented_write(ctxt, operand.segment, operand.ea, operand.bytes * operand.count, operand.val)
    elif kind == XMM:
        ctxt.regs.xmm[operand.reg] = ctxt.regs.xmm[operand.reg] & ~_LOW128 | operand.val
    elif kind == MM:
        write_mmx(ctxt.regs, operand.reg, operand.val & MASK64)


def writeback_registers(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:writeback_registers: the cache goes to the vCPU."""
    ctxt.regs.gpr = ctxt.gpr
    ctxt.gpr = ctxt.gpr[:]


def emulator_invalidate_register_cache(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:emulator_invalidate_register_cache: before a decoded instruction runs again."""
    ctxt.gpr = ctxt.regs.gpr[:]
    ctxt.accesses.clear()
    ctxt.io_needed = False


# Strings.


def _next_element(ctxt: X86EmulateCtxt, repeated: bool) -> bool:
    """Move the pointers and count down; True if the next iteration follows without leaving the emulator."""
    entry = ctxt.insn.entry
    count = ctxt.dst.count
    if entry.src == OP_SI:
        count = ctxt.src.count
        _string_addr_inc(ctxt, RSI, ctxt.src)
    if entry.dst == OP_DI:
        _string_addr_inc(ctxt, RDI, ctxt.dst)
    if not repeated:
        return False
    register_address_increment(ctxt, RCX, -count)
    if string_insn_completed(ctxt):
        return False
    if ctxt.io_read_used:
        again = ctxt.io_read_pos != len(ctxt.io_read)
    else:
        again = ctxt.gpr[RCX] & BATCH_MASK != 0
    if again:
        ctxt.mem_read.clear()
        ctxt.mem_read_bytes = 0
        writeback_registers(ctxt)
    return again


def _string_addr_inc(ctxt: X86EmulateCtxt, index: int, operand: Operand) -> None:
    """emulate.c:string_addr_inc."""
    by = operand.count * operand.bytes
    register_address_increment(ctxt, index, -by if ctxt.eflags & FLAG_DF else by)
    operand.ea = address_mask(ctxt.insn, ctxt.gpr[index])


def string_insn_completed(ctxt: X86EmulateCtxt) -> bool:
    """emulate.c:string_insn_completed: what ends REPE and REPNE of CMPS and SCAS, beside the count."""
    insn = ctxt.insn
    if insn.b & 0xF6 != 0xA6:
        return False
    zero = ctxt.eflags & FLAG_ZF != 0
    return zero == (insn.rep == 0xF2)


def string_registers_quirk(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:string_registers_quirk: what Intel CPUs do to upper halves when ECX is zero."""
    if ctxt.insn.ad_bytes != 4 or not ctxt.fixes.rep_zero_quirk:
        return
    ctxt.gpr[RCX] = 0
    if ctxt.insn.b in (0xA4, 0xA5):
        ctxt.gpr[RSI] &= MASK32
    if ctxt.insn.b in (0xA4, 0xA5, 0xAA, 0xAB):
        ctxt.gpr[RDI] &= MASK32
