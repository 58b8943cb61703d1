"""What KVM's emulator is expected to leave where it deviates: LLDT, LTR, and the limit of the LDT.

See ``emulator_expected``.
"""

from __future__ import annotations

from mmufuzz.kvm.emulate_ctxt import CMPXCHG, READ, SYSTEM, Access
from mmufuzz.oracle.emulator_compare import ERROR_CODE, Comparison, expecting, translated
from mmufuzz.oracle.emulator_expected import segment_fault, without
from mmufuzz.x86.execute_operands import MASK64
from mmufuzz.x86.insn import LDTR, REG, TR, Insn
from mmufuzz.x86.state import EFER_LMA, RIGHTS_UNUSABLE, VECTOR_GP, VECTOR_PF, Fault


def _selector(made: Comparison, insn: Insn) -> int:
    """What LLDT and LTR load; -1 if it was not read."""
    operand = insn.operands[0]
    if operand.kind == REG:
        return made.gpr[operand.index] & 0xFFFF
    return made.accesses[0].value & 0xFFFF if made.accesses and made.accesses[0].value >= 0 else -1


def local_limit(made: Comparison) -> Comparison | None:
    """A selector of an LDT of more than 64 KiB: as if its limit were the low 16 bits of it."""
    insn = made.insn
    if insn is None or made.after.segments[LDTR].limit <= 0xFFFF or made.emulated_vector != VECTOR_GP:
        return None
    regs = made.origin()
    after = made.after.copy()
    limit = regs.segments[LDTR].limit & ~0xFFFF
    regs.segments[LDTR].limit -= limit
    after.segments[LDTR].limit -= limit
    return translated(made, insn, regs, after, made.accesses)


def ltr_error(made: Comparison) -> Comparison | None:
    """LTR of a selector of the LDT: #GP(0)."""
    insn = made.insn
    if insn is None or made.decoded.name != "ltr" or not _selector(made, insn) & 4:
        return None
    if made.emulated_vector != VECTOR_GP or made.expected_vector != VECTOR_GP or not segment_fault(made):
        return None
    return expecting(made, made.origin(), (ERROR_CODE,))


def lldt_local(made: Comparison) -> Comparison | None:
    """LLDT of a selector of the LDT: as if the LDT were the GDT, one entry further on, as entry 0 of a GDT is null."""
    insn = made.insn
    if insn is None or made.decoded.name != "lldt":
        return None
    selector = _selector(made, insn)
    if selector < 0 or not selector & 4 or selector > 0xFFF7:
        return None
    regs = made.origin()
    after = made.after.copy()
    table = regs.segments[LDTR]
    usable = not table.rights & RIGHTS_UNUSABLE
    substitute = (selector | 7) + 1 | selector & 3
    base = (table.base if usable else 0) - 8 - regs.gdt_base
    limit = (table.limit & 0xFFFF if usable else 0) + 8 - regs.gdt_limit
    for each in (regs, after):
        each.gdt_base = each.gdt_base + base & MASK64
        each.gdt_limit += limit
        if insn.operands[0].kind == REG:
            each.gpr[insn.operands[0].index] ^= selector ^ substitute
    accesses = made.accesses[:]
    if insn.operands[0].kind != REG:
        accesses[0] = Access(accesses[0].kind, accesses[0].gva, accesses[0].size, substitute)
    other = Comparison(made.decoded, regs.copy(), after, False)
    other.tried = made.tried
    other.fault = made.fault
    if made.fault is None:
        if after.segments[LDTR].selector != selector:
            return None
        after.segments[LDTR].selector = substitute
    elif made.fault.error_code == selector & 0xFFFC and made.fault.vector != VECTOR_PF:
        other.fault = Fault(made.fault.vector, substitute & 0xFFFC)
    return translated(other, insn, regs, after, accesses)


def system_limit(made: Comparison) -> Comparison | None:
    """LLDT and LTR in long mode: as if the table were 8 bytes longer."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("lldt", "ltr") or not made.mode64:
        return None
    selector = _selector(made, insn)
    regs = made.origin()
    if selector < 0 or not (selector | 7) <= regs.gdt_limit < (selector | 7) + 8:
        return None
    after = made.after.copy()
    regs.gdt_limit += 8
    after.gdt_limit += 8
    return translated(made, insn, regs, after, made.accesses)


def system_compatibility(made: Comparison) -> Comparison | None:
    """LLDT and LTR in compatibility mode: as outside long mode."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("lldt", "ltr") or made.mode64:
        return None
    return without(made, insn, efer=EFER_LMA) if made.origin().efer & EFER_LMA else None


def system_read(made: Comparison) -> Comparison | None:
    """LLDT and LTR in long mode: the last 4 bytes of the descriptor, which are not read, have no effect."""
    insn = made.insn
    if insn is None or made.decoded.name not in ("lldt", "ltr") or not made.mode64:
        return None
    accesses = [
        Access(access.kind, access.gva, 8, access.value)
        if access.kind == READ | SYSTEM and access.size == 4
        else access
        for access in made.accesses
    ]
    return translated(made, insn, made.origin(), made.after, accesses)


def tss16(made: Comparison) -> Comparison | None:
    """LTR of a 16-bit TSS in long mode: as if it were of 64 bits."""
    insn = made.insn
    if insn is None or made.decoded.name != "ltr" or not made.mode64 or made.emulated_vector == VECTOR_GP:
        return None
    accesses: list[Access] = []
    changed = False
    for access in made.accesses:
        tss = access.kind == READ | SYSTEM and access.size == 8 and access.value >> 40 & 0x1F == 1
        changed = changed or tss
        wide = tss or (changed and access.kind == CMPXCHG)
        value = access.value | 8 << 40 if wide else access.value
        accesses.append(Access(access.kind, access.gva, access.size, value))
    if not changed:
        return None
    after = made.after.copy()
    if made.fault is None:
        after.segments[TR].rights ^= 8
    return translated(made, insn, made.origin(), after, accesses)
