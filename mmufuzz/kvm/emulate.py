"""KVM's instruction emulator (emulate.c): the fetch, and the order in which an instruction is checked, reads,
executes and writes. What executes is in ``emulate_alu``, ``emulate_stack``, ``emulate_far`` and ``emulate_system``.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SIZE
from mmufuzz.kvm.emulate_checks import check_enabled
from mmufuzz.kvm.emulate_ctxt import (
    MEM,
    MEM_STR,
    MM,
    MODE_PROT64,
    REG,
    XMM,
    Operand,
    X86EmulateCtxt,
    address_mask,
    assign_reg,
    code_address,
    code_limit,
    register_address_increment,
    segmented_cmpxchg,
    segmented_read,
    segmented_write,
)
from mmufuzz.kvm.emulate_decode import NeedsBytes, decode
from mmufuzz.kvm.emulate_handlers import EXECUTE
from mmufuzz.kvm.emulate_operands import set_operands
from mmufuzz.kvm.emulate_ops import CmpxchgFailed, EmulationFailed, IoNeeded
from mmufuzz.kvm.opcode_table import (
    EMULATE_ON_UD,
    LOCK,
    MOV,
    MOVBE66,
    NO_ACCESS,
    NO_WRITE,
    OP_DI,
    OP_MEM_FAR,
    OP_SI,
    PAGE_TABLE,
    SRC_WRITE,
    STRING,
    UNUSUAL,
)
from mmufuzz.x86 import alu
from mmufuzz.x86.execute_operands import MASK32, MASK64, RCX, RDI, RSI
from mmufuzz.x86.execute_vector import write_mmx
from mmufuzz.x86.state import FLAG_DF, FLAG_RF, FLAG_ZF, PFERR_WRITE, VECTOR_GP, VECTOR_PF, VECTOR_UD, Fault

EMULATION_OK: Final = 0
EMULATION_FAILED: Final = 1
EMULATION_RESTART: Final = 2

MAX_FETCH: Final = 15
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
    ea = ctxt.eip + done
    if ea >= alu.SHORT:
        ea &= MASK64
    linear = code_address(ctxt, ea)
    in_page = PAGE_SIZE - (linear & PAGE_SIZE - 1)
    size = min(min(MAX_FETCH - done, in_page), code_limit(ctxt, ea))  # noqa: PLW3301 - mypyc knows min() of two
    if size < wanted:
        raise Fault(VECTOR_GP, 0)
    return ctxt.ops.fetch(linear, size)


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
        ctxt.exception = fault.with_traceback(None)
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
    ctxt.completed = not ctxt.hypercall_fixed
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
        if size < 8:
            operand.val &= alu.mask(size)
        elif operand.val < 0:
            # A sign-extended immediate.
            operand.val &= MASK64
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
    """emulate.c:writeback_registers: the vCPU gets the cache, which has to be filled anew before it is used again."""
    ctxt.regs.gpr = ctxt.gpr


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
        ctxt.gpr = ctxt.gpr[:]
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
