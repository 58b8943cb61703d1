"""What KVM's emulator is expected to leave where it deviates: segment, control and debug registers, addresses.

See ``emulator_expected``.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_ctxt import READ, WRITE
from mmufuzz.kvm.emulate_ops import HYPERCALL_LENGTH, VMCALL, VMMCALL
from mmufuzz.kvm.opcode_table import CHECK_SVM_ADDRESS, MOV, NO_WRITE, PRIV
from mmufuzz.oracle.emulator_compare import (
    ADDRESS,
    ERROR_CODE,
    EXCEPTION,
    FAULT,
    MEMORY,
    Comparison,
    expecting,
    same_segments,
    translated,
)
from mmufuzz.oracle.emulator_expected import again, low_half_end, operand_fault, resized, segment_fault, without
from mmufuzz.x86.bus import WIDEST
from mmufuzz.x86.execute_operands import MASK32, MASK64, RAX, effective_address, linear
from mmufuzz.x86.insn import FS, SS, Insn, renamed
from mmufuzz.x86.segments import refresh
from mmufuzz.x86.state import (
    CR0_AM,
    CR4_UMIP,
    RIGHTS_DB,
    RIGHTS_UNUSABLE,
    VECTOR_AC,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
    Fault,
    Regs,
    Segment,
)

_FXSAVE_SIZE: Final = 288
_DR6_TRAPS: Final = 0xF
_DR6_BD: Final = 1 << 13
_DR6_FIXED: Final = 0xFFFF0FF0

# Segment, control and debug registers.


def _is_sreg(made: Comparison) -> bool:
    return made.decoded.name in ("mov.from_sreg", "mov.to_sreg")


def sreg_rex(made: Comparison) -> Comparison | None:
    """REX.R with a segment register: #UD, once the operand of a load is read."""
    if not _is_sreg(made) or made.decoded.modrm_reg <= 7:
        return None
    loads = made.decoded.name == "mov.to_sreg"
    if made.emulated_vector != VECTOR_UD and not (loads and operand_fault(made)):
        return None
    return expecting(made, made.origin(), FAULT)


def sreg_order(made: Comparison) -> Comparison | None:
    """MOV to CS or an undefined register: the fault of its operand."""
    if made.decoded.name != "mov.to_sreg" or made.expected_vector != VECTOR_UD or not operand_fault(made):
        return None
    return expecting(made, made.origin(), FAULT)


def selector_width(made: Comparison) -> Comparison | None:
    """A selector stored with REX.W: 8 bytes."""
    insn = made.insn
    stores = made.decoded.name in ("sldt", "str", "mov.from_sreg")
    if insn is None or not stores or not made.decoded.in_memory or made.decoded.op_bytes != 8:
        return None
    return again(made, resized(insn, 8))


def selector_read(made: Comparison) -> Comparison | None:
    """SLDT and STR to memory that cannot be accessed: the fault of as many bytes as the operand size says."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("sldt", "str") or not operand_fault(made):
        return None
    size = made.decoded.op_bytes
    return again(made, resized(insn, size)) if size > insn.operands[0].size else None


def control_order(made: Comparison) -> Comparison | None:
    """#GP(0) for privilege, a wide value of DR6 or DR7, or SVM's rAX, where hardware has another exception first."""
    insn = made.decoded
    if not segment_fault(made) or made.emulated_vector != VECTOR_GP:
        return None
    wide = insn.name == "movdr.write" and insn.modrm_reg in (6, 7) and made.gpr[insn.modrm_rm] > MASK32
    address = insn.d & CHECK_SVM_ADDRESS != 0 and made.gpr[RAX] >> 48 != 0
    privilege = insn.d & PRIV != 0 and made.origin().cpl != 0
    if made.expected_vector == VECTOR_DB:
        refused = wide
    else:
        refused = made.expected_vector == VECTOR_UD and (wide or address or privilege)
    return expecting(made, made.origin(), FAULT) if refused else None


def debug_detect(made: Comparison) -> Comparison | None:
    """DR7.GD at the #DB for it: DR7 as it was, in DR6 BD alone."""
    if made.emulated_vector != VECTOR_DB or made.expected_vector != VECTOR_DB:
        return None
    regs = made.origin()
    regs.dr[6] = regs.dr[6] & ~_DR6_TRAPS | _DR6_BD | _DR6_FIXED
    return expecting(made, regs, ())


def null_ss(made: Comparison) -> Comparison | None:
    """A null SS: a writable data segment with DPL = CPL."""
    old = made.expected.segments[SS]
    if not made.mode64 or made.emulated_vector >= 0 or not old.rights & RIGHTS_UNUSABLE:
        return None
    regs = made.expected.copy()
    rights = 0x93 | regs.cpl << 5 | RIGHTS_DB | 1 << 15
    regs.segments[SS] = Segment(old.selector, 0, 0xFFF, rights)
    return expecting(made, regs, ())


# Addresses.


def segment_override(made: Comparison) -> Comparison | None:
    """The last segment prefix in 64-bit mode."""
    insn = made.insn
    if not made.mode64 or insn is None or insn.segment == made.decoded.segment:
        return None
    other = renamed(insn, insn.mnemonic, insn.operation)
    other.segment = made.decoded.segment
    return again(made, other)


