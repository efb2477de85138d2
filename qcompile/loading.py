"""`qcompile.load`: a compiled model from its folder; the compiler is imported only if kernels are built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from qcompile.runtime import load as runtime_load
from qcompile.runtime.cache import Builder
from qcompile.runtime.model import CompiledModel
from qcompile.target import Target


def load(
    path: str | Path,
    target: str | None = None,
    native: Literal["rebuild", "trusted"] = "rebuild",
    *,
    threads: int | None = None,
    verify: bool = True,
) -> CompiledModel:
    """The compiled model in the folder `path`; see `qcompile.runtime.load.load`.

    With native="rebuild" nothing in the folder is executed: the installed compiler makes the kernels again from data, or
    takes them from the user's cache. With native="trusted" the object files in the folder are run.
    """
    builder_for: Callable[[Target], Builder] | None = None
    if native == "rebuild":
        from qcompile.lowering import builders

        builder_for = builders.builder_for
    return runtime_load.load(path, target, native, builder_for=builder_for, threads=threads, verify=verify)
