"""Where KVM's emulator is known not to do what hardware does (reference sections 5.4 and 5.6).

Deviations of the accesses themselves, which x86.c makes, are not here, because they leave the result of the
instruction alone: stores that cross a page may be half done, locked operations that cross a cache line are not atomic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from mmufuzz.kvm.opcode_table import MMX, MOV, NO_WRITE, STRING
from mmufuzz.oracle.emulator_compare import (
    ACCESSES,
    ADDRESS,
    ERROR_CODE,
    EXCEPTION,
    FLAGS,
    GPR,
    MEMORY,
    RIP,
    SEGMENTS,
    SHADOW,
    SYSTEM,
    VECTORS,
    X87,
    Comparison,
)
from mmufuzz.x86.execute_operands import effective_address
from mmufuzz.x86.insn import FS, SS
from mmufuzz.x86.state import (
    FLAG_ZF,
    RIGHTS_UNUSABLE,
    VECTOR_DB,
    VECTOR_GP,
    VECTOR_PF,
    VECTOR_SS,
    VECTOR_UD,
)

_OUTCOME: Final = (
    *(EXCEPTION, ERROR_CODE, ADDRESS, ACCESSES, MEMORY, GPR, RIP, FLAGS, SEGMENTS, SYSTEM, X87, VECTORS),
)
"""One of them completes or both fault, but not in the same way."""


class Deviation:
    """``applies`` says whether ``explains`` may differ in a comparison; ``source`` is where KVM does it."""

    def __init__(
        self, name: str, what: str, source: str, explains: tuple[str, ...], applies: Callable[[Comparison], bool]
    ) -> None:
        self.name = name
        self.what = what
        self.source = source
        self.explains = explains
        self.applies = applies


def _tzcnt(made: Comparison) -> bool:
    return made.insn is not None and made.insn.mnemonic in ("tzcnt", "lzcnt")


def _bsf_zero(made: Comparison) -> bool:
    return made.decoded.name in ("bsf", "bsr") and made.after.rflags & FLAG_ZF != 0


def _repeated(made: Comparison) -> bool:
    return made.decoded.rep != 0 and made.decoded.d & STRING != 0


def _rep_end(made: Comparison) -> bool:
    return _repeated(made) and made.emulated_vector < 0


def _rep_flags(made: Comparison) -> bool:
    return _repeated(made) and made.decoded.name in ("cmps", "scas") and made.emulated_vector >= 0


def _cmpxchg_register(made: Comparison) -> bool:
    return made.decoded.name == "cmpxchg" and not made.decoded.in_memory


def _is_sreg(made: Comparison) -> bool:
    return made.decoded.name in ("mov.from_sreg", "mov.to_sreg")


def _sreg_rex(made: Comparison) -> bool:
    return _is_sreg(made) and made.decoded.modrm_reg > 7


def _sreg_order(made: Comparison) -> bool:
    return _is_sreg(made) and made.expected_vector == VECTOR_UD and made.emulated_vector >= 0


def _selector_width(made: Comparison) -> bool:
    stores = made.decoded.name in ("sldt", "str", "mov.from_sreg")
    return stores and made.decoded.in_memory and made.decoded.op_bytes == 8


def _control_order(made: Comparison) -> bool:
    name = made.decoded.name
    undefined = made.expected_vector == VECTOR_UD and made.emulated_vector == VECTOR_GP
    wide = name == "movdr.write" and made.emulated_vector == VECTOR_GP
    return (undefined and name.startswith(("movcr.", "movdr."))) or wide


def _debug_detect(made: Comparison) -> bool:
    return made.emulated_vector == VECTOR_DB and made.expected_vector == VECTOR_DB


def _mmx_fault(made: Comparison) -> bool:
    return made.decoded.d & MMX != 0 and made.emulated_vector in (VECTOR_GP, VECTOR_SS, VECTOR_PF)


def _segment_override(made: Comparison) -> bool:
    insn = made.insn
    if not made.mode64 or insn is None or insn.segment == made.decoded.segment:
        return False
    if insn.segment >= FS:
        return made.decoded.segment < FS
    addresses = (VECTOR_GP, VECTOR_SS)
    return made.emulated_vector in addresses and made.expected_vector in addresses


def _first_byte(made: Comparison) -> bool:
    """Not #GP or #SS where hardware raises it: what comes of the access instead may be anything."""
    addresses = (VECTOR_GP, VECTOR_SS)
    if not made.straddles or made.expected_vector not in addresses:
        return False
    # The emulator may find something else wrong then: a selector, say, that it should not have read.
    return made.emulated_vector not in addresses or (made.fault is not None and made.fault.error_code != 0)


