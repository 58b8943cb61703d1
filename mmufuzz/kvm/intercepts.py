"""Instructions that exit by themselves: CPUID, hypercalls, MSRs, ports; and what KVM does for them (vmx.c, x86.c)."""

from __future__ import annotations

from typing import Final

from mmufuzz.host.sites import EMUL_LOAD, EMUL_STORE
from mmufuzz.kvm.emulator_access import emulator_pio_in, emulator_pio_out, set_efer
from mmufuzz.kvm.exits import EXIT_CPUID, EXIT_HYPERCALL, EXIT_IO, EXIT_RDMSR, EXIT_WRMSR, VmExit
from mmufuzz.kvm.structs import Vcpu
from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import MASK32, MASK64, RAX, RDX, check_io, load_operand, read_reg, write_reg
from mmufuzz.x86.executor import execute
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.opcodes import MNEMONICS
from mmufuzz.x86.state import Regs

_NAMES: Final = ("cpuid", "vmcall", "vmmcall", "rdmsr", "wrmsr", "in", "out", "ins", "outs")

_HC_VAPIC_POLL_IRQ: Final = 1
_HC_CLOCK_PAIRING: Final = 9
_EPERM: Final = 1
_EOPNOTSUPP: Final = 95
_ENOSYS: Final = 1000
"""kvm_para.h"""


def _intercepted() -> list[bool]:
    return [name in _NAMES for name in MNEMONICS]


INTERCEPTED: Final[list[bool]] = _intercepted()
"""Operations that ``intercept`` has to see, by number."""


def intercept(vcpu: Vcpu, bus: Bus, insn: Insn) -> VmExit | None:
    """The exit of one of these; None if it raises #GP at this privilege, which comes first. Raises ``Fault``.

    An L1 that intercepts nothing of its L2's is modelled, so that L2 executes them itself.
    """
    regs = vcpu.regs
    name = insn.mnemonic
    if name == ("vmmcall" if vcpu.guest_mode else "vmcall"):
        # At any privilege. L1 does not intercept it, so that it is KVM's.
        vmexit = VmExit(EXIT_HYPERCALL)
    elif vcpu.guest_mode or name in ("vmcall", "vmmcall"):
        return None
    elif name == "cpuid":
        vmexit = VmExit(EXIT_CPUID)
    elif name in ("rdmsr", "wrmsr"):
        if regs.cpl != 0:
            return None
        vmexit = VmExit(EXIT_RDMSR if name == "rdmsr" else EXIT_WRMSR)
    else:
        check_io(regs, bus, _port(regs, insn, bus), _io_size(insn))
        vmexit = VmExit(EXIT_IO)
    vmexit.insn = insn
    vmexit.length = insn.length
    return vmexit


def _port(regs: Regs, insn: Insn, bus: Bus) -> int:
    if insn.mnemonic in ("ins", "outs"):
        return regs.gpr[RDX] & 0xFFFF
    operand = insn.operands[1 if insn.mnemonic == "in" else 0]
    return load_operand(regs, insn, bus, operand) & 0xFFFF


def _io_size(insn: Insn) -> int:
    if insn.mnemonic in ("ins", "outs"):
        return min(4, insn.size)
    return insn.operands[0 if insn.mnemonic == "in" else 1].size


class ExitBus(Bus):
    """KVM, carrying out an instruction that has no memory operand."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    def fence(self, regs: Regs) -> None:
        """The exit has drained the store buffer."""

    def write_efer(self, regs: Regs, value: int) -> None:
        """x86.c:set_efer."""
        set_efer(self.vcpu, value)


def carry_out(vcpu: Vcpu, insn: Insn) -> None:
    """x86.c:kvm_emulate_cpuid, kvm_emulate_rdmsr, kvm_emulate_wrmsr, without the skip. Raises ``Fault``."""
    regs = vcpu.regs
    rip = regs.rip
    execute(regs, insn, ExitBus(vcpu))
    regs.rip = rip


def kvm_emulate_hypercall(vcpu: Vcpu) -> None:
    """x86.c:kvm_emulate_hypercall, without the skip, of a guest that has no paravirtual features.

    KVM_HC_CLOCK_PAIRING needs a host whose clock is the TSC.
    """
    regs = vcpu.regs
    number = read_reg(regs, RAX, 8 if regs.long_mode else 4)
    if regs.cpl != 0:
        result = -_EPERM
    elif number == _HC_VAPIC_POLL_IRQ:
        result = 0
    else:
        result = -_EOPNOTSUPP if number == _HC_CLOCK_PAIRING else -_ENOSYS
    regs.gpr[RAX] = result & (MASK64 if regs.long_mode else MASK32)


def kvm_fast_pio(vcpu: Vcpu, insn: Insn, length: int) -> None:
    """x86.c:kvm_fast_pio: IN or OUT goes to userspace, and is skipped when that has answered."""
    regs = vcpu.regs
    bus = ExitBus(vcpu)
    port = _port(regs, insn, bus)
    size = _io_size(insn)
    if insn.mnemonic == "in":
        emulator_pio_in(vcpu, port, size, 1)
    else:
        emulator_pio_out(vcpu, port, size, read_reg(regs, RAX, size))
    vcpu.pio.fast_length = length
    vcpu.pio.linear_rip = regs.rip


def complete_fast_pio(vcpu: Vcpu) -> bool:
    """x86.c:complete_fast_pio_in, complete_fast_pio_out, without the skip: False if RIP has moved meanwhile."""
    pio = vcpu.pio
    pio.exit_pending = False
    pio.count = 0
    if vcpu.regs.rip != pio.linear_rip:
        return False
    if pio.is_in:
        write_reg(vcpu.regs, RAX, pio.size, pio.data[0])
    return True


def answer_pio(vcpu: Vcpu) -> None:
    """KVM_EXIT_IO: a port of the modelled userspace, which keeps what is written to it and floats high before."""
    pio = vcpu.pio
    kvm = vcpu.kvm
    if pio.is_in:
        kvm.host.point(EMUL_LOAD)
        pio.data = [kvm.ports.read(pio.port, pio.size) for _ in pio.data]
    else:
        kvm.host.point(EMUL_STORE)
        for value in pio.data:
            kvm.ports.write(pio.port, pio.size, value)
    values = " ".join([f"{value:#x}" for value in pio.data])
    what = "in" if pio.is_in else "out"
    line = f"io {what} {pio.port:#x} {pio.size} {values}"
    kvm.host.note("exit to userspace: " + line)
    vcpu.userspace_exits.append(line)
