"""Kernel specs to object code: generates each kernel's text from data and compiles it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qcompile.artifact import Built, KernelSpec
from qcompile.lowering.mlir.templates import emit, entry
from qcompile.lowering.mlir.toolchain import compile_module
from qcompile.target import Target


def build(
    kernels: Mapping[str, KernelSpec], target: Target, progress: Callable[[str, str], None] | None = None
) -> dict[str, Built]:
    """Text and object of each kernel; `progress` is called with "build" and the name of the kernel being compiled."""
    made = {}
    for name, spec in kernels.items():
        if progress is not None:
            progress("build", name)
        text = emit(spec, target)
        made[name] = Built(text, compile_module(text, target), entry(spec))
    return made
