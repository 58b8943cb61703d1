"""Where Unicorn (QEMU's TCG) and the model differ by design: each with the section of the SDM that decides."""

from __future__ import annotations

from dataclasses import dataclass

from mmufuzz.x86 import alu
from mmufuzz.x86.execute_operands import RSP
from mmufuzz.x86.floats import INVALID, narrow, to_integer
from mmufuzz.x86.insn import STI, Insn
from mmufuzz.x86.opcodes import MAP_VEX
from mmufuzz.x86.state import FLAG_CF, Regs

_NAMES = """
movcr movdr in out ins outs hlt ud2 invlpg invpcid cpuid rdtsc rdtscp rdpid rdpmc rdmsr wrmsr xgetbv xsetbv rdpkru
wrpkru
syscall sysret sysenter sysexit swapgs clts invd wbinvd smsw lmsw sgdt sidt lgdt lidt sldt str lldt ltr lar lsl verr
verw arpl clac stac cli sti les lds lss lfs lgs jmpf callf retf iret int int3 into int1 rdfsbase rdgsbase wrfsbase
wrgsbase fxsave fxrstor xsave xrstor xsaveopt xsavec ldmxcsr
"""
CANNOT_RUN = frozenset(_NAMES.split())
"""What these do depends on state that is not set up alike on both sides; they have tests of their own."""


@dataclass(frozen=True)
class Divergence:
    """One entry: flags or the destination are left out of the comparison, or the instruction is not run at all.

    ``right`` names the section that says who is right; it is the model everywhere here.
    """

    what: str
    right: str
    flags: int = 0
    result: bool = False
    skip: bool = False


