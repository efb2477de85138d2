"""What makes kernels for which targets: MLIR for a CPU, Triton for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qcompile.runtime.cache import Builder
from qcompile.target import Target


def builder_for(
    target: Target, progress: Callable[[str, str], None] | None = None, schedules: Path | None = None
) -> Builder:
    """The builder of a target's kernels; `progress` is called with "build" and a kernel's name.

    `schedules` is a table of schedules for GPUs (None: the user's own, where there is one).
    """
    if target.backend == "cuda":
        from qcompile.lowering.triton import build, tables

        return build.Builder(progress, None if schedules is None else tables.read(schedules))
    from qcompile.lowering.mlir.build import Builder as CpuBuilder

    return CpuBuilder(progress)
