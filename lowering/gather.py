"""Copying chosen rows of a tensor, as data: embedding in a float table, index_select, and indexing by one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.dtypes import DTYPES
from qcompile.lowering.alignment import tile
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.extents import Element, numbers

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
    if source.dtype not in DTYPES:
        raise Refuse(f"gathering {source.dtype} elements")
    shape = ctx.shape(x)
    args = [ctx.contiguous(x), ctx.contiguous(index), ctx.output(node)]
    dims = [times(*shape[:axis]), shape[axis], times(*ctx.shape(index)), times(*shape[axis + 1 :])]
    params = {"x": source.dtype, "index": at.dtype, "y": ctx.dtype(node), **tile(ctx, dims[3])}
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
