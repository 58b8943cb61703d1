"""Semantic counters as libFuzzer's coverage, with no instrumented code: it takes any memory as 8-bit counters."""

from __future__ import annotations

import ctypes
import os


class CoverageTable:
    """``size`` counters; ``attached`` tells whether libFuzzer reads them.

    Needs libFuzzer's symbols to be global (``engine_atheris.preload``), and must be made before ``atheris.Setup``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.table = (ctypes.c_uint8 * size)()
        # libFuzzer wants a PC for each counter; made-up ones do.
        self.places = (ctypes.c_uint64 * (2 * size))()
        for index in range(size):
            self.places[2 * index] = (1 << 20) + 16 * index
        self.attached = self._attach()

    def _attach(self) -> bool:
        if "_with_fuzzer.so" not in os.environ.get("LD_PRELOAD", ""):
            return False
        # By index: the names begin with underscores that Python would mangle in a class.
        library = ctypes.CDLL(None)
        start = ctypes.addressof(self.table)
        places = ctypes.addressof(self.places)
        library["__sanitizer_cov_8bit_counters_init"](ctypes.c_void_p(start), ctypes.c_void_p(start + self.size))
        library["__sanitizer_cov_pcs_init"](ctypes.c_void_p(places), ctypes.c_void_p(places + 16 * self.size))
        return True

    def add(self, counters: dict[int, int]) -> None:
        """Add the counters of a run, each up to 255; libFuzzer clears the table between inputs."""
        for index, count in counters.items():
            self.table[index] = min(255, self.table[index] + count)
