"""em_ functions on system state: segment registers, tables, control registers, MSRs, ports, the x87 (emulate.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import PAGE_SIZE
from mmufuzz.kvm.emulate_checks import bad_iopl
from mmufuzz.kvm.emulate_ctxt import (
    MEM,
    MEM_STR,
    MODE_PROT64,
    NONE,
    PORT,
    WRITE,
    Access,
    X86EmulateCtxt,
    address_mask,
    effective_address,
    is_noncanonical,
    linearize,
    segmented_read_std,
    segmented_write_std,
)
from mmufuzz.kvm.emulate_decode import RIP
from mmufuzz.kvm.emulate_ops import HYPERCALL_LENGTH, EmulationFailed
from mmufuzz.kvm.emulate_segments import load_segment_descriptor
from mmufuzz.kvm.opcode_table import STRING
from mmufuzz.x86 import cpuid
from mmufuzz.x86.execute_operands import MASK32, MASK64, RAX, RBX, RCX, RDI, RDX
from mmufuzz.x86.execute_x87 import reset
from mmufuzz.x86.execute_xsave import fxsave_image, load_fxsave_image
from mmufuzz.x86.insn import CS, GS, LDTR, SS, TR
from mmufuzz.x86.state import (
    CR0_EM,
    CR0_TS,
    CR4_UMIP,
    FLAG_DF,
    FLAG_IF,
    MSR_TSC,
    MSR_TSC_AUX,
    SHADOW_MOV_SS,
    SHADOW_STI,
    VECTOR_GP,
    VECTOR_NM,
    VECTOR_UD,
    Fault,
)

_READ_AHEAD: Final = 1024
_FXSAVE_SIZE: Final = 160 + 8 * 16
"""An image with the eight vector registers that 32-bit code has."""


def _store_selector(ctxt: X86EmulateCtxt, index: int) -> None:
    """emulate.c:em_store_sreg. CR4.UMIP is not modelled."""
    dst = ctxt.dst
    dst.val = ctxt.regs.segments[index].selector
    if dst.type == MEM and dst.bytes == 4:
        dst.bytes = 2


def em_mov_rm_sreg(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_mov_rm_sreg."""
    if ctxt.insn.modrm_reg > GS:
        raise Fault(VECTOR_UD)
    _store_selector(ctxt, ctxt.insn.modrm_reg)


