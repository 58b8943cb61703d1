"""System instructions: control and debug registers, descriptor tables, MSRs, flags of the system, ports."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86 import alu, cpuid
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.event import deliver
from mmufuzz.x86.execute_operands import (
    MASK32,
    RAX,
    RBX,
    RCX,
    RDX,
    advance,
    check_io,
    effective_address,
    is_canonical,
    linear,
    load_operand,
    load_stack,
    operand_address,
    read_reg,
    require_cpl0,
    rip_mask,
    set_stack,
    stack_offset,
    store_operand,
    write_reg,
)
from mmufuzz.x86.insn import CR, DR, FS, GS, LDTR, MEM, SREG, TR, Insn
from mmufuzz.x86.segments import (
    TYPE_CODE,
    TYPE_RW,
    Descriptor,
    install,
    load_segment,
    read_descriptor,
)
from mmufuzz.x86.state import (
    CR0_TS,
    CR4_DE,
    CR4_TSD,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    FLAG_AC,
    FLAG_CF,
    FLAG_DF,
    FLAG_IF,
    FLAG_OF,
    FLAG_ZF,
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
    NO_ERROR_CODE,
    RIGHTS_UNUSABLE,
    VECTOR_BP,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_OF,
    VECTOR_UD,
    Fault,
    Regs,
)

_CR4_FSGSBASE: Final = 1 << 16
_CR4_PKE: Final = 1 << 22
_DR7_GD: Final = 1 << 13
_DR6_BD: Final = 1 << 13

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
    """CLI and STI: #GP(0) if CPL > IOPL; virtual interrupts are not modelled."""
    if not regs.real_mode and regs.cpl > regs.rflags >> 12 & 3:
        raise Fault(VECTOR_GP, 0)
    if insn.opcode & 1:
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
    """UD2."""
    raise Fault(VECTOR_UD)


# Descriptor tables and segment registers.


