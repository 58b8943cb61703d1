"""The emulator's accesses to guest memory and control registers (x86.c:emulate_ops and what it calls).

How an address is translated, what a store sets off, and what becomes of an access to no memory.
"""

from __future__ import annotations

from typing import Final

from mmufuzz.host.memory import ALL_ONES, PAGE_SHIFT, PAGE_SIZE
from mmufuzz.host.sites import EMUL_ATOMIC, EMUL_FETCH, EMUL_LOAD, EMUL_STORE
from mmufuzz.kvm.emulate_ops import EmulationFailed, IoNeeded
from mmufuzz.kvm.io import MAX_MMIO_FRAGMENTS, MMIO_PIECE, MmioFragment
from mmufuzz.kvm.memslots import gfn_to_memslot, gpa_to_hpa
from mmufuzz.kvm.role import ACC_USER_MASK, ACC_WRITE_MASK
from mmufuzz.kvm.root import kvm_mmu_reset_context, kvm_set_cr0, kvm_set_cr3, kvm_set_cr4
from mmufuzz.kvm.structs import INVALID_GPA, Vcpu
from mmufuzz.kvm.track import kvm_mmu_track_write
from mmufuzz.kvm.walker import gva_to_gpa, vcpu_match_mmio_gva
from mmufuzz.x86.paging import ACCESS_FETCH, ACCESS_USER, ACCESS_WRITE, permitted
from mmufuzz.x86.state import (
    CR0_PG,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    EFER_SCE,
    VECTOR_GP,
    VECTOR_PF,
    Fault,
)

CACHE_LINE: Final = 64

_EFER_VALID: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX


def emulator_read_emulated(vcpu: Vcpu, gva: int, size: int) -> int:
    """x86.c:emulator_read_write, reading, page by page; raises IoNeeded until userspace has read MMIO."""
    mmio = vcpu.mmio
    if mmio.read_completed:
        mmio.read_completed = False
        return mmio.value
    mmio.fragments.clear()
    value = 0
    done = 0
    for at, count in pages(gva, size, vcpu.regs.long_mode):
        gpa = vcpu_mmio_gva_to_gpa(vcpu, at, 0)
        value |= _read_onepage(vcpu, gpa, count, done) << (done << 3)
        done += count
    if mmio.fragments:
        mmio.value = value
        _mmio_needed(vcpu, False)
        raise IoNeeded
    return value


def emulator_write_emulated(vcpu: Vcpu, gva: int, size: int, value: int, local: bool = False) -> None:
    """x86.c:emulator_read_write, writing: page 1 is written before page 2 is translated.

    ``local``: the value is in a local variable of the emulator, and not in its context.
    """
    mmio = vcpu.mmio
    mmio.fragments.clear()
    done = 0
    for at, count in pages(gva, size, vcpu.regs.long_mode):
        part = value >> (done << 3) & (1 << (count << 3)) - 1
        gpa = vcpu_mmio_gva_to_gpa(vcpu, at, ACCESS_WRITE)
        _write_onepage(vcpu, gpa, count, part, local)
        done += count
    if mmio.fragments:
        _mmio_needed(vcpu, True)


def _mmio_needed(vcpu: Vcpu, is_write: bool) -> None:
    """The end of x86.c:emulator_read_write: run->mmio gets the first piece.

    An earlier MMIO write of the same instruction is forgotten, fragments and all.
    """
    mmio = vcpu.mmio
    mmio.needed = True
    mmio.is_write = is_write
    mmio.current = 0
    mmio.prepare_exit(mmio.fragments[0])


def kvm_fetch_guest_virt(vcpu: Vcpu, gva: int, size: int) -> bytes:
    """x86.c:kvm_fetch_guest_virt: ``size`` code bytes in one page. EmulationFailed where there is no memory."""
    gpa = translate(vcpu, gva, ACCESS_FETCH)
    if gfn_to_memslot(vcpu.kvm, gpa >> PAGE_SHIFT) is None:
        raise EmulationFailed
    return _read_bytes(vcpu, gpa, size)


