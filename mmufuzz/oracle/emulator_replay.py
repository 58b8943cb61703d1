"""The hardware's side of an emulated instruction: the executor over what the emulator accessed.

The values are those that the emulator itself read, so what other CPUs do meanwhile does not matter.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from mmufuzz.kvm.emulate_ctxt import CMPXCHG, PORT, READ, SYSTEM, WRITE, Access
from mmufuzz.x86.bus import WIDEST, Bus
from mmufuzz.x86.state import PFERR_WRITE, VECTOR_GP, VECTOR_PF, Fault, Regs

_PAGE: Final = ~0xFFF
NO_REGS: Final = Regs()
"""Stands where there are none yet; they cost more to make than to compare."""


@mypyc_attr(native_class=False)
class BeyondTheRecord(Exception):
    """The executor asks for what the emulator did not access."""


class Store:
    """A store of the executor."""

    def __init__(self, gva: int, size: int, value: int, locked: bool, system: bool) -> None:
        self.gva = gva
        self.size = size
        self.value = value
        self.locked = locked
        self.system = system


def _is_read(access: Access) -> bool:
    """Whether it has read something: one that failed has not."""
    return access.kind & ~SYSTEM == READ and access.value >= 0


def _is_write(access: Access) -> bool:
    kind = access.kind & ~SYSTEM
    return kind in (WRITE, CMPXCHG)


class Replay(Bus):
    """The bus of a replay; ``begin`` says of which one."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self.count = 0
        """How many of them came to their end."""
        self.used: list[bool] = []
        """By access: a load has been given what it read."""
        self.first = 0
        """All accesses before this one are used."""
        self.after = NO_REGS
        self.fault: Fault | None = None
        self.mask = 0
        self.failed: Access | None = None
        """The access that the page fault interrupted."""
        self.stores: list[Store] = []
        self.budget = 0
        """Bytes that the emulator wrote and the executor has not stored yet."""
        self.system = False
        self.privilege = True
        """Every access so far was made with the privilege that the emulator used."""

    def begin(self, accesses: list[Access], fault: Fault | None, after: Regs, mode64: bool) -> None:
        """Of an emulation that ended with ``fault``, or with none, and left ``after``."""
        self.accesses = accesses
        self.count = len(accesses)
        self.used = [False] * self.count
        self.first = 0
        self.after = after
        self.fault = fault
        self.mask = 0xFFFFFFFFFFFFFFFF if mode64 else 0xFFFFFFFF
        self.failed = None
        if fault is not None and fault.vector == VECTOR_PF:
            self.count -= 1
            self.failed = accesses[self.count]
        self.stores.clear()
        self.budget = 0
        for place in range(self.count):
            if _is_write(accesses[place]):
                self.budget += accesses[place].size
        self.system = False
        self.privilege = True

    @property
    def writes(self) -> list[Access]:
        """What the emulator wrote."""
        return [self.accesses[place] for place in range(self.count) if _is_write(self.accesses[place])]

    def _check_fault(self, gva: int, size: int, write: bool) -> None:
        """Raise the emulator's page fault, for the first byte of this access in its page, if there is one."""
        failed = self.failed
        fault = self.fault
        if failed is None or fault is None:
            return
        page = fault.address & self.mask & _PAGE
        if gva & _PAGE != page and gva + size - 1 & self.mask & _PAGE != page:
            return
        if not self._in_failed(gva, size):
            return
        if (failed.kind & SYSTEM != 0) != self.system:
            self.privilege = False
        error_code = fault.error_code & ~PFERR_WRITE | (PFERR_WRITE if write else 0)
        address = fault.address
        if not failed.kind & SYSTEM and failed.size <= WIDEST:
            # Which bytes of a descriptor it writes, and of a save area it reads first, is the CPU's own affair.
            address = (gva if gva & _PAGE == page else page) & self.mask
        raise Fault(VECTOR_PF, error_code, address)

    def _in_failed(self, gva: int, size: int) -> bool:
        """Whether an access overlaps the one that failed. Addresses wrap."""
        failed = self.failed
        if failed is None:
            return False
        return gva - failed.gva & self.mask < failed.size or failed.gva - gva & self.mask < size

    def load(self, regs: Regs, gva: int, size: int, rmw: bool, locked: bool) -> int:
        """What the emulator read there; its first read that has not been asked for yet."""
        for place in range(self.first, self.count):
            access = self.accesses[place]
            if access.gva == gva and access.size == size and _is_read(access) and not self.used[place]:
                self._use(place)
                self._check_privilege(access)
                return access.value
        self._check_fault(gva, size, rmw)
        value = 0
        for place in range(size):
            value |= self._byte(gva + place) << (place << 3)
        return value

    def _use(self, place: int) -> None:
        self.used[place] = True
        while self.first < self.count and (self.used[self.first] or _is_write(self.accesses[self.first])):
            self.first += 1

    def _byte(self, gva: int) -> int:
        """A byte of an access that the emulator made in other pieces, or of a store before."""
        for store in self.stores:
            place = gva - store.gva & self.mask
            if place < store.size:
                return store.value >> (place << 3) & 0xFF
        for number in range(self.count):
            access = self.accesses[number]
            place = gva - access.gva & self.mask
            if place < access.size and _is_read(access):
                self._check_privilege(access)
                return access.value >> (place << 3) & 0xFF
        if self._in_failed(gva, 1):
            # The part before the page that faults; what it holds no longer matters.
            return 0
        raise BeyondTheRecord

    def _check_privilege(self, access: Access) -> None:
        if (access.kind & SYSTEM != 0) != self.system:
            self.privilege = False

    def store(self, regs: Regs, gva: int, size: int, value: int, locked: bool) -> None:
        """Remember the store, unless the emulator wrote less."""
        if self._in_failed(gva, size) and not self._written(gva, size):
            self._check_fault(gva, size, True)
            return
        self.budget -= size
        if self.budget < 0:
            raise BeyondTheRecord
        self.stores.append(Store(gva, size, value, locked, self.system))

    def _written(self, gva: int, size: int) -> bool:
        """Whether the emulator has made this store before it came to the access that failed (a repetition may)."""
        left = 0
        for write in self.writes:
            left += write.gva == gva and write.size == size
        for store in self.stores:
            left -= store.gva == gva and store.size == size
        return left > 0

    def fence(self, regs: Regs) -> None:
        """Nothing to order."""

    def _refused(self) -> None:
        """Whether a register takes a value is not emulate.c's to say: the replay follows the emulation."""
        if self.fault is not None and self.fault.vector == VECTOR_GP:
            raise Fault(VECTOR_GP, 0)

    def write_cr(self, regs: Regs, number: int, value: int) -> None:
        """What the control register then holds."""
        self._refused()
        regs.cr0 = self.after.cr0
        regs.cr3 = self.after.cr3
        regs.cr4 = self.after.cr4

    def write_efer(self, regs: Regs, value: int) -> None:
        """What EFER then holds."""
        self._refused()
        regs.efer = self.after.efer

    def invlpg(self, regs: Regs, gva: int) -> None:
        """No register changes."""

    def halt(self, regs: Regs) -> None:
        """No register changes."""

    def port_in(self, regs: Regs, port: int, size: int) -> int:
        """What the emulator read."""
        for place in range(self.first, self.count):
            if self.accesses[place].kind == PORT and not self.used[place]:
                self._use(place)
                return self.accesses[place].value
        raise BeyondTheRecord

    def same_writes(self) -> bool:
        """The emulator wrote what the executor stored, byte by byte, and locked where that locks."""
        stores = self.stores
        if not self.budget and not stores:
            return True
        if len(stores) == 1 and not self.budget:
            store = stores[0]
            write = self.accesses[self.count - 1]
            if write.gva == store.gva and write.value == store.value and write.size == store.size and _is_write(write):
                # The only write, as it is all that was written.
                return write.kind & ~SYSTEM == (CMPXCHG if store.locked else WRITE)
        writes = self.writes
        emulated: dict[int, int] = {}
        for write in writes:
            for place in range(write.size):
                emulated[write.gva + place & self.mask] = write.value >> (place << 3) & 0xFF
        executed: dict[int, int] = {}
        for store in stores:
            for place in range(store.size):
                executed[store.gva + place & self.mask] = store.value >> (place << 3) & 0xFF
        return self._same_bytes(emulated, executed) and not any(store.locked for store in stores)

    def _same_bytes(self, emulated: dict[int, int], executed: dict[int, int]) -> bool:
        """Equal, but for bytes of descriptors that the emulator wrote back as it had read them."""
        for gva, value in executed.items():
            if emulated.get(gva, -1) != value:
                return False
        for gva, value in emulated.items():
            if gva not in executed and self._read_as_system(gva) != value:
                return False
        return True

    def _read_as_system(self, gva: int) -> int:
        for place in range(self.count):
            access = self.accesses[place]
            place_in = gva - access.gva & self.mask
            if access.kind == READ | SYSTEM and place_in < access.size:
                return access.value >> (place_in << 3) & 0xFF
        return -1

    def same_write_privilege(self) -> bool:
        """No write was made with more privilege than the store it stands for."""
        for write in self.writes:
            for store in self.stores:
                if write.gva <= store.gva < write.gva + write.size and (write.kind & SYSTEM != 0) != store.system:
                    return False
        return True
