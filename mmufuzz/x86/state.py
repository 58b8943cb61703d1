"""Architectural register state of one logical CPU, and the faults it can raise."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.x86.insn import CS

CR0_PE: Final = 1 << 0
CR0_MP: Final = 1 << 1
CR0_EM: Final = 1 << 2
CR0_TS: Final = 1 << 3
CR0_WP: Final = 1 << 16
CR0_AM: Final = 1 << 18
CR0_PG: Final = 1 << 31
CR4_TSD: Final = 1 << 2
CR4_DE: Final = 1 << 3
CR4_UMIP: Final = 1 << 11
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_PGE: Final = 1 << 7
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
EFER_SCE: Final = 1 << 0
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NX: Final = 1 << 11

FLAG_CF: Final = 1 << 0
FLAG_FIXED: Final = 1 << 1
FLAG_PF: Final = 1 << 2
FLAG_AF: Final = 1 << 4
FLAG_ZF: Final = 1 << 6
FLAG_SF: Final = 1 << 7
FLAG_TF: Final = 1 << 8
FLAG_IF: Final = 1 << 9
FLAG_DF: Final = 1 << 10
FLAG_OF: Final = 1 << 11
FLAG_IOPL: Final = 3 << 12
FLAG_NT: Final = 1 << 14
FLAG_RF: Final = 1 << 16
FLAG_VM: Final = 1 << 17
FLAG_AC: Final = 1 << 18
FLAG_VIF: Final = 1 << 19
FLAG_VIP: Final = 1 << 20
FLAG_ID: Final = 1 << 21

# Exception vectors (SDM vol. 3, 6.3.1).
VECTOR_DE: Final = 0
VECTOR_DB: Final = 1
VECTOR_BP: Final = 3
VECTOR_OF: Final = 4
VECTOR_BR: Final = 5
VECTOR_UD: Final = 6
VECTOR_NM: Final = 7
VECTOR_DF: Final = 8
VECTOR_TS: Final = 10
VECTOR_NP: Final = 11
VECTOR_SS: Final = 12
VECTOR_GP: Final = 13
VECTOR_PF: Final = 14
VECTOR_MF: Final = 16
VECTOR_AC: Final = 17

# Page-fault error code (SDM vol. 3, 4.7).
PFERR_PRESENT: Final = 1 << 0
PFERR_WRITE: Final = 1 << 1
PFERR_USER: Final = 1 << 2
PFERR_RSVD: Final = 1 << 3
PFERR_FETCH: Final = 1 << 4

FIRST_INTERRUPT: Final = 32
"""Vectors from here on are no exceptions."""

NO_ERROR_CODE: Final = -1

DR6_BS: Final = 1 << 14

SHADOW_MOV_SS: Final = 1
SHADOW_STI: Final = 2
"""What keeps interrupts off for one instruction, numbered as KVM does (KVM_X86_SHADOW_INT_*)."""


@mypyc_attr(native_class=False)
class Fault(Exception):
    """An architectural exception: ``vector``, ``error_code`` (-1: none) and, for #PF, ``address``."""

    def __init__(self, vector: int, error_code: int = NO_ERROR_CODE, address: int = 0) -> None:
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address


class Segment:
    """A segment register with its hidden part.

    ``rights`` are bits 40..47 and 52..55 of the descriptor as the VMCS has them (SDM vol. 3, 25.4.1): type in bits
    3..0, S 4, DPL 6..5, P 7, L 13, D/B 14, G 15, and 16 if the register is unusable, as after a null selector.
    ``limit`` is the last byte's offset.
    """

    def __init__(self, selector: int, base: int, limit: int, rights: int) -> None:
        self.selector = selector
        self.base = base
        self.limit = limit
        self.rights = rights

    def copy(self) -> Segment:
        """An independent copy."""
        return Segment(self.selector, self.base, self.limit, self.rights)


RIGHTS_L: Final = 1 << 13
RIGHTS_DB: Final = 1 << 14
RIGHTS_UNUSABLE: Final = 1 << 16

MSR_TSC: Final = 0x10
MSR_SYSENTER_CS: Final = 0x174
MSR_SYSENTER_ESP: Final = 0x175
MSR_SYSENTER_EIP: Final = 0x176
MSR_PAT: Final = 0x277
MSR_EFER: Final = 0xC0000080
MSR_STAR: Final = 0xC0000081
MSR_LSTAR: Final = 0xC0000082
MSR_CSTAR: Final = 0xC0000083
MSR_FMASK: Final = 0xC0000084
MSR_FS_BASE: Final = 0xC0000100
MSR_GS_BASE: Final = 0xC0000101
MSR_KERNEL_GS_BASE: Final = 0xC0000102
MSR_TSC_AUX: Final = 0xC0000103

FCW_RESET: Final = 0x37F
MXCSR_RESET: Final = 0x1F80


