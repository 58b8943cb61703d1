"""The one error a malformed case raises."""

from __future__ import annotations

from mypy_extensions import mypyc_attr


@mypyc_attr(native_class=False)
class CaseError(ValueError):
    """``place`` says where (file, line, key; as far as known), ``expected`` what should be there."""

    def __init__(self, place: str, expected: str) -> None:
        super().__init__(f"{place}: {expected}")
        self.place = place
        self.expected = expected
