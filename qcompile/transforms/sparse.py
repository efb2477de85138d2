"""A part of a weight that is stored as single numbers with their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.dtypes import DTYPES
from qcompile.format import Stored
from qcompile.transform import Transform

CHUNK = 1 << 16  # numbers whose products with x are in memory at a time, for each token


@dataclass(frozen=True)
class Sparse(Transform):
    """x [..., K] times a sparse matrix [rows, K] of `count` numbers, transposed: [..., rows]. For a weight's outliers.

    Their places are row i32 [count] and column i32 [count]; number (`dtype`) [count]. The weight that has these outliers
    is the sum, rounded to `rounding` where that is a dtype.
    """

    kind: ClassVar[str] = "sparse"
    rows: int = 16
    count: int = 1
    dtype: str = "f16"
    rounding: str = ""

    def stored(self, K: int) -> tuple[Stored, ...]:
        place = (Stored("row", "i32", (self.count,)), Stored("column", "i32", (self.count,)))
        return (*place, Stored("number", self.dtype, (self.count,)))

    def width(self, K: int) -> int:
        return self.rows

    def apply(self, x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        made = torch.zeros((*x.shape[:-1], self.rows), dtype=x.dtype, device=x.device)
        for at in range(0, self.count, CHUNK):
            row, column, number = (
                t[name].narrow(0, at, min(CHUNK, self.count - at)) for name in ("row", "column", "number")
            )
            product = torch.index_select(x, -1, column) * number.to(torch.float32)
            made = made.scatter_add(-1, row.to(torch.int64).expand(product.shape), product)
        return made

    def weight(self, w: Tensor, t: Mapping[str, Tensor]) -> Tensor:
        place = (t["row"].long(), t["column"].long())
        summed = w.index_put(place, t["number"].to(w.dtype), accumulate=True)
        return summed.to(DTYPES[self.rounding]).to(w.dtype) if self.rounding else summed

    def summary(self) -> str:
        return f"{self.count} outliers"
