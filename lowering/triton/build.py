"""Kernel specs to machine code for GPUs: generates each kernel's text from data and compiles it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qcompile.artifact import Built, Extents, KernelSpec, Launch
from qcompile.lowering.triton import tables, templates, toolchain
from qcompile.lowering.triton.schedule import Problem, Schedule, using, watched
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.toolchain import Job
from qcompile.runtime.cache import cache_folder
from qcompile.target import INTERPRET
from qcompile.target import target as target_of


@dataclass(frozen=True)
class Builder:
    """Makes kernels for the runtime, which knows no compiler; the targets it is asked for have one capability each.

    `progress` is called with "build" and a kernel's name. Schedules are looked up in `schedules` before the shipped table
    (None: in the user's own).
    """

    progress: Callable[[str, str], None] | None = None
    schedules: tables.Table | None = None

    def key(self, spec: KernelSpec, target: str) -> str:
        """A digest of all that the kernel's object depends on: its text, the target, the compiler."""
        job = self._job(spec, target)
        return toolchain.key(job.source, job.target)

    def build(self, kernels: Mapping[str, tuple[KernelSpec, str]]) -> dict[str, Built]:
        """Text and machine code of each kernel; for Triton's interpreter the text alone."""
        jobs = {name: self._job(spec, target) for name, (spec, target) in kernels.items()}
        made = {job: _interpreted(job.source) for job in jobs.values() if job.target == INTERPRET}
        named = {job: name for name, job in jobs.items() if job not in made}

        def done(job: Job) -> None:
            if self.progress is not None:
                self.progress("build", named[job])

        made |= zip(named, toolchain.compile_jobs(list(named), done), strict=True)
        return {name: made[job] for name, job in jobs.items()}

    def schedules_of(self, spec: KernelSpec, target: str) -> list[tuple[Problem, Schedule]]:
        """What the kernel's text asks schedules for, and those that it gets."""
        with watched() as chosen:
            self._job(spec, target)
        return chosen

    def extents(self, spec: KernelSpec) -> Extents:
        """What the kernel may touch of its arguments; ArtifactError for parameters that no kernel can be made from."""
        return templates.extents(spec)

    @functools.cached_property
    def _table(self) -> tables.Table:
        return tables.user(cache_folder()) if self.schedules is None else self.schedules

    def _job(self, spec: KernelSpec, target: str) -> Job:
        code = target_of(target)
        with using(self._table):
            return Job(templates.emit(spec, code), code)


def _interpreted(source: Source) -> Built:
    return Built(source.text, b"", source.entry, Launch(source.grid, source.warps, stages=source.stages))