def kvm_read_guest_virt(vcpu: Vcpu, gva: int, size: int) -> bytes:
    """x86.c:kvm_read_guest_virt: bytes as data, page by page. IoNeeded where there is no memory."""
    data = b""
    for at, count in pages(gva, size, vcpu.regs.long_mode):
        data += _read_std(vcpu, at, count, False)
    return data


def emulator_read_std(vcpu: Vcpu, gva: int, size: int, system: bool) -> int:
    """x86.c:emulator_read_std: of descriptors (``system``: a supervisor access) and of table images."""
    value = 0
    done = 0
    for at, count in pages(gva, size, vcpu.regs.long_mode):
        value |= int.from_bytes(_read_std(vcpu, at, count, system), "little") << (done << 3)
        done += count
    return value


def _read_std(vcpu: Vcpu, gva: int, size: int, system: bool) -> bytes:
    """x86.c:kvm_read_guest_virt_helper, one page."""
    gpa = translate(vcpu, gva, 0, system)
    if gfn_to_memslot(vcpu.kvm, gpa >> PAGE_SHIFT) is None:
        vcpu.kvm.mark("emulate.io_needed")
        raise IoNeeded
    return _read_bytes(vcpu, gpa, size)


def _read_bytes(vcpu: Vcpu, gpa: int, size: int) -> bytes:
    thread = vcpu.kvm.host.current
    thread.host.point(EMUL_FETCH)
    return thread.peek_bytes(gpa_to_hpa(gpa), size).to_bytes(size, "little")


def emulator_write_std(vcpu: Vcpu, gva: int, size: int, value: int, system: bool) -> None:
    """x86.c:emulator_write_std, kvm_write_guest_virt_helper: page by page, and without page tracking.

    IoNeeded where there is no memory that can be written.
    """
    done = 0
    for at, count in pages(gva, size, vcpu.regs.long_mode):
        gpa = translate(vcpu, at, ACCESS_WRITE, system)
        if not kvm_vcpu_write_guest(vcpu, gpa, count, value >> (done << 3) & (1 << (count << 3)) - 1):
            vcpu.kvm.mark("emulate.io_needed")
            raise IoNeeded
        done += count


def vcpu_mmio_gva_to_gpa(vcpu: Vcpu, gva: int, access: int) -> int:
    """x86.c:vcpu_mmio_gva_to_gpa: the page of the last MMIO access needs no walk; raises the guest's #PF."""
    if vcpu_match_mmio_gva(vcpu, gva):
        cached = vcpu.mmio_access
        user = ACCESS_USER if vcpu.regs.cpl == 3 else 0
        writable = cached & ACC_WRITE_MASK != 0
        if permitted(vcpu.paging, writable, cached & ACC_USER_MASK != 0, False, access | user):
            return vcpu.mmio_gfn << PAGE_SHIFT | gva & PAGE_SIZE - 1
    return translate(vcpu, gva, access)


def translate(vcpu: Vcpu, gva: int, access: int, system: bool = False) -> int:
    """mmu->gva_to_gpa of walk_mmu for ``access`` at the guest's CPL, or as the supervisor; raises the guest's #PF."""
    if vcpu.regs.cpl == 3 and not system:
        access |= ACCESS_USER
    gpa, error_code = gva_to_gpa(vcpu, gva, access)
    if gpa == INVALID_GPA:
        raise Fault(VECTOR_PF, error_code, gva)
    if gfn_to_memslot(vcpu.kvm, gpa >> PAGE_SHIFT) is not None:
        vcpu.kvm.observer.guest_access(vcpu.index, gva, gpa_to_hpa(gpa), access, True)
    return gpa


def _read_onepage(vcpu: Vcpu, gpa: int, size: int, place: int) -> int:
    """x86.c:emulator_read_write_onepage, reading: no slot means a fragment for userspace, and 0 for now."""
    if gfn_to_memslot(vcpu.kvm, gpa >> PAGE_SHIFT) is None:
        _add_fragment(vcpu, MmioFragment(gpa, size, place, 0, False))
        return 0
    thread = vcpu.kvm.host.current
    value = 0
    done = 0
    for at, count in words(gpa_to_hpa(gpa), size):
        value |= thread.load(EMUL_LOAD, at, count) << (done << 3)
        done += count
    return value


