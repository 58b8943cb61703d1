"""How the oracles see the machine. The model calls; it never asks."""

from __future__ import annotations

from mypy_extensions import mypyc_attr


@mypyc_attr(allow_interpreted_subclasses=True)
class Observer:
    """Does nothing. ``vcpu`` is a vCPU's index; addresses are bytes; ``access`` has the bits of a #PF error code."""

    def guest_access(self, vcpu: int, gva: int, hpa: int, access: int, emulated: bool) -> None:
        """An access to guest memory at ``gva`` reaches host physical ``hpa``: by hardware, or by the emulator."""

    def guest_fault(self, vcpu: int, gva: int, error_code: int) -> None:
        """The guest is about to receive a #PF."""

    def guest_exception(self, vcpu: int, vector: int) -> None:
        """The guest is about to receive an exception, a #PF too, at its RIP."""

    def guest_invalidated(self, vcpu: int, gva: int) -> None:
        """The guest completed an architectural invalidation: INVLPG of ``gva``, or of everything (-1)."""

    def internal_error(self, vcpu: int) -> None:
        """KVM gives up with KVM_EXIT_INTERNAL_ERROR."""

    def instruction_done(self, vcpu: int) -> None:
        """KVM has carried out the instruction at RIP, which has only to be skipped."""

    def instruction_skipped(self, vcpu: int) -> None:
        """It has been, or KVM has given up."""

    def emulation_begins(self, vcpu: int) -> None:
        """The emulator is about to execute what it has decoded; nothing has changed yet."""

    def emulation_ends(self, vcpu: int) -> None:
        """It has, RIP and RFLAGS included, unless an exception is queued or userspace has to answer first."""

    def interrupt_queued(self, vcpu: int, vector: int) -> None:
        """Userspace has handed an interrupt over to KVM."""

    def interrupt_begins(self, vcpu: int, vector: int) -> None:
        """The CPU begins to deliver it, perhaps not for the first time."""

    def interrupt_delivered(self, vcpu: int, vector: int) -> None:
        """The guest stands at its handler's first instruction."""

    def vm_entered(self, vcpu: int) -> None:
        """A vCPU that takes interrupts is in guest mode, with whatever was injected delivered."""

    def vm_entry_failed(self, vcpu: int) -> None:
        """The CPU refuses to inject an interrupt where none can be taken."""

    def events_ended(self, vcpu: int) -> None:
        """A triple fault, or a task switch that failed, ends what was queued for the guest."""

    def temporary_used(self, vcpu: int, site: str) -> None:
        """Kernel function ``site`` reads a local variable of a function that has returned."""

    def warn(self, site: str, text: str) -> None:
        """A WARN_ON or KVM_BUG_ON of the modelled kernel fired in ``site``."""
