"""The emulator's context and how it reaches memory (kvm_emulate.h:struct x86_emulate_ctxt; emulate.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.kvm.emulate_decode import NO_INSN, Decoded
from mmufuzz.kvm.emulate_ops import EmulationFailed, X86EmulateOps
from mmufuzz.kvm.opcode_table import ALIGNED16, UNALIGNED
from mmufuzz.kvm.switches import Fixes
from mmufuzz.x86 import alu
from mmufuzz.x86.execute_operands import MASK32, MASK64, RSP
from mmufuzz.x86.insn import CS, FS, NO_REG, SS
from mmufuzz.x86.paging import CR4_LA57, is_canonical
from mmufuzz.x86.segments import install
from mmufuzz.x86.state import FLAG_TF, RIGHTS_DB, RIGHTS_UNUSABLE, VECTOR_GP, VECTOR_SS, Fault, Regs

# enum x86emul_mode.
MODE_REAL: Final = 0
MODE_PROT16: Final = 2
MODE_PROT32: Final = 4
MODE_PROT64: Final = 8

# Kinds of operands: struct operand.type.
NONE: Final = 0
REG: Final = 1
MEM: Final = 2
MEM_STR: Final = 3
IMM: Final = 4
XMM: Final = 5
MM: Final = 6

# Kinds of accesses that the emulator remembers.
READ: Final = 0
WRITE: Final = 1
CMPXCHG: Final = 2
PORT: Final = 3
"""A port was read; ``gva`` is its number."""
SYSTEM: Final = 4
"""Added to READ and WRITE: a supervisor's access whatever CPL is."""

READ_CACHE_SIZE: Final = 1024
_NO_FAULT: Final = Fault(0)
_LOW_HALF_END: Final = 1 << 47


class Access:
    """An access as the emulator asked for it. The ``value`` of a read that failed is -1.

    ``kind`` is READ, WRITE, CMPXCHG or PORT, the first two perhaps with SYSTEM.
    """

    def __init__(self, kind: int, gva: int, size: int, value: int) -> None:
        self.kind = kind
        self.gva = gva
        self.size = size
        self.value = value


class Operand:
    """struct operand. ``val`` is unsigned, but immediates are signed; ``ea`` the offset in ``segment``."""

    def __init__(self) -> None:
        self.type = NONE
        self.bytes = 0
        self.val = 0
        self.orig_val = 0
        self.ea = 0
        self.segment = 0
        self.reg = 0
        self.high8 = False
        self.count = 1
        """Elements of a string that one iteration moves."""


