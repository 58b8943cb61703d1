"""The architecture. Public: ``walk``, the reference page walk, and ``execute``, which runs flat code."""

from mmufuzz.x86.flat import Execution, execute
from mmufuzz.x86.page_walk import PageTableReader, PagingRegisters, walk
from mmufuzz.x86.paging import ACCESS_FETCH, ACCESS_READ, ACCESS_WRITE
from mmufuzz.x86.walk_result import WalkResult

__all__ = [
    "ACCESS_FETCH",
    "ACCESS_READ",
    "ACCESS_WRITE",
    "Execution",
    "PageTableReader",
    "PagingRegisters",
    "WalkResult",
    "execute",
    "walk",
]