def first_byte(made: Comparison) -> Comparison | None:
    """An access that leaves the low canonical half: as if only its first byte had to be canonical."""
    insn = made.insn
    regs = made.origin()
    if insn is None or not made.mode64 or not _leaves_the_low_half(made, regs, insn):
        return None
    regs.only_first_byte_canonical = True
    return translated(made, insn, regs, made.after, made.accesses)


def _leaves_the_low_half(made: Comparison, regs: Regs, insn: Insn) -> bool:
    """An access does, or the operand, if it is refused for another reason."""
    ranges = [(access.gva, access.size) for access in made.accesses]
    if made.decoded.in_memory:
        base = regs.segments[insn.segment].base if insn.segment >= FS else 0
        ranges.append((effective_address(regs, insn) + base & MASK64, WIDEST))
    end = low_half_end(made)
    return any(first < end < first + size for first, size in ranges)


def alignment(made: Comparison) -> Comparison | None:
    """An access that is not aligned: as with CR0.AM clear."""
    insn = made.insn
    if insn is None or made.expected_vector != VECTOR_AC:
        return None
    return without(made, insn, cr0=CR0_AM)


def umip_order(made: Comparison) -> Comparison | None:
    """SLDT and STR that CR4.UMIP refuses: the fault of their operand, which is read first, as without UMIP."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("sldt", "str") or not operand_fault(made):
        return None
    return without(made, insn, cr4=CR4_UMIP) if made.origin().cr4 & CR4_UMIP else None


def hypercall(made: Comparison) -> Comparison | None:
    """VMCALL and VMMCALL: the host's hypercall is stored at RIP, or the store faults."""
    if made.decoded.name != "vmcall" or made.expected_vector != VECTOR_UD or len(made.accesses) != 1:
        return None
    store = made.accesses[0]
    if store.kind != WRITE or store.gva != made.start or store.size != HYPERCALL_LENGTH:
        return None
    if store.value not in (VMCALL, VMMCALL):
        return None
    regs = made.origin()
    if made.emulated_vector == VECTOR_PF:
        return expecting(made, regs, FAULT)
    regs.shadow = 0
    return expecting(made, regs, (*FAULT, MEMORY)) if made.emulated_vector < 0 else None


def write_check(made: Comparison) -> Comparison | None:
    """A read-modify-write in a segment that cannot be written: the #PF of the read."""
    insn = made.decoded
    if made.mode64 or insn.d & (MOV | NO_WRITE) or made.emulated_vector != VECTOR_PF or not insn.in_memory:
        return None
    rights = made.origin().segments[insn.segment].rights
    read = made.accesses[len(made.accesses) - 1].kind == READ
    if not read or made.expected_vector not in (VECTOR_GP, VECTOR_SS) or (rights & 2 and not rights & 8):
        return None
    return expecting(made, made.origin(), (EXCEPTION, ERROR_CODE, ADDRESS))


def wrap(made: Comparison) -> Comparison | None:
    """LGDT and LIDT with the base behind 4 GiB: #GP(0) or #SS(0)."""
    insn = made.insn
    if made.mode64 or insn is None or made.decoded.name not in ("lgdt", "lidt") or not segment_fault(made):
        return None
    regs = made.origin()
    if effective_address(regs, insn) + 2 <= MASK32 or (made.emulated_vector == VECTOR_SS) != (insn.segment == SS):
        return None
    return expecting(made, regs, FAULT)


def table_order(made: Comparison) -> Comparison | None:
    """LGDT and LIDT whose first bytes are absent: the #PF, though the last ones are beyond segment or low half."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("lgdt", "lidt") or made.emulated_vector != VECTOR_PF:
        return None
    regs = made.origin()
    try:
        first = linear(regs, insn.segment, effective_address(regs, insn), 2, False)
    except Fault:
        return None
    refused = made.expected_vector in (VECTOR_GP, VECTOR_SS) and made.accesses[len(made.accesses) - 1].gva == first
    return expecting(made, regs, FAULT) if refused else None


def lgdt16(made: Comparison) -> Comparison | None:
    """LGDT and LIDT of 16 bits: an operand of 5 bytes."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("lgdt", "lidt") or made.decoded.op_bytes != 2 or made.mode64:
        return None
    return again(made, resized(insn, 5))


def sgdt16(made: Comparison) -> Comparison | None:
    """SGDT and SIDT of 16 bits: as if the bases had 24 bits."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("sgdt", "sidt") or made.decoded.op_bytes != 2 or made.mode64:
        return None
    regs = made.origin()
    after = made.after.copy()
    for each in (after, regs):
        each.gdt_base -= regs.gdt_base & ~0xFFFFFF
        each.idt_base -= regs.idt_base & ~0xFFFFFF
    return translated(made, insn, regs, after, made.accesses)


def fxsave_size(made: Comparison) -> Comparison | None:
    """FXSAVE and FXRSTOR outside 64-bit mode: a segment that ends behind the 288th byte does not matter."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("fxsave", "fxrstor") or made.mode64:
        return None
    regs = made.origin()
    try:
        linear(regs, insn.segment, effective_address(regs, insn), _FXSAVE_SIZE, made.decoded.name == "fxsave")
    except Fault:
        return None
    after = made.after.copy()
    if not same_segments(regs, after):
        return None
    for each in (regs, after):
        segment = each.segments[insn.segment]
        segment.limit = MASK32
        segment.rights = segment.rights & ~0xC | 2
        refresh(each)
    return translated(made, insn, regs, after, made.accesses)
