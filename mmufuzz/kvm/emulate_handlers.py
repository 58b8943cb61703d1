"""The function of each name in the opcode tables (emulate.c:opcode.u.execute, and the switches of x86_emulate_insn)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.kvm import emulate_alu as alu
from mmufuzz.kvm import emulate_far as far
from mmufuzz.kvm import emulate_stack as stack
from mmufuzz.kvm import emulate_system as system
from mmufuzz.kvm.emulate_ctxt import X86EmulateCtxt
from mmufuzz.kvm.emulate_ops import EmulationFailed
from mmufuzz.kvm.opcode_table import NAMES

Handler = Callable[[X86EmulateCtxt], None]


def cannot_emulate(ctxt: X86EmulateCtxt) -> None:
    """An entry without a function."""
    raise EmulationFailed


_BY_HANDLER: Final[list[tuple[Handler, str]]] = [
    (cannot_emulate, "-"),
    (alu.em_mov, "mov movs stos lods xlat movzx movnti movups movupd movaps movapd movntps movntpd movntdq"),
    (alu.em_mov, "movq movdqa movdqu"),
    (alu.movsx, "movsx movsxd"),
    (alu.lea, "lea"),
    (alu.em_add, "add"),
    (alu.em_or, "or"),
    (alu.em_adc, "adc"),
    (alu.em_sbb, "sbb"),
    (alu.em_and, "and"),
    (alu.em_sub, "sub"),
    (alu.em_xor, "xor"),
    (alu.em_cmp, "cmp"),
    (alu.em_cmp_r, "cmps scas"),
    (alu.em_test, "test"),
    (alu.em_xadd, "xadd"),
    (alu.em_not, "not"),
    (alu.em_neg, "neg"),
    (alu.em_inc, "inc"),
    (alu.em_dec, "dec"),
    (alu.shift, "rol ror rcl rcr shl shr sar"),
    (alu.double_shift, "shld shrd"),
    (alu.bit, "bt bts btr btc"),
    (alu.bit_scan, "bsf bsr"),
    (alu.em_imul, "imul.2"),
    (alu.em_imul_3op, "imul.3"),
    (alu.multiply, "mul imul"),
    (alu.divide, "div idiv"),
    (alu.em_xchg, "xchg"),
    (alu.xchg_accumulator, "xchg.acc nop.acc"),
    (alu.em_cmpxchg, "cmpxchg"),
    (alu.em_cmpxchg8b, "cmpxchg8b"),
    (alu.em_bswap, "bswap"),
    (alu.em_movbe, "movbe"),
    (alu.cbw, "cbw"),
    (alu.em_cwd, "cwd"),
    (alu.cmovcc, "cmovcc"),
    (alu.setcc, "setcc"),
    (alu.em_das, "das"),
    (alu.adjust, "aam aad"),
    (alu.em_salc, "salc"),
    (alu.em_sahf, "sahf"),
    (alu.em_lahf, "lahf"),
    (alu.carry, "clc stc cmc cld std"),
    (alu.nop, "nop clflush clflushopt invd wbinvd"),
    (stack.em_push, "push"),
    (stack.em_pop, "pop"),
    (stack.em_push_sreg, "push.sreg"),
    (stack.em_pop_sreg, "pop.sreg"),
    (stack.em_pusha, "pusha"),
    (stack.em_popa, "popa"),
    (stack.em_pushf, "pushf"),
    (stack.em_popf, "popf"),
    (stack.em_enter, "enter"),
    (stack.em_leave, "leave"),
    (stack.jump_relative, "jmp"),
    (stack.jump_if, "jcc"),
    (stack.em_loop, "loop loope loopne"),
    (stack.em_jcxz, "jcxz"),
    (stack.em_jmp_abs, "jmp.abs"),
    (stack.em_call, "call"),
    (stack.em_call_near_abs, "call.abs"),
    (stack.em_ret, "ret"),
    (far.em_lseg, "les lds lss lfs lgs"),
    (far.em_jmp_far, "jmpf"),
    (far.em_call_far, "callf"),
    (far.em_ret_far, "retf"),
    (far.int_n, "int int3 into"),
    (far.em_iret, "iret"),
    (far.em_syscall, "syscall"),
    (far.em_sysenter, "sysenter"),
    (far.em_sysexit, "sysexit"),
    (system.em_mov_rm_sreg, "mov.from_sreg"),
    (system.em_mov_sreg_rm, "mov.to_sreg"),
    (system.store_system_segment, "sldt str"),
    (system.load_system_segment, "lldt ltr"),
    (system.store_table, "sgdt sidt"),
    (system.load_table, "lgdt lidt"),
    (system.em_smsw, "smsw"),
    (system.em_lmsw, "lmsw"),
    (system.em_clts, "clts"),
    (system.em_invlpg, "invlpg"),
    (system.halt, "hlt"),
    (system.em_hypercall, "vmcall"),
    (system.em_rsm, "rsm"),
    (system.read_control, "movcr.read"),
    (system.em_cr_write, "movcr.write"),
    (system.read_debug, "movdr.read"),
    (system.em_dr_write, "movdr.write"),
    (system.em_rdtsc, "rdtsc"),
    (system.em_rdmsr, "rdmsr"),
    (system.em_wrmsr, "wrmsr"),
    (system.em_rdpmc, "rdpmc"),
    (system.em_rdpid, "rdpid"),
    (system.em_cpuid, "cpuid"),
    (system.em_xsetbv, "xsetbv"),
    (system.interrupts, "cli sti"),
    (system.em_in, "in ins"),
    (system.em_out, "out outs"),
    (system.em_fninit, "fninit"),
    (system.store_x87_word, "fnstcw fnstsw"),
    (system.em_fxsave, "fxsave"),
    (system.em_fxrstor, "fxrstor"),
]


def _handlers() -> list[Handler]:
    table: dict[str, Handler] = {}
    for handler, names in _BY_HANDLER:
        for name in names.split():
            table[name] = handler
    return [table[name] for name in NAMES]


EXECUTE: Final[list[Handler]] = _handlers()
"""By ``Opcode.operation``."""
