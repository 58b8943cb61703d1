"""Atheris as an engine: libFuzzer owns its process, so the harness runs as one of ours and reports through a file.

libFuzzer writes its corpus in place, and reads whatever lies in its directories. So it works on a private copy, from
which whole files are taken over: a process killed at any moment leaves no torn file in the corpus, and reads none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from mmufuzz.campaign.budget import Budget
from mmufuzz.campaign.corpus import CASE_HARNESS, OWN, SUFFIX
from mmufuzz.campaign.engine_process import GRACE_SECONDS, HARNESS_FAILED, harness_command, run_harness
from mmufuzz.campaign.files import writable_directory
from mmufuzz.campaign.insn_counters import reach as insn_reach
from mmufuzz.campaign.kernel import Kernel
from mmufuzz.campaign.minimal import ReachesOf, minimal, reach
from mmufuzz.campaign.recorder import REDUCE_SECONDS, Recorder
from mmufuzz.campaign.units import load_units, take_over
from mmufuzz.case import bytes as case_bytes

MERGE_SECONDS: Final = 10.0
"""For the merge into a minimal corpus at the end; one that takes longer is left to ``mmufuzz corpus merge``."""

MAX_LEN: Final = 4096

CUSTOM: Final = ("atheris.custom_mutator", "atheris.custom_crossover")


def libfuzzer_flags(seconds: float | None, seed: int, corpora: list[Path]) -> list[str]:
    """Arguments for libFuzzer; it reads all of ``corpora`` and adds to the first.

    ``-len_control=0``: its default starves structured inputs. ``-entropic=0``: its entropic schedule keeps statistics
    of rare features, which with the hundred thousand counters of an instrumented core cost ten times what a run does.
    ``-print_funcs=0``: it starts a symbolizer, which the preloaded libraries break. ``-report_slow_units``: an input
    whose finding is reduced is slow, and no error of the harness. The harness ends by its own clock;
    libFuzzer's is the backstop. Signals are left to the harness. A crash of the process itself has the status of an
    error inside mmufuzz.
    """
    flags = ["-len_control=0", f"-max_len={MAX_LEN}", "-handle_int=0", "-handle_term=0", "-print_final_stats=0"]
    flags += ["-entropic=0", "-print_funcs=0", "-verbosity=0", "-reload=0"]
    flags.append(f"-report_slow_units={int(3 * REDUCE_SECONDS)}")
    flags += [f"-error_exitcode={HARNESS_FAILED}", f"-timeout_exitcode={HARNESS_FAILED}"]
    flags.append(f"-seed={seed % 0x7FFFFFFF + 1}")
    if seconds is not None:
        flags.append(f"-max_total_time={int(seconds + GRACE_SECONDS)}")
    return flags + [str(corpus) for corpus in corpora]


def preload(custom: bool) -> dict[str, str]:
    """Environment in which libFuzzer's symbols are global, so that the harness' counters can be its coverage.

    Uses the library that the Atheris wheel installs beside its package; empty if there is none. With ``custom`` the
    wheel's entry points for a mutator and a crossover of our own come before it: libFuzzer looks for them when it is
    loaded, and Atheris would load them too late. They must not be there without such functions.
    """
    import atheris  # noqa: PLC0415 - an extra; only this engine needs it

    library = Path(atheris.path()).parent / "ubsan_with_fuzzer.so"
    if not library.is_file():
        library = Path(atheris.__file__).parent.parent / "ubsan_with_fuzzer.so"
    if not library.is_file():
        return {}
    libraries = [str(library)]
    for name in CUSTOM if custom else ():
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return {}
        libraries.insert(0, spec.origin)
    return {"LD_PRELOAD": ":".join(libraries)}


def run_atheris(
    harness: Path,
    recorder: Recorder,
    seed: int,
    budget: Budget,
    tick: Callable[[], None],
    workdir: Path,
    corpus: Path,
) -> None:
    """Run ``harness`` for the rest of ``budget``; take over its sums and findings, also if it ends early.

    It starts from its seeds in the checkout, its own directory in ``corpus``, and, if it takes Cases, those kept there;
    what it adds goes to its own directory, which is then merged into a minimal one.
    """
    own = writable_directory(corpus / harness.stem)
    units = workdir / f"{harness.stem}.units"
    units.mkdir()
    take_over(own, units)
    command = harness_command(harness, recorder, seed, budget)
    for directory in (_with_kept_cases(units, harness, corpus), harness.parents[1] / "corpus" / "seeds" / harness.stem):
        if directory.is_dir():
            command += ["--corpus", str(directory)]
    if run_harness(harness, command, recorder, budget, tick, workdir, lambda: take_over(units, own)):
        of_cases = harness.stem == CASE_HARNESS
        reaches_of = case_reach(recorder.kernel) if of_cases else insn_reach
        minimize(own, reaches_of, Budget(MERGE_SECONDS), lambda: recorder.stop.requested)


def case_reach(kernel: Kernel) -> ReachesOf:
    """What a unit of the Case harness reaches on ``kernel``."""
    return lambda data: reach(case_bytes.encode(kernel.dress(case_bytes.decode(data))))


def minimize(own: Path, reaches_of: ReachesOf, patience: Budget, stopped: Callable[[], bool]) -> int:
    """Remove from ``own`` the units that reach nothing that the others do not; how many.

    0, and nothing is removed, if ``patience`` is too short for all of them.
    """
    paths: dict[bytes, list[Path]] = {}
    for path, data in load_units(own):
        paths.setdefault(data, []).append(path)

    def patiently(data: bytes) -> Sequence[int]:
        if stopped() or patience.spent(0):
            raise TimeoutError
        return reaches_of(data)

    try:
        for unit in minimal(paths, patiently):
            paths[unit.data].pop(0)
    except TimeoutError:
        return 0
    superfluous = [path for same in paths.values() for path in same]
    for path in superfluous:
        path.unlink(missing_ok=True)
    return len(superfluous)


def _with_kept_cases(units: Path, harness: Path, corpus: Path) -> Path:
    """``units``, to which, for a harness that takes Cases, those kept by other engines are copied."""
    if harness.stem == CASE_HARNESS and (corpus / OWN).is_dir():
        for path in sorted((corpus / OWN).glob(f"*{SUFFIX}")):
            if not path.name.startswith("."):
                (units / path.name).write_bytes(path.read_bytes())
    return units