DIVERGENCES = {
    "near-66": Divergence(
        "66 before a near branch in 64-bit code makes Unicorn branch by 16 bits, as AMD's CPUs do",
        "SDM vol. 2, JMP and vol. 1, 3.6.1: near branches have 64-bit operands (AMD differs)",
        skip=True,
    ),
    "test-alias": Divergence(
        "F6 /1 and F7 /1 are not TEST to Unicorn", "SDM vol. 2, table A-6, note 1: an alias of /0", skip=True
    ),
    "rex-extension": Divergence(
        "REX.R before C6 /0, C7 /0 and 8F /0 is taken for a part of the opcode extension",
        "SDM vol. 2, 2.2.1.2: REX.R extends ModRM.reg only where that names a register",
        skip=True,
    ),
    "lahf-rex": Divergence(
        "LAHF and SAHF with REX use SPL in the place of AH", "SDM vol. 2, LAHF: AH whatever the prefix", skip=True
    ),
    "ret-negative": Divergence(
        "RET imm16 sign-extends the number of bytes to release", "SDM vol. 2, RET: an unsigned count", skip=True
    ),
    "lock-neg": Divergence(
        "LOCK NEG takes the flags from the operand, not from the result", "SDM vol. 2, NEG", flags=alu.ARITHMETIC_FLAGS
    ),
    "prefetch-register": Divergence(
        "0F 0D and 0F 18 with a register are undefined to Unicorn", "SDM vol. 2, table A-3: reserved NOPs", skip=True
    ),
    "movdiri": Divergence("Unicorn has no MOVDIRI", "SDM vol. 2, MOVDIRI", skip=True),
    "blsi-carry": Divergence("BLSI inverts CF", "SDM vol. 2, BLSI: CF is set if the source is not zero", flags=FLAG_CF),
    "bzhi-index": Divergence(
        "BZHI with an index of the width or more clears the top bit, and the last valid index sets CF",
        "SDM vol. 2, BZHI: nothing is cleared, and CF is set for an index of the width or more",
        flags=alu.ARITHMETIC_FLAGS,
        result=True,
    ),
    "bmi-32": Divergence(
        "32-bit BEXTR, PDEP and PEXT work on the whole 64-bit registers",
        "SDM vol. 2, BEXTR and PDEP: sources and results have the operand size",
        flags=alu.ARITHMETIC_FLAGS,
        result=True,
    ),
    "bextr-length": Divergence(
        "BEXTR of the width or more bits clears the top bit",
        "SDM vol. 2, BEXTR: a length of the width or more takes all bits",
        flags=alu.ARITHMETIC_FLAGS,
        result=True,
    ),
    "vex-register-32": Divergence(
        "outside 64-bit code VEX.vvvv names registers that do not exist",
        "SDM vol. 2, 2.3.5.6: its top bit is ignored there",
        skip=True,
    ),
    "size-16": Divergence(
        "MOVBE, POPCNT and CRC32 have 32-bit operands in 16-bit code, prefix or not",
        "SDM vol. 1, 3.6.1: the default size is that of the code segment",
        skip=True,
    ),
    "real-limit": Divergence(
        "a branch beyond the limit of CS in real-address mode does not fault",
        "SDM vol. 3, 21.1.1: #GP for an offset beyond 64 KiB",
        skip=True,
    ),
    "enter-limit": Divergence(
        "ENTER does not look at the stack where its frame ends",
        "SDM vol. 2, ENTER: it faults if a write at the final stack pointer would",
        skip=True,
    ),
    "cmpxchg-upper": Divergence(
        "a 32-bit CMPXCHG zero-extends the register that it does not write",
        "SDM vol. 1, 3.4.1.1 zero-extends results only, and CPUs leave the other register alone",
        result=True,
    ),
    "x87-flags": Divergence(
        "the exception flags of the x87 and C1 stay clear", "SDM vol. 1, 8.1.3: they are set, masked or not"
    ),
    "x87-stack": Divergence(
        "a push onto a full x87 stack and the use of an empty register are no stack faults",
        "SDM vol. 1, 8.5.1.1: invalid operation, whose masked result is the default NaN or the integer indefinite",
        skip=True,
    ),
    "x87-invalid": Divergence(
        "FISTTP of what does not fit stores the largest integer; FLD and FST of a signalling NaN leave it signalling",
        "SDM vol. 1, 8.5.1.2 and 4.8.3.4: the integer indefinite; NaNs become quiet",
        skip=True,
    ),
    "x87-decimal-range": Divergence(
        "FBSTP of what does not fit stores anything but the indefinite",
        "SDM vol. 1, 8.5.1.2 and vol. 2, FBSTP: the packed BCD integer indefinite",
    ),
    "x87-decimal-zero": Divergence(
        "FBSTP of a negative value that rounds to zero stores a positive zero",
        "SDM vol. 2, FBSTP: -0 is stored as -0, and so is what rounds to it",
    ),
    "x87-constants": Divergence(
        "FLDPI and the other constants are rounded to nearest whatever FCW says",
        "SDM vol. 2, FLD1: rounded as FCW.RC says",
        skip=True,
    ),
    "x87-empty-destination": Divergence(
        "FST and FSTP to an empty register leave it empty", "SDM vol. 1, 8.1.7: the tag tells what a register holds"
    ),
    "x87-loaded": Divergence(
        "FLDCW, FLDENV and FRSTOR load reserved bits of FCW, and ES and B of FSW as they are in memory",
        "SDM vol. 1, 8.1.3 and 8.1.5: ES and B follow from flags and masks; reserved bits do not change",
    ),
    "x87-environment": Divergence(
        "FNSTENV and FNSAVE write zeros to the unused halves, and the last instruction and operand",
        "SDM vol. 1, 8.1.10: CPUs write ones; the model does not track the last instruction",
    ),
    "x87-rex": Divergence(
        "REX.W before FNSAVE and FRSTOR puts the registers 28 bytes behind the environment",
        "SDM vol. 2, FRSTOR: the 32-bit format has 108 bytes, and REX.W selects no other",
        skip=True,
    ),
    "mmx-exponent": Divergence(
        "a write to an MMX register leaves bits 79 to 64 of the x87 register",
        "SDM vol. 3, 12.2: they are set to ones",
    ),
}


NEAR = frozenset(("jmp", "jcc", "call", "ret", "loop", "loope", "loopne", "jcxz"))
LEGACY = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3)


def prefixes(code: bytes, bits: int) -> tuple[bool, int]:
    """(whether 66 stands before the opcode, the REX prefix or 0)."""
    place = 0
    while code[place] in LEGACY:
        place += 1
    rex = code[place] if bits == 64 and code[place] & 0xF0 == 0x40 else 0
    return 0x66 in code[:place], rex


_PUSHES = frozenset(("fld", "fild", "fbld", "fld1", "fldl2t", "fldl2e", "fldpi", "fldlg2", "fldln2", "fldz"))
_READS_TOP = frozenset(("fst", "fstp", "fist", "fistp", "fisttp", "fbstp", "fchs", "fabs", "fxch"))