def _write_onepage(vcpu: Vcpu, gpa: int, size: int, value: int, local: bool) -> None:
    """x86.c:emulator_read_write_onepage, writing: a slot that cannot be written makes a fragment, too."""
    if not emulator_write_phys(vcpu, gpa, size, value):
        copied = size <= MMIO_PIECE and vcpu.kvm.fixes.mmio_scratch
        _add_fragment(vcpu, MmioFragment(gpa, size, 0, value, local and not copied))


def _add_fragment(vcpu: Vcpu, fragment: MmioFragment) -> None:
    mmio = vcpu.mmio
    full = len(mmio.fragments) >= MAX_MMIO_FRAGMENTS
    vcpu.kvm.warn_on(full, "emulator_read_write_onepage", "more than KVM_MAX_MMIO_FRAGMENTS fragments")
    mmio.fragments.append(fragment)


def emulator_write_phys(vcpu: Vcpu, gpa: int, size: int, value: int) -> bool:
    """x86.c:emulator_write_phys: store, then tell the shadow MMU. False if there is no memory that can be written."""
    if not kvm_vcpu_write_guest(vcpu, gpa, size, value):
        return False
    kvm_mmu_track_write(vcpu, gpa, size)
    return True


def kvm_vcpu_write_guest(vcpu: Vcpu, gpa: int, size: int, value: int) -> bool:
    """kvm_main.c:kvm_vcpu_write_guest, in one page: False if there is no slot, or a read-only one."""
    slot = gfn_to_memslot(vcpu.kvm, gpa >> PAGE_SHIFT)
    if slot is None or slot.readonly:
        return False
    thread = vcpu.kvm.host.current
    done = 0
    for at, count in words(gpa_to_hpa(gpa), size):
        thread.store(EMUL_STORE, at, value >> (done << 3) & (1 << (count << 3)) - 1, count)
        done += count
    return True


def emulator_cmpxchg_emulated(vcpu: Vcpu, gva: int, size: int, expected: int, value: int) -> bool:
    """x86.c:emulator_cmpxchg_emulated: False is X86EMUL_CMPXCHG_FAILED, somebody else changed the operand.

    Falls back to a plain write, one reason being a cache line crossed: the host has split-lock detection, so the access
    would raise #AC there.
    """
    kvm = vcpu.kvm
    gpa = _cmpxchg_gpa(vcpu, gva, size)
    if gpa == INVALID_GPA:
        emulator_write_emulated(vcpu, gva, size, value)
        return True
    kvm.mark("emulate.cmpxchg")
    if not _locked_cmpxchg(vcpu, gpa_to_hpa(gpa), size, expected, value):
        kvm.mark("emulate.cmpxchg_failed")
        return False
    kvm_mmu_track_write(vcpu, gpa, size)
    return True


def _cmpxchg_gpa(vcpu: Vcpu, gva: int, size: int) -> int:
    """Where emulator_cmpxchg_emulated can use a locked operation of the host, or INVALID_GPA."""
    if size > 8 or size & (size - 1):
        return INVALID_GPA
    gpa, _ = gva_to_gpa(vcpu, gva, ACCESS_WRITE | (ACCESS_USER if vcpu.regs.cpl == 3 else 0))
    if gpa == INVALID_GPA or (gpa & CACHE_LINE - 1) + size > CACHE_LINE:
        return INVALID_GPA
    slot = gfn_to_memslot(vcpu.kvm, gpa >> PAGE_SHIFT)
    return INVALID_GPA if slot is None or slot.readonly else gpa


