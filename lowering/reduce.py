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
from qcompile.lowering.pointwise import Operand, call
from qcompile.lowering.symbolic import Strided

TEMPLATE = "reduce"
FEW = 16  # slices
_FOLDS = {"sum": "add", "mean": "add", "amax": "maximum", "amin": "minimum"}


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
    length = ctx.shape(x)[folded[0]] if len(folded) == 1 and folded != [rank - 1] else 0
    floats = op in _FOLDS and {source.dtype, result} == {"f32"}
    if ctx.target.backend == "cuda" and floats and isinstance(length, int) and 0 < length <= FEW:
        slices = [source.select(folded[0], i) for i in range(length)]
        ctx.output(node)
        _fold_slices(ctx, op, slices, ctx.strided(node), folded[0])
        return
    view = ctx.contiguous(source.permute([*kept, *folded]))
    dims = [times(*view.shape[: len(kept)]), times(*view.shape[len(kept) :])]
    params = {"op": op, "x": source.dtype, "y": result, **tile(ctx, dims[1])}
    ctx.emit(ctx.call(TEMPLATE, params, [view, ctx.output(node)], dims, [1]))


def _fold_slices(ctx: Context, op: str, slices: list[Strided], target: Strided, axis: int) -> None:
    """Few slices are folded onto each other where they lie: to put them behind one another would cost more."""
    if len(target.shape) > len(slices[0].shape):  # keepdim
        target = target.select(axis, 0)
    count = len(slices)
    ops: list[Any] = [[_FOLDS[op], "f32", [count + i - 2 if i > 1 else 0, i]] for i in range(1, count)]
    if op == "mean":
        ops.append(["mul", "f32", [count + len(ops) - 1, {"number": 1 / count}]])
    views = [Operand(ctx.view(item), "f32") for item in (*slices, target)]
    ctx.emit(call(ctx, views[:-1], views[-1:], ops, [count + len(ops) - 1]))


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
