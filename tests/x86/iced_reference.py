"""What iced-x86 says about an instruction, in the words of mmufuzz.x86.insn: the oracle of the decoder tests."""

from __future__ import annotations

import iced_x86
from iced_x86 import ConditionCode, Decoder, EncodingKind, Instruction, Mnemonic, OpKind, Register

from mmufuzz.x86.insn import CR, DR, FAR, HIGH8, IMM, MEM, MMX, NO_REG, REG, REL, RIP, SREG, STI, XMM, Insn
from mmufuzz.x86.opcodes import MNEMONICS


def _names(module: object) -> dict[int, str]:
    return {value: name for name, value in vars(module).items() if isinstance(value, int)}


_MNEMONICS = _names(Mnemonic)
_REGISTERS = _names(Register)
_STRINGS = frozenset(("movs", "stos", "lods", "scas", "cmps", "ins", "outs"))
# One name for all operand sizes, or for encodings that do the same.
_ALIASES = {
    "sal": "shl", "pause": "nop", "reservednop": "nop", "prefetch": "nop", "prefetchw": "nop", "prefetchwt1": "nop",
    "prefetchnta": "nop",
    "prefetcht0": "nop", "prefetcht1": "nop", "prefetcht2": "nop", "cwde": "cbw", "cdqe": "cbw", "cdq": "cwd",
    "cqo": "cwd", "pushad": "pusha", "popad": "popa", "pushfd": "pushf", "pushfq": "pushf", "popfd": "popf",
    "popfq": "popf", "iretd": "iret", "iretq": "iret", "sysexitq": "sysexit", "sysretq": "sysret", "jecxz": "jcxz",
    "jrcxz": "jcxz", "fxsave64": "fxsave", "fxrstor64": "fxrstor", "xsave64": "xsave", "xrstor64": "xrstor",
    "xsaveopt64": "xsaveopt", "xsavec64": "xsavec", "xlatb": "xlat",
}  # fmt: skip
_GPR = ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"]
_NO_OPERANDS = (*_STRINGS, "nop", "xlat")
# Those whose memory operand is an address, or an area whose size the model works out when it executes them.
_AREAS = frozenset(
    (
        *("clflush", "clflushopt", "clwb", "fxsave", "fxrstor", "xsave", "xrstor", "xsaveopt", "xsavec"),
        *("fldenv", "fnstenv", "frstor", "fnsave"),
    )
)

SUPPORTED = frozenset(MNEMONICS)

Operands = list[tuple[int, int, int, int]]


def decoder(code: bytes, mode64: bool) -> Decoder:
    """A decoder of ``code`` at address 0, of a CPU without the extensions in the hint NOPs and without WBNOINVD."""
    options = iced_x86.DecoderOptions.FORCE_RESERVED_NOP | iced_x86.DecoderOptions.NO_WBNOINVD
    return Decoder(64 if mode64 else 32, code, options, ip=0)


def reference(code: bytes, mode64: bool) -> Instruction:
    """The first instruction of ``code`` as iced-x86 reads it, placed at address 0."""
    return decoder(code, mode64).decode()


def mnemonic(instruction: Instruction) -> str:
    """The generic mnemonic."""
    name = _MNEMONICS[instruction.mnemonic].lower()
    if instruction.is_string_instruction and name[:-1] in _STRINGS:
        return name[:-1]
    if instruction.is_call_far or instruction.is_call_far_indirect:
        return "callf"
    if instruction.is_jmp_far or instruction.is_jmp_far_indirect:
        return "jmpf"
    if name == "mov":
        for place in range(instruction.op_count):
            if instruction.op_kind(place) == OpKind.REGISTER:
                register = _REGISTERS[instruction.op_register(place)]
                if register.startswith(("CR", "DR")):
                    return "mov" + register[:2].lower()
    if instruction.condition_code != ConditionCode.NONE:
        for stem in ("j", "set", "cmov"):
            if name.startswith(stem):
                return stem + "cc"
    return _ALIASES.get(name, name)


def supported(instruction: Instruction) -> bool:
    """True if the decoder has to know the instruction."""
    name = mnemonic(instruction)
    if name in ("syscall", "sysret") and instruction.code_size != iced_x86.CodeSize.CODE64:
        # AMD's alone (SDM vol. 2, SYSCALL: #UD outside 64-bit mode).
        return False
    if name not in SUPPORTED or instruction.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
        return False
    if instruction.mnemonic == Mnemonic.RESERVEDNOP:
        # 1A and 1B are left to MPX.
        return instruction.op_code().op_code & 0xFF not in (0x1A, 0x1B)
    registers = [
        _REGISTERS[instruction.op_register(place)]
        for place in range(instruction.op_count)
        if instruction.op_kind(place) == OpKind.REGISTER
    ]
    return not any(register.startswith("TR") for register in registers)


