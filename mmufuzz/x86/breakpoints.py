"""Execution breakpoints in the debug registers (SDM vol. 3, 18.2)."""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.state import FLAG_RF, SHADOW_MOV_SS, Regs

_DR6_RESERVED_ONE: Final = 0xFFFE0FF0
_DR6_RTM: Final = 1 << 16

DR7_ENABLED: Final = 0xFF
"""L0, G0, …, L3, G3."""
DR7_GD: Final = 1 << 13


def code_breakpoint(regs: Regs) -> int:
    """Bits B0 to B3 of DR6 for the breakpoints on the instruction at RIP; 0 for none.

    RFLAGS.RF inhibits them, and so does a load of SS right before (SDM vol. 3, 6.8.3).
    """
    dr7 = regs.dr[7]
    if not dr7 & DR7_ENABLED or regs.rflags & FLAG_RF or regs.shadow & SHADOW_MOV_SS:
        return 0
    hit = 0
    for number in range(4):
        # R/W = 0 is execution, for which LEN must be 0.
        if dr7 >> 2 * number & 3 and dr7 >> 16 + 4 * number & 15 == 0 and regs.dr[number] == regs.rip:
            hit |= 1 << number
    return hit


def deliver_debug_payload(regs: Regs, payload: int) -> None:
    """DR6 and DR7 as #DB leaves them; ``payload`` are its bits (SDM vol. 3, 18.2.3: B0 to B3 are cleared, BS stays)."""
    regs.dr[6] = regs.dr[6] & ~15 | payload | _DR6_RESERVED_ONE | _DR6_RTM
    regs.dr[7] &= ~DR7_GD
