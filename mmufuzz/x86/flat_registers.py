"""Registers by name, for ``flat.execute``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mmufuzz.x86.insn import CS
from mmufuzz.x86.segments import install, refresh
from mmufuzz.x86.state import CR0_PE, EFER_LMA, EFER_LME, FLAG_FIXED, RIGHTS_L, Regs

_LEGACY: Final = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"]
_SEGMENTS: Final = ["es", "cs", "ss", "ds", "fs", "gs"]
_FLAG_NAMES: Final[dict[int, str]] = {64: "rflags", 32: "eflags", 16: "eflags"}
_IP_NAMES: Final[dict[int, str]] = {64: "rip", 32: "eip", 16: "eip"}
_X87: Final = ("fcw", "fsw", "ftw", "mxcsr")
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "cpl")
_TABLES: Final = ("gdt_base", "gdt_limit", "idt_base", "idt_limit")


def general_names(mode: int) -> list[str]:
    """The general registers of a mode in encoding order; 16-bit mode has the 32-bit ones."""
    if mode == 64:
        return ["r" + name for name in _LEGACY] + [f"r{number}" for number in range(8, 16)]
    return ["e" + name for name in _LEGACY]


def initial_registers(mode: int) -> Regs:
    """Zeros, in the given mode at CPL 0."""
    regs = Regs()
    if mode == 64:
        regs.efer = EFER_LME | EFER_LMA
        install(regs, CS, 0, 0, 0xFFFFFFFF, 0x9B | RIGHTS_L | 1 << 15)
    elif mode == 16:
        regs.cr0 &= ~CR0_PE
        for index in range(6):
            segment = regs.segments[index]
            install(regs, index, 0, 0, 0xFFFF, segment.rights & 0xFF)
    refresh(regs)
    return regs


def apply_registers(regs: Regs, mode: int, values: Mapping[str, int]) -> None:
    """Set registers by name. Raises ``ValueError`` for an unknown name and for a value that does not fit."""
    for name, value in values.items():
        width = _set(regs, mode, name, value)
        if width == 0:
            raise ValueError(f"register {name!r}: {mode}-bit code has no such register")
        if not 0 <= value < 1 << width:
            raise ValueError(f"register {name!r}: expected a value of {width} bits, got {value:#x}")
    if "cpl" in values:
        regs.segments[1].rights |= regs.cpl << 5
        regs.segments[2].rights |= regs.cpl << 5
    refresh(regs)


def _set(regs: Regs, mode: int, name: str, value: int) -> int:
    """Set one register; the answer is its width in bits, or 0 if there is none of that name."""
    native = 64 if mode == 64 else 32
    general = general_names(mode)
    if name in general:
        regs.gpr[general.index(name)] = value
        return native
    if name == _FLAG_NAMES[mode]:
        regs.rflags = value | FLAG_FIXED
        return 32
    if name in _CONTROL or name in _TABLES or name in _X87:
        return _set_special(regs, name, value, native)
    place = _numbered(name, "ymm")
    if 0 <= place < (16 if mode == 64 else 8):
        regs.xmm[place] = value
        return 256
    place = _numbered(name, "xmm")
    if 0 <= place < (16 if mode == 64 else 8):
        regs.xmm[place] = value
        return 128
    place = _numbered(name, "fpr")
    if 0 <= place < 8:
        regs.fpr[place] = value
        return 80
    return _set_segment(regs, mode, name, value)


def _set_segment(regs: Regs, mode: int, name: str, value: int) -> int:
    """A selector ("ds"; in real-address mode it sets the base too), or a base ("fs_base")."""
    stem = name.removesuffix("_base")
    if stem not in _SEGMENTS:
        return 0
    segment = regs.segments[_SEGMENTS.index(stem)]
    if stem != name:
        segment.base = value
        return 64 if mode == 64 else 32
    segment.selector = value
    if regs.real_mode:
        segment.base = value << 4
    return 16


def _numbered(name: str, stem: str) -> int:
    """The number behind ``stem``, or -1."""
    digits = name.removeprefix(stem)
    return int(digits) if digits != name and digits.isdecimal() else -1


def _set_special(regs: Regs, name: str, value: int, native: int) -> int:
    if name == "cr0":
        regs.cr0 = value
    elif name == "cr2":
        regs.cr2 = value
    elif name == "cr3":
        regs.cr3 = value
    elif name == "cr4":
        regs.cr4 = value
    elif name == "cr8":
        regs.cr8 = value
        return 4
    elif name == "efer":
        regs.efer = value
    elif name == "cpl":
        regs.cpl = value
        return 2
    elif name == "gdt_base":
        regs.gdt_base = value
    elif name == "idt_base":
        regs.idt_base = value
    elif name == "mxcsr":
        regs.mxcsr = value
        return 16
    elif name == "ftw":
        regs.ftw = value
        return 8
    else:
        _set_word(regs, name, value)
        return 16
    return native


def _set_word(regs: Regs, name: str, value: int) -> None:
    if name == "gdt_limit":
        regs.gdt_limit = value
    elif name == "idt_limit":
        regs.idt_limit = value
    elif name == "fcw":
        regs.fcw = value
    else:
        regs.fsw = value


def register_values(regs: Regs, mode: int) -> dict[str, int]:
    """Every register that the mode has, by name, as ``apply_registers`` takes it, and RIP."""
    values: dict[str, int] = {}
    general = general_names(mode)
    for index, name in enumerate(general):
        values[name] = regs.gpr[index]
    values[_IP_NAMES[mode]] = regs.rip
    values[_FLAG_NAMES[mode]] = regs.rflags
    for index in range(len(general)):
        values[f"ymm{index}"] = regs.xmm[index]
    for index in range(8):
        values[f"fpr{index}"] = regs.fpr[index]
    for index, name in enumerate(_SEGMENTS):
        values[name] = regs.segments[index].selector
        values[name + "_base"] = regs.segments[index].base
    values["fcw"] = regs.fcw
    values["fsw"] = regs.fsw
    values["ftw"] = regs.ftw
    values["mxcsr"] = regs.mxcsr
    values["cr0"] = regs.cr0
    values["cr2"] = regs.cr2
    values["cr3"] = regs.cr3
    values["cr4"] = regs.cr4
    values["cr8"] = regs.cr8
    values["efer"] = regs.efer
    values["cpl"] = regs.cpl
    values["gdt_base"] = regs.gdt_base
    values["gdt_limit"] = regs.gdt_limit
    values["idt_base"] = regs.idt_base
    values["idt_limit"] = regs.idt_limit
    return values
