"""Loading segment registers in the emulator (emulate.c:__load_segment_descriptor): KVM's own order of checks."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import (
    CMPXCHG,
    MODE_PROT64,
    MODE_REAL,
    Access,
    X86EmulateCtxt,
    is_noncanonical,
    linear_read_system,
    linear_write_system,
    set_segment,
)
from mmufuzz.kvm.emulate_ops import EmulationFailed
from mmufuzz.x86.insn import CS, GS, LDTR, SS, TR
from mmufuzz.x86.segments import Descriptor
from mmufuzz.x86.state import (
    EFER_LMA,
    RIGHTS_DB,
    RIGHTS_L,
    RIGHTS_UNUSABLE,
    VECTOR_GP,
    VECTOR_NP,
    VECTOR_SS,
    Fault,
)

# enum x86_transfer_type.
TRANSFER_NONE: Final = 0
TRANSFER_CALL_JMP: Final = 1
TRANSFER_RET: Final = 2

_MASK32: Final = 0xFFFFFFFF
_G: Final = 1 << 15


def load_segment_descriptor(ctxt: X86EmulateCtxt, selector: int, index: int) -> None:
    """emulate.c:load_segment_descriptor: MOV, POP and the like. A null SS is refused at CPL 3."""
    if ctxt.fixes.null_ss and index == SS and selector == 3 and ctxt.mode == MODE_PROT64:
        raise Fault(VECTOR_GP, 0)
    load_descriptor(ctxt, selector, index, TRANSFER_NONE)


def load_descriptor(ctxt: X86EmulateCtxt, selector: int, index: int, transfer: int) -> None:
    """emulate.c:__load_segment_descriptor at the guest's CPL; the register is the vCPU's at once."""
    regs = ctxt.regs
    if ctxt.mode == MODE_REAL:
        old = regs.segments[index]
        set_segment(ctxt, index, selector, selector << 4, old.limit, old.rights & ~RIGHTS_UNUSABLE)
        return
    if index == TR and selector & 4:
        raise Fault(VECTOR_GP, 0)
    if selector & ~3 == 0:
        _load_null(ctxt, selector, index)
        return
    descriptor = _read_segment_descriptor(ctxt, selector)
    error = selector & 0xFFFC
    if index <= GS and descriptor.is_system:
        if transfer == TRANSFER_CALL_JMP:
            raise EmulationFailed
        raise Fault(VECTOR_GP, error)
    if not _privileged(ctxt, selector, index, transfer, descriptor):
        raise Fault(VECTOR_GP, error)
    if index == CS:
        selector = error | regs.cpl
    if not descriptor.present:
        raise Fault(VECTOR_SS if index == SS else VECTOR_NP, error)
    base = descriptor.base
    if not descriptor.is_system:
        if not descriptor.type & 1:
            descriptor.rights |= 1
            linear_write_system(ctxt, descriptor.address, 8, descriptor.word | 1 << 40)
    elif ctxt.mode == MODE_PROT64:
        base |= linear_read_system(ctxt, descriptor.address + 8, 4) << 32
        if is_noncanonical(ctxt, base):
            raise Fault(VECTOR_GP, error)
    if index == TR:
        descriptor.rights |= 2
        new = descriptor.word | 2 << 40
        ctxt.accesses.append(Access(CMPXCHG, descriptor.address, 8, new))
        ctxt.ops.cmpxchg_emulated(descriptor.address, 8, descriptor.word, new)
    set_segment(ctxt, index, selector, base, descriptor.limit, descriptor.rights)


def _load_null(ctxt: X86EmulateCtxt, selector: int, index: int) -> None:
    """A null selector: never for CS and TR, for SS only in 64-bit mode and with RPL = CPL."""
    cpl = ctxt.regs.cpl
    if index in (CS, TR):
        raise Fault(VECTOR_GP, 0)
    if index == SS:
        if ctxt.mode != MODE_PROT64 or selector & 3 != cpl:
            raise Fault(VECTOR_GP, 0)
        if ctxt.fixes.null_ss:
            # CPL is SS.DPL, so the descriptor is made up.
            set_segment(ctxt, SS, selector, 0, 0xFFF, 0x93 | cpl << 5 | RIGHTS_DB | _G)
            return
    set_segment(ctxt, index, selector, 0, 0, 0)


def _read_segment_descriptor(ctxt: X86EmulateCtxt, selector: int) -> Descriptor:
    """emulate.c:get_descriptor_table_ptr, get_descriptor_ptr, read_segment_descriptor."""
    regs = ctxt.regs
    base = regs.gdt_base
    limit = regs.gdt_limit
    if selector & 4:
        ldt = regs.segments[LDTR]
        usable = not ldt.rights & RIGHTS_UNUSABLE
        base = ldt.base if usable else 0
        # struct desc_ptr has 16 bits for it.
        limit = ldt.limit & 0xFFFF if usable else 0
    place = selector >> 3 << 3
    if limit < place + 7:
        raise Fault(VECTOR_GP, selector & 0xFFFC)
    address = base + place
    if not regs.efer & EFER_LMA:
        address &= _MASK32
    return Descriptor(address, linear_read_system(ctxt, address, 8))


def _privileged(ctxt: X86EmulateCtxt, selector: int, index: int, transfer: int, descriptor: Descriptor) -> bool:
    """Type and privilege of a descriptor for register ``index``."""
    cpl = ctxt.regs.cpl
    rpl = selector & 3
    dpl = descriptor.dpl
    kind = descriptor.type
    if index == SS:
        return rpl == cpl and kind & 0xA == 2 and dpl == cpl
    if index == CS:
        return _code_allowed(ctxt, rpl, transfer, descriptor)
    if index == TR:
        return descriptor.is_system and kind in (1, 9)
    if index == LDTR:
        return descriptor.is_system and kind == 2
    if kind & 0xA == 8:
        return False
    if kind & 0xC == 0xC:
        return True
    if ctxt.fixes.segment_privilege:
        return rpl <= dpl and cpl <= dpl
    return rpl <= dpl or cpl <= dpl


def _code_allowed(ctxt: X86EmulateCtxt, rpl: int, transfer: int, descriptor: Descriptor) -> bool:
    """A code segment as the target of ``transfer``; EmulationFailed for a return to an outer privilege."""
    cpl = ctxt.regs.cpl
    dpl = descriptor.dpl
    if not descriptor.type & 8 or transfer == TRANSFER_NONE:
        return False
    conforming = descriptor.type & 4 != 0
    if transfer == TRANSFER_RET:
        if rpl < cpl:
            return False
        if rpl > cpl:
            raise EmulationFailed
        allowed = dpl <= rpl if conforming else dpl == rpl
    else:
        allowed = dpl <= cpl if conforming else rpl <= cpl and dpl == cpl
    both = RIGHTS_L | RIGHTS_DB
    return allowed and not (descriptor.rights & both == both and ctxt.regs.efer & EFER_LMA)
