"""What CPUID says: the CPU whose instructions the opcode tables list (SDM vol. 2, CPUID)."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.state import Regs


def _bits(*numbers: int) -> int:
    value = 0
    for number in numbers:
        value |= 1 << number
    return value


# Leaf 1, EDX: FPU, DE, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV, PAT, PSE-36, CLFSH, MMX, FXSR, SSE, SSE2.
_EDX1: Final = _bits(0, 2, 3, 4, 5, 6, 8, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26)
# Leaf 1, ECX: SSE3, CX16, PCID, SSE4.2, MOVBE, POPCNT, XSAVE, OSXSAVE, AVX.
_ECX1: Final = _bits(0, 13, 17, 20, 22, 23, 26, 27, 28)
# Leaf 7, EBX: FSGSBASE, BMI1, SMEP, BMI2, INVPCID, ADX, SMAP, CLFLUSHOPT, CLWB.
_EBX7: Final = _bits(0, 3, 7, 8, 10, 19, 20, 23, 24)
# Leaf 7, ECX: UMIP, PKU, OSPKE, LA57, RDPID, MOVDIRI.
_ECX7: Final = _bits(2, 3, 4, 16, 22, 27)
# Leaf 80000001, ECX: LAHF in 64-bit code, LZCNT. EDX: SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
_ECX81: Final = _bits(0, 5)
_EDX81: Final = _bits(11, 20, 26, 27, 29)
_SIGNATURE: Final = 0x000306C3


def leaf(number: int, subleaf: int, regs: Regs) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX and EDX of leaf ``number``; leaves beyond the last one read as zero."""
    if number == 0:
        return 0xD, 0x756E6547, 0x6C65746E, 0x49656E69
    if number == 1:
        return _SIGNATURE, 8 << 8, _ECX1, _EDX1
    if number == 7 and subleaf == 0:
        return 0, _EBX7, _ECX7, 0
    if number == 0xD:
        return _save_area(subleaf, regs)
    if number == 0x80000000:
        return 0x80000008, 0, 0, 0
    if number == 0x80000001:
        return _SIGNATURE, 0, _ECX81, _EDX81
    if number == 0x80000008:
        # MAXPHYADDR 52, linear addresses of 57 bits.
        return 57 << 8 | 52, 0, 0, 0
    return 0, 0, 0, 0


def _save_area(subleaf: int, regs: Regs) -> tuple[int, int, int, int]:
    """The layout of XSAVE: x87 and SSE in the first 576 bytes, AVX in the 256 behind them."""
    if subleaf == 0:
        return 7, 832 if regs.xcr0 & 4 else 576, 832, 0
    if subleaf == 1:
        # XSAVEOPT and XSAVEC.
        return 3, 832 if regs.xcr0 & 4 else 576, 0, 0
    if subleaf == 2:
        return 256, 576, 0, 0
    return 0, 0, 0, 0
