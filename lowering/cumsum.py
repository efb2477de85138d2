"""aten.cumsum over the last dimension, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.lowering.alignment import tile
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.extents import Element, numbers

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
class Params:
    """The dtypes."""

    x: Element
    y: Element

    def problem(self) -> str:
        return ""


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    rows, n = numbers(dims, 2)
    return [Extent(params.x, rows * n), Extent(params.y, rows * n, True)]
