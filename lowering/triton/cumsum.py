"""aten.cumsum over the last dimension: a program carries the sum along its rows, a tile of columns after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.expr import FLOATS
from qcompile.lowering.alignment import tile
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.extents import Element, numbers
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.memory import convert, load, pointer, store, value_type
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.lowering.triton.tiling import Tiled, columns, grid, height, row_lines, warps
from qcompile.target import Target

TEMPLATE = "cumsum"


def lower_cumsum(node: Node, ctx: Context) -> None:
    x, axis, _ = operands(node, dtype=None)
    source, rank = ctx.strided(x), len(x.meta["val"].shape)
    if not rank or axis % rank != rank - 1:
        raise Refuse("cumsum over another than the last dimension")
    *rows, n = ctx.shape(x)
    params = {"x": source.dtype, "y": ctx.dtype(node), **tile(ctx, n)}
    ctx.emit(ctx.call(TEMPLATE, params, [ctx.contiguous(x), ctx.output(node)], [times(*rows), n], [1]))


@dataclass(frozen=True)
class Params(Tiled):
    """The dtypes, and the tile."""

    x: Element
    y: Element


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    rows, n = numbers(dims, 2)
    params.check(rows, n)
    return [Extent(params.x, rows * n), Extent(params.y, rows * n, True)]


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: x [rows, n], y [rows, n]. dims: rows, n. Floats are summed in f32, integers in i64."""
    x, y = params["x"], params["y"]
    work = "f32" if y in FLOATS else "i64"
    body = [
        *row_lines(params, "d0", "d1"),
        f"before = tl.zeros([{height(params)}, 1], {value_type(work)})",
        *columns(params, [
            f"v = {load('x + row.to(tl.int64) * n + col', x, 'live')}",
            f"v = {convert('v', x, work, target)}",
            "sums = before + tl.cumsum(v, 1)",
            "before += tl.sum(v, 1, keep_dims=True)",
            f"sums = {convert('sums', work, y, target)}",
            store("y + row.to(tl.int64) * n + col", "sums", y, target, "live"),
        ]),
    ]  # fmt: skip
    about = f"y[row, i] = the sum of x[row, : i + 1], x {x} and y {y} [d0, d1]."
    about += f"\n\n{height(params)} rows a program, {params['columns']} columns at a time."
    text = "\n".join(body)
    source = module(TEMPLATE, about, ["x", "y"], 2, text, target, functions(text))
    return Source(source, TEMPLATE, (pointer(x), pointer(y)), 2, grid(params, "d0"), warps(params))
