"""Where KVM's emulator is known not to do what hardware does (reference sections 5.4 and 5.6).

Deviations of the accesses themselves, which x86.c makes, are not here, because they leave the result of the
instruction alone: stores that cross a page may be half done, locked operations that cross a cache line are not atomic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.oracle import emulator_expected as results
from mmufuzz.oracle import emulator_expected_far as far
from mmufuzz.oracle import emulator_expected_segments as segments
from mmufuzz.oracle import emulator_expected_system as system
from mmufuzz.oracle.emulator_compare import Comparison


class Deviation:
    """``expects`` makes the deviation good in a comparison, or answers None; ``source`` is where KVM does it."""

    def __init__(self, name: str, what: str, source: str, expects: Callable[[Comparison], Comparison | None]) -> None:
        self.name = name
        self.what = what
        self.source = source
        self.expects = expects


DEVIATIONS: Final[list[Deviation]] = [
    Deviation("tzcnt", "TZCNT and LZCNT are executed as BSF and BSR", "em_bsf_c, em_bsr_c", results.tzcnt),
    Deviation("bsf-zero", "BSF and BSR of zero leave all 64 bits alone", "em_bsf_c, em_bsr_c", results.bsf_zero),
    Deviation(
        "ins-read-ahead",
        "REP INS stores what it has read ahead in one piece",
        "pio_in_emulated",
        results.read_ahead,
    ),
    Deviation(
        "rep-end",
        "a repetition ends with RIP at the instruction, and after 1024 elements it pauses so",
        "x86_emulate_insn",
        results.rep_end,
    ),
    Deviation(
        "rep-flags",
        "if REP CMPS or SCAS faults, the flags of the elements before are lost",
        "x86.c:x86_emulate_instruction",
        results.rep_flags,
    ),
    Deviation(
        "cmpxchg-register",
        "CMPXCHG of a register writes it even if the comparison fails, so its upper half is cleared",
        "em_cmpxchg",
        results.cmpxchg_register,
    ),
    Deviation("sreg-rex", "REX.R makes a segment register undefined", "em_mov_rm_sreg", system.sreg_rex),
    Deviation(
        "sreg-order",
        "MOV to CS or to an undefined segment register reads its operand before it raises #UD",
        "em_mov_sreg_rm",
        system.sreg_order,
    ),
    Deviation(
        "umip-order",
        "SLDT and STR read their operand before they look at CR4.UMIP",
        "x86_emulate_insn",
        system.umip_order,
    ),
    Deviation(
        "selector-width",
        "SLDT, STR and MOV m, Sreg with REX.W store 8 bytes, not 2",
        "em_store_sreg",
        system.selector_width,
    ),
    Deviation(
        "selector-read",
        "SLDT and STR read their operand first, as wide as the operand size",
        "x86_emulate_insn",
        system.selector_read,
    ),
    Deviation(
        "control-order",
        "privilege, upper halves of DR6 and DR7 and SVM's address are checked before whether an instruction exists",
        "x86_emulate_insn, check_dr_write",
        system.control_order,
    ),
    Deviation(
        "debug-detect",
        "at the #DB of DR7.GD, DR7.GD stays set until it is delivered, and B0 to B3 of DR6 are cleared",
        "check_dr_read",
        system.debug_detect,
    ),
    Deviation(
        "io-bitmap",
        "of the two bytes of the I/O bitmap that count only the first must lie in the TSS, which may be a 16-bit one",
        "emulator_io_port_access_allowed",
        results.io_bitmap,
    ),
    Deviation(
        "io-bitmap-fault",
        "an I/O bitmap that cannot be read forbids: #GP(0), not #PF",
        "emulator_io_port_access_allowed",
        results.io_bitmap_fault,
    ),
    Deviation(
        "mmx-fault",
        "an MMX store that faults has marked the x87 registers as in use",
        "fetch_possible_mmx_operand",
        results.mmx_fault,
    ),
    Deviation(
        "segment-override",
        "in 64-bit mode the last segment prefix counts, of whatever segment",
        "x86_decode_insn",
        system.segment_override,
    ),
    Deviation(
        "canonical-first-byte",
        "of an access only the first byte must be canonical",
        "__linearize",
        system.first_byte,
    ),
    Deviation(
        "hypercall",
        "VMCALL and VMMCALL, which raise #UD, are overwritten with the host's hypercall",
        "em_hypercall",
        system.hypercall,
    ),
    Deviation("alignment", "there is no #AC", "segmented_read, segmented_write", system.alignment),
    Deviation(
        "write-check",
        "a read-modify-write in a segment that cannot be written reads first",
        "x86_emulate_insn",
        system.write_check,
    ),
    Deviation(
        "null-ss",
        "a null SS is a data segment, so that its DPL can be CPL",
        "__load_segment_descriptor",
        system.null_ss,
    ),
    Deviation(
        "local-limit", "of the limit of the LDT the low 16 bits count", "get_descriptor_table_ptr", segments.local_limit
    ),
    Deviation("lldt-local", "LLDT takes a selector of the LDT", "__load_segment_descriptor", segments.lldt_local),
    Deviation(
        "ltr-error",
        "LTR of a selector of the LDT is #GP(0), without the selector",
        "__load_segment_descriptor",
        segments.ltr_error,
    ),
    Deviation(
        "system-limit",
        "of a descriptor of 16 bytes, LLDT and LTR ask for 8 to be within the limit",
        "get_descriptor_ptr",
        segments.system_limit,
    ),
    Deviation(
        "system-compatibility",
        "in compatibility mode LLDT and LTR take a descriptor of 8 bytes, and LTR a 16-bit TSS",
        "__load_segment_descriptor",
        segments.system_compatibility,
    ),
    Deviation("tss16", "LTR takes a 16-bit TSS in long mode", "__load_segment_descriptor", segments.tss16),
    Deviation(
        "system-read",
        "of a descriptor of 16 bytes, LLDT and LTR read 12",
        "__load_segment_descriptor",
        segments.system_read,
    ),
    Deviation("enter-size", "ENTER pushes RBP in the width of the stack", "em_enter", results.enter_size),
    Deviation(
        "enter-top",
        "ENTER does not ask whether the new top of the stack can be written",
        "em_enter",
        results.enter_top,
    ),
    Deviation(
        "undefined-prefix",
        "66, F2 and F3 before FXSAVE, FXRSTOR, MOVNTI and XSETBV are ignored",
        "x86_decode_insn",
        results.undefined_prefix,
    ),
    Deviation("pusha-stores", "PUSHA that faults has made the stores before", "em_pusha", results.pusha_stores),
    Deviation(
        "far-call",
        "far CALL marks the descriptor first and pushes in the width of the new code; what it wrote stays if it faults",
        "em_call_far",
        far.far_call,
    ),
    Deviation(
        "far-mark",
        "far JMP and RETF mark the descriptor before they look at the offset",
        "em_jmp_far, em_ret_far",
        far.far_mark,
    ),
    Deviation(
        "far-return",
        "RETF n from 64-bit code to 32-bit or 16-bit code adds n in the width of the stack there",
        "em_ret_far_imm",
        far.far_return,
    ),
    Deviation(
        "interrupt-size",
        "with a 32-bit operand INT in real mode pushes 12 bytes, not 6",
        "__emulate_int_real",
        far.interrupt_size,
    ),
    Deviation(
        "interrupt-limit",
        "INT in real mode does not look at the limit of the IDT",
        "__emulate_int_real",
        far.interrupt_limit,
    ),
    Deviation(
        "interrupt-stores",
        "INT in real mode that faults has made the stores before",
        "__emulate_int_real",
        far.interrupt_stores,
    ),
    Deviation(
        "iret-order",
        "IRET in real mode refuses an offset above FFFF before it reads CS and the flags",
        "emulate_iret_real",
        far.iret_order,
    ),
    Deviation(
        "sysexit-null",
        "SYSEXIT to 64-bit code takes SYSENTER_CS for null only if it is 0, not if bits 15:2 are",
        "em_sysexit",
        far.sysexit_null,
    ),
    Deviation(
        "lgdt-order",
        "LGDT and LIDT read the first bytes of their operand before they check the last",
        "em_lgdt_lidt",
        system.table_order,
    ),
    Deviation("lgdt16", "LGDT and LIDT of 16 bits read 5 bytes, not 6", "read_descriptor", system.lgdt16),
    Deviation("sgdt16", "SGDT and SIDT of 16 bits store 24 bits of the base, not 32", "em_sgdt", system.sgdt16),
    Deviation(
        "fxsave-size",
        "outside 64-bit mode FXSAVE and FXRSTOR touch 288 bytes, not 512",
        "em_fxsave",
        system.fxsave_size,
    ),
    Deviation(
        "wrap-4g",
        "LGDT and LIDT of an operand whose base lies behind 4 GiB are refused; a CPU may wrap",
        "__linearize",
        system.wrap,
    ),
    Deviation("sti-shadow", "STI with IF set casts an interrupt shadow all the same", "em_sti", results.sti_shadow),
    Deviation("movsxd-read", "MOVSXD of 16 bits reads 4 bytes, not 2", "opcode_table", results.movsxd_read),
    Deviation("pause-rex", "PAUSE with REX.B exchanges R8 with rAX", "x86_emulate_insn", results.pause_rex),
]


def explain(made: Comparison) -> str:
    """The name of a deviation that explains the differences of ``made``, if need be with others; "" if none does.

    It explains them if none is left once it is made good.
    """
    for deviation in DEVIATIONS:
        if deviation.name in made.tried:
            continue
        rest = deviation.expects(made)
        if rest is None or rest.unmodelled:
            continue
        rest.tried = (*made.tried, deviation.name)
        if not rest.differences or explain(rest):
            return deviation.name
    return ""
