"""Host operations with arguments, as the text that stands for them in a ``HostThread``."""

from __future__ import annotations

from typing import Final

from mmufuzz.case.model import HOST_OPS, MAX_VCPUS
from mmufuzz.x86.state import FIRST_INTERRUPT

LAST_VECTOR: Final = 255
FORM: Final = f"{', '.join(HOST_OPS)} or 'interrupt vcpuN {FIRST_INTERRUPT:#x}..{LAST_VECTOR:#x}'"
"""What an operation may be."""

_PREFIX: Final = "interrupt vcpu"
NO_INTERRUPT: Final = (-1, -1)


def interrupt_op(vcpu: int, vector: int) -> str:
    """Userspace raises external interrupt ``vector`` (32 to 255) for a vCPU."""
    return f"{_PREFIX}{vcpu} {vector:#x}"


def interrupt_of(op: str) -> tuple[int, int]:
    """(vCPU, vector) of an interrupt; ``NO_INTERRUPT`` for any other text."""
    if not op.startswith(_PREFIX):
        return NO_INTERRUPT
    try:
        number, _, text = op[len(_PREFIX) :].partition(" ")
        vcpu = int(number)
        vector = int(text, 16)
    except ValueError:
        return NO_INTERRUPT
    # One text for each, so that equal operations are equal texts.
    if not 0 <= vcpu < MAX_VCPUS or not FIRST_INTERRUPT <= vector <= LAST_VECTOR or op != interrupt_op(vcpu, vector):
        return NO_INTERRUPT
    return vcpu, vector
