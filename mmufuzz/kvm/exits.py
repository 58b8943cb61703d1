"""VM exits: why guest mode was left."""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.kvm.structs import QueuedException
from mmufuzz.x86.insn import Insn

EXIT_INTERRUPT: Final = "external-interrupt"
EXIT_PF: Final = "page-fault"
EXIT_UD: Final = "invalid-opcode"
EXIT_DB: Final = "debug"
EXIT_AC: Final = "alignment-check"
EXIT_CR: Final = "cr-access"
EXIT_INVLPG: Final = "invlpg"
EXIT_INVPCID: Final = "invpcid"
EXIT_HLT: Final = "hlt"
EXIT_CPUID: Final = "cpuid"
EXIT_HYPERCALL: Final = "hypercall"
EXIT_RDMSR: Final = "rdmsr"
EXIT_WRMSR: Final = "wrmsr"
EXIT_IO: Final = "io"
EXIT_TASK_SWITCH: Final = "task-switch"
EXIT_TRIPLE_FAULT: Final = "triple-fault"
EXIT_INTERRUPT_WINDOW: Final = "interrupt-window"
EXIT_PREEMPTION_TIMER: Final = "preemption-timer"
EXIT_INVALID_STATE: Final = "invalid-state"
EXIT_DONE: Final = "program-end"


class VmExit:
    """``a`` and ``b`` qualify the reason: CR number and value, address and error code, type and address, DR6."""

    def __init__(self, reason: str, a: int = 0, b: int = 0) -> None:
        self.reason = reason
        self.a = a
        self.b = b
        self.length = 0
        """Bytes of the instruction that exited, where it completes by being skipped."""
        self.event: QueuedException | None = None
        """IDT-vectoring information: the event whose delivery exited."""
        self.insn: Insn | None = None
        """The instruction, where what KVM does depends on its operands."""


@mypyc_attr(native_class=False)
class Intercepted(Exception):
    """The instruction exits before it completes."""

    def __init__(self, vmexit: VmExit) -> None:
        super().__init__(vmexit.reason)
        self.vmexit = vmexit
