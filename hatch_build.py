"""Wheels get the compiled core where there is a C compiler; without one a wheel is pure Python and says why.

Editable installs stay pure: their sources change. ``MMUFUZZ_PURE=1`` asks for a pure wheel.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
# The build needs the room that compiles, not a core that happens to be installed or cached.
os.environ["MMUFUZZ_CORE"] = "installed"

from mmufuzz.build.compile import BuildError, compile_core  # noqa: E402 - the path comes first
from mmufuzz.build.compilers import MYPYC, plain_compiler  # noqa: E402
from mmufuzz.build.core import DESCRIPTION, PURE, snapshot  # noqa: E402
from mmufuzz.build.loader import PURE_VARIABLE, pure_wanted  # noqa: E402


class CompiledCore(BuildHookInterface):  # type: ignore[type-arg] - not generic in every hatchling
    """Adds ``mmufuzz/_core`` to a wheel: the library and its description, or the reason why there is none."""

    def dependencies(self) -> list[str]:
        """What compiling needs, if anything is going to be compiled."""
        if _why_not():
            return []
        extra: list[str] = self.metadata.core.optional_dependencies["compile"]
        # The types of what the core imports are needed, too.
        imported: list[str] = self.metadata.core.dependencies
        return imported + [text for text in extra if text.partition(">=")[0] in MYPYC]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is put together. ``version`` is "standard" or "editable"."""
        if version == "editable":
            return
        self.scratch = tempfile.TemporaryDirectory(prefix="mmufuzz-core-")
        target = Path(self.scratch.name)
        why = _why_not()
        compiler = plain_compiler()
        if not why and compiler is not None:
            try:
                compile_core(snapshot(ROOT), compiler, target, self.app.display_debug)
            except (BuildError, OSError) as error:
                why = f"compiling it failed when mmufuzz was installed: {error}"
                self.app.display_warning(f"pure Python: {why}")
        if why:
            (target / DESCRIPTION).write_text(json.dumps({"kind": PURE, "why": why}) + "\n")
        else:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
        files = [path for path in target.iterdir() if path.is_file()]
        build_data["force_include"].update({str(path): f"mmufuzz/_core/{path.name}" for path in files})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is complete."""
        if version != "editable":
            self.scratch.cleanup()


def _why_not() -> str:
    """Why the core is not going to be compiled; "" if it is."""
    if pure_wanted():
        return f"{PURE_VARIABLE} was set when mmufuzz was installed"
    return "" if plain_compiler() is not None else "no C compiler was found when mmufuzz was installed"
