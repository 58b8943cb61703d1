"""What iced-x86 says about an instruction, in the words of mmufuzz.x86.insn: the oracle of the decoder tests."""

from __future__ import annotations

import iced_x86
from iced_x86 import ConditionCode, Decoder, Instruction, Mnemonic, OpKind, Register

from mmufuzz.x86.insn import CR, HIGH8, IMM, MEM, NO_REG, REG, REL, RIP, ST0, XMM, Insn


def _names(module: object) -> dict[int, str]:
    return {value: name for name, value in vars(module).items() if isinstance(value, int)}


_MNEMONICS = _names(Mnemonic)
_REGISTERS = _names(Register)
_STRINGS = {"movsb": "movs", "movsw": "movs", "movsd": "movs", "movsq": "movs"} | {
    f"stos{suffix}": "stos" for suffix in "bwdq"
}
_ALIASES = {"sal": "shl", "pause": "nop", "reservednop": "nop"}
_GPR = ["AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI"]

_SUPPORTED = """
    adc add and bt btc btr bts call clc cld cmc cmovcc cmp cmpxchg cmpxchg16b cmpxchg8b dec fstp hlt inc invlpg
    jcc jmp lea lfence mfence mov movaps movcr movdqa movdqu movs movss movsx movsxd movups movzx neg nop not or pop
    push rcl rcr ret rol ror sar sbb setcc sfence shl shr stc std stos sub test ud2 vmovdqu xadd xchg xor
"""
SUPPORTED = frozenset(_SUPPORTED.split())

Operands = list[tuple[int, int, int, int]]


def reference(code: bytes, mode64: bool) -> Instruction:
    """The first instruction of ``code`` as iced-x86 reads it, placed at address 0."""
    return Decoder(64 if mode64 else 32, code, ip=0).decode()


def mnemonic(instruction: Instruction) -> str:
    """The generic mnemonic."""
    name = _MNEMONICS[instruction.mnemonic].lower()
    if instruction.is_string_instruction and name in _STRINGS:
        return _STRINGS[name]
    if name == "mov" and any(
        _REGISTERS[instruction.op_register(i)].startswith("CR")
        for i in range(instruction.op_count)
        if instruction.op_kind(i) == OpKind.REGISTER
    ):
        return "movcr"
    if instruction.condition_code != ConditionCode.NONE:
        if name.startswith("j"):
            return "jcc"
        if name.startswith("set"):
            return "setcc"
        if name.startswith("cmov"):
            return "cmovcc"
    return _ALIASES.get(name, name)


def supported(instruction: Instruction) -> bool:
    """True if the decoder has to know the instruction."""
    name = mnemonic(instruction)
    if name not in SUPPORTED or instruction.is_call_far or instruction.is_jmp_far:
        return False
    if instruction.is_call_far_indirect or instruction.is_jmp_far_indirect:
        return False
    kinds = [instruction.op_kind(i) for i in range(instruction.op_count)]
    registers = [_REGISTERS[instruction.op_register(i)] for i, kind in enumerate(kinds) if kind == OpKind.REGISTER]
    if name == "fstp":
        return OpKind.MEMORY in kinds
    if instruction.mnemonic == Mnemonic.RESERVEDNOP:
        return instruction.op_code().op_code & 0xFF == 0x1F
    for register in registers:
        if register in ("CS", "DS", "ES", "FS", "GS", "SS") or register[:2] in ("DR", "TR", "MM"):
            return False
        if register.startswith("CR") and register not in ("CR0", "CR2", "CR3", "CR4"):
            return False
    return True


def _register(register: int, operand_size: int) -> tuple[int, int, int, int]:
    name = _REGISTERS[register]
    if name in ("AH", "CH", "DH", "BH"):
        return (HIGH8, 1, "ACDB".index(name[0]), 0)
    if name.startswith("CR"):
        return (CR, operand_size, int(name[2:]), 0)
    if name[:3] in ("XMM", "YMM"):
        return (XMM, operand_size, int(name[3:]), 0)
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
    if name in ("nop", "movs", "stos"):
        return answer
    memory_size = iced_x86.MemorySizeExt.size(instruction.memory_size)
    for place in range(instruction.op_count):
        kind = instruction.op_kind(place)
        if kind == OpKind.REGISTER:
            answer.append(_register(instruction.op_register(place), insn.operands[place].size))
        elif kind == OpKind.MEMORY:
            answer.append((MEM, memory_size, 0, 0))
        elif kind in (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64):
            bits = {OpKind.NEAR_BRANCH16: 16, OpKind.NEAR_BRANCH32: 32, OpKind.NEAR_BRANCH64: 64}[kind]
            distance = _signed(instruction.near_branch_target - instruction.len, bits)
            answer.append((REL, bits // 8, 0, distance))
        else:
            size = _IMMEDIATE_SIZES[kind]
            answer.append((IMM, size, 0, instruction.immediate(place) & ((1 << (8 * size)) - 1)))
    if name == "fstp":
        answer.append((ST0, 10, 0, 0))
    return answer


_IMMEDIATE_SIZES = {
    OpKind.IMMEDIATE8: 1,
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
    if mnemonic(instruction) in ("nop", "movs", "stos"):
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
