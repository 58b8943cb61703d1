"""Execution of one decoded instruction, as hardware does it.

Each mnemonic has a handler. Handlers make every access through the ``Bus`` first and commit registers, flags
and RIP afterwards, so that a ``Fault``, or an exception with which the bus ends the instruction (a VM exit), leaves
the registers untouched. Repeated string instructions commit after each element instead.

Not modelled: RFLAGS.TF, breakpoints, virtual-8086 mode, task switches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.x86 import alu
from mmufuzz.x86 import execute_arith as arith
from mmufuzz.x86 import execute_far as far
from mmufuzz.x86 import execute_flow as flow
from mmufuzz.x86 import execute_msr as msr
from mmufuzz.x86 import execute_system as system
from mmufuzz.x86 import execute_tables as tables
from mmufuzz.x86 import execute_vector as vector
from mmufuzz.x86 import execute_x87 as x87
from mmufuzz.x86 import execute_xsave as xsave
from mmufuzz.x86.alignment import AlignedBus, checks_alignment
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import advance, effective_address, load_operand, store_operand, write_reg
from mmufuzz.x86.execute_string import string
from mmufuzz.x86.insn import SREG, Insn
from mmufuzz.x86.opcodes import MNEMONICS
from mmufuzz.x86.state import FLAG_AC, VECTOR_UD, Fault, Regs

Handler = Callable[[Regs, Insn, Bus], None]


def execute(regs: Regs, insn: Insn, bus: Bus) -> None:
    """Execute ``insn``, which lies at ``regs.rip``, and advance RIP.

    Raises ``Fault`` for architectural exceptions; whatever ``bus`` raises passes through. Behind the
    forced-emulation prefix hardware sees only its UD2. The interrupt shadow in which it stands ends with it.
    """
    if insn.fep:
        raise Fault(VECTOR_UD)
    shadow = regs.shadow
    if regs.rflags & FLAG_AC and checks_alignment(regs):
        bus = AlignedBus(bus, insn)
    _TABLE[insn.operation](regs, insn, bus)
    if shadow:
        regs.shadow &= ~shadow


def supported(mnemonic: str) -> bool:
    """True if ``execute`` has a handler for ``mnemonic``."""
    return mnemonic in HANDLERS


def _mov(regs: Regs, insn: Insn, bus: Bus) -> None:
    store_operand(regs, insn, bus, insn.operands[0], load_operand(regs, insn, bus, insn.operands[1]))
    advance(regs, insn)


def _mov_any(regs: Regs, insn: Insn, bus: Bus) -> None:
    """MOV, of which two opcodes name segment registers."""
    if insn.opcode in (0x8C, 0x8E):
        tables.mov_sreg(regs, insn, bus)
    else:
        _mov(regs, insn, bus)


def _movsx(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    src = insn.operands[1]
    value = alu.sign_extend(load_operand(regs, insn, bus, src), src.size, dst.size)
    store_operand(regs, insn, bus, dst, value)
    advance(regs, insn)


def _lea(regs: Regs, insn: Insn, bus: Bus) -> None:
    dst = insn.operands[0]
    write_reg(regs, dst.index, dst.size, effective_address(regs, insn) & alu.mask(dst.size))
    advance(regs, insn)


def _xchg(regs: Regs, insn: Insn, bus: Bus) -> None:
    first = insn.operands[0]
    second = insn.operands[1]
    # With memory it locks, prefix or not.
    old = load_operand(regs, insn, bus, first, True, True)
    store_operand(regs, insn, bus, first, load_operand(regs, insn, bus, second), True)
    store_operand(regs, insn, bus, second, old)
    advance(regs, insn)


def _pop(regs: Regs, insn: Insn, bus: Bus) -> None:
    """POP, of which some opcodes name segment registers."""
    if insn.operands[0].kind == SREG:
        tables.pop_sreg(regs, insn, bus)
    else:
        flow.pop_operand(regs, insn, bus)


_BY_HANDLER: Final[list[tuple[Handler, str]]] = [
    (_mov_any, "mov"),
    (_mov, "movzx movnti movdiri"),
    (_movsx, "movsx movsxd"),
    (_lea, "lea"),
    (_xchg, "xchg"),
    (arith.setcc, "setcc"),
    (arith.cmovcc, "cmovcc"),
    (arith.binary, "add or adc sbb and sub xor rol ror rcl rcr shl shr sar"),
    (arith.compare, "cmp test"),
    (arith.unary, "inc dec neg not"),
    (arith.source_only, "bsf bsr tzcnt lzcnt popcnt blsr blsmsk blsi adcx adox"),
    (arith.three, "andn bzhi bextr shlx shrx sarx rorx pext pdep"),
    (arith.bit, "bt bts btr btc"),
    (arith.double_shift, "shld shrd"),
    (arith.multiply, "mul"),
    (arith.signed_multiply, "imul"),
    (arith.multiply_without_flags, "mulx"),
    (arith.divide, "div idiv"),
    (arith.xadd, "xadd"),
    (arith.cmpxchg, "cmpxchg"),
    (arith.cmpxchg_pair, "cmpxchg8b cmpxchg16b"),
    (arith.byte_swap, "bswap"),
    (arith.move_swapped, "movbe"),
    (arith.crc32, "crc32"),
    (arith.extend_accumulator, "cbw"),
    (arith.extend_into_rdx, "cwd"),
    (arith.decimal, "daa das aaa aas aam aad"),
    (arith.set_al_on_carry, "salc"),
    (arith.bound, "bound"),
    (arith.load_flags_into_ah, "lahf"),
    (arith.store_ah_into_flags, "sahf"),
    (string, "movs stos lods cmps scas ins outs"),
    (flow.jump, "jmp"),
    (flow.jump_if, "jcc"),
    (flow.loop, "loop loope loopne"),
    (flow.jump_if_no_count, "jcxz"),
    (flow.call, "call"),
    (flow.ret, "ret"),
    (flow.push_operand, "push"),
    (_pop, "pop"),
    (flow.push_all, "pusha"),
    (flow.pop_all, "popa"),
    (flow.push_flags, "pushf"),
    (flow.pop_flags, "popf"),
    (flow.enter, "enter"),
    (flow.leave, "leave"),
    (far.load_far_pointer, "les lds lss lfs lgs"),
    (far.jump_far, "jmpf"),
    (far.call_far, "callf"),
    (far.return_far, "retf"),
    (far.iret, "iret"),
    (far.syscall, "syscall"),
    (far.sysret, "sysret"),
    (far.sysenter, "sysenter"),
    (far.sysexit, "sysexit"),
    (system.software_interrupt, "int int3 into int1"),
    (system.clear_carry, "clc stc cmc"),
    (system.direction, "cld std"),
    (system.interrupts, "cli sti"),
    (system.smap_override, "clac stac"),
    (system.mov_cr, "movcr"),
    (system.mov_dr, "movdr"),
    (system.machine_status_word, "smsw lmsw clts"),
    (system.invlpg, "invlpg"),
    (system.invpcid, "invpcid"),
    (system.privileged_nop, "invd wbinvd"),
    (system.halt, "hlt"),
    (system.mfence, "mfence"),
    (system.nop, "nop lfence sfence"),
    (system.flush_line, "clflush clflushopt clwb"),
    (system.undefined, "ud2 vmcall vmmcall"),
    (tables.store_table, "sgdt sidt"),
    (tables.load_table, "lgdt lidt"),
    (tables.store_system_segment, "sldt str"),
    (tables.load_system_segment, "lldt ltr"),
    (tables.look_at_segment, "lar lsl verr verw"),
    (tables.adjust_privilege, "arpl"),
    (tables.swap_gs, "swapgs"),
    (tables.fs_gs_base, "rdfsbase rdgsbase wrfsbase wrgsbase"),
    (msr.identify, "cpuid"),
    (msr.time_stamp, "rdtsc rdtscp"),
    (msr.processor_id, "rdpid"),
    (msr.performance_counter, "rdpmc"),
    (msr.read_msr, "rdmsr"),
    (msr.write_msr, "wrmsr"),
    (msr.extended_control, "xgetbv xsetbv"),
    (msr.protection_keys, "rdpkru wrpkru"),
    (system.port_in, "in"),
    (system.port_out, "out"),
    (system.translate_byte, "xlat"),
    (vector.move, "movups movupd movaps movapd movdqa movdqu movntps movntpd movntdq lddqu movd movq movntq movq2dq"),
    (vector.move, "movdq2q vmovups vmovupd vmovaps vmovapd vmovdqa vmovdqu vmovntps vmovntpd vmovntdq vlddqu"),
    (vector.move, "vmovd vmovq"),
    (vector.move_scalar, "movss movsd vmovss vmovsd"),
    (vector.move_half, "movlps movlpd movhps movhpd movhlps movlhps"),
    (vector.move_half, "vmovlps vmovlpd vmovhps vmovhpd vmovhlps vmovlhps"),
    (vector.duplicate, "movsldup movshdup movddup vmovsldup vmovshdup vmovddup"),
    (vector.masked_store, "maskmovq maskmovdqu vmaskmovdqu"),
    (vector.zero_upper, "vzeroupper vzeroall"),
    (vector.empty_mmx, "emms"),
    (vector.control_word, "ldmxcsr stmxcsr vldmxcsr vstmxcsr"),
    (x87.load, "fld"),
    (x87.load_integer, "fild fbld"),
    (x87.load_constant, "fld1 fldl2t fldl2e fldpi fldlg2 fldln2 fldz"),
    (x87.store, "fst fstp fist fistp fisttp fbstp"),
    (x87.exchange, "fxch"),
    (x87.change_sign, "fchs fabs"),
    (x87.move_top, "fdecstp fincstp ffree fnop"),
    (x87.wait, "wait"),
    (x87.control, "fninit fnclex fldcw fnstcw fnstsw"),
    (x87.store_environment, "fnstenv fnsave"),
    (x87.load_environment, "fldenv frstor"),
    (xsave.fxsave, "fxsave"),
    (xsave.fxrstor, "fxrstor"),
    (xsave.xsave, "xsave xsaveopt xsavec"),
    (xsave.xrstor, "xrstor"),
]


def _handlers() -> dict[str, Handler]:
    table: dict[str, Handler] = {}
    for handler, names in _BY_HANDLER:
        for name in names.split():
            table[name] = handler
    return table


HANDLERS: Final[dict[str, Handler]] = _handlers()
"""The handler of each mnemonic."""

_TABLE: Final[list[Handler]] = [HANDLERS[name] for name in MNEMONICS]
