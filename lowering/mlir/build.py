"""Kernel specs to object code: generates each kernel's text from data and compiles it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qcompile.artifact import Built, Extents, KernelSpec
from qcompile.lowering.mlir import templates, toolchain
from qcompile.lowering.mlir.templates import emit, entry
from qcompile.target import target as target_of


@dataclass(frozen=True)
class Builder:
    """Makes kernels for the runtime, which knows no compiler. `progress` is called with "build" and a kernel's name."""

    progress: Callable[[str, str], None] | None = None

    def key(self, spec: KernelSpec, target: str) -> str:
        """A digest of all that the kernel's object depends on: its text, the target, the compilers."""
        level = target_of(target)
        return toolchain.key(emit(spec, level), level)

    def build(self, kernels: Mapping[str, tuple[KernelSpec, str]]) -> dict[str, Built]:
        """Text and object of each kernel."""
        made = {}
        for name, (spec, target) in kernels.items():
            if self.progress is not None:
                self.progress("build", name)
            level = target_of(target)
            text = emit(spec, level)
            made[name] = Built(text, toolchain.compile_module(text, level), entry(spec))
        return made

    def extents(self, spec: KernelSpec) -> Extents:
        """What the kernel may touch of its arguments; ArtifactError for parameters that no kernel can be made from."""
        return templates.extents(spec)
