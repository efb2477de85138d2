"""The text of the kernel that copies chosen rows of a tensor, for GPUs: a program takes a tile of the result's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.expr import FLOATS
from qcompile.lowering import gather
from qcompile.lowering.extents import numbers
from qcompile.lowering.gather import TEMPLATE
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.memory import convert, load, pointer, store
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.lowering.triton.tiling import Tiled, columns, grid, height, row_lines, warps
from qcompile.target import Target


@dataclass(frozen=True)
class Params(gather.Params, Tiled):
    """The dtypes, and the tile of rows of `inner` elements."""

    def problem(self) -> str:
        return Tiled.problem(self)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    outer, _, count, inner = numbers(dims, 4)
    params.check(outer * count, inner)
    return gather.extents(params, dims, threads)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: x [outer, rows, inner], index [count], y [outer, count, inner]. dims: outer, rows, count, inner.
    A negative index counts from the end; one out of range reads nothing and gives NaN (0 for integers)."""
    x, y = params["x"], params["y"]
    wrong = 'float("nan")' if y in FLOATS else "0"
    body = [
        *row_lines(params, "d0 * d2", "d3"),
        "at = tl.load(index + row % d2, mask=inside, other=0).to(tl.int64)",
        "at = tl.where(at < 0, at + d1, at)",
        "there = inside & (at >= 0) & (at < d1)",
        "source = ((row // d2).to(tl.int64) * d1 + at) * n",
        *columns(params, [
            f"v = {load('x + source + col', x, 'there & live')}",
            f"v = {convert('v', x, y, target)}",
            f"v = tl.where(there, v, {wrong})",
            store("y + row.to(tl.int64) * n + col", "v", y, target, "live"),
        ]),
    ]  # fmt: skip
    about = (
        f"y[i, j, :] = x[i, index[j], :], x {x} [d0, d1, d3], y {y} [d0, d2, d3].\n\n"
        f"{height(params)} rows a program, {params['columns']} columns at a time."
    )
    text = "\n".join(body)
    source = module(TEMPLATE, about, ["x", "index", "y"], 4, text, target, functions(text))
    return Source(source, TEMPLATE, (pointer(x), params["index"], pointer(y)), 4, grid(params, "d0*d2"), warps(params))
