"""System instructions: flags, control and debug registers, software interrupts, ports."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.event import deliver
from mmufuzz.x86.execute_operands import (
    MASK32,
    MASK64,
    RAX,
    RBX,
    advance,
    check_io,
    check_umip,
    effective_address,
    is_canonical,
    linear,
    load_operand,
    operand_address,
    read_reg,
    require_cpl0,
    rip_mask,
    store_operand,
    write_reg,
)
from mmufuzz.x86.insn import CR, DR, FS, Insn
from mmufuzz.x86.paging import CR4_PCIDE, INVPCID_ADDRESS, INVPCID_ALL, INVPCID_CONTEXT
from mmufuzz.x86.state import (
    CR0_TS,
    CR4_DE,
    FLAG_AC,
    FLAG_CF,
    FLAG_DF,
    FLAG_IF,
    FLAG_OF,
    NO_ERROR_CODE,
    SHADOW_STI,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_OF,
    VECTOR_UD,
    Fault,
    Regs,
)

_DR7_GD: Final = 1 << 13
_DR6_BD: Final = 1 << 13


# Flags.


def clear_carry(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CLC, STC, CMC, by the low bits of the opcode."""
    if insn.opcode == 0xF5:
        regs.rflags ^= FLAG_CF
    elif insn.opcode == 0xF8:
        regs.rflags &= ~FLAG_CF
    else:
        regs.rflags |= FLAG_CF
    advance(regs, insn)


