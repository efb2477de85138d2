"""What makes kernels for which targets: MLIR for a CPU, Triton for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from qcompile.runtime.cache import Builder
from qcompile.target import Target


def builder_for(target: Target, progress: Callable[[str, str], None] | None = None) -> Builder:
    """The builder of a target's kernels; `progress` is called with "build" and a kernel's name."""
    backend = "triton" if target.backend == "cuda" else "mlir"
    made: Builder = import_module(f"qcompile.lowering.{backend}.build").Builder(progress)
    return made