def _write_check(made: Comparison) -> bool:
    """A segment that cannot be written is noticed only when the result is."""
    changes = made.decoded.d & (MOV | NO_WRITE) == 0
    return not made.mode64 and changes and made.expected_vector == VECTOR_GP and made.emulated_vector == VECTOR_PF


def _null_stack(made: Comparison) -> bool:
    return made.mode64 and made.expected.segments[SS].rights & RIGHTS_UNUSABLE != 0


def _system_segment(made: Comparison) -> bool:
    return made.decoded.name in ("lldt", "ltr")


def _enter(made: Comparison) -> bool:
    return made.decoded.name == "enter"


def _undefined_encoding(made: Comparison) -> bool:
    return made.insn is None and made.expected_vector == VECTOR_UD


def _several_stores(made: Comparison) -> bool:
    return made.decoded.name in ("pusha", "callf", "int", "int3", "into") and made.emulated_vector >= 0


def _far_order(made: Comparison) -> bool:
    if made.decoded.name == "callf" and made.after.long_mode != made.mode64:
        # It pushes with the stack pointer of the new code's width.
        return True
    faults = made.emulated_vector >= 0 or made.expected_vector >= 0
    return made.decoded.name in ("callf", "jmpf", "retf", "iret", "int", "int3", "into") and faults


def _interrupt_size(made: Comparison) -> bool:
    return made.decoded.name in ("int", "int3", "into") and made.decoded.op_bytes == 4


def _read_ahead(made: Comparison) -> bool:
    insn = made.decoded
    if insn.name != "ins" or insn.rep == 0:
        return False
    if made.emulated_vector >= 0:
        return True
    # A piece that runs past the width of the address: element by element it would go on at the beginning.
    end = 1 << 8 * insn.ad_bytes
    return any(access.size > insn.op_bytes and access.gva % end + access.size > end for access in made.accesses)


def _lgdt16(made: Comparison) -> bool:
    return made.decoded.name in ("lgdt", "lidt") and made.decoded.op_bytes == 2 and not made.mode64


def _sgdt16(made: Comparison) -> bool:
    return made.decoded.name in ("sgdt", "sidt") and made.decoded.op_bytes == 2 and not made.mode64


def _fxsave(made: Comparison) -> bool:
    return made.decoded.name in ("fxsave", "fxrstor") and not made.mode64


def _wrap(made: Comparison) -> bool:
    insn = made.insn
    if made.mode64 or insn is None or not insn.has_memory or made.expected_vector >= 0:
        return False
    # The emulator's registers are those before the instruction, because it faults.
    return made.emulated_vector in (VECTOR_GP, VECTOR_SS) and effective_address(made.after, insn) + 8 > 0xFFFFFFFF


def _pause(made: Comparison) -> bool:
    insn = made.decoded
    return insn.entry.opcode == 0x90 and insn.entry.map == 1 and insn.rep == 0xF3 and insn.rex & 1 != 0


def _sti(made: Comparison) -> bool:
    return made.decoded.name == "sti" and made.expected.shadow == 0


