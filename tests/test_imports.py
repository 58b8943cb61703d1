"""Imports go one way: a room may use the rooms below it, never one beside or above it."""

from __future__ import annotations

import ast
from pathlib import Path

import mmufuzz

RANKS = {
    "x86": 0,
    "host": 0,
    "case": 1,
    "outcome": 1,
    "kvm": 2,
    "oracle": 3,
    "run": 4,
    "search": 5,
    "build": 5,
    "campaign": 6,
    "litmus": 6,
    "vectors": 6,
    "report": 6,
    "cli": 7,
}


def violations(package: Path) -> list[str]:
    """One line for each import in ``package`` that goes up or sideways, or names a room without a rank."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        room = parts[0]
        if room == "__init__":
            continue
        for target, line in imported_rooms(path, package.name):
            if room not in RANKS or target not in RANKS:
                found.append(f"{path.name}:{line}: {room if room not in RANKS else target} has no rank")
            elif target != room and RANKS[target] >= RANKS[room]:
                found.append(f"{path.name}:{line}: {room} imports {target}")
    return found


def imported_rooms(path: Path, package: str) -> list[tuple[str, int]]:
    """Rooms that the module at ``path`` imports, anywhere in it, with line numbers."""
    rooms = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                rooms.append(("a relative import", node.lineno))
            elif node.module == package:
                names = [f"{package}.{alias.name}" for alias in node.names]
            elif node.module is not None:
                names = [node.module]
        rooms.extend((name.split(".")[1], node.lineno) for name in names if name.startswith(f"{package}."))
    return rooms


def test_the_package_imports_one_way() -> None:
    assert violations(Path(mmufuzz.__file__).parent) == []


def test_the_build_room_imports_no_other_room() -> None:
    room = Path(mmufuzz.__file__).parent / "build"
    paths = sorted(room.glob("*.py"))
    assert paths
    assert {target for path in paths for target, _ in imported_rooms(path, "mmufuzz")} == {"build"}


def test_the_core_does_not_use_what_would_make_it_nondeterministic() -> None:
    package = Path(mmufuzz.__file__).parent
    around = ("campaign", "cli", "build")
    core = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in around]
    used = []
    for path in core:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            used.extend(
                f"{path.name}: {name}" for name in names if name in ("time", "random", "datetime", "secrets", "uuid")
            )
    assert used == []


def plant(root: Path, files: dict[str, str]) -> Path:
    """A package ``toy`` with these modules."""
    package = root / "toy"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_the_check_is_silent_on_imports_that_go_down(tmp_path: Path) -> None:
    files = {
        "kvm/mmu.py": "from toy.host.sched import Host\nfrom toy.kvm.page import zap\n",
        "run.py": "import toy.kvm.mmu\n",
    }
    assert violations(plant(tmp_path, files)) == []


def test_the_check_fires_on_an_import_that_goes_up(tmp_path: Path) -> None:
    package = plant(tmp_path, {"kvm/mmu.py": "from toy.oracle.coherence import check\n"})
    assert violations(package) == ["mmu.py:1: kvm imports oracle"]


def test_the_check_fires_on_an_import_that_goes_sideways(tmp_path: Path) -> None:
    package = plant(tmp_path, {"host/sched.py": "import toy.x86.tlb\n"})
    assert violations(package) == ["sched.py:1: host imports x86"]


def test_the_check_sees_imports_inside_functions_and_from_the_package_itself(tmp_path: Path) -> None:
    package = plant(tmp_path, {"case/model.py": "def late():\n    from toy import cli\n"})
    assert violations(package) == ["model.py:2: case imports cli"]


def test_the_check_fires_on_a_room_nobody_ranked(tmp_path: Path) -> None:
    assert violations(plant(tmp_path, {"attic/old.py": "import toy.kvm\n"})) == ["old.py:1: attic has no rank"]
