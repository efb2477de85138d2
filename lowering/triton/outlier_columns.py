"""Which columns of x hold an outlier in any row (LLM.int8): the template "outlier-columns"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.row_transforms import LONGEST
from qcompile.target import Target

TEMPLATE = "outlier-columns"
_COLUMNS, _ROWS = 64, 32  # of the tile that one step looks at


@dataclass(frozen=True)
class Params:
    """|x| >= `threshold` is an outlier, x rounded to float16 first. `padded` flags are written, those beyond `k` 0."""

    k: int
    padded: int
    threshold: float

    def problem(self) -> str:
        return outside(
            self,
            k=1 <= self.k <= LONGEST,
            padded=self.k <= self.padded < self.k + 128,
            threshold=self.threshold > 0 and math.isfinite(self.threshold),
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    return [Extent("f32", m * params.k), Extent("u8", params.padded, True)]


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: x f32 [M, K], columns u8 [padded]. Dims: M."""
    p = Params(**params)
    body = f"""
k = tl.program_id(0) * {_COLUMNS} + tl.arange(0, {_COLUMNS})
found = tl.zeros(({_COLUMNS},), tl.int32)
for m0 in range(0, d0, {_ROWS}):
    m = (m0 + tl.arange(0, {_ROWS}))[:, None]
    inside = (m < d0) & (k < {p.k})[None, :]
    half = tl.load(x + m.to(tl.int64) * {p.k} + k[None, :], mask=inside, other=0).to(tl.float16)
    found = tl.maximum(found, tl.max((tl.abs(half.to(tl.float32)) >= {p.threshold!r}).to(tl.int32), 0))
tl.store(columns + k, found.to(tl.uint8), mask=k < {p.padded})
"""
    about = (
        f"columns[k] = any of |f16(x[:, k])| >= {p.threshold:g}\n\nOne program looks at {_COLUMNS} columns of all rows."
    )
    text = module("outlier_columns", about, ["x", "columns"], 1, body, target)
    return Source(text, "outlier_columns", ("f32", "u8"), 1, (-(-p.padded // _COLUMNS), 1, 1), 4, 2)
