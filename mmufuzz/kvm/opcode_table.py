"""Which instructions KVM's emulator knows (emulate.c:opcode_table, twobyte_table, opcode_map_0f_38 and their groups).

The decoder is shared with the hardware side and knows more. What is missing here never becomes emulatable by growing
the decoder: a mnemonic has to be listed.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.insn import Insn, renamed
from mmufuzz.x86.opcodes import MAP_0F, MAP_0F38, MAP_ONE_BYTE, MNEMONICS
from mmufuzz.x86.state import Regs

_NAMES: Final = """
aad aam adc add and bsf bsr bswap bt btc btr bts call callf cbw clc cld clflush clflushopt cli clts cmc cmovcc cmp cmps
cmpxchg cmpxchg16b cmpxchg8b cpuid cwd das dec div enter fninit fnstcw fnstsw fxrstor fxsave hlt idiv imul in inc ins
int int3 into invd invlpg iret jcc jcxz jmp jmpf lahf lds lea leave les lfs lgdt lgs lidt lldt lmsw lods loop loope
loopne lss ltr lzcnt mov movapd movaps movbe movcr movdqa movdqu movdr movntdq movnti movntpd movntps movq movs movsx
movsxd movupd movups movzx mul neg nop not or out outs pop popa popf push pusha pushf rcl rcr rdmsr rdpid rdpmc rdtsc
ret retf rol ror sahf salc sar sbb scas setcc sgdt shl shld shr shrd sidt sldt smsw stc std sti stos str sub syscall
sysenter sysexit test tzcnt wbinvd wrmsr xadd xchg xlat xor xsetbv
"""
_KNOWN: Final = frozenset(_NAMES.split())


def _known_operations() -> list[bool]:
    return [name in _KNOWN for name in MNEMONICS]


_CAN_DECODE: Final[list[bool]] = _known_operations()

# Opcodes without an entry whose mnemonics have others: MOVQ but 0F 6F and 0F 7F, hint NOPs, FNSTSW AX.
_MISSING: Final = frozenset(
    (
        (MAP_0F, 0x19),
        (MAP_0F, 0x1C),
        (MAP_0F, 0x1D),
        (MAP_0F, 0x1E),
        (MAP_0F, 0x6E),
        (MAP_0F, 0x7E),
        (MAP_0F, 0xD6),
        (MAP_ONE_BYTE, 0xDF),
    )
)

# TZCNT and LZCNT are BSF and BSR with a prefix that the tables do not look at (reference section 5.6, item 4).
_MISTAKEN: Final[dict[str, str]] = {"tzcnt": "bsf", "lzcnt": "bsr"}


def can_decode(insn: Insn) -> bool:
    """True if emulate.c's opcode tables have an entry."""
    if not _CAN_DECODE[insn.operation] or insn.opcode_map > MAP_0F38:
        return False
    return (insn.opcode_map, insn.opcode) not in _MISSING


def as_emulated(insn: Insn) -> Insn:
    """The instruction as which the emulator takes ``insn``."""
    name = _MISTAKEN.get(insn.mnemonic)
    return insn if name is None else renamed(insn, name, MNEMONICS.index(name))


def can_begin(insn: Insn, regs: Regs) -> bool:
    """False for an entry that is refused before it accesses anything.

    emulate.c:em_enter (nesting), check_fxsr (64-bit mode), emulate_int and em_iret (protected mode).
    """
    name = insn.mnemonic
    if name == "enter":
        return insn.operands[1].value & 31 == 0
    if name in ("fxsave", "fxrstor"):
        return not regs.long_mode
    if name in ("int", "int3", "into", "iret"):
        return regs.real_mode
    return True


def can_execute(insn: Insn) -> bool:
    """False for an entry that fails once its operand has been read (emulate.c:em_cmpxchg8b with REX.W)."""
    return insn.mnemonic != "cmpxchg16b"
