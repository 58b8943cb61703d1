"""Which core this process uses: settled when ``mmufuzz`` is imported, before any module of the core is.

In this order: ``MMUFUZZ_PURE=1`` asks for pure Python; ``MMUFUZZ_CORE`` names the directory of a build, or says
``installed``; a compiled core that was installed with the package; pure Python. The command line may choose a build
from the cache afterwards (``use``), as long as no core module has been imported.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from mmufuzz.build.core import DESCRIPTION, PURE, snapshot

PURE_VARIABLE: Final = "MMUFUZZ_PURE"
CORE_VARIABLE: Final = "MMUFUZZ_CORE"
INSTALLED: Final = "installed"
"""Value of ``MMUFUZZ_CORE``: what is installed, whatever the cache holds."""

SAME_SOURCES: Final = "a build of these sources"
INSTALLED_DIRECTORY: Final = Path(__file__).resolve().parents[1] / "_core"
"""Where a wheel has its compiled core, or the reason why it has none."""


@dataclass(frozen=True)
class InUse:
    """The core of this process. ``directory`` is None for the pure one, ``compiler`` then ""."""

    kind: str
    why: str
    directory: Path | None = None
    compiler: str = ""
    modules: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """For people."""
        by = f" by {self.compiler}" if self.compiler else ""
        return f"{self.kind}{by}: {self.why}"

    def as_json(self) -> dict[str, str]:
        """Fields for the JSON of verbs."""
        return {"core": self.kind, "core_compiler": self.compiler, "core_why": self.why}


_current = InUse(PURE, "nothing was chosen")


def in_use() -> InUse:
    """The core of this process, and why it is this one."""
    return _current


class CannotLoad(Exception):
    """A build that does not fit this process; the text says why, in one line."""


class CoreFinder(MetaPathFinder, Loader):
    """Imports ``modules`` from one shared library, made by mypyc, instead of from their Python files."""

    def __init__(self, library: Path, name: str, modules: tuple[str, ...]) -> None:
        self.path = str(library)
        self.name = name
        self.modules = frozenset(modules)
        self.library: ModuleType | None = None

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """For modules of the core only."""
        return spec_from_loader(fullname, self, origin=self.path) if fullname in self.modules else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Call the initialisation function that the library exports for the module; it runs the module, too."""
        import ctypes  # noqa: PLC0415 - the pure core does without

        library = self._loaded()
        name = f"init_{spec.name.replace('.', '___')}"
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype = ctypes.c_void_p
        pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        address = pointer(getattr(library, name), f"{self.name}.{name}".encode())
        module: ModuleType = ctypes.PYFUNCTYPE(ctypes.py_object)(address)()
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""

    def _loaded(self) -> ModuleType:
        if self.library is None:
            loader = ExtensionFileLoader(self.name, self.path)
            spec = spec_from_file_location(self.name, self.path, loader=loader)
            assert spec is not None
            self.library = module_from_spec(spec)
            # Its modules look for it there.
            sys.modules[self.name] = self.library
            loader.exec_module(self.library)
        return self.library


def pure_wanted() -> bool:
    """Whether the environment asks for pure Python."""
    return os.environ.get(PURE_VARIABLE, "") not in ("", "0")


def choose() -> None:
    """Settle the core of this process from its environment and from what is installed."""
    if pure_wanted():
        settle(InUse(PURE, f"{PURE_VARIABLE} is set"))
        return
    wanted = os.environ.get(CORE_VARIABLE) or INSTALLED
    why = ""
    if wanted != INSTALLED:
        try:
            use(Path(wanted), SAME_SOURCES, snapshot().digest)
            return
        except (CannotLoad, OSError) as error:
            why = f"the build that {CORE_VARIABLE} names cannot be used: {error}"
    if (INSTALLED_DIRECTORY / DESCRIPTION).is_file():
        try:
            use(INSTALLED_DIRECTORY, "installed with the package")
            return
        except CannotLoad as error:
            why = why or str(error)
    settle(InUse(PURE, why or "no compiled core is installed"))


def use(directory: Path, why: str, sources: str = "") -> InUse:
    """Import the core from the build in ``directory`` from here on. ``sources``: the digest that it must have.

    Raises ``CannotLoad``. Must come before the first import of a core module.
    """
    try:
        fields: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
        if fields["kind"] == PURE:
            raise CannotLoad(str(fields["why"]))
        library, modules = directory / fields["library"], tuple(fields["modules"])
        name = f"{fields['package']}_core__mypyc"
        built = InUse(fields["kind"], why, directory, fields["compiler"], modules)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotLoad(f"{directory} holds no build") from error
    if sources and fields["sources"] != sources:
        raise CannotLoad("it was built from other sources")
    if not library.name.endswith(EXTENSION_SUFFIXES[0]) or not library.is_file():
        raise CannotLoad(f"it is not for Python {sys.version_info.major}.{sys.version_info.minor}")
    imported = [module for module in modules if module in sys.modules]
    if imported:
        raise CannotLoad(f"{imported[0]} has been imported already")
    sys.meta_path.insert(0, CoreFinder(library, name, modules))
    settle(built)
    return built


def settle(core: InUse) -> None:
    """Record which core this process uses."""
    global _current  # noqa: PLW0603 - one process has one core
    _current = core
