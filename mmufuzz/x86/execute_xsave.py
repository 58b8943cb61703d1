"""FXSAVE, XSAVE and their counterparts, as memory effects (SDM vol. 1, 10.5 and 13).

Every state component counts as in use, so XSAVEOPT and XSAVEC leave nothing out that XSAVE writes.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.x86.bus import Bus
from mmufuzz.x86.execute_operands import MASK64, RAX, RDX, advance, operand_address, read_reg
from mmufuzz.x86.execute_vector import checked_mxcsr
from mmufuzz.x86.execute_x87 import control_word, reset, summarize
from mmufuzz.x86.insn import Insn
from mmufuzz.x86.state import CR0_EM, CR0_TS, MXCSR_RESET, VECTOR_GP, VECTOR_NM, Fault, Regs

X87: Final = 1
SSE: Final = 2
AVX: Final = 4
COMPACTED: Final = 1 << 63
_LEGACY_SIZE: Final = 512
_LEGACY_USED32: Final = 288  # without XMM8 to XMM15 and what is the program's own
_HEADER: Final = 512
_AVX_AREA: Final = 576
_MXCSR_MASK: Final = 0xFFFF
_MASK128: Final = (1 << 128) - 1


def _area(regs: Regs, insn: Insn, size: int, align: int, write: bool) -> int:
    """The address of a save area; #GP(0) unless it is aligned."""
    address = operand_address(regs, insn, size, write)
    if address % align:
        raise Fault(VECTOR_GP, 0)
    return address


def _vectors(regs: Regs) -> int:
    """How many vector registers the mode has."""
    return 16 if regs.long_mode else 8


def _save_x87(regs: Regs, bus: Bus, address: int) -> None:
    bus.store(regs, address, 8, regs.fcw | regs.fsw << 16 | regs.ftw << 32, False)
    bus.store(regs, address + 8, 16, 0, False)
    for place in range(8):
        bus.store(regs, address + 32 + 16 * place, 16, regs.fpr[(regs.fsw >> 11) + place & 7], False)


def _save_mxcsr(regs: Regs, bus: Bus, address: int) -> None:
    bus.store(regs, address + 24, 8, regs.mxcsr | _MXCSR_MASK << 32, False)


def _save_vectors(regs: Regs, bus: Bus, address: int, upper: bool) -> None:
    for index in range(_vectors(regs)):
        value = regs.xmm[index] >> 128 if upper else regs.xmm[index] & _MASK128
        bus.store(regs, address + 16 * index, 16, value, False)


class _X87State:
    """The x87 part of a save area, read but not yet committed."""

    def __init__(self, regs: Regs, bus: Bus, address: int) -> None:
        word = bus.load(regs, address, 8, False, False)
        self.fcw = control_word(word)
        self.fsw = word >> 16 & 0xFFFF
        self.ftw = word >> 32 & 0xFF
        self.stack = [bus.load(regs, address + 32 + 16 * place, 10, False, False) for place in range(8)]

    def commit(self, regs: Regs) -> None:
        """Make it the state of the x87."""
        regs.fcw = self.fcw
        regs.fsw = self.fsw
        regs.ftw = self.ftw
        for place in range(8):
            regs.fpr[(regs.fsw >> 11) + place & 7] = self.stack[place]
        summarize(regs, 0)


def _load_vectors(regs: Regs, bus: Bus, address: int) -> list[int]:
    return [bus.load(regs, address + 16 * index, 16, False, False) for index in range(_vectors(regs))]


