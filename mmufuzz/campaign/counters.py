"""Semantic counters: features of a run as libFuzzer coverage, with no instrumented code.

libFuzzer takes any memory as 8-bit counters. They see what line counts cannot: which return code on which role, and
which thread met which other one at a word.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from typing import Final

SIZE: Final = 1 << 13


class Counters:
    """A table of counters; ``attached`` tells whether libFuzzer reads it.

    Needs libFuzzer's symbols to be global (``engine_atheris.preload``), and must be made before ``atheris.Setup``.
    """

    def __init__(self) -> None:
        self.table = (ctypes.c_uint8 * SIZE)()
        # libFuzzer wants a PC for each counter; made-up ones do.
        self.places = (ctypes.c_uint64 * (2 * SIZE))()
        for index in range(SIZE):
            self.places[2 * index] = (1 << 20) + 16 * index
        self.attached = self._attach()

    def _attach(self) -> bool:
        if "_with_fuzzer.so" not in os.environ.get("LD_PRELOAD", ""):
            return False
        # By index: the names begin with underscores that Python would mangle in a class.
        library = ctypes.CDLL(None)
        start = ctypes.addressof(self.table)
        places = ctypes.addressof(self.places)
        library["__sanitizer_cov_8bit_counters_init"](ctypes.c_void_p(start), ctypes.c_void_p(start + SIZE))
        library["__sanitizer_cov_pcs_init"](ctypes.c_void_p(places), ctypes.c_void_p(places + 16 * SIZE))
        return True

    def hit(self, name: str) -> None:
        """Count ``name``; which counter it is depends on the name alone."""
        index = zlib.crc32(name.encode()) % SIZE
        if self.table[index] < 255:
            self.table[index] += 1
