"""Kernel templates of a backend by name: parameters from an artifact are checked before a text is made of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from qcompile import codec
from qcompile.artifact import Extents, KernelSpec
from qcompile.errors import ArtifactError, InternalError, near
from qcompile.lowering.base import Refuse
from qcompile.target import Target


@dataclass(frozen=True)
class Templates:
    """The templates in the modules of `package`: `modules` maps a template's name to its module.

    Each module has `Params`, the schema of its parameters; `emit(params, target)`, one kernel; and
    `extents(params, dims, threads)`, what that kernel may touch of its arguments.
    """

    package: str
    modules: Mapping[str, str]

    def emit(self, spec: KernelSpec, target: Target) -> Any:
        """The kernel for `target`; ArtifactError for an unknown template, and for parameters that it has no kernel for."""
        self._checked(spec)
        with _sense(spec):
            return self._module(spec).emit(spec.params, target)

    def extents(self, spec: KernelSpec) -> Extents:
        """What the kernel may touch of its arguments, once its parameters are checked; ArtifactError as `emit`."""
        found, params = self._module(spec).extents, self._checked(spec)

        # The layers of a model call few kernels, with few sizes.
        @functools.lru_cache(maxsize=256)
        def of(dims: tuple[int, ...], threads: int) -> Any:
            with _sense(spec):
                return tuple(found(params, dims, threads))

        return of

    def _module(self, spec: KernelSpec) -> ModuleType:
        if spec.template not in self.modules:
            raise ArtifactError(
                "unknown kernel template",
                found=f"{spec.template!r}{near(spec.template, self.modules)}",
                expected=", ".join(sorted(self.modules)),
            )
        return import_module(f"{self.package}.{self.modules[spec.template]}")

    def _checked(self, spec: KernelSpec) -> Any:
        """The parameters as the template's `Params`."""
        schema = self._module(spec).Params
        with _sense(spec):
            params = codec.decode(schema, spec.params, spec.template)
            problem = params.problem()
        if problem:
            raise ArtifactError("a kernel's parameter is out of range", where=spec.template, found=problem)
        return params


@contextmanager
def _sense(spec: KernelSpec) -> Iterator[None]:
    """Parameters that are well-formed but contradict each other are the artifact's fault, not a crash."""
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError, Refuse, InternalError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise ArtifactError("a kernel's parameters make no sense", where=spec.template, found=found) from error
