"""What KVM's emulator is expected to leave of far transfers where it deviates (see ``emulator_expected``)."""

from __future__ import annotations

from mmufuzz.kvm.emulate_ctxt import CMPXCHG, READ, SYSTEM, WRITE, Access
from mmufuzz.kvm.opcode_table import OP_IMM_FAR
from mmufuzz.oracle.emulator_compare import FAULT, MEMORY, Comparison, expecting
from mmufuzz.x86 import alu
from mmufuzz.x86.execute_operands import MASK32, MASK64, RCX, RDX, RSP, is_canonical
from mmufuzz.x86.insn import CS, SS
from mmufuzz.x86.segments import Descriptor, install_flat
from mmufuzz.x86.state import (
    EFER_LMA,
    FLAG_AC,
    FLAG_IF,
    FLAG_TF,
    MSR_SYSENTER_CS,
    RIGHTS_DB,
    RIGHTS_L,
    VECTOR_BP,
    VECTOR_GP,
    VECTOR_OF,
    VECTOR_PF,
    VECTOR_SS,
    Regs,
    Segment,
)


class _Pushes:
    """Pushes on the stack of ``regs``, which has the width of ``mask``, as the writes that they are."""

    def __init__(self, regs: Regs, mask: int) -> None:
        self.mask = mask
        self.rsp = regs.gpr[RSP]
        self.base = regs.segments[SS].base
        self.writes: list[Access] = []

    def push(self, size: int, value: int) -> None:
        """One value, cut to ``size`` bytes."""
        self.rsp = self.rsp & ~self.mask | self.rsp - size & self.mask
        offset = self.rsp & self.mask
        gva = offset if self.mask == MASK64 else self.base + offset & MASK32
        self.writes.append(Access(WRITE, gva, size, value & alu.mask(size)))


def _made_writes(made: Comparison, wanted: list[Access]) -> bool:
    """The emulator wrote what is ``wanted``, or if it faulted a part of that, from the first on."""
    found = [access for access in made.accesses if access.kind & ~SYSTEM in (WRITE, CMPXCHG)]
    if len(found) > len(wanted) or (len(found) < len(wanted) and made.fault is None):
        return False
    return all(_is_same(access, wanted[place]) for place, access in enumerate(found))


def _is_same(one: Access, other: Access) -> bool:
    return (one.kind, one.gva, one.size, one.value) == (other.kind, other.gva, other.size, other.value)


def _stack_fault(made: Comparison) -> bool:
    """The emulator could not write to its stack, or not say so in a descriptor: what it had loaded is put back."""
    fault = made.fault
    assert fault is not None
    if fault.vector == VECTOR_PF:
        return made.accesses[len(made.accesses) - 1].kind & ~SYSTEM == WRITE
    return fault.vector == VECTOR_SS and fault.error_code == 0


def _far_pointer(made: Comparison) -> tuple[int, int]:
    """(selector, offset); a selector of -1 if it was not read."""
    insn = made.decoded
    if insn.entry.src == OP_IMM_FAR:
        return insn.selector, insn.imm & alu.mask(insn.op_bytes)
    if not made.accesses or made.accesses[0].kind != READ or made.accesses[0].value < 0:
        return -1, 0
    value = made.accesses[0].value
    return value >> 8 * insn.op_bytes & 0xFFFF, value & alu.mask(insn.op_bytes)


def _descriptor(made: Comparison) -> Descriptor | None:
    """The descriptor that the emulator read first, of 8 bytes."""
    for access in made.accesses:
        if access.kind == READ | SYSTEM and access.size == 8:
            return Descriptor(access.gva, access.value)
    return None


def _marking(descriptor: Descriptor) -> Access:
    """The write that marks ``descriptor`` accessed."""
    return Access(WRITE | SYSTEM, descriptor.address, 8, descriptor.word | 1 << 40)


def _is_wide(regs: Regs, rights: int) -> bool:
    """Code of these rights is 64-bit code."""
    return regs.efer & EFER_LMA != 0 and rights & RIGHTS_L != 0


def _is_beyond(regs: Regs, rights: int, limit: int, offset: int) -> bool:
    """Code of these rights and this limit does not reach to ``offset``."""
    return not is_canonical(regs, offset) if _is_wide(regs, rights) else offset > limit


def far_mark(made: Comparison) -> Comparison | None:
    """Far JMP and RETF beyond the code: the #PF of marking its descriptor accessed, which comes first."""
    insn = made.decoded
    if insn.name not in ("jmpf", "retf") or made.emulated_vector != VECTOR_PF or made.expected_vector != VECTOR_GP:
        return None
    failed = made.accesses[len(made.accesses) - 1]
    descriptor = _descriptor(made)
    if descriptor is None or not _is_same(failed, _marking(descriptor)):
        return None
    offset = made.accesses[0].value & alu.mask(insn.op_bytes) if insn.name == "retf" else _far_pointer(made)[1]
    regs = made.origin()
    return expecting(made, regs, FAULT) if _is_beyond(regs, descriptor.rights, descriptor.limit, offset) else None


