"""What kernels may touch of their arguments: the arithmetic, and the checks of parameters, that templates share.

Every template has a class `Params`, the schema of its parameters, whose `problem` says which are out of range; and
`extents(params, dims, threads)`. An artifact's kernels come from anyone: nothing is generated from parameters that
were not checked, and no kernel is called with dims that were not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from qcompile.errors import ArtifactError

Element = Literal["f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool", "f8e4m3", "f8e5m2", "f8e8m0"]
Float = Literal["f32", "f16", "bf16"]
MOST = 2**48  # as for a buffer's elements


def numbers(dims: Sequence[int], count: int) -> tuple[int, ...]:
    """`dims`, of which the kernel reads `count`; ArtifactError for another number of them, or one below zero."""
    require(len(dims) == count, "a kernel is called with the wrong number of dims", len(dims), count)
    require(min(dims, default=0) >= 0, "a kernel is called with a negative dim", list(dims))
    return tuple(dims)


def strided(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements up to the last one of an array with `sizes` and `strides`; the last stride is 1 where it is left out."""
    if 0 in sizes:
        return 0
    steps = [*strides, 1][: len(sizes)]
    return 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))


def require(holds: bool, summary: str, found: object, expected: object = "") -> None:
    """ArtifactError unless the condition holds."""
    if not holds:
        raise ArtifactError(summary, found=found, expected=expected)


def outside(params: Any, **inside: bool) -> str:
    """The first parameter that is not `inside` its range, with its value; empty when all are."""
    return next((f"{name} = {getattr(params, name)!r}"[:120] for name, holds in inside.items() if not holds), "")