def direction(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CLD and STD."""
    if insn.opcode & 1:
        regs.rflags |= FLAG_DF
    else:
        regs.rflags &= ~FLAG_DF
    advance(regs, insn)


def interrupts(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CLI and STI: #GP(0) if CPL > IOPL; virtual interrupts are not modelled. STI that sets IF casts a shadow."""
    if not regs.real_mode and regs.cpl > regs.rflags >> 12 & 3:
        raise Fault(VECTOR_GP, 0)
    if insn.opcode & 1:
        if not regs.rflags & FLAG_IF:
            regs.shadow |= SHADOW_STI
        regs.rflags |= FLAG_IF
    else:
        regs.rflags &= ~FLAG_IF
    advance(regs, insn)


def smap_override(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CLAC and STAC; #UD outside CPL 0."""
    if regs.cpl != 0:
        raise Fault(VECTOR_UD)
    if insn.mnemonic == "stac":
        regs.rflags |= FLAG_AC
    else:
        regs.rflags &= ~FLAG_AC
    advance(regs, insn)

# Control and debug registers.


def mov_cr(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOV to and from CR0, CR2, CR3, CR4 and CR8."""
    require_cpl0(regs)
    dst = insn.operands[0]
    src = insn.operands[1]
    if dst.kind != CR:
        write_reg(regs, dst.index, dst.size, _control_register(regs, src.index) & alu.mask(dst.size))
    else:
        value = read_reg(regs, src.index, src.size)
        if dst.index == 2:
            regs.cr2 = value
        elif dst.index == 8:
            if value > 15:
                raise Fault(VECTOR_GP, 0)
            regs.cr8 = value
        else:
            # Serialising: earlier stores are visible before the register changes (SDM vol. 3, 9.3).
            bus.fence(regs)
            bus.write_cr(regs, dst.index, value)
    advance(regs, insn)


def _control_register(regs: Regs, number: int) -> int:
    if number == 0:
        return regs.cr0
    if number == 2:
        return regs.cr2
    if number == 3:
        return regs.cr3
    return regs.cr4 if number == 4 else regs.cr8


def mov_dr(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOV to and from debug registers. Breakpoints are not modelled, but general detect is (SDM vol. 3, 18.2)."""
    dst = insn.operands[0]
    src = insn.operands[1]
    number = dst.index if dst.kind == DR else src.index
    if number in (4, 5):
        if regs.cr4 & CR4_DE:
            raise Fault(VECTOR_UD)
        number += 2
    require_cpl0(regs)
    if regs.dr[7] & _DR7_GD:
        regs.dr[6] |= _DR6_BD
        regs.dr[7] &= ~_DR7_GD
        raise Fault(VECTOR_DB)
    if dst.kind != DR:
        write_reg(regs, dst.index, dst.size, regs.dr[number] & alu.mask(dst.size))
    else:
        value = read_reg(regs, src.index, src.size)
        if number >= 6 and value > MASK32:
            raise Fault(VECTOR_GP, 0)
        if number == 6:
            value = value & 0x1E00F | 0xFFFE0FF0
        elif number == 7:
            value = value & 0xFFFF2FFF | 0x400
        regs.dr[number] = value
    advance(regs, insn)


def machine_status_word(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SMSW, LMSW, CLTS. LMSW can set PE but not clear it."""
    if insn.mnemonic == "smsw":
        check_umip(regs)
        operand = insn.operands[0]
        value = regs.cr0 & alu.mask(operand.size)
        store_operand(regs, insn, bus, operand, value)
        advance(regs, insn)
        return
    require_cpl0(regs)
    if insn.mnemonic == "clts":
        value = regs.cr0 & ~CR0_TS
    else:
        value = regs.cr0 & ~14 | load_operand(regs, insn, bus, insn.operands[0]) & 15
    bus.write_cr(regs, 0, value)
    advance(regs, insn)


def invlpg(regs: Regs, insn: Insn, bus: Bus) -> None:
    """INVLPG. A non-canonical address is no fault: the bus gets it as it is (SDM vol. 2, INVLPG)."""
    require_cpl0(regs)
    # Serialising, as MOV to CR is.
    bus.fence(regs)
    address = effective_address(regs, insn)
    if insn.segment >= FS or not regs.flat:
        address = address + regs.segments[insn.segment].base & rip_mask(regs)
    bus.invlpg(regs, address)
    advance(regs, insn)


def invpcid(regs: Regs, insn: Insn, bus: Bus) -> None:
    """INVPCID: #GP(0) for a type above 3, reserved bits, a PCID without CR4.PCIDE, or a non-canonical address."""
    require_cpl0(regs)
    bus.fence(regs)
    kind = load_operand(regs, insn, bus, insn.operands[0])
    descriptor = load_operand(regs, insn, bus, insn.operands[1])
    pcid = descriptor & MASK64
    address = descriptor >> 64
    if kind > INVPCID_ALL or pcid >> 12:
        raise Fault(VECTOR_GP, 0)
    if kind <= INVPCID_CONTEXT and pcid and not regs.cr4 & CR4_PCIDE:
        raise Fault(VECTOR_GP, 0)
    if kind == INVPCID_ADDRESS and not is_canonical(regs, address):
        raise Fault(VECTOR_GP, 0)
    bus.invpcid(regs, kind, pcid, address)
    advance(regs, insn)


def privileged_nop(regs: Regs, insn: Insn, bus: Bus) -> None:
    """INVD and WBINVD: there are no caches to lose data from."""
    require_cpl0(regs)
    bus.fence(regs)
    advance(regs, insn)


def halt(regs: Regs, insn: Insn, bus: Bus) -> None:
    """HLT."""
    require_cpl0(regs)
    bus.halt(regs)
    advance(regs, insn)


def mfence(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MFENCE."""
    bus.fence(regs)
    advance(regs, insn)


def nop(regs: Regs, insn: Insn, bus: Bus) -> None:
    """NOP and hints; LFENCE and SFENCE: under TSO loads and stores are ordered among themselves already."""
    advance(regs, insn)


def flush_line(regs: Regs, insn: Insn, bus: Bus) -> None:
    """CLFLUSH, CLFLUSHOPT, CLWB: a load of one byte as far as faults go."""
    bus.load(regs, operand_address(regs, insn, 1), 1, False, False)
    advance(regs, insn)


def undefined(regs: Regs, insn: Insn, bus: Bus) -> None:
    """UD2; hypercalls, which exist for the guests of a hypervisor only (SDM vol. 3, 31.3; APM vol. 3, VMMCALL)."""
    raise Fault(VECTOR_UD)

# Software interrupts.


def software_interrupt(regs: Regs, insn: Insn, bus: Bus) -> None:
    """INT n, INT3, INTO, INT1, through the IDT. INT1 is a #DB, which asks for no privilege."""
    following = regs.rip + insn.length & rip_mask(regs)
    if insn.mnemonic == "int":
        vector = insn.operands[0].value
    elif insn.mnemonic == "int3":
        vector = VECTOR_BP
    elif insn.mnemonic == "int1":
        vector = VECTOR_DB
    else:
        vector = VECTOR_OF
        if not regs.rflags & FLAG_OF:
            advance(regs, insn)
            return
    if regs.idt_limit == 0:
        # Without an IDT whoever runs the guest answers exceptions, and this like one.
        raise Fault(vector)
    deliver(regs, bus, vector, NO_ERROR_CODE, following, insn.mnemonic != "int1")

# Ports.


def port_in(regs: Regs, insn: Insn, bus: Bus) -> None:
    """IN."""
    dst = insn.operands[0]
    port = load_operand(regs, insn, bus, insn.operands[1])
    check_io(regs, bus, port, dst.size)
    write_reg(regs, dst.index, dst.size, bus.port_in(regs, port, dst.size))
    advance(regs, insn)


def port_out(regs: Regs, insn: Insn, bus: Bus) -> None:
    """OUT."""
    src = insn.operands[1]
    port = load_operand(regs, insn, bus, insn.operands[0])
    check_io(regs, bus, port, src.size)
    bus.port_out(regs, port, src.size, load_operand(regs, insn, bus, src))
    advance(regs, insn)


def translate_byte(regs: Regs, insn: Insn, bus: Bus) -> None:
    """XLAT."""
    offset = read_reg(regs, RBX, insn.asize) + read_reg(regs, RAX, 1) & alu.mask(insn.asize)
    value = bus.load(regs, linear(regs, insn.segment, offset, 1, False), 1, False, False)
    write_reg(regs, RAX, 1, value)
    advance(regs, insn)
