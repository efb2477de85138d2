"""aten.topk of short rows: a program takes the greatest element that is left of each of its rows, k times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.lowering.alignment import MOST_COLUMNS, tile
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.extents import Float, numbers, outside
from qcompile.lowering.triton.memory import load
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.lowering.triton.tiling import Tiled, columns, grid, height, row_lines, warps
from qcompile.target import Target

TEMPLATE = "topk"
MOST = 256  # elements that are taken of a row


def lower_topk(node: Node, ctx: Context) -> None:
    x, k, axis, largest, _ = operands(node, dim=-1, largest=True, sorted=True)
    source, rank = ctx.strided(x), len(x.meta["val"].shape)
    if not rank or axis % rank != rank - 1:
        raise Refuse("topk over another than the last dimension")
    if source.dtype not in ("f32", "f16", "bf16"):
        raise Refuse(f"topk of {source.dtype} elements")
    *rows, n = ctx.shape(x)
    if not isinstance(n, int) or not isinstance(k, int) or n > MOST_COLUMNS or not 1 <= k <= MOST:
        raise Refuse(f"topk with k = {k} of rows of {n} elements; at most {MOST} of {MOST_COLUMNS} are taken")
    params = {"x": source.dtype, "k": k, "largest": largest, **tile(ctx, n)}
    args = [ctx.contiguous(x), *ctx.outputs_of(node)]
    ctx.emit(ctx.call(TEMPLATE, params, args, [times(*rows), n], [1, 2]))


@dataclass(frozen=True)
class Params(Tiled):
    """The dtype of x and of the values, how many are taken, whether the greatest or the least, and the tile."""

    x: Float
    k: int
    largest: bool

    def problem(self) -> str:
        return super().problem() or outside(self, k=1 <= self.k <= MOST, whole=self.whole)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    rows, n = numbers(dims, 2)
    params.check(rows, n)
    taken = rows * params.k
    return [Extent(params.x, rows * n), Extent(params.x, taken, True), Extent("i64", taken, True)]


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
