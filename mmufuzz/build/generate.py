"""mypyc as a program of its own: ``python generate.py LIBRARY TARGET FILE…`` writes C for the modules FILE to TARGET.

A process of its own because mypyc leaves by ``sys.exit`` on a type error and keeps what it has parsed in memory.
"""

from __future__ import annotations

import sys


def main(library: str, target: str, files: list[str]) -> None:
    """One C file a module, so that they compile side by side, and one for mypyc's runtime."""
    from mypyc.build import mypyc_build  # noqa: PLC0415 - an extra; only this program needs it
    from mypyc.options import CompilerOptions  # noqa: PLC0415 - the same

    options = CompilerOptions(
        multi_file=True, include_runtime_files=True, target_dir=target, group_name=library.removesuffix("__mypyc")
    )
    mypyc_build(["--config-file=", "--cache-dir=/dev/null", *files], options, always_use_shared_lib=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