def _locked_cmpxchg(vcpu: Vcpu, hpa: int, size: int, expected: int, value: int) -> bool:
    """LOCK CMPXCHG by the host, on one or two words; one visible operation."""
    thread = vcpu.kvm.host.current
    pieces = words(hpa, size)
    found = thread.atomic_load(EMUL_ATOMIC, pieces[0][0], pieces[0][1])
    done = pieces[0][1]
    for at, count in pieces[1:]:
        found |= thread.peek(at, count) << (done << 3)
        done += count
    if found != expected:
        return False
    done = 0
    for at, count in pieces:
        thread.store_now(at, value >> (done << 3) & (1 << (count << 3)) - 1, count)
        done += count
    return True


def set_cr(vcpu: Vcpu, number: int, value: int) -> bool:
    """MOV to CR ``number`` (0, 3 or 4), by exit or emulated; False asks for #GP(0)."""
    if number == 0:
        return kvm_set_cr0(vcpu, value)
    if number == 3:
        done = kvm_set_cr3(vcpu, value)
        flushes = True
    else:
        # Of the changes KVM lets pass, setting SMEP invalidates (SDM vol. 3, 4.10.4.1).
        flushes = value & ~vcpu.regs.cr4 & CR4_SMEP != 0
        done = kvm_set_cr4(vcpu, value)
    if done and flushes:
        vcpu.kvm.observer.guest_invalidated(vcpu.index, -1)
    return done


def set_efer(vcpu: Vcpu, value: int) -> None:
    """x86.c:set_efer: a change of NX or LME changes the MMU's role. #GP(0) for reserved bits, and LME under paging.

    An L1 that lets L2 change its EFER is not modelled: #GP(0).
    """
    regs = vcpu.regs
    changed = value ^ regs.efer
    if vcpu.guest_mode or value & ~_EFER_VALID or (changed & EFER_LME and regs.cr0 & CR0_PG):
        raise Fault(VECTOR_GP, 0)
    regs.efer = value & ~EFER_LMA | regs.efer & EFER_LMA
    if changed & (EFER_LME | EFER_NX):
        vcpu.kvm.mark("efer.role")
        kvm_mmu_reset_context(vcpu)


def emulator_pio_in(vcpu: Vcpu, port: int, size: int, count: int) -> None:
    """x86.c:emulator_pio_in, emulator_pio_in_out: no port is in the kernel, so userspace has to answer."""
    _pio(vcpu, port, size, [0] * count, True)


def emulator_pio_out(vcpu: Vcpu, port: int, size: int, value: int) -> None:
    """x86.c:emulator_pio_out."""
    _pio(vcpu, port, size, [value], False)


def _pio(vcpu: Vcpu, port: int, size: int, data: list[int], is_in: bool) -> None:
    pio = vcpu.pio
    vcpu.kvm.warn_on(pio.count != 0, "emulator_pio_in_out", "a port access is under way")
    pio.count = len(data)
    pio.is_in = is_in
    pio.port = port
    pio.size = size
    pio.data = data
    pio.fast_length = 0
    pio.exit_pending = True


def emulator_pio_in_emulated(vcpu: Vcpu, port: int, size: int, count: int) -> list[int]:
    """x86.c:emulator_pio_in_emulated: what userspace has read; raises IoNeeded until it has."""
    pio = vcpu.pio
    if not pio.count:
        emulator_pio_in(vcpu, port, size, count)
        raise IoNeeded
    pio.count = 0
    return pio.data


def pages(gva: int, size: int, long_mode: bool) -> list[tuple[int, int]]:
    """The pieces of an access by page: (address, bytes). Addresses wrap at 2^64, outside 64-bit mode at 2^32."""
    first = PAGE_SIZE - (gva & PAGE_SIZE - 1)
    if size <= first:
        return [(gva, size)]
    return [(gva, first), (gva + first & (ALL_ONES if long_mode else 0xFFFF_FFFF), size - first)]


def words(address: int, size: int) -> list[tuple[int, int]]:
    """The pieces of an access by aligned 64-bit word, each of 1, 2, 4 or 8 bytes."""
    if size in (1, 2, 4, 8) and (address & 7) + size <= 8:
        return [(address, size)]
    pieces = []
    while size:
        count = 8
        while count > size or address & (count - 1):
            count >>= 1
        pieces.append((address, count))
        address += count
        size -= count
    return pieces