def mov_sreg(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOV to and from a segment register."""
    dst = insn.operands[0]
    src = insn.operands[1]
    if dst.kind == SREG:
        load_segment(regs, bus, dst.index, load_operand(regs, insn, bus, src) & 0xFFFF)
    else:
        store_operand(regs, insn, bus, dst, regs.segments[src.index].selector)
    advance(regs, insn)


def pop_sreg(regs: Regs, insn: Insn, bus: Bus) -> None:
    """POP of a segment register, which reads its 16 bits in a slot of the operand size."""
    size = insn.size
    selector = load_stack(regs, bus, 0, size) & 0xFFFF
    top = stack_offset(regs, size)
    load_segment(regs, bus, insn.operands[0].index, selector)
    set_stack(regs, top)
    advance(regs, insn)


def store_table(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SGDT and SIDT."""
    size = insn.operands[0].size
    address = operand_address(regs, insn, size, True)
    gdt = insn.mnemonic == "sgdt"
    base = regs.gdt_base if gdt else regs.idt_base
    bus.store(regs, address, 2, regs.gdt_limit if gdt else regs.idt_limit, False)
    bus.store(regs, address + 2 & rip_mask(regs), size - 2, base & alu.mask(size - 2), False)
    advance(regs, insn)


def load_table(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LGDT and LIDT."""
    require_cpl0(regs)
    size = insn.operands[0].size
    address = operand_address(regs, insn, size)
    limit = bus.load(regs, address, 2, False, False)
    base = bus.load(regs, address + 2 & rip_mask(regs), size - 2, False, False)
    if insn.size == 2 and not regs.long_mode:
        base &= 0xFFFFFF
    if not is_canonical(regs, base):
        raise Fault(VECTOR_GP, 0)
    if insn.mnemonic == "lgdt":
        regs.gdt_base = base
        regs.gdt_limit = limit
    else:
        regs.idt_base = base
        regs.idt_limit = limit
    advance(regs, insn)


def store_system_segment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SLDT and STR."""
    _require_protected(regs)
    index = LDTR if insn.mnemonic == "sldt" else TR
    store_operand(regs, insn, bus, insn.operands[0], regs.segments[index].selector)
    advance(regs, insn)


def _require_protected(regs: Regs) -> None:
    if regs.real_mode:
        raise Fault(VECTOR_UD)


def load_system_segment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LLDT and LTR. In long mode the descriptor has 16 bytes, and a TSS becomes busy."""
    _require_protected(regs)
    require_cpl0(regs)
    selector = load_operand(regs, insn, bus, insn.operands[0]) & 0xFFFF
    index = LDTR if insn.mnemonic == "lldt" else TR
    error = selector & 0xFFFC
    if error == 0:
        if index == TR:
            raise Fault(VECTOR_GP, 0)
        install(regs, index, selector, 0, 0, RIGHTS_UNUSABLE)
        advance(regs, insn)
        return
    long = regs.efer & EFER_LMA != 0
    if selector & 4 or (selector | (15 if long else 7)) > regs.gdt_limit:
        raise Fault(VECTOR_GP, error)
    descriptor = read_descriptor(regs, bus, selector)
    wanted = (2,) if index == LDTR else (9,) if long else (1, 9)
    if not descriptor.is_system or descriptor.type not in wanted:
        raise Fault(VECTOR_GP, error)
    if not descriptor.present:
        raise Fault(VECTOR_NP, error)
    base = descriptor.base
    if long:
        base |= (bus.load_system(regs, descriptor.address + 8, 8) & MASK32) << 32
        if not is_canonical(regs, base):
            raise Fault(VECTOR_GP, error)
    rights = descriptor.rights
    if index == TR:
        bus.store_system(regs, descriptor.address + 5, 1, rights & 0xFF | 2)
        rights |= 2
    install(regs, index, selector, base, descriptor.limit, rights)
    advance(regs, insn)


def _visible(regs: Regs, bus: Bus, selector: int) -> Descriptor | None:
    """The descriptor that LAR and the like may look at, or None. They raise nothing but page faults."""
    if selector & 0xFFFC == 0:
        return None
    try:
        descriptor = read_descriptor(regs, bus, selector)
    except Fault as fault:
        if fault.vector == VECTOR_GP:
            return None
        raise
    if not descriptor.is_conforming and (descriptor.dpl < regs.cpl or descriptor.dpl < selector & 3):
        return None
    return descriptor


def look_at_segment(regs: Regs, insn: Insn, bus: Bus) -> None:
    """LAR, LSL, VERR, VERW: ZF tells whether the selector may be used so."""
    _require_protected(regs)
    name = insn.mnemonic
    selector = load_operand(regs, insn, bus, insn.operands[len(insn.operands) - 1]) & 0xFFFF
    descriptor = _visible(regs, bus, selector)
    value = -1
    if descriptor is not None:
        kind = descriptor.type
        long = regs.efer & EFER_LMA != 0
        if name == "lar":
            # Interrupt and trap gates have no access rights to show.
            known = not descriptor.is_system or kind in ((2, 9, 11, 12) if long else (1, 2, 3, 4, 5, 9, 11, 12))
            value = descriptor.word >> 32 & 0xF0FF00 if known else -1
        elif name == "lsl":
            known = not descriptor.is_system or kind in ((2, 9, 11) if long else (1, 2, 3, 9, 11))
            value = descriptor.limit if known else -1
        elif name == "verr":
            known = not descriptor.is_system and (kind & TYPE_CODE == 0 or kind & TYPE_RW != 0)
            value = 0 if known else -1
        else:
            value = 0 if descriptor.is_writable else -1
    if value < 0:
        regs.rflags &= ~FLAG_ZF
    else:
        regs.rflags |= FLAG_ZF
        if len(insn.operands) == 2:
            dst = insn.operands[0]
            write_reg(regs, dst.index, dst.size, value & alu.mask(dst.size))
    advance(regs, insn)


def adjust_privilege(regs: Regs, insn: Insn, bus: Bus) -> None:
    """ARPL."""
    _require_protected(regs)
    dst = insn.operands[0]
    old = load_operand(regs, insn, bus, dst, True)
    level = load_operand(regs, insn, bus, insn.operands[1]) & 3
    if old & 3 < level:
        value = old & ~3 | level
        if dst.kind != MEM:
            write_reg(regs, dst.index, 2, value & 0xFFFF)
        else:
            store_operand(regs, insn, bus, dst, value)
        regs.rflags |= FLAG_ZF
    else:
        regs.rflags &= ~FLAG_ZF
    advance(regs, insn)


def swap_gs(regs: Regs, insn: Insn, bus: Bus) -> None:
    """SWAPGS."""
    require_cpl0(regs)
    base = regs.segments[GS].base
    regs.segments[GS].base = regs.msr.get(MSR_KERNEL_GS_BASE, 0)
    regs.msr[MSR_KERNEL_GS_BASE] = base
    advance(regs, insn)


def fs_gs_base(regs: Regs, insn: Insn, bus: Bus) -> None:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE."""
    if not regs.cr4 & _CR4_FSGSBASE:
        raise Fault(VECTOR_UD)
    operand = insn.operands[0]
    segment = regs.segments[FS + (insn.reg_field & 1)]
    if insn.reg_field < 2:
        write_reg(regs, operand.index, operand.size, segment.base & alu.mask(operand.size))
    else:
        base = read_reg(regs, operand.index, operand.size)
        if not is_canonical(regs, base):
            raise Fault(VECTOR_GP, 0)
        segment.base = base
    advance(regs, insn)


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


# Information.


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
    number = read_reg(regs, RCX, 4)
    if number == MSR_EFER:
        value = regs.efer
    elif number == MSR_FS_BASE:
        value = regs.segments[FS].base
    elif number == MSR_GS_BASE:
        value = regs.segments[GS].base
    elif number == MSR_TSC:
        value = bus.read_tsc(regs)
    elif number in _ADDRESSES or number in _PLAIN:
        value = regs.msr.get(number, _PAT_RESET if number == MSR_PAT else 0)
    else:
        raise Fault(VECTOR_GP, 0)
    regs.gpr[RAX] = value & MASK32
    regs.gpr[RDX] = value >> 32
    advance(regs, insn)


def write_msr(regs: Regs, insn: Insn, bus: Bus) -> None:
    """WRMSR, with the checks of each MSR (SDM vol. 4, table 2-2)."""
    require_cpl0(regs)
    number = read_reg(regs, RCX, 4)
    value = read_reg(regs, RDX, 4) << 32 | read_reg(regs, RAX, 4)
    bus.fence(regs)
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
    advance(regs, insn)


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