def fxsave(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FXSAVE. Bytes 464 to 511 are the program's own; outside 64-bit code so are those of XMM8 to XMM15."""
    _check_fx(regs)
    address = _area(regs, insn, _LEGACY_SIZE, 16, True)
    _save_x87(regs, bus, address)
    _save_mxcsr(regs, bus, address)
    _save_vectors(regs, bus, address + 160, False)
    advance(regs, insn)


def _check_switched(regs: Regs) -> None:
    """#NM with CR0.TS; CR0.EM is of no account to XSAVE and its counterparts."""
    if regs.cr0 & CR0_TS:
        raise Fault(VECTOR_NM)


def _check_fx(regs: Regs) -> None:
    """FXSAVE and FXRSTOR raise #NM where SSE instructions raise #UD."""
    if regs.cr0 & (CR0_EM | CR0_TS):
        raise Fault(VECTOR_NM)


def fxrstor(regs: Regs, insn: Insn, bus: Bus) -> None:
    """FXRSTOR."""
    _check_fx(regs)
    _load_legacy(regs, bus, _area(regs, insn, _LEGACY_SIZE, 16, False))
    advance(regs, insn)


class _Image(Bus):
    """A save area of its own, from address 0."""

    def __init__(self, image: bytes) -> None:
        self.image = image

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """Bytes of the area."""
        return int.from_bytes(self.image[gva : gva + size], "little")

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """Bytes of the area."""
        self.image = self.image[:gva] + value.to_bytes(size, "little") + self.image[gva + size :]


def fxsave_image(regs: Regs) -> int:
    """What FXSAVE writes outside 64-bit code, as a number of 288 bytes."""
    area = _Image(bytes(_LEGACY_USED32))
    _save_x87(regs, area, 0)
    _save_mxcsr(regs, area, 0)
    _save_vectors(regs, area, 160, False)
    return int.from_bytes(area.image, "little")


def load_fxsave_image(regs: Regs, image: int) -> None:
    """Load the 288 bytes of ``fxsave_image``; #GP(0) for reserved bits of MXCSR."""
    area = _Image(image.to_bytes(_LEGACY_USED32, "little"))
    _load_legacy(regs, area, 0)


def _load_legacy(regs: Regs, bus: Bus, address: int) -> None:
    x87 = _X87State(regs, bus, address)
    mxcsr = checked_mxcsr(bus.load(regs, address + 24, 4, False, False))
    vectors = _load_vectors(regs, bus, address + 160)
    x87.commit(regs)
    regs.mxcsr = mxcsr
    for index in range(len(vectors)):
        regs.xmm[index] = regs.xmm[index] >> 128 << 128 | vectors[index]


def _requested(regs: Regs) -> int:
    """The requested-feature bitmap: EDX:EAX within XCR0."""
    return (read_reg(regs, RDX, 4) << 32 | read_reg(regs, RAX, 4)) & regs.xcr0


def xsave(regs: Regs, insn: Insn, bus: Bus) -> None:
    """XSAVE, XSAVEOPT and XSAVEC; the last in the compacted format, where AVX has the same place."""
    _check_switched(regs)
    wanted = _requested(regs)
    compacted = insn.mnemonic == "xsavec"
    address = _area(regs, insn, _AVX_AREA + (256 if wanted & AVX else 0), 64, True)
    kept = 0 if compacted else bus.load(regs, address + _HEADER, 8, True, False) & ~wanted
    if wanted & X87:
        _save_x87(regs, bus, address)
    if wanted & (SSE if compacted else SSE | AVX):
        _save_mxcsr(regs, bus, address)
    if wanted & SSE:
        _save_vectors(regs, bus, address + 160, False)
    if wanted & AVX:
        _save_vectors(regs, bus, address + _AVX_AREA, True)
    bus.store(regs, address + _HEADER, 8, kept & MASK64 | wanted, False)
    if compacted:
        bus.store(regs, address + _HEADER + 8, 8, COMPACTED | wanted, False)
    advance(regs, insn)


def xrstor(regs: Regs, insn: Insn, bus: Bus) -> None:
    """XRSTOR, of either format. Components that the area does not hold are initialized."""
    _check_switched(regs)
    wanted = _requested(regs)
    address = _area(regs, insn, _AVX_AREA, 64, False)
    present = bus.load(regs, address + _HEADER, 8, False, False)
    layout = bus.load(regs, address + _HEADER + 8, 8, False, False)
    _check_header(regs, bus, address, present, layout)
    from_area = wanted & present
    x87 = _X87State(regs, bus, address) if from_area & X87 else None
    mxcsr = regs.mxcsr
    if layout & COMPACTED:
        if wanted & SSE:
            mxcsr = bus.load(regs, address + 24, 4, False, False) if from_area & SSE else MXCSR_RESET
    elif wanted & (SSE | AVX):
        mxcsr = bus.load(regs, address + 24, 4, False, False)
    checked_mxcsr(mxcsr)
    count = _vectors(regs)
    low = _load_vectors(regs, bus, address + 160) if from_area & SSE else [0] * count
    high = _load_vectors(regs, bus, address + _AVX_AREA) if from_area & AVX else [0] * count
    if x87 is not None:
        x87.commit(regs)
    elif wanted & X87:
        reset(regs)
        regs.fpr = [0] * 8
    regs.mxcsr = mxcsr
    for index in range(count):
        if wanted & SSE:
            regs.xmm[index] = regs.xmm[index] >> 128 << 128 | low[index]
        if wanted & AVX:
            regs.xmm[index] = regs.xmm[index] & _MASK128 | high[index] << 128
    advance(regs, insn)


def _check_header(regs: Regs, bus: Bus, address: int, present: int, layout: int) -> None:
    """#GP(0) for a header that asks for what is not there (SDM vol. 1, 13.8)."""
    rest = 0
    last = 64 if layout & COMPACTED else 24
    for place in range(16, last, 8):
        rest |= bus.load(regs, address + _HEADER + place, 8, False, False)
    known = layout & ~COMPACTED
    if layout & COMPACTED:
        bad = known & ~regs.xcr0 or present & ~known
    else:
        bad = layout or present & ~regs.xcr0
    if rest or bad:
        raise Fault(VECTOR_GP, 0)
