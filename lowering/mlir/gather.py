"""Copying chosen rows of a tensor: embedding in a float table, index_select, and indexing by one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.mlir.extents import Element, numbers
from qcompile.lowering.mlir.memory import ELEMENTS, FLOATS, convert, load, store, tiles
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "gather"


def lower_embedding(node: Node, ctx: Context) -> None:
    table, ids = operands(node)[:2]
    _lower(node, ctx, table, ids, 0)


def lower_index_select(node: Node, ctx: Context) -> None:
    x, axis, index = operands(node)
    _lower(node, ctx, x, index, axis % len(ctx.shape(x)))


def lower_index(node: Node, ctx: Context) -> None:
    x, indices = operands(node)
    places = [i for i, item in enumerate(indices) if item is not None]
    if len(places) != 1:
        raise Refuse("indexing by more than one tensor")
    _lower(node, ctx, x, indices[places[0]], places[0])


def _lower(node: Node, ctx: Context, x: Node, index: Node, axis: int) -> None:
    """y[before, *index, after] = x[before, index[...], after]."""
    source, at = ctx.strided(x), ctx.strided(index)
    if at.dtype not in ("i64", "i32"):
        raise Refuse(f"indexing by {at.dtype} elements")
    if source.dtype not in ELEMENTS:
        raise Refuse(f"gathering {source.dtype} elements")
    shape = ctx.shape(x)
    params = {"x": source.dtype, "index": at.dtype, "y": ctx.dtype(node)}
    args = [ctx.contiguous(x), ctx.contiguous(index), ctx.output(node)]
    dims = [times(*shape[:axis]), shape[axis], times(*ctx.shape(index)), times(*shape[axis + 1 :])]
    ctx.emit(ctx.call(TEMPLATE, params, args, dims, [2]))


@dataclass(frozen=True)
class Params:
    """The dtypes."""

    x: Element
    index: Literal["i64", "i32"]
    y: Element

    def problem(self) -> str:
        return ""


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    outer, rows, count, inner = numbers(dims, 4)
    y = Extent(params.y, outer * count * inner, True)
    return [Extent(params.x, outer * rows * inner), Extent(params.index, count), y]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x [outer, rows, inner], index [count], y [outer, count, inner]. dims: outer, rows, count,
    inner. A negative index counts from the end; one out of range reads nothing and gives NaN (0 for integers)."""
    t = Text(TEMPLATE, f"y[i, j] = x[i, index[j]]; rows shared by the threads. {params}")
    x, index, y = (t.arg(i) for i in range(3))
    outer, rows, count, inner = (t.dim(i) for i in range(4))
    lanes = target.lanes
    first, end = t.share(outer * count)
    with t.loop(first, end) as item:
        assert isinstance(item, Value)
        row = convert(t, load(t, index, item % count, params["index"]), params["index"], "i64")
        row = t.select(row < 0, row + rows, row)
        inside = row.compare("ult", rows)
        source = (item // count * rows + t.select(inside, row, 0)) * inner
        with t.when(inside):
            for i, mask in tiles(t, inner, lanes):
                value = convert(t, load(t, x, source + i, params["x"], lanes, mask), params["x"], params["y"])
                store(t, value, y, item * inner + i, params["y"], mask)
        with t.when(inside.equals(0)):
            wrong = t.constant(math.nan if params["y"] in FLOATS else 0, f"vector<{lanes}x{ELEMENTS[params['y']][1]}>")
            for i, mask in tiles(t, inner, lanes):
                store(t, wrong, y, item * inner + i, params["y"], mask)
    return t.finish()