class Regs:
    """Registers of one CPU. ``gpr`` holds 16 unsigned 64-bit values in encoding order (RAX, RCX, RDX, RBX, RSP, …)."""

    def __init__(self) -> None:
        self.gpr: list[int] = [0] * 16
        self.rip = 0
        self.rflags = FLAG_FIXED
        self.shadow = 0
        """SHADOW_* bits: interrupts stay off before the instruction at RIP (SDM vol. 3, 6.8.1 and 6.8.3)."""
        self.cr0 = CR0_PE
        self.cr2 = 0
        self.cr3 = 0
        self.cr4 = 0
        self.cr8 = 0
        self.efer = 0
        self.cpl = 0
        self.xmm: list[int] = [0] * 16
        """YMM contents, 256-bit unsigned."""
        self.fpr: list[int] = [0] * 8
        """Physical x87 registers, 80-bit unsigned; MMX registers are their low 64 bits. FSW says which is the top."""
        self.fcw = FCW_RESET
        self.fsw = 0
        self.ftw = 0
        """Bit i set: physical x87 register i is not empty (the abridged form of FXSAVE)."""
        self.mxcsr = MXCSR_RESET
        self.xcr0 = 7
        self.pkru = 0
        self.segments: list[Segment] = [
            Segment(0, 0, 0xFFFFFFFF, 0xC09B if number == CS else 0xC093) for number in range(6)
        ]
        self.segments.append(Segment(0, 0, 0, 0x82 | RIGHTS_UNUSABLE))
        self.segments.append(Segment(0, 0, 0, 0x8B))
        self.gdt_base = 0
        self.gdt_limit = 0
        self.idt_base = 0
        self.idt_limit = 0
        self.dr: list[int] = [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400]
        self.msr: dict[int, int] = {}
        """Model-specific registers that have been written, without EFER and the bases of FS and GS."""
        # What the segment registers say, kept beside them because every instruction asks.
        self.compatibility = False
        """In long mode, CS.L is clear: the code is 32-bit or 16-bit code."""
        self.code16 = False
        """CS.D is clear outside 64-bit code: operands and addresses have 16 bits by default."""
        self.stack16 = False
        """SS.B is clear outside 64-bit code: the stack pointer is SP."""
        self.flat = True
        """ES, SS and DS have base 0, a limit of 4 GiB and are writable; CS too, but readable."""
        self.only_first_byte_canonical = False
        """No CPU's: of an access only the first byte must be canonical. The oracle of KVM's emulator sets it."""

    @property
    def long_mode(self) -> bool:
        """True if code runs as 64-bit code (EFER.LMA and CS.L)."""
        return self.efer & EFER_LMA != 0 and not self.compatibility

    @property
    def real_mode(self) -> bool:
        """True if segment registers hold paragraph numbers (CR0.PE clear)."""
        return self.cr0 & CR0_PE == 0

    def copy(self) -> Regs:
        """An independent copy."""
        other = Regs()
        other.gpr = self.gpr[:]
        other.rip = self.rip
        other.rflags = self.rflags
        other.shadow = self.shadow
        other.cr0 = self.cr0
        other.cr2 = self.cr2
        other.cr3 = self.cr3
        other.cr4 = self.cr4
        other.cr8 = self.cr8
        other.efer = self.efer
        other.cpl = self.cpl
        other.xmm = self.xmm[:]
        other.fpr = self.fpr[:]
        other.fcw = self.fcw
        other.fsw = self.fsw
        other.ftw = self.ftw
        other.mxcsr = self.mxcsr
        other.xcr0 = self.xcr0
        other.pkru = self.pkru
        other.segments = [segment.copy() for segment in self.segments]
        other.gdt_base = self.gdt_base
        other.gdt_limit = self.gdt_limit
        other.idt_base = self.idt_base
        other.idt_limit = self.idt_limit
        other.dr = self.dr[:]
        other.msr = self.msr.copy()
        other.compatibility = self.compatibility
        other.code16 = self.code16
        other.stack16 = self.stack16
        other.flat = self.flat
        other.only_first_byte_canonical = self.only_first_byte_canonical
        return other

    def words(self) -> list[int]:
        """Everything as numbers: equal lists mean equal registers."""
        return [*self.gpr, self.rip, self.rflags, self.shadow, *self.rest()]

    def rest(self) -> list[int]:
        """All but the general registers, RIP, RFLAGS and the interrupt shadow."""
        words = self.xmm + self.fpr + self.dr
        words += [self.cr0, self.cr2, self.cr3, self.cr4, self.cr8, self.efer, self.cpl]
        words += [self.fcw, self.fsw, self.ftw, self.mxcsr, self.xcr0, self.pkru]
        words += [self.gdt_base, self.gdt_limit, self.idt_base, self.idt_limit]
        for segment in self.segments:
            words += [segment.selector, segment.base, segment.limit, segment.rights]
        for number in sorted(self.msr):
            words += [number, self.msr[number]]
        return words