def em_mov_sreg_rm(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_mov_sreg_rm."""
    index = ctxt.insn.modrm_reg
    if index == CS or index > GS:
        raise Fault(VECTOR_UD)
    if index == SS:
        ctxt.interruptibility = SHADOW_MOV_SS
    load_segment_descriptor(ctxt, ctxt.src.val & 0xFFFF, index)


def _check_umip(ctxt: X86EmulateCtxt) -> None:
    """X86_CR4_UMIP in emulate.c:em_store_sreg, em_smsw, emulate_store_desc_ptr."""
    if ctxt.regs.cr4 & CR4_UMIP and ctxt.regs.cpl > 0:
        raise Fault(VECTOR_GP, 0)


def store_system_segment(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_sldt, em_str."""
    _check_umip(ctxt)
    _store_selector(ctxt, LDTR if ctxt.insn.name == "sldt" else TR)


def load_system_segment(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_lldt, em_ltr."""
    load_segment_descriptor(ctxt, ctxt.src.val & 0xFFFF, LDTR if ctxt.insn.name == "lldt" else TR)


def store_table(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:emulate_store_desc_ptr: SGDT, SIDT. 16-bit code gets 3 bytes of the base, and a zero."""
    _check_umip(ctxt)
    regs = ctxt.regs
    gdt = ctxt.insn.name == "sgdt"
    limit = regs.gdt_limit if gdt else regs.idt_limit
    base = regs.gdt_base if gdt else regs.idt_base
    size = 8 if ctxt.mode == MODE_PROT64 else ctxt.op_bytes
    if size == 2:
        size = 4
        base &= 0xFFFFFF
    dst = ctxt.dst
    dst.type = NONE
    base &= (1 << 8 * size) - 1
    segmented_write_std(ctxt, dst.segment, dst.ea, 2 + size, limit | base << 16)


def load_table(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_lgdt_lidt, read_descriptor: the limit, then the base."""
    src = ctxt.src
    size = 8 if ctxt.mode == MODE_PROT64 else ctxt.op_bytes
    limit = segmented_read_std(ctxt, src.segment, src.ea, 2)
    base = segmented_read_std(ctxt, src.segment, src.ea + 2 & MASK64, 3 if size == 2 else size)
    if ctxt.mode == MODE_PROT64 and is_noncanonical(ctxt, base):
        raise Fault(VECTOR_GP, 0)
    regs = ctxt.regs
    if ctxt.insn.name == "lgdt":
        regs.gdt_base = base
        regs.gdt_limit = limit
    else:
        regs.idt_base = base
        regs.idt_limit = limit


def em_smsw(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_smsw."""
    _check_umip(ctxt)
    if ctxt.dst.type == MEM:
        ctxt.dst.bytes = 2
    ctxt.dst.val = ctxt.regs.cr0


def em_lmsw(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_lmsw: whether CR0 takes the value is not looked at."""
    ctxt.ops.set_cr(0, ctxt.regs.cr0 & ~0xE | ctxt.src.val & 0xF)


def em_clts(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_clts."""
    ctxt.ops.set_cr(0, ctxt.regs.cr0 & ~CR0_TS)


def em_invlpg(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_invlpg: an address that no segment allows is no fault, and nothing is invalidated."""
    try:
        gva = linearize(ctxt, ctxt.src.segment, ctxt.src.ea, 1, False)
    except Fault:
        return
    ctxt.ops.invlpg(gva)


def halt(ctxt: X86EmulateCtxt) -> None:
    """HLT."""
    ctxt.ops.halt()


def em_hypercall(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_hypercall, x86.c:emulator_fix_hypercall: the host's own hypercall takes the instruction's place.

    The guest executes it again. It is written at RIP, whatever the base of CS, with the privilege of the guest.
    """
    rip = ctxt.regs.rip
    hypercall = ctxt.ops.patch_hypercall()
    ctxt.accesses.append(Access(WRITE, rip, HYPERCALL_LENGTH, hypercall))
    ctxt.ops.write_emulated(rip, HYPERCALL_LENGTH, hypercall, True)
    ctxt.next_eip = ctxt.eip
    ctxt.hypercall_fixed = True


def em_rsm(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_rsm: there is no SMM."""
    raise Fault(VECTOR_UD)


def read_control(ctxt: X86EmulateCtxt) -> None:
    """MOV from CR (x86.c:emulator_get_cr)."""
    regs = ctxt.regs
    number = ctxt.insn.modrm_reg
    if number == 0:
        ctxt.dst.val = regs.cr0
    elif number == 2:
        ctxt.dst.val = regs.cr2
    elif number == 3:
        ctxt.dst.val = regs.cr3
    else:
        ctxt.dst.val = regs.cr4 if number == 4 else regs.cr8


def em_cr_write(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_cr_write."""
    number = ctxt.insn.modrm_reg
    if not ctxt.ops.set_cr(number, ctxt.src.val):
        raise Fault(VECTOR_GP, 0)
    if number == 0:
        ctxt.recalculate_mode()


def _debug_register(number: int) -> int:
    """Without CR4.DE, DR4 and DR5 are DR6 and DR7."""
    return number + 2 if number in (4, 5) else number


def read_debug(ctxt: X86EmulateCtxt) -> None:
    """MOV from DR."""
    ctxt.dst.val = ctxt.regs.dr[_debug_register(ctxt.insn.modrm_reg)]


def em_dr_write(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_dr_write; x86.c:kvm_set_dr refuses upper halves of DR6 and DR7."""
    number = _debug_register(ctxt.insn.modrm_reg)
    value = ctxt.src.val if ctxt.mode == MODE_PROT64 else ctxt.src.val & MASK32
    if number >= 6 and value > MASK32:
        raise Fault(VECTOR_GP, 0)
    if number == 6:
        value = value & 0x1E00F | 0xFFFE0FF0
    elif number == 7:
        value = value & 0xFFFF2FFF | 0x400
    ctxt.regs.dr[number] = value


def em_rdtsc(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_rdtsc."""
    _set_edx_eax(ctxt, ctxt.ops.get_msr(MSR_TSC))


def em_rdmsr(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_rdmsr."""
    _set_edx_eax(ctxt, ctxt.ops.get_msr(ctxt.gpr[RCX] & MASK32))


def _set_edx_eax(ctxt: X86EmulateCtxt, value: int) -> None:
    ctxt.gpr[RAX] = value & MASK32
    ctxt.gpr[RDX] = value >> 32


def em_wrmsr(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_wrmsr."""
    ctxt.ops.set_msr(ctxt.gpr[RCX] & MASK32, (ctxt.gpr[RDX] & MASK32) << 32 | ctxt.gpr[RAX] & MASK32)


def em_rdpmc(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_rdpmc: there are no counters."""
    raise Fault(VECTOR_GP, 0)


def em_rdpid(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_rdpid. The guest's CPUID has RDPID."""
    ctxt.dst.val = ctxt.ops.get_msr(MSR_TSC_AUX)


def em_cpuid(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_cpuid."""
    gpr = ctxt.gpr
    gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX] = cpuid.leaf(gpr[RAX] & MASK32, gpr[RCX] & MASK32, ctxt.regs)


def em_xsetbv(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_xsetbv. CR4.OSXSAVE counts as set."""
    gpr = ctxt.gpr
    value = (gpr[RDX] & MASK32) << 32 | gpr[RAX] & MASK32
    if gpr[RCX] & MASK32 or value not in (1, 3, 7):
        raise Fault(VECTOR_GP, 0)
    ctxt.regs.xcr0 = value


def interrupts(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_cli, em_sti: STI casts a shadow whether IF was set or not."""
    if bad_iopl(ctxt):
        raise Fault(VECTOR_GP, 0)
    if ctxt.insn.name == "sti":
        ctxt.interruptibility = SHADOW_STI
        ctxt.eflags |= FLAG_IF
    else:
        ctxt.eflags &= ~FLAG_IF


# Ports.


def em_in(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_in, pio_in_emulated: REP INS reads ahead, up to the end of the page."""
    dst = ctxt.dst
    port = ctxt.src.val & 0xFFFF
    if not (ctxt.insn.rep and ctxt.d & STRING):
        dst.val = _read_port(ctxt, port, dst.bytes, 1)[0]
        return
    if ctxt.io_read_pos == len(ctxt.io_read):
        _read_ahead(ctxt, port, dst.bytes)
    if ctxt.eflags & FLAG_DF:
        dst.val = ctxt.io_read[ctxt.io_read_pos]
        dst.count = 1
        ctxt.io_read_pos += 1
        return
    dst.val = 0
    dst.count = len(ctxt.io_read) - ctxt.io_read_pos
    for place in range(dst.count):
        dst.val |= ctxt.io_read[ctxt.io_read_pos + place] << 8 * dst.bytes * place
    dst.type = MEM_STR
    ctxt.io_read_pos = len(ctxt.io_read)


def _read_port(ctxt: X86EmulateCtxt, port: int, size: int, count: int) -> list[int]:
    values = ctxt.ops.pio_in(port, size, count)
    for value in values:
        ctxt.accesses.append(Access(PORT, port, size, value))
    return values


def _read_ahead(ctxt: X86EmulateCtxt, port: int, size: int) -> None:
    offset = ctxt.gpr[RDI] & PAGE_SIZE - 1
    in_page = offset if ctxt.eflags & FLAG_DF else PAGE_SIZE - offset
    count = max(1, min(in_page, _READ_AHEAD // size, address_mask(ctxt.insn, ctxt.gpr[RCX])))
    ctxt.io_read = _read_port(ctxt, port, size, count)
    ctxt.io_read_pos = 0
    ctxt.io_read_used = True


def em_out(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_out."""
    size = ctxt.src.bytes
    ctxt.ops.pio_out(ctxt.dst.val & 0xFFFF, size, ctxt.src.val & (1 << 8 * size) - 1)
    ctxt.dst.type = NONE


# x87.


def _check_x87(ctxt: X86EmulateCtxt) -> None:
    if ctxt.regs.cr0 & (CR0_EM | CR0_TS):
        raise Fault(VECTOR_NM)


def em_fninit(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_fninit."""
    _check_x87(ctxt)
    reset(ctxt.regs)


def store_x87_word(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_fnstcw, em_fnstsw."""
    _check_x87(ctxt)
    ctxt.dst.val = ctxt.regs.fcw if ctxt.insn.name == "fnstcw" else ctxt.regs.fsw


def _save_area(ctxt: X86EmulateCtxt) -> int:
    """Offset of the memory operand, which the entry does not declare. emulate.c:check_fxsr: not in 64-bit mode."""
    _check_x87(ctxt)
    if ctxt.mode == MODE_PROT64:
        raise EmulationFailed
    assert ctxt.insn.base != RIP
    return effective_address(ctxt, ctxt.insn)


def em_fxsave(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_fxsave: only the bytes that 32-bit code has registers for are written."""
    ea = _save_area(ctxt)
    segmented_write_std(ctxt, ctxt.insn.segment, ea, _FXSAVE_SIZE, fxsave_image(ctxt.regs))


def em_fxrstor(ctxt: X86EmulateCtxt) -> None:
    """emulate.c:em_fxrstor."""
    image = segmented_read_std(ctxt, ctxt.insn.segment, _save_area(ctxt), _FXSAVE_SIZE)
    if image >> 8 * 26 & 0xFFFF:
        # MXCSR, bytes 24 to 27.
        raise Fault(VECTOR_GP, 0)
    load_fxsave_image(ctxt.regs, image)