def _register(register: int, operand_size: int) -> tuple[int, int, int, int]:
    name = _REGISTERS[register]
    if name in ("AH", "CH", "DH", "BH"):
        return (HIGH8, 1, "ACDB".index(name[0]), 0)
    if name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        return (SREG, 2, ("ES", "CS", "SS", "DS", "FS", "GS").index(name), 0)
    for prefix, kind in (("CR", CR), ("DR", DR), ("XMM", XMM), ("YMM", XMM), ("MM", MMX), ("ST", STI)):
        if name.startswith(prefix) and name[len(prefix) :].isdigit():
            return (kind, operand_size, int(name[len(prefix) :]), 0)
    number = _gpr(register)
    return (REG, iced_x86.RegisterExt.size(register), number, 0)


def _gpr(register: int) -> int:
    if register == Register.NONE:
        return NO_REG
    if register in (Register.RIP, Register.EIP):
        return RIP
    return iced_x86.RegisterExt.number(iced_x86.RegisterExt.full_register(register))


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def operands(instruction: Instruction, insn: Insn) -> Operands:
    """The explicit operands; sizes that iced-x86 does not give (vector registers) are taken from ``insn``."""
    answer: Operands = []
    name = mnemonic(instruction)
    if name in _NO_OPERANDS:
        return answer
    for place in range(instruction.op_count):
        kind = instruction.op_kind(place)
        given = insn.operands[len(answer)].size if len(answer) < len(insn.operands) else 0
        if kind == OpKind.REGISTER:
            register = _register(instruction.op_register(place), given)
            # The top of the x87 stack is implied, unless it is the only operand.
            implied = instruction.op_count < 2 or place != _explicit(instruction)
            if register[0] != STI or register[2] != 0 or not implied:
                answer.append(register)
        elif kind == OpKind.MEMORY:
            answer.append((MEM, memory_size(instruction, insn), 0, 0))
        elif kind in _BRANCH_BITS:
            bits = _BRANCH_BITS[kind]
            distance = _signed(instruction.near_branch_target - instruction.len, bits)
            answer.append((REL, bits // 8, 0, distance))
        elif kind == OpKind.FAR_BRANCH16:
            answer.append((FAR, 4, instruction.far_branch_selector, instruction.far_branch16))
        elif kind == OpKind.FAR_BRANCH32:
            answer.append((FAR, 6, instruction.far_branch_selector, instruction.far_branch32))
        elif kind in _IMMEDIATE_SIZES:
            size = _IMMEDIATE_SIZES[kind]
            answer.append((IMM, size, 0, instruction.immediate(place) & ((1 << (8 * size)) - 1)))
    if not answer and name in ("fld", "fst", "fstp", "fxch", "ffree"):
        answer.append((STI, 10, 0, 0))
    return answer


def _explicit(instruction: Instruction) -> int:
    """Which of the two operands of an x87 register form is encoded."""
    return 0 if mnemonic(instruction) in ("fst", "fstp") else 1


def memory_size(instruction: Instruction, insn: Insn) -> int:
    """Bytes of the memory operand; 0 where only its address is used."""
    if mnemonic(instruction) in _AREAS:
        return insn.operands[0].size
    return iced_x86.MemorySizeExt.size(instruction.memory_size)


_BRANCH_BITS = {OpKind.NEAR_BRANCH16: 16, OpKind.NEAR_BRANCH32: 32, OpKind.NEAR_BRANCH64: 64}
_IMMEDIATE_SIZES = {
    OpKind.IMMEDIATE8: 1,
    OpKind.IMMEDIATE8_2ND: 1,
    OpKind.IMMEDIATE16: 2,
    OpKind.IMMEDIATE32: 4,
    OpKind.IMMEDIATE64: 8,
    OpKind.IMMEDIATE8TO16: 2,
    OpKind.IMMEDIATE8TO32: 4,
    OpKind.IMMEDIATE8TO64: 8,
    OpKind.IMMEDIATE32TO64: 8,
}


def memory(instruction: Instruction, insn: Insn) -> tuple[int, int, int, int] | None:
    """(base, index, scale, displacement modulo the address size) of the memory operand, if there is one."""
    if mnemonic(instruction) in _NO_OPERANDS:
        return None
    for place in range(instruction.op_count):
        if instruction.op_kind(place) == OpKind.MEMORY:
            base = _gpr(instruction.memory_base)
            index = _gpr(instruction.memory_index)
            displacement = instruction.memory_displacement
            if base == RIP:
                # iced-x86 answers the target address.
                displacement -= instruction.len
            scale = instruction.memory_index_scale if index != NO_REG else 1
            return (base, index, scale, displacement & ((1 << (8 * insn.asize)) - 1))
    return None


def segment(instruction: Instruction, mode64: bool) -> int:
    """The segment of the memory operand as ``Insn.segment`` says it."""
    number = _register(instruction.memory_segment, 2)[2]
    if mode64 and number < 4:
        return 2 if _gpr(instruction.memory_base) in (4, 5) else 3
    return number
