"""Reductions over the last dimension(s) of a view, as data: sum, mean, amax, amin, argmax, argmin, any, all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.dtypes import DTYPES, itemsize
from qcompile.expr import FLOATS
from qcompile.lowering.alignment import tile
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.extents import Element, numbers

TEMPLATE = "reduce"


def lower_reduction(node: Node, ctx: Context) -> None:
    """aten.sum/mean/amax/amin/any/all with dim lists, and argmax/argmin over one dimension."""
    op = str(node.target.overloadpacket).removeprefix("aten.")  # type: ignore[union-attr]
    op = {"max": "amax", "min": "amin"}.get(op, op)
    if op not in ("sum", "mean", "amax", "amin", "argmax", "argmin", "any", "all"):
        raise Refuse(f"no kernel for the reduction {op}")
    x, axes, *_ = operands(node, dim=None)
    source = ctx.strided(x)
    rank = len(source.shape)
    if op.startswith("arg") and axes is None and rank > 1:
        raise Refuse(f"{op} over all dimensions")
    if isinstance(axes, int):
        axes = [axes]
    folded = sorted({axis % rank for axis in axes}) if axes else list(range(rank))
    kept = [axis for axis in range(rank) if axis not in folded]
    result = ctx.dtype(node)
    if source.dtype not in DTYPES or (op == "mean" and source.dtype not in FLOATS):
        raise Refuse(f"{op} of {source.dtype} elements")
    if op.startswith("arg") and source.dtype not in FLOATS:
        raise Refuse(f"{op} of {source.dtype} elements")
    view = ctx.contiguous(source.permute([*kept, *folded]))
    dims = [times(*view.shape[: len(kept)]), times(*view.shape[len(kept) :])]
    params = {"op": op, "x": source.dtype, "y": result, **tile(ctx, dims[1])}
    ctx.emit(ctx.call(TEMPLATE, params, [view, ctx.output(node)], dims, [1]))


@dataclass(frozen=True)
class Params:
    """The operation, and the dtypes."""

    op: Literal["sum", "mean", "amax", "amin", "argmax", "argmin", "any", "all"]
    x: Element
    y: Element

    def problem(self) -> str:
        return ""


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    rows, n = numbers(dims, 2)
    return [Extent(params.x, rows * n), Extent(params.y, rows, True)]


def work_dtype(params: dict[str, Any]) -> str:
    """The dtype that is folded in."""
    if params["op"] in ("any", "all"):
        return "bool"
    if params["x"] in FLOATS or params["y"] in FLOATS:
        return "f32"
    return "i64" if params["op"] == "sum" else params["x"]


def start(op: str, dtype: str) -> float:
    """What an absent element counts as."""
    if op in ("sum", "mean", "any", "all"):
        return int(op == "all")
    if dtype in FLOATS:
        return -math.inf if op in ("amax", "argmax") else math.inf
    bits = 1 if dtype == "bool" else 8 * itemsize(dtype)
    signed = dtype not in ("u8", "bool")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return low if op == "amax" else high
