"""The architecture. Public: ``walk``, the reference page walk, with the types of its arguments and its answer."""

from mmufuzz.x86.page_walk import PageTableReader, PagingRegisters, WalkResult, walk
from mmufuzz.x86.paging import ACCESS_FETCH, ACCESS_READ, ACCESS_WRITE

__all__ = [
    "ACCESS_FETCH",
    "ACCESS_READ",
    "ACCESS_WRITE",
    "PageTableReader",
    "PagingRegisters",
    "WalkResult",
    "walk",
]
