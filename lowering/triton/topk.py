"""aten.topk of short rows: a program takes the greatest element that is left of each of its rows, k times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering import topk
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.topk import TEMPLATE
from qcompile.lowering.triton.memory import load
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.lowering.triton.tiling import Tiled, columns, grid, height, row_lines, warps
from qcompile.target import Target


@dataclass(frozen=True)
class Params(topk.Params, Tiled):
    """And the tile, which holds a row."""

    def problem(self) -> str:
        return topk.Params.problem(self) or Tiled.problem(self) or outside(self, whole=self.whole)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    params.check(*numbers(dims, 2))
    return topk.extents(params, dims, threads)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: x [rows, n], values [rows, k], indices [rows, k]. dims: rows, n. NaN counts as greatest, and of
    equal elements the first is taken first."""
    k = params["k"]
    body = [
        *row_lines(params, "d0", "d1"),
        *columns(params, []),
        "start = row.to(tl.int64) * n",
        f"v = {load('x + start + col', params['x'], 'live')}",
        "# integers in the order of the floats, -0 as 0, with the place in the lower half: no two are equal",
        "key = tl.where(v == 0.0, 0.0, v).to(tl.int32, bitcast=True)",
        "key = tl.where(v == v, tl.where(key < 0, key ^ 0x7FFFFFFF, key), 0x7FFFFFFF)",
        f"key = ({'key' if params['largest'] else '~key'}.to(tl.int64) << 32) + (0x7FFFFFFF - col)",
        f"key = tl.where(live, key, {-(2**63)})",
        f"for j in range({k}):",
        "    best = tl.max(key, 1, keep_dims=True)",
        f"    key = tl.where(key == best, {-(2**63)}, key)",
        "    place = 0x7FFFFFFF - (best & 0x7FFFFFFF)",
        "    there = inside & (place < n)",
        f"    tl.store(values + row.to(tl.int64) * {k} + j, tl.load(x + start + place, mask=there, other=0), mask=inside)",
        f"    tl.store(indices + row.to(tl.int64) * {k} + j, place, mask=inside)",
    ]
    about = (
        f"values[row, j], indices[row, j] = the {k} {'greatest' if params['largest'] else 'least'} of x[row, :], in order; "
        f"x {params['x']} [d0, d1].\n\n{height(params)} rows a program, {params['columns']} columns."
    )
    source = module(TEMPLATE, about, ["x", "values", "indices"], 2, "\n".join(body), target)
    return Source(source, TEMPLATE, (params["x"], params["x"], "i64"), 2, grid(params, "d0"), warps(params))