def far_call(made: Comparison) -> Comparison | None:
    """Far CALL: CS is loaded, its descriptor accessed, before the offset is checked and before the pushes.

    The pushes have the width of the new code.
    """
    insn = made.decoded
    selector, offset = _far_pointer(made) if insn.name == "callf" else (-1, 0)
    refused = made.fault is not None and (made.emulated_vector, made.fault.error_code) == (VECTOR_GP, 0)
    if selector < 0 or (made.fault is not None and not refused and not _stack_fault(made)):
        return None
    regs = made.origin()
    writes: list[Access] = []
    code = regs.segments[CS]
    if regs.real_mode:
        target = Segment(selector, selector << 4, code.limit, code.rights)
    else:
        descriptor = _descriptor(made)
        if descriptor is None:
            return None
        if not descriptor.type & 1:
            writes.append(_marking(descriptor))
        rights = descriptor.rights | 1
        target = Segment(selector & 0xFFFC | regs.cpl, descriptor.base, descriptor.limit, rights)
    mask = MASK32 if regs.segments[SS].rights & RIGHTS_DB else 0xFFFF
    if _is_wide(regs, target.rights):
        mask = MASK64
    if refused and not _is_beyond(regs, target.rights, target.limit, offset):
        return None
    stack = _Pushes(regs, mask)
    if not refused:
        stack.push(insn.op_bytes, code.selector)
        stack.push(insn.op_bytes, made.start + insn.length)
    if not _made_writes(made, writes + stack.writes):
        return None
    if made.fault is None:
        regs.shadow = 0
        regs.segments[CS] = target
        regs.gpr[RSP] = stack.rsp
        regs.rip = offset
    return expecting(made, regs, (*FAULT, MEMORY))


def far_return(made: Comparison) -> Comparison | None:
    """RETF n from 64-bit code to 32-bit or 16-bit code: n is added in the width of the stack there."""
    insn = made.decoded
    regs = made.expected.copy()
    if insn.entry.opcode != 0xCA or made.emulated_vector >= 0 or not made.mode64 or regs.long_mode:
        return None
    regs.gpr[RSP] = made.gpr[RSP] + 2 * insn.op_bytes & MASK64
    mask = 0xFFFF if regs.stack16 else MASK32
    regs.gpr[RSP] = regs.gpr[RSP] & ~mask | regs.gpr[RSP] + (insn.imm & 0xFFFF) & mask
    return expecting(made, regs, ())


def _interrupt(made: Comparison) -> Comparison | None:
    """INT in real mode: three pushes of the operand size, whatever the limit of the IDT is."""
    insn = made.decoded
    if insn.name not in ("int", "int3", "into") or not made.after.real_mode:
        return None
    regs = made.origin()
    if made.fault is not None and not (_stack_fault(made) or made.emulated_vector == VECTOR_PF):
        return None
    vector = VECTOR_BP if insn.name == "int3" else VECTOR_OF if insn.name == "into" else insn.imm & 0xFF
    stack = _Pushes(regs, MASK32 if regs.segments[SS].rights & RIGHTS_DB else 0xFFFF)
    stack.push(insn.op_bytes, regs.rflags)
    stack.push(insn.op_bytes, regs.segments[CS].selector)
    stack.push(insn.op_bytes, made.start + insn.length)
    if not _made_writes(made, stack.writes):
        return None
    if made.fault is None:
        entry = regs.idt_base + 4 * vector & MASK32
        read = {access.gva: access.value for access in made.accesses if access.kind == READ | SYSTEM}
        if entry not in read or entry + 2 not in read:
            return None
        code = regs.segments[CS]
        regs.shadow = 0
        regs.segments[CS] = Segment(read[entry + 2], read[entry + 2] << 4, code.limit, code.rights)
        regs.rip = read[entry]
        regs.rflags &= ~(FLAG_IF | FLAG_TF | FLAG_AC)
        regs.gpr[RSP] = stack.rsp
    return expecting(made, regs, (*FAULT, MEMORY))


def interrupt_size(made: Comparison) -> Comparison | None:
    """INT with a 32-bit operand."""
    return _interrupt(made) if made.decoded.op_bytes == 4 else None


def interrupt_limit(made: Comparison) -> Comparison | None:
    """INT beyond the limit of the IDT, or without an IDT."""
    return _interrupt(made) if made.expected_vector >= 0 and made.emulated_vector < 0 else None


def interrupt_stores(made: Comparison) -> Comparison | None:
    """INT that faults on both sides: what it has pushed."""
    return _interrupt(made) if made.emulated_vector >= 0 else None


def iret_order(made: Comparison) -> Comparison | None:
    """IRET in real mode: #GP(0) for an offset above FFFF before CS and the flags are read."""
    fault = made.fault
    if made.decoded.name != "iret" or not made.after.real_mode or fault is None or len(made.accesses) != 1:
        return None
    if (fault.vector, fault.error_code) != (VECTOR_GP, 0) or made.accesses[0].value <= 0xFFFF:
        return None
    return expecting(made, made.origin(), FAULT)


def sysexit_null(made: Comparison) -> Comparison | None:
    """SYSEXIT to 64-bit code with a null selector in an MSR that is not zero: it goes there."""
    insn = made.insn
    if insn is None or made.decoded.name != "sysexit" or insn.size != 8:
        return None
    regs = made.origin()
    selector = regs.msr.get(MSR_SYSENTER_CS, 0)
    if selector == 0 or selector & 0xFFFC or made.emulated_vector >= 0 or made.expected_vector != VECTOR_GP:
        return None
    regs.shadow = 0
    regs.rip = regs.gpr[RDX]
    regs.gpr[RSP] = regs.gpr[RCX]
    regs.cpl = 3
    install_flat(regs, CS, 32 | 3, True)
    install_flat(regs, SS, 40 | 3, False)
    return expecting(made, regs, FAULT)
