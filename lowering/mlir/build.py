"""Kernel specs to object code: generates each kernel's text again from data and compiles it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qcompile.artifact import KernelSpec
from qcompile.lowering.mlir import toolchain
from qcompile.lowering.mlir.templates import emit
from qcompile.target import Target


def sources(kernels: Mapping[str, KernelSpec], target: Target) -> dict[str, str]:
    """The MLIR text of each kernel, which defines one function of the kernel's name."""
    return {name: emit(spec, name, target) for name, spec in kernels.items()}


def objects(
    texts: Mapping[str, str], target: Target, working: Callable[[str], None] = lambda name: None
) -> dict[str, bytes]:
    """The relocatable object of each text; `working` is told the name of the kernel being compiled."""
    made = {}
    for name, text in texts.items():
        working(name)
        made[name] = toolchain.compile_module(text, target)
    return made
