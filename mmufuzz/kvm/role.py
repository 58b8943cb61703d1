"""union kvm_mmu_page_role as a packed int (kvm_host.h): equal ints are equal roles.

``invalid`` is not part of the word: it is state of one page, not of its identity (``ShadowPage.invalid``).
"""

from __future__ import annotations

from typing import Final

ACC_EXEC_MASK: Final = 1
ACC_WRITE_MASK: Final = 2
ACC_USER_MASK: Final = 4
ACC_ALL: Final = 7

_ACCESS_SHIFT: Final = 4
ROLE_DIRECT: Final = 1 << 7
ROLE_EFER_NX: Final = 1 << 8
ROLE_CR0_WP: Final = 1 << 9
ROLE_SMEP_ANDNOT_WP: Final = 1 << 10
ROLE_SMAP_ANDNOT_WP: Final = 1 << 11
ROLE_GUEST_MODE: Final = 1 << 12
ROLE_PASSTHROUGH: Final = 1 << 13
ROLE_BITS: Final = 14
"""Width of a role."""
_LEVEL_AND_ACCESS: Final = 0x7F


def role_level(role: int) -> int:
    """Paging level of the table, 1..5."""
    return role & 15


def role_access(role: int) -> int:
    """ACC_* bits inherited from the levels above."""
    return role >> _ACCESS_SHIFT & 7


def with_level_access(role: int, level: int, access: int) -> int:
    """``role`` at another level with other inherited access."""
    return role & ~_LEVEL_AND_ACCESS | level | access << _ACCESS_SHIFT


def child_role(role: int, direct: bool, access: int) -> int:
    """Role of a child table (mmu.c:kvm_mmu_child_role): one level down, never passthrough."""
    child = with_level_access(role, role_level(role) - 1, access) & ~(ROLE_DIRECT | ROLE_PASSTHROUGH)
    return child | ROLE_DIRECT if direct else child


_TEXTS: Final[dict[int, str]] = {}
"""``role_text`` by role: a run asks for the same few over and over."""


def role_text(role: int) -> str:
    """For people: level, access and the bits that are set."""
    text = _TEXTS.get(role)
    if text is None:
        text = _role_text(role)
        _TEXTS[role] = text
    return text


def _role_text(role: int) -> str:
    access = role_access(role)
    text = f"L{role_level(role)} {'U' if access & ACC_USER_MASK else '-'}{'W' if access & ACC_WRITE_MASK else '-'}"
    text += "X" if access & ACC_EXEC_MASK else "-"
    if role & ROLE_DIRECT:
        text += " direct"
    if role & ROLE_PASSTHROUGH:
        text += " passthrough"
    return text