class X86EmulateCtxt:
    """One vCPU's emulator. ``gpr`` is the register cache, which the vCPU gets only when an instruction is done."""

    def __init__(self, regs: Regs, fixes: Fixes) -> None:
        self.ops = X86EmulateOps()
        """Given by whoever runs the emulator."""
        self.regs = regs
        self.fixes = fixes
        self.mode = MODE_PROT64
        self.insn = NO_INSN
        self.code = b""
        """The bytes that ``insn`` was decoded from, and perhaps more."""
        self.d = 0
        self.gpr: list[int] = regs.gpr
        self.eip = 0
        """RIP of the instruction, and once it is done that of the next one."""
        self.next_eip = 0
        """_eip: behind what was decoded, or where a branch goes."""
        self.eflags = 0
        self.tf = False
        """RFLAGS.TF at the start of the instruction."""
        self.completed = False
        """The instruction has been executed to its end: ``eip`` is behind it."""
        self.hypercall_fixed = False
        """A hypercall has been written over the instruction, which the guest executes again."""
        self.interruptibility = 0
        """SHADOW_* bit of a STI, or of a load of SS even if that fails."""
        self.op_bytes = 0
        self.lock_prefix = False
        self.src = Operand()
        self.src2 = Operand()
        self.dst = Operand()
        self.mem_read: list[int] = []
        """What read_emulated got, for the case that the instruction runs again."""
        self.mem_read_bytes = 0
        self.mem_read_pos = 0
        self.io_read: list[int] = []
        """Elements that REP INS has read ahead."""
        self.io_read_pos = 0
        self.io_read_used = False
        self.perm_ok = False
        self.have_exception = False
        self.exception = _NO_FAULT
        self.cmpxchg_failed = False
        """X86EMUL_CMPXCHG_FAILED ended the instruction."""
        self.io_needed = False
        """X86EMUL_IO_NEEDED ended it."""
        self.accesses: list[Access] = []
        """Since the instruction was decoded, in order, each listed before it is made: the last one may have failed."""

    def init(self) -> None:
        """x86.c:init_emulate_ctxt, emulate.c:init_decode_cache: a new instruction at the vCPU's RIP."""
        regs = self.regs
        self.gpr = regs.gpr[:]
        self.eip = regs.rip
        self.eflags = regs.rflags
        self.tf = regs.rflags & FLAG_TF != 0
        self.interruptibility = 0
        self.completed = False
        self.hypercall_fixed = False
        self.have_exception = False
        self.cmpxchg_failed = False
        self.io_needed = False
        self.perm_ok = False
        if self.mem_read:
            self.mem_read.clear()
        self.mem_read_bytes = 0
        if self.io_read:
            self.io_read.clear()
        self.io_read_pos = 0
        self.io_read_used = False
        if self.accesses:
            self.accesses.clear()
        self.recalculate_mode()

    def recalculate_mode(self) -> None:
        """emulate.c:emulator_recalc_and_set_mode. Virtual-8086 mode is not modelled."""
        regs = self.regs
        if regs.long_mode:
            self.mode = MODE_PROT64
        elif regs.real_mode:
            self.mode = MODE_REAL
        else:
            self.mode = MODE_PROT16 if regs.code16 else MODE_PROT32

    @property
    def bits(self) -> int:
        """Default size of code: 64, 32 or 16."""
        if self.mode == MODE_PROT64:
            return 64
        return 16 if self.regs.code16 else 32


# Registers.


def assign_reg(gpr: list[int], index: int, value: int, size: int) -> None:
    """kvm_emulate.h:insn_assign_reg, emulate.c:assign_register: 4 bytes clear the upper half, 1 and 2 keep the rest."""
    if size == 8:
        gpr[index] = value if 0 <= value < alu.SHORT else value & MASK64
    elif size == 4:
        gpr[index] = value & MASK32
    else:
        mask = alu.mask(size)
        gpr[index] = gpr[index] & ~mask | value & mask


def address_mask(insn: Decoded, value: int) -> int:
    """emulate.c:address_mask."""
    if insn.ad_bytes == 8:
        return value if 0 <= value < alu.SHORT else value & MASK64
    return value & (MASK32 if insn.ad_bytes == 4 else 0xFFFF)


def register_address_increment(ctxt: X86EmulateCtxt, index: int, by: int) -> None:
    """emulate.c:register_address_increment."""
    assign_reg(ctxt.gpr, index, ctxt.gpr[index] + by, ctxt.insn.ad_bytes)


def stack_mask(ctxt: X86EmulateCtxt) -> int:
    """emulate.c:stack_mask."""
    if ctxt.mode == MODE_PROT64:
        return MASK64
    return MASK32 if ctxt.regs.segments[SS].rights & RIGHTS_DB else 0xFFFF


def rsp_increment(ctxt: X86EmulateCtxt, by: int) -> None:
    """emulate.c:rsp_increment."""
    mask = stack_mask(ctxt)
    rsp = ctxt.gpr[RSP]
    ctxt.gpr[RSP] = rsp & ~mask | rsp + by & mask


def set_segment(ctxt: X86EmulateCtxt, index: int, selector: int, base: int, limit: int, rights: int) -> None:
    """x86.c:emulator_set_segment. CPL is SS.DPL (vmx.c:vmx_get_cpl, svm.c:svm_set_segment)."""
    if not rights & 0x80:
        rights |= RIGHTS_UNUSABLE
    install(ctxt.regs, index, selector, base, limit, rights)
    if index == SS and not ctxt.regs.real_mode:
        ctxt.regs.cpl = rights >> 5 & 3


