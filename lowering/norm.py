"""Kernels that look at whole rows, as data: rms_norm, layer_norm, softmax and log_softmax over the last dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import Dim, times
from qcompile.expr import FLOATS
from qcompile.lowering.alignment import tile
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.extents import Float, numbers, outside

TEMPLATE = "row-norm"


def lower_rms_norm(node: Node, ctx: Context) -> None:
    x, weight, eps, offset = operands(node)
    _lower(node, ctx, x, {"op": "rms_norm", "eps": eps, "offset": offset}, {"weight": weight})


def lower_layer_norm(node: Node, ctx: Context) -> None:
    x, shape, weight, bias, eps = operands(node, weight=None, bias=None, eps=1e-5)[:5]
    if len(shape) != 1:
        raise Refuse("layer_norm over more than the last dimension")
    _lower(node, ctx, x, {"op": "layer_norm", "eps": eps}, {"weight": weight, "bias": bias})


def lower_softmax(node: Node, ctx: Context) -> None:
    x, axis = operands(node)[:2]
    if axis % len(x.meta["val"].shape) != len(x.meta["val"].shape) - 1:
        raise Refuse("softmax over another than the last dimension")
    op = "log_softmax" if "log" in str(node.target) else "softmax"
    _lower(node, ctx, x, {"op": op}, {})


def _lower(node: Node, ctx: Context, x: Any, params: dict[str, Any], vectors: dict[str, Any]) -> None:
    source = ctx.strided(x)
    if source.dtype not in FLOATS or ctx.dtype(node) not in FLOATS:
        raise Refuse(f"{params['op']} of {source.dtype} elements")
    if not source.shape:
        raise Refuse(f"{params['op']} of a tensor without dimensions")
    args = [ctx.contiguous(x)]
    params |= {"x": source.dtype, "y": ctx.dtype(node)}
    for name, vector in vectors.items():
        if vector is not None:
            params[name] = ctx.strided(vector).dtype
            args.append(ctx.contiguous(vector))
    *rows, n = ctx.shape(x)
    output = ctx.output(node)
    dims: list[Dim] = [times(*rows), n]
    params |= tile(ctx, n)
    ctx.emit(ctx.call(TEMPLATE, params, [*args, output], dims, [len(args)]))


@dataclass(frozen=True)
class Params:
    """What is done to each row, with which constants; the dtypes of x, y and, where there are, weight and bias."""

    op: Literal["rms_norm", "layer_norm", "softmax", "log_softmax"]
    x: Float
    y: Float
    weight: Float | None = None
    bias: Float | None = None
    eps: float = 0.0
    offset: float = 0.0

    def problem(self) -> str:
        return outside(self, weight=self.weight is not None or self.op != "rms_norm")


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    rows, n = numbers(dims, 2)
    vectors = [Extent(dtype, n) for dtype in (params.weight, params.bias) if dtype is not None]
    return [Extent(params.x, rows * n), *vectors, Extent(params.y, rows * n, True)]
