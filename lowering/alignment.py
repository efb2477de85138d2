"""What is known before a run of where elements lie: powers of two that divide sizes, strides and offsets; tiles of rows."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from qcompile.dims import Dim, evaluate, names
from qcompile.dtypes import itemsize

ALIGNED = 16  # bytes: what the address of every argument of a GPU kernel is a multiple of
MOST_COLUMNS = 8192  # elements of a row that one program holds at a time
LOOP_COLUMNS = 2048


@functools.cache
def divisor(dim: Dim) -> int:
    """The greatest power of two up to 16 that surely divides `dim`; whether it does depends on the sizes modulo 16 only.

    >>> divisor(24), divisor("4*b"), divisor("b*(b + 1)"), divisor("s//2"), divisor(0)
    (8, 4, 2, 1, 16)
    """
    if isinstance(dim, int):
        return min(dim & -dim, ALIGNED) if dim else ALIGNED
    known = sorted(names(dim))
    if len(known) > 2 or "/" in dim or "%" in dim:
        return 1
    values = (
        evaluate(dim, dict(zip(known, sizes, strict=True))) for sizes in itertools.product(range(16), repeat=len(known))
    )
    found = ALIGNED
    for value in values:
        found = min(found, value & -value) if value else found
    return found


def starts_aligned(offset: Dim, dtype: str) -> bool:
    """Whether an array that begins `offset` elements into its buffer surely begins at a multiple of 16 bytes."""
    return divisor(offset) * itemsize(dtype) >= ALIGNED


def columns(n: Dim, most: int = MOST_COLUMNS, otherwise: int = LOOP_COLUMNS) -> int:
    """How wide a tile of rows of `n` elements is: a power of two that holds the row where that is known and at most `most`.

    >>> columns(80), columns(100000), columns("s")
    (128, 2048, 2048)
    """
    return 1 << max(n - 1, 0).bit_length() if isinstance(n, int) and n <= most else otherwise


def tile(ctx: Any, n: Dim) -> dict[str, Any]:
    """What the text of a kernel over rows of `n` elements has to know of them, as parameters; nothing on a CPU.

    `columns`: the width of a program's tile; `whole`: it holds a row; `multiple`: a power of two that divides n.
    """
    if ctx.target.backend != "cuda":
        return {}
    return {"columns": columns(n), "whole": isinstance(n, int) and n <= MOST_COLUMNS, "multiple": divisor(n)}