# Addresses.


def effective_address(ctxt: X86EmulateCtxt, insn: Decoded) -> int:
    """emulate.c:decode_modrm, decode_abs: the offset of the memory operand. RIP-relative ones get RIP later."""
    address = insn.displacement
    if insn.base >= 0 and insn.base < 16:
        address += ctxt.gpr[insn.base]
    if insn.index != NO_REG:
        address += ctxt.gpr[insn.index] << insn.scale
    return address_mask(insn, address)


def is_noncanonical(ctxt: X86EmulateCtxt, address: int) -> bool:
    """emulate.c:emul_is_noncanonical_address."""
    return not is_canonical(address, 57 if ctxt.regs.cr4 & CR4_LA57 else 48)


def linearize(ctxt: X86EmulateCtxt, segment: int, ea: int, size: int, write: bool) -> int:
    """emulate.c:__linearize for data: the linear address. #GP(0) or #SS(0).

    In 64-bit mode only the first byte must be canonical, which is not what hardware does.
    """
    if ctxt.mode == MODE_PROT64:
        if segment >= FS:
            ea = ea + ctxt.regs.segments[segment].base & MASK64
        if ea >= _LOW_HALF_END and is_noncanonical(ctxt, ea):
            raise Fault(VECTOR_SS if segment == SS else VECTOR_GP, 0)
        linear = ea
    else:
        linear = ctxt.regs.segments[segment].base + ea & MASK32
        if not _segment_allows(ctxt, segment, ea, size, write, False):
            raise Fault(VECTOR_SS if segment == SS else VECTOR_GP, 0)
    if size >= 16 and not ctxt.d & UNALIGNED and linear % (16 if ctxt.d & ALIGNED16 else size):
        raise Fault(VECTOR_GP, 0)
    return linear


def _segment_allows(ctxt: X86EmulateCtxt, segment: int, ea: int, size: int, write: bool, fetch: bool) -> bool:
    """__linearize outside 64-bit mode: presence, type and limit."""
    descriptor = ctxt.regs.segments[segment]
    kind = descriptor.rights
    if kind & RIGHTS_UNUSABLE:
        return False
    if write and ((kind & 8 and ctxt.mode != MODE_REAL) or not kind & 2):
        return False
    if not fetch and kind & 0xA == 8:
        return False
    limit = descriptor.limit
    if kind & 0xC == 4:
        if ea <= limit:
            return False
        limit = MASK32 if kind & RIGHTS_DB else 0xFFFF
    if ea > limit:
        return False
    return limit == MASK32 or ea + size <= limit + 1


def code_address(ctxt: X86EmulateCtxt, ea: int) -> int:
    """emulate.c:__linearize for a fetch at offset ``ea``. #GP(0)."""
    if ctxt.mode == MODE_PROT64:
        if is_noncanonical(ctxt, ea):
            raise Fault(VECTOR_GP, 0)
        return ea
    if not _segment_allows(ctxt, CS, ea, 0, False, True):
        raise Fault(VECTOR_GP, 0)
    return ctxt.regs.segments[CS].base + ea & MASK32


def assign_eip_near(ctxt: X86EmulateCtxt, target: int) -> None:
    """emulate.c:assign_eip_near: #GP(0) for a target that is not canonical, or beyond the limit of CS."""
    target &= alu.mask(ctxt.op_bytes)
    if ctxt.fixes.eip_check:
        code_address(ctxt, target)
    ctxt.next_eip = target


def assign_eip_far(ctxt: X86EmulateCtxt, target: int) -> None:
    """emulate.c:assign_eip_far: the same in the mode that the new CS gives."""
    ctxt.recalculate_mode()
    target &= alu.mask(ctxt.op_bytes)
    code_address(ctxt, target)
    ctxt.next_eip = target


