"""The states in which inputs of the instruction harness begin.

The first byte of an input says which mode, and whether at CPL 3, with an IDT, and in an unusual state: one with
addresses at the ends of pages, segments, tables and the canonical halves, pages that are absent, and control bits at
random. The other bytes of the header are where the rest is drawn from.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.case.encodings import edge_value
from mmufuzz.case.rng import Rng
from mmufuzz.x86.flat_registers import initial_registers
from mmufuzz.x86.insn import CS, DS, ES, FS, GS, LDTR, SS, TR
from mmufuzz.x86.paging import CR4_LA57
from mmufuzz.x86.segments import install, refresh
from mmufuzz.x86.state import (
    CR0_AM,
    CR0_EM,
    CR0_MP,
    CR0_TS,
    CR4_DE,
    CR4_TSD,
    CR4_UMIP,
    EFER_LMA,
    EFER_LME,
    EFER_SCE,
    FLAG_AC,
    FLAG_DF,
    MSR_FMASK,
    MSR_LSTAR,
    MSR_STAR,
    MSR_SYSENTER_CS,
    MSR_SYSENTER_EIP,
    MSR_SYSENTER_ESP,
    RIGHTS_UNUSABLE,
    Regs,
    Segment,
)

MODES: Final = (64, 32, 16)
USER: Final = 1 << 2
HANDLED: Final = 1 << 3
UNUSUAL: Final = 1 << 5
"""Bits of the first byte: code at CPL 3; exceptions go through an IDT; an unusual state. Below them is the place in
``MODES``."""

HEADER: Final = 4
"""Bytes before the instructions."""

_MASK64: Final = (1 << 64) - 1
_TABLES: Final = 0x10000
"""Where GDT, IDT, LDT and TSS lie."""
_EDGES: Final = (
    *(0x3000, 0x4000, 0x5000, 0x3000, 0x4000, 1 << 16, 1 << 31, 1 << 32),
    *(1 << 47, 1 << 56, (1 << 64) - (1 << 47), (1 << 64) - (1 << 56), 1 << 64),
)
_FLAG_BITS: Final = (0, 2, 4, 6, 7, 8, 9, 11, 12, 13, 14, 18)
_LIMITS: Final = (0xFFFF, 0xFFF, 0x3007, 0x4003, 0xFFFFFFFF, 0x10003)
_BASES: Final = (0, 0, 0x10, 0xFFFF0000, 0x1000)
_DATA_TYPES: Final = (3, 7, 1, 5)
"""Of data segments that have been accessed: up and down, writable, which SS has to be, and not."""
_SELECTORS: Final = (0, 3, 8, 16, 0x10000)
_MSRS: Final = (MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_STAR, MSR_LSTAR, MSR_FMASK)
_CR0_NE: Final = 1 << 5
_DR7_GD: Final = 1 << 13


def bits_of(data: bytes) -> int:
    """Of ``MODES``, the one that an input begins in; it is not empty."""
    return MODES[(data[0] & 3) % len(MODES)]


def _rng(data: bytes) -> Rng:
    return Rng(int.from_bytes(data[1:HEADER], "little"))


def registers(data: bytes) -> Regs:
    """The registers that the header stands for: addresses, mostly, and values at which flags change."""
    bits = bits_of(data)
    rng = _rng(data)
    regs = initial_registers(bits)
    for number in range(16 if bits == 64 else 8):
        value = edge_value(rng) if rng.below(4) == 0 else 0x2000 + 64 * rng.below(0x380)
        regs.gpr[number] = value if bits == 64 else value & 0xFFFFFFFF
        regs.xmm[number] = edge_value(rng) << 128 | edge_value(rng)
    for number in range(8):
        regs.fpr[number] = rng.below(1 << 16) << 64 | edge_value(rng)
    regs.ftw = rng.below(256)
    regs.fsw = rng.below(8) << 11
    if data[0] & USER and bits != 16:
        regs.cpl = 3
        regs.segments[CS].rights |= 3 << 5
        regs.segments[SS].rights |= 3 << 5
    if regs.cpl == 3 and rng.below(2):
        regs.cr0 |= CR0_AM
        regs.rflags |= FLAG_AC
    if rng.below(8) == 0:
        regs.cr4 |= CR4_UMIP
    regs.gdt_base = regs.idt_base = _TABLES
    regs.gdt_limit = 0xFFFF
    regs.idt_limit = 0xFFFF if data[0] & HANDLED else 0
    if data[0] & UNUSUAL:
        _make_unusual(regs, rng, bits)
    refresh(regs)
    return regs


def absent_pages(data: bytes) -> list[int]:
    """Numbers of the pages of 4 KiB on which accesses fault; none unless the state is unusual."""
    rng = _rng(data)
    absent: list[int] = []
    if data[0] & UNUSUAL:
        if rng.below(2):
            absent.append(4)
        if rng.below(3) == 0:
            absent.append(_TABLES >> 12)
        if rng.below(3) == 0:
            absent += [0, 0xFFFFF, (1 << 47 >> 12) - 1, (1 << 56 >> 12) - 1]
    return absent


def _make_unusual(regs: Regs, rng: Rng, bits: int) -> None:
    _unusual_registers(regs, rng, bits)
    _unusual_control(regs, rng, bits)
    _unusual_tables(regs, rng)
    if bits == 64:
        _unusual_bases(regs, rng)
    else:
        _unusual_segments(regs, rng, bits)


def _unusual_registers(regs: Regs, rng: Rng, bits: int) -> None:
    for number in range(16 if bits == 64 else 8):
        choice = rng.below(4)
        if choice < 2:
            value = _EDGES[rng.below(len(_EDGES))] + rng.below(40) - 24 & _MASK64
        elif choice == 2:
            value = rng.below(200)
        else:
            continue
        regs.gpr[number] = value if bits == 64 else value & 0xFFFFFFFF
    for bit in _FLAG_BITS:
        if rng.below(2):
            regs.rflags ^= 1 << bit
    if rng.below(4) == 0:
        regs.rflags ^= FLAG_DF
    regs.shadow = rng.below(3)


def _unusual_control(regs: Regs, rng: Rng, bits: int) -> None:
    for bit in (CR0_MP, CR0_EM, CR0_TS, _CR0_NE):
        if rng.below(6) == 0:
            regs.cr0 |= bit
    if rng.below(2):
        regs.cr0 ^= CR0_AM
    for bit in (CR4_DE, CR4_TSD, CR4_UMIP):
        if rng.below(4) == 0:
            regs.cr4 ^= bit
    if bits == 64 and rng.below(2):
        regs.cr4 |= CR4_LA57
    if bits == 32 and rng.below(3) == 0:
        regs.efer |= EFER_LME | EFER_LMA
        regs.compatibility = True
    if rng.below(2):
        regs.efer |= EFER_SCE
    if rng.below(8) == 0:
        regs.dr[7] |= _DR7_GD
    for number in _MSRS:
        if rng.below(2):
            choice = rng.below(len(_SELECTORS) + 1)
            regs.msr[number] = _SELECTORS[choice] if choice < len(_SELECTORS) else edge_value(rng)


def _unusual_tables(regs: Regs, rng: Rng) -> None:
    if rng.below(2):
        regs.gdt_limit = rng.below(128)
    if regs.idt_limit and rng.below(2):
        regs.idt_limit = rng.below(2048)
    if rng.below(2):
        limit = rng.below(200) + (0x10000 if rng.below(2) else 0)
        rights = 0x82 | (RIGHTS_UNUSABLE if rng.below(4) == 0 else 0)
        regs.segments[LDTR] = Segment(8 * rng.below(8), _TABLES + 8 * rng.below(4), limit, rights)
    if rng.below(2):
        limit = 0x60 + 7 * rng.below(2) + rng.below(12)
        regs.segments[TR] = Segment(8, _TABLES, limit, 0x8B if rng.below(3) else 0x83)


def _unusual_bases(regs: Regs, rng: Rng) -> None:
    for index in (FS, GS):
        if rng.below(2):
            regs.segments[index].base = _EDGES[rng.below(len(_EDGES))] & _MASK64
    if rng.below(4) == 0:
        regs.segments[SS].rights |= RIGHTS_UNUSABLE


def _unusual_segments(regs: Regs, rng: Rng, bits: int) -> None:
    for index in (ES, CS, SS, DS, FS, GS):
        if rng.below(4):
            continue
        limit = _LIMITS[rng.below(len(_LIMITS))]
        base = _BASES[rng.below(len(_BASES))]
        rights = regs.segments[index].rights
        if bits == 16:
            # In real-address mode there are no others.
            limit = 0xFFFF
            base &= 0xFFFF0
        elif index == SS:
            rights = rights & ~0xF | _DATA_TYPES[rng.below(2)]
        elif index != CS:
            rights = rights & ~0xF | _DATA_TYPES[rng.below(4)]
        install(regs, index, regs.segments[index].selector, base, limit, rights)