def invalid_store(insn: Insn, value: int) -> bool:
    """Whether ``value`` cannot be stored as FISTTP or FST to memory would have it."""
    if not insn.has_memory:
        return False
    size = insn.operands[0].size
    if insn.mnemonic == "fisttp":
        return to_integer(value, size, 3)[1] & INVALID != 0
    if insn.mnemonic in ("fst", "fstp") and size < 10:
        return narrow(value, 8, 23, 0)[1] & INVALID != 0
    return False


def decimal_divergence(value: int, rounding: int) -> str:
    """The entry that applies to FBSTP of ``value``, or ""."""
    integer, flags = to_integer(value, 8, rounding)
    if flags & INVALID or min(integer, (1 << 64) - integer) >= 10**18:
        return "x87-decimal-range"
    return "x87-decimal-zero" if integer == 0 and value >> 79 else ""


def fpu_divergence_of(insn: Insn, regs: Regs) -> str:
    """``divergence_of`` for instructions of the x87."""
    name = insn.mnemonic
    top = regs.fsw >> 11 & 7
    named = insn.operands[0] if insn.operands and insn.operands[0].kind == STI else None
    empty = named is not None and not regs.ftw >> (top + named.index & 7) & 1
    if (name in _PUSHES and regs.ftw >> (top - 1 & 7) & 1) or (name in _READS_TOP and not regs.ftw >> top & 1):
        return "x87-stack"
    if name in ("fld", "fxch") and empty:
        return "x87-stack"
    if name in _PUSHES and name.startswith(("fldl", "fldp")) and regs.fcw >> 10 & 3:
        return "x87-constants"
    if invalid_store(insn, regs.fpr[top]):
        return "x87-invalid"
    if name == "fbstp":
        return decimal_divergence(regs.fpr[top], regs.fcw >> 10 & 3)
    if name in ("fst", "fstp") and empty:
        return "x87-empty-destination"
    if name in ("fnsave", "frstor") and insn.size == 8:
        return "x87-rex"
    if name in ("fldcw", "fldenv", "frstor"):
        return "x87-loaded"
    return "x87-environment" if name in ("fnstenv", "fnsave") else ""


def divergence_of(insn: Insn, code: bytes, regs: Regs, bits: int) -> str:
    """The name of the entry that applies to ``insn``, encoded as ``code``, in state ``regs``; or ""."""
    name = insn.mnemonic
    if name[0] == "f":
        return fpu_divergence_of(insn, regs)
    operand_prefix, rex = prefixes(code, bits)
    if bits == 16 and operand_prefix and name in NEAR:
        return "real-limit"
    if bits == 16 and name == "enter":
        # RBP and, up to the nesting level, frame pointers are pushed; the frame lies below them.
        below = (1 + (insn.operands[1].value & 31)) * insn.size + insn.operands[0].value
        if (regs.gpr[RSP] - below & 0xFFFF) + insn.size > 0x10000:
            return "enter-limit"
    if bits == 16 and name in ("movbe", "popcnt", "crc32"):
        return "size-16"
    if bits == 32 and insn.opcode_map >= MAP_VEX and not code[2] & 0x40:
        return "vex-register-32"
    if bits == 64 and operand_prefix and name in NEAR:
        return "near-66"
    if name == "test" and insn.opcode in (0xF6, 0xF7) and insn.reg_field == 1:
        return "test-alias"
    if rex & 4 and insn.opcode_map == 0 and insn.opcode in (0xC6, 0xC7, 0x8F):
        return "rex-extension"
    if rex and name in ("lahf", "sahf"):
        return "lahf-rex"
    if name == "ret" and insn.operands and insn.operands[0].value >= 0x8000:
        return "ret-negative"
    if name == "neg" and insn.lock:
        return "lock-neg"
    if name == "nop" and insn.opcode in (0x0D, 0x18) and insn.modrm >= 0xC0:
        return "prefetch-register"
    if name == "bzhi" and insn.operands[2].index >= 0 and regs.gpr[insn.operands[2].index] & 0xFF >= 8 * insn.size - 1:
        return "bzhi-index"
    if name == "bextr" and regs.gpr[insn.operands[2].index] >> 8 & 0xFF >= 8 * insn.size:
        return "bextr-length"
    if name in ("pdep", "pext", "bextr") and insn.size == 4 and bits == 64:
        return "bmi-32"
    if name == "cmpxchg" and insn.size == 4 and bits == 64:
        return "cmpxchg-upper"
    return {"movdiri": "movdiri", "blsi": "blsi-carry"}.get(name, "")
