"""aten.cumsum over the last dimension: a program carries the sum along its rows, a tile of columns after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.expr import FLOATS
from qcompile.lowering import cumsum
from qcompile.lowering.cumsum import TEMPLATE
from qcompile.lowering.extents import numbers
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.memory import convert, load, pointer, store, value_type
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.lowering.triton.tiling import Tiled, columns, grid, height, row_lines, warps
from qcompile.target import Target


@dataclass(frozen=True)
class Params(cumsum.Params, Tiled):
    """The dtypes, and the tile."""

    def problem(self) -> str:
        return Tiled.problem(self)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    params.check(*numbers(dims, 2))
    return cumsum.extents(params, dims, threads)


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
