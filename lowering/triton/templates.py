"""The kernel templates of the Triton backend, by name.

Each module has `Params`, the schema of its parameters; `emit(params, target)`, the source of one kernel for a target of one
capability; and `extents(params, dims, threads)`, what that kernel may touch of its arguments on any capability.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from qcompile import codec
from qcompile.artifact import Extents, KernelSpec
from qcompile.errors import ArtifactError, InternalError, near
from qcompile.lowering.base import Refuse
from qcompile.lowering.triton.source import Source
from qcompile.target import Target

TEMPLATES: dict[str, str] = {
    "activation": "activation",
    "attention": "attention_prefill",
    "attention-combine": "combine",
    "attention-decode": "attention_decode",
    "cache-write": "cache_write",
    "dequantize": "dequantize",
    "embedding": "embedding",
    "experts-gather": "experts_gather",
    "experts-grouped": "experts_grouped",
    "experts-order": "experts_order",
    "cumsum": "cumsum",
    "gather": "gather",
    "linear-finish": "linear_dense",
    "linear-fragments": "linear_fragments",
    "linear-codebook": "linear_codebook",
    "linear-generic": "linear_generic",
    "linear-native": "linear_native",
    "outlier-columns": "outlier_columns",
    "pointwise": "pointwise",
    "reduce": "reduce",
    "rope": "rope",
    "row-norm": "norm",
    "sparse": "sparse",
    "topk": "topk",
}


def emit(spec: KernelSpec, target: Target) -> Source:
    """The source of a kernel for `target`, which has one capability.

    ArtifactError for an unknown template, and for parameters that it has no kernel for.
    """
    _checked(spec)
    with _sense(spec):
        source: Source = _module(spec).emit(spec.params, target)
    return source


def extents(spec: KernelSpec) -> Extents:
    """What the kernel may touch of its arguments, once its parameters are checked; ArtifactError as `emit`."""
    found, params = _module(spec).extents, _checked(spec)

    # The layers of a model call few kernels, with few sizes.
    @functools.lru_cache(maxsize=256)
    def of(dims: tuple[int, ...], threads: int) -> Any:
        with _sense(spec):
            return tuple(found(params, dims, threads))

    return of


def _module(spec: KernelSpec) -> ModuleType:
    if spec.template not in TEMPLATES:
        raise ArtifactError(
            "unknown kernel template",
            found=f"{spec.template!r}{near(spec.template, TEMPLATES)}",
            expected=", ".join(sorted(TEMPLATES)),
        )
    return import_module(f"qcompile.lowering.triton.{TEMPLATES[spec.template]}")


def _checked(spec: KernelSpec) -> Any:
    """The parameters as the template's `Params`."""
    schema = _module(spec).Params
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
