"""Model-specific registers, CPUID, the time-stamp counter, XCR0 and PKRU."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import cpuid
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import (
    MASK32,
    RAX,
    RBX,
    RCX,
    RDX,
    advance,
    is_canonical,
    read_reg,
    require_cpl0,
    write_reg,
)
from mmufuzz.x86.insn import FS, GS, Insn
from mmufuzz.x86.state import (
    CR4_TSD,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    MSR_CSTAR,
    MSR_EFER,
    MSR_FMASK,
    MSR_FS_BASE,
    MSR_GS_BASE,
    MSR_KERNEL_GS_BASE,
    MSR_LSTAR,
    MSR_PAT,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    MSR_TSC,
    MSR_TSC_AUX,
    VECTOR_GP,
    VECTOR_UD,
    Fault,
    Regs,
)

_CR4_PKE: Final = 1 << 22
_ADDRESSES: Final = (
    MSR_SYSENTER_ESP,
    MSR_SYSENTER_EIP,
    MSR_LSTAR,
    MSR_CSTAR,
    MSR_KERNEL_GS_BASE,
)
_PLAIN: Final = (MSR_TSC, MSR_SYSENTER_CS, MSR_STAR, MSR_FMASK, MSR_PAT, MSR_TSC_AUX)
_PAT_RESET: Final = 0x0007040600070406
_EFER_KNOWN: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX


def identify(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CPUID: the CPU that the opcode tables describe."""
    answer = cpuid.leaf(read_reg(regs, RAX, 4), read_reg(regs, RCX, 4), regs)
    for index, value in zip((RAX, RBX, RCX, RDX), answer, strict=True):
        regs.gpr[index] = value
    advance(regs, insn)


def time_stamp(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RDTSC and RDTSCP; #GP(0) if CR4.TSD reserves them for CPL 0."""
    if regs.cr4 & CR4_TSD and regs.cpl != 0:
        raise Fault(VECTOR_GP, 0)
    value = bus.read_tsc(regs)
    regs.gpr[RAX] = value & MASK32
    regs.gpr[RDX] = value >> 32
    if insn.mnemonic == "rdtscp":
        regs.gpr[RCX] = regs.msr.get(MSR_TSC_AUX, 0)
    advance(regs, insn)


def processor_id(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RDPID."""
    operand = insn.operands[0]
    write_reg(regs, operand.index, operand.size, regs.msr.get(MSR_TSC_AUX, 0))
    advance(regs, insn)


def performance_counter(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RDPMC: there are no counters."""
    raise Fault(VECTOR_GP, 0)


def read_msr(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RDMSR."""
    require_cpl0(regs)
    value = get_msr(regs, bus, read_reg(regs, RCX, 4))
    regs.gpr[RAX] = value & MASK32
    regs.gpr[RDX] = value >> 32
    advance(regs, insn)


def get_msr(regs: Regs, bus: Bus, number: int) -> int:
    """What RDMSR of ``number`` reads; #GP(0) for an MSR that does not exist."""
    if number == MSR_EFER:
        return regs.efer
    if number == MSR_FS_BASE:
        return regs.segments[FS].base
    if number == MSR_GS_BASE:
        return regs.segments[GS].base
    if number == MSR_TSC:
        return bus.read_tsc(regs)
    if number in _ADDRESSES or number in _PLAIN:
        return regs.msr.get(number, _PAT_RESET if number == MSR_PAT else 0)
    raise Fault(VECTOR_GP, 0)


def write_msr(regs: Regs, insn: Insn, bus: Bus) -> None:
    """WRMSR, which serialises."""
    require_cpl0(regs)
    bus.fence(regs)
    set_msr(regs, bus, read_reg(regs, RCX, 4), read_reg(regs, RDX, 4) << 32 | read_reg(regs, RAX, 4))
    advance(regs, insn)


def set_msr(regs: Regs, bus: Bus, number: int, value: int) -> None:
    """Write an MSR, with the checks of each (SDM vol. 4, table 2-2); #GP(0) where they fail."""
    if number == MSR_EFER:
        if value & ~_EFER_KNOWN or ((value ^ regs.efer) & EFER_LME and regs.cr0 >> 31):
            raise Fault(VECTOR_GP, 0)
        # LMA is read-only: writes to it are ignored.
        bus.write_efer(regs, value & ~EFER_LMA | regs.efer & EFER_LMA)
    elif number in (MSR_FS_BASE, MSR_GS_BASE) or number in _ADDRESSES:
        if not is_canonical(regs, value):
            raise Fault(VECTOR_GP, 0)
        if number == MSR_FS_BASE:
            regs.segments[FS].base = value
        elif number == MSR_GS_BASE:
            regs.segments[GS].base = value
        else:
            regs.msr[number] = value
    elif number in _PLAIN:
        if not _plain_allows(number, value):
            raise Fault(VECTOR_GP, 0)
        regs.msr[number] = value
    else:
        raise Fault(VECTOR_GP, 0)


def _plain_allows(number: int, value: int) -> bool:
    if number == MSR_PAT:
        return all(value >> 8 * place & 0xFF in (0, 1, 4, 5, 6, 7) for place in range(8))
    if number in (MSR_TSC_AUX, MSR_FMASK):
        return value <= MASK32
    return True


def extended_control(regs: Regs, insn: Insn, bus: Bus) -> None:
    """XGETBV and XSETBV of XCR0: x87, SSE, AVX."""
    if read_reg(regs, RCX, 4) != 0:
        raise Fault(VECTOR_GP, 0)
    if insn.mnemonic == "xgetbv":
        regs.gpr[RAX] = regs.xcr0
        regs.gpr[RDX] = 0
    else:
        require_cpl0(regs)
        value = read_reg(regs, RDX, 4) << 32 | read_reg(regs, RAX, 4)
        if value not in (1, 3, 7):
            raise Fault(VECTOR_GP, 0)
        regs.xcr0 = value
    advance(regs, insn)


def protection_keys(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RDPKRU and WRPKRU."""
    if not regs.cr4 & _CR4_PKE:
        raise Fault(VECTOR_UD)
    if read_reg(regs, RCX, 4) != 0 or (insn.mnemonic == "wrpkru" and read_reg(regs, RDX, 4) != 0):
        raise Fault(VECTOR_GP, 0)
    if insn.mnemonic == "rdpkru":
        regs.gpr[RAX] = regs.pkru
        regs.gpr[RDX] = 0
    else:
        regs.pkru = read_reg(regs, RAX, 4)
    advance(regs, insn)
