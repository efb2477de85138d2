"""Kernel specs to machine code for GPUs: generates each kernel's text from data and compiles it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qcompile.artifact import Built, Extents, KernelSpec, Launch
from qcompile.lowering.triton import tables, templates, toolchain
from qcompile.lowering.triton.schedule import Problem, Schedule, using, watched
from qcompile.lowering.triton.source import Source
from qcompile.runtime.cache import cache_folder
from qcompile.target import INTERPRET, Target
from qcompile.target import target as target_of


@dataclass(frozen=True)
class Builder:
    """Makes kernels for the runtime, which knows no compiler; the targets it is asked for have one capability.

    `progress` is called with "build" and a kernel's name. Schedules are looked up in `schedules` before the shipped table
    (None: in the user's own).
    """

    progress: Callable[[str, str], None] | None = None
    schedules: tables.Table | None = None

    def key(self, spec: KernelSpec, target: str) -> str:
        """A digest of all that the kernel's object depends on: its text, the target, the compiler."""
        code = target_of(target)
        return toolchain.key(self._emit(spec, code), code)

    def build(self, kernels: Mapping[str, KernelSpec], target: str) -> dict[str, Built]:
        """Text and machine code of each kernel; for Triton's interpreter the text alone."""
        code = target_of(target)
        sources = {name: self._emit(spec, code) for name, spec in kernels.items()}
        if code == INTERPRET:
            return {name: _interpreted(source) for name, source in sources.items()}
        named = {source: name for name, source in sources.items()}

        def done(source: Source) -> None:
            if self.progress is not None:
                self.progress("build", f"{named[source]} for {code.name}")

        made = toolchain.compile_sources(list(sources.values()), code, done)
        return dict(zip(sources, made, strict=True))

    def schedules_of(self, spec: KernelSpec, target: str) -> list[tuple[Problem, Schedule]]:
        """What the kernel's text asks schedules for, and those that it gets."""
        with watched() as chosen:
            self._emit(spec, target_of(target))
        return chosen

    def extents(self, spec: KernelSpec) -> Extents:
        """What the kernel may touch of its arguments; ArtifactError for parameters that no kernel can be made from."""
        return templates.extents(spec)

    @functools.cached_property
    def _table(self) -> tables.Table:
        return tables.user(cache_folder()) if self.schedules is None else self.schedules

    def _emit(self, spec: KernelSpec, code: Target) -> Source:
        with using(self._table):
            return templates.emit(spec, code)


def _interpreted(source: Source) -> Built:
    return Built(source.text, b"", source.entry, Launch(source.grid, source.warps, stages=source.stages))