DEVIATIONS: Final[list[Deviation]] = [
    Deviation("tzcnt", "TZCNT and LZCNT are executed as BSF and BSR", "em_bsf_c, em_bsr_c", (GPR, FLAGS), _tzcnt),
    Deviation("bsf-zero", "BSF and BSR of zero leave all 64 bits alone", "em_bsf_c, em_bsr_c", (GPR,), _bsf_zero),
    Deviation(
        "rep-end",
        "a repetition ends with RIP at the instruction, and after 1024 elements it pauses so",
        "x86_emulate_insn",
        (RIP,),
        _rep_end,
    ),
    Deviation(
        "rep-flags",
        "if REP CMPS or SCAS faults, the flags of the elements before are lost",
        "x86.c:x86_emulate_instruction",
        (FLAGS,),
        _rep_flags,
    ),
    Deviation(
        "cmpxchg-register",
        "CMPXCHG of a register writes it even if the comparison fails, so its upper half is cleared",
        "em_cmpxchg",
        (GPR,),
        _cmpxchg_register,
    ),
    Deviation("sreg-rex", "REX.R makes a segment register undefined", "em_mov_rm_sreg", _OUTCOME, _sreg_rex),
    Deviation(
        "sreg-order",
        "MOV to CS or to an undefined segment register reads its operand before it raises #UD",
        "em_mov_sreg_rm",
        _OUTCOME,
        _sreg_order,
    ),
    Deviation(
        "selector-width",
        "SLDT, STR and MOV m, Sreg with REX.W store 8 bytes, not 2",
        "em_store_sreg",
        _OUTCOME,
        _selector_width,
    ),
    Deviation(
        "control-order",
        "privilege, and upper halves of DR6 and DR7, are checked before the register's number",
        "x86_emulate_insn, check_dr_write",
        _OUTCOME,
        _control_order,
    ),
    Deviation(
        "debug-detect",
        "DR7.GD is cleared when the #DB is delivered",
        "x86.c:kvm_inject_exception",
        (SYSTEM,),
        _debug_detect,
    ),
    Deviation(
        "mmx-fault",
        "an MMX store that faults has marked the x87 registers as in use",
        "fetch_possible_mmx_operand",
        (X87,),
        _mmx_fault,
    ),
    Deviation(
        "segment-override",
        "in 64-bit mode the last segment prefix counts, of whatever segment",
        "x86_decode_insn",
        _OUTCOME,
        _segment_override,
    ),
    Deviation(
        "canonical-first-byte",
        "of an access only the first byte must be canonical",
        "__linearize",
        _OUTCOME,
        _first_byte,
    ),
    Deviation(
        "write-check",
        "a read-modify-write in a segment that cannot be written reads first",
        "x86_emulate_insn",
        (EXCEPTION, ERROR_CODE, ADDRESS),
        _write_check,
    ),
    Deviation(
        "null-ss",
        "a null SS is a data segment, so that its DPL can be CPL",
        "__load_segment_descriptor",
        (SEGMENTS,),
        _null_stack,
    ),
    Deviation(
        "system-segment",
        "LLDT and LTR look in the LDT, at 8 bytes of 16, and take a 16-bit TSS in long mode",
        "__load_segment_descriptor",
        _OUTCOME,
        _system_segment,
    ),
    Deviation("enter-size", "ENTER pushes RBP in the width of the stack", "em_enter", _OUTCOME, _enter),
    Deviation(
        "undefined-encoding",
        "mandatory prefixes and register forms that make an encoding undefined are ignored",
        "x86_decode_insn",
        _OUTCOME,
        _undefined_encoding,
    ),
    Deviation(
        "several-stores",
        "PUSHA, far CALL and INT that fault have made the stores before",
        "em_pusha, em_call_far",
        (MEMORY,),
        _several_stores,
    ),
    Deviation(
        "far-order",
        "far transfers load CS before they check the offset and touch the stack",
        "em_call_far, em_jmp_far, em_ret_far",
        _OUTCOME,
        _far_order,
    ),
    Deviation(
        "interrupt-size",
        "with a 32-bit operand INT in real mode pushes 12 bytes, not 6",
        "__emulate_int_real",
        _OUTCOME,
        _interrupt_size,
    ),
    Deviation(
        "ins-read-ahead", "REP INS stores what it has read ahead in one piece", "pio_in_emulated", _OUTCOME, _read_ahead
    ),
    Deviation("lgdt16", "LGDT and LIDT of 16 bits read 5 bytes, not 6", "read_descriptor", _OUTCOME, _lgdt16),
    Deviation("sgdt16", "SGDT and SIDT of 16 bits store 24 bits of the base, not 32", "em_sgdt", (MEMORY,), _sgdt16),
    Deviation(
        "fxsave-size", "outside 64-bit mode FXSAVE and FXRSTOR touch 288 bytes, not 512", "em_fxsave", _OUTCOME, _fxsave
    ),
    Deviation(
        "wrap-4g",
        "what lies behind 4 GiB of an operand that is read in parts is beyond the limit; a CPU may wrap",
        "__linearize",
        _OUTCOME,
        _wrap,
    ),
    Deviation("sti-shadow", "STI with IF set casts an interrupt shadow all the same", "em_sti", (SHADOW,), _sti),
    Deviation("pause-rex", "PAUSE with REX.B exchanges R8 with rAX", "x86_emulate_insn", (GPR,), _pause),
]


def explain(made: Comparison) -> str:
    """The name of a deviation that explains all differences of ``made``; "" if there is none."""
    for deviation in DEVIATIONS:
        if deviation.applies(made) and all(found in deviation.explains for found in made.differences):
            return deviation.name
    return ""