def code_limit(ctxt: X86EmulateCtxt, ea: int) -> int:
    """max_size of __linearize: bytes from ``ea`` to the end of the code segment, at most 4 GiB."""
    if ctxt.mode == MODE_PROT64:
        return MASK32
    limit = ctxt.regs.segments[CS].limit
    return MASK32 if limit == MASK32 else limit + 1 - ea


# Memory.


def read_emulated(ctxt: X86EmulateCtxt, gva: int, size: int) -> int:
    """emulate.c:read_emulated: a read that is not made again if the instruction runs again."""
    access = Access(READ, gva, size, -1)
    ctxt.accesses.append(access)
    place = ctxt.mem_read_pos
    if place < len(ctxt.mem_read):
        value = ctxt.mem_read[place]
    else:
        if ctxt.mem_read_bytes + size >= READ_CACHE_SIZE:
            ctxt.ops.bug("read_emulated", "the read cache is full")
            raise EmulationFailed
        value = ctxt.ops.read_emulated(gva, size)
        ctxt.mem_read.append(value)
        ctxt.mem_read_bytes += size
    ctxt.mem_read_pos = place + 1
    access.value = value
    return value


def segmented_read(ctxt: X86EmulateCtxt, segment: int, ea: int, size: int) -> int:
    """emulate.c:segmented_read."""
    return read_emulated(ctxt, linearize(ctxt, segment, ea, size, False), size)


def segmented_write(
    ctxt: X86EmulateCtxt, segment: int, ea: int, size: int, value: int, local: bool = False
) -> None:
    """emulate.c:segmented_write. ``local``: the value is in a local variable, and not in the context."""
    gva = linearize(ctxt, segment, ea, size, True)
    ctxt.accesses.append(Access(WRITE, gva, size, value))
    ctxt.ops.write_emulated(gva, size, value, local)


def segmented_cmpxchg(ctxt: X86EmulateCtxt, operand: Operand) -> None:
    """emulate.c:segmented_cmpxchg."""
    gva = linearize(ctxt, operand.segment, operand.ea, operand.bytes, True)
    ctxt.accesses.append(Access(CMPXCHG, gva, operand.bytes, operand.val))
    ctxt.ops.cmpxchg_emulated(gva, operand.bytes, operand.orig_val, operand.val)


def segmented_read_std(ctxt: X86EmulateCtxt, segment: int, ea: int, size: int) -> int:
    """emulate.c:segmented_read_std: an operand in memory proper, at the guest's privilege."""
    return read_std(ctxt, linearize(ctxt, segment, ea, size, False), size, not ctxt.fixes.std_user_access)


def segmented_write_std(ctxt: X86EmulateCtxt, segment: int, ea: int, size: int, value: int) -> None:
    """emulate.c:segmented_write_std."""
    write_std(ctxt, linearize(ctxt, segment, ea, size, True), size, value, not ctxt.fixes.std_user_access)


def linear_read_system(ctxt: X86EmulateCtxt, gva: int, size: int) -> int:
    """emulate.c:linear_read_system."""
    return read_std(ctxt, gva, size, True)


def linear_write_system(ctxt: X86EmulateCtxt, gva: int, size: int, value: int) -> None:
    """emulate.c:linear_write_system."""
    write_std(ctxt, gva, size, value, True)


def read_std(ctxt: X86EmulateCtxt, gva: int, size: int, system: bool) -> int:
    """ops->read_std."""
    access = Access(READ | SYSTEM if system else READ, gva, size, -1)
    ctxt.accesses.append(access)
    access.value = ctxt.ops.read_std(gva, size, system)
    return access.value


def write_std(ctxt: X86EmulateCtxt, gva: int, size: int, value: int, system: bool) -> None:
    """ops->write_std."""
    ctxt.accesses.append(Access(WRITE | SYSTEM if system else WRITE, gva, size, value))
    ctxt.ops.write_std(gva, size, value, system)
