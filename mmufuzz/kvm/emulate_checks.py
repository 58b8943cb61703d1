"""What x86_emulate_insn checks before it accesses anything (emulate.c; reference section 5.2, steps 3 to 8)."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import (
    MM,
    MODE_PROT16,
    MODE_PROT64,
    MODE_REAL,
    NONE,
    Operand,
    X86EmulateCtxt,
    linear_read_system,
)
from mmufuzz.kvm.emulate_ops import EmulationFailed, IoNeeded
from mmufuzz.kvm.opcode_table import (
    CHECK_CR,
    CHECK_DR,
    CHECK_PERM,
    CHECK_SVM,
    CHECK_SVM_ADDRESS,
    CHECK_TSC,
    MMX,
    NO64,
    PRIV,
    PROT,
    SSE,
    UNDEFINED,
)
from mmufuzz.x86.execute_operands import MASK32, RAX
from mmufuzz.x86.execute_vector import enter_mmx
from mmufuzz.x86.execute_x87 import SUMMARY
from mmufuzz.x86.insn import TR
from mmufuzz.x86.state import (
    CR0_EM,
    CR0_TS,
    CR4_DE,
    CR4_TSD,
    RIGHTS_UNUSABLE,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_MF,
    VECTOR_NM,
    VECTOR_UD,
    Fault,
)

_DR7_GD: Final = 1 << 13
_DR6_BD: Final = 1 << 13
_DR6_TRAPS: Final = 0xF
_DR6_FIXED: Final = 0xFFFF0FF0
_CR4_PCE: Final = 1 << 8


def check_enabled(ctxt: X86EmulateCtxt) -> None:
    """No64 and Undefined; SSE and MMX state; Prot; Priv; check_perm. Intercepts by L1 are not modelled."""
    d = ctxt.d
    regs = ctxt.regs
    if d & UNDEFINED or (d & NO64 and ctxt.mode == MODE_PROT64):
        raise Fault(VECTOR_UD)
    if d & (SSE | MMX):
        _check_vector(ctxt)
    if d & PROT and ctxt.mode < MODE_PROT16:
        raise Fault(VECTOR_UD)
    if d & PRIV and regs.cpl:
        raise Fault(VECTOR_GP, 0)
    if d & CHECK_PERM:
        _check_perm(ctxt)


def _check_vector(ctxt: X86EmulateCtxt) -> None:
    """CR4.OSFXSR counts as set, as for the executor. Every MMX entry is a move: its destination is not read."""
    cr0 = ctxt.regs.cr0
    if cr0 & CR0_EM:
        raise Fault(VECTOR_UD)
    if cr0 & CR0_TS:
        raise Fault(VECTOR_NM)
    if ctxt.d & MMX:
        if ctxt.regs.fsw & SUMMARY:
            raise Fault(VECTOR_MF)
        _fetch_mmx(ctxt, ctxt.src)


def _fetch_mmx(ctxt: X86EmulateCtxt, operand: Operand) -> None:
    """emulate.c:fetch_possible_mmx_operand, which executes an MMX instruction on the guest's x87."""
    if operand.type == MM:
        enter_mmx(ctxt.regs)
        operand.val = ctxt.regs.fpr[operand.reg] & (1 << 64) - 1


def _check_perm(ctxt: X86EmulateCtxt) -> None:
    d = ctxt.d
    if d & CHECK_CR:
        if ctxt.insn.modrm_reg not in (0, 2, 3, 4, 8):
            raise Fault(VECTOR_UD)
    elif d & CHECK_DR:
        _check_dr(ctxt)
    elif d & CHECK_SVM:
        # EFER.SVME is never set.
        if d & CHECK_SVM_ADDRESS and ctxt.gpr[RAX] >> 48:
            raise Fault(VECTOR_GP, 0)
        raise Fault(VECTOR_UD)
    elif d & CHECK_TSC:
        if ctxt.regs.cr4 & CR4_TSD and ctxt.regs.cpl:
            raise Fault(VECTOR_GP, 0)
    elif ctxt.insn.name == "rdpmc":
        if not ctxt.regs.cr4 & _CR4_PCE and ctxt.regs.cpl:
            raise Fault(VECTOR_GP, 0)
    elif ctxt.insn.name in ("in", "ins"):
        # check_perm_in
        ctxt.dst.bytes = min(ctxt.dst.bytes, 4)
        _check_io(ctxt, ctxt.src.val & 0xFFFF, ctxt.dst.bytes)
    else:
        # check_perm_out
        ctxt.src.bytes = min(ctxt.src.bytes, 4)
        _check_io(ctxt, ctxt.dst.val & 0xFFFF, ctxt.src.bytes)


def _check_dr(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:check_dr_write, check_dr_read."""
    number = ctxt.insn.modrm_reg
    regs = ctxt.regs
    if ctxt.src.type != NONE and number in (6, 7) and ctxt.src.val > MASK32:
        raise Fault(VECTOR_GP, 0)
    if number > 7 or (number in (4, 5) and regs.cr4 & CR4_DE):
        raise Fault(VECTOR_UD)
    if regs.dr[7] & _DR7_GD:
        regs.dr[6] = regs.dr[6] & ~_DR6_TRAPS | _DR6_BD | _DR6_FIXED
        raise Fault(VECTOR_DB)


def bad_iopl(ctxt: X86EmulateCtxt) -> bool:
    """emulate.c:emulator_bad_iopl."""
    return ctxt.mode != MODE_REAL and ctxt.regs.cpl > ctxt.eflags >> 12 & 3


def _check_io(ctxt: X86EmulateCtxt, port: int, size: int) -> None:
    """emulate.c:emulator_io_permitted: #GP(0); once permitted, a repeated instruction does not ask again."""
    if ctxt.perm_ok:
        return
    if bad_iopl(ctxt) and not _io_port_access_allowed(ctxt, port, size):
        raise Fault(VECTOR_GP, 0)
    ctxt.perm_ok = True


def _io_port_access_allowed(ctxt: X86EmulateCtxt, port: int, size: int) -> bool:
    """emulate.c:emulator_io_port_access_allowed: the bitmap of the TSS. What cannot be read forbids."""
    tss = ctxt.regs.segments[TR]
    if tss.rights & RIGHTS_UNUSABLE or tss.limit < 103:
        return False
    try:
        place = linear_read_system(ctxt, tss.base + 102, 2) + (port >> 3)
        if place > tss.limit:
            return False
        bitmap = linear_read_system(ctxt, tss.base + place, 2)
    except (Fault, EmulationFailed, IoNeeded):
        return False
    return bitmap >> (port & 7) & (1 << size) - 1 == 0
