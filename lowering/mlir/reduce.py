"""Reductions over the last dimension(s) of a view: sum, mean, amax, amin, argmax, argmin, any, all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.mlir.extents import Element, numbers
from qcompile.lowering.mlir.memory import ELEMENTS, FLOATS, convert, first_lanes, load, store
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.target import Target

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
    if source.dtype not in ELEMENTS or (op == "mean" and source.dtype not in FLOATS):
        raise Refuse(f"{op} of {source.dtype} elements")
    if op.startswith("arg") and source.dtype not in FLOATS:
        raise Refuse(f"{op} of {source.dtype} elements")
    view = ctx.contiguous(source.permute([*kept, *folded]))
    params = {"op": op, "x": source.dtype, "y": result}
    dims = [times(*view.shape[: len(kept)]), times(*view.shape[len(kept) :])]
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


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x [rows, n], y [rows]. dims: rows, n. Floats are summed in f32, integers in i64."""
    op, lanes = params["op"], target.lanes
    t = Text(TEMPLATE, f"y[row] = {op} of x[row, :]; rows shared by the threads. {params}")
    x, y, n = t.arg(0), t.arg(1), t.dim(1)
    first, end = t.share(t.dim(0))
    with t.loop(first, end) as row:
        assert isinstance(row, Value)
        value = (_place if op.startswith("arg") else _fold)(t, params, lanes, x, row * n, n)
        store(t, value, y, row, params["y"])
    return t.finish()


def _work(params: dict[str, Any]) -> str:
    """The dtype that is folded in."""
    if params["op"] in ("any", "all"):
        return "bool"
    if params["x"] in FLOATS or params["y"] in FLOATS:
        return "f32"
    return "i64" if params["op"] == "sum" else params["x"]


def _start(op: str, dtype: str) -> float:
    """What an absent element counts as."""
    if op in ("sum", "mean", "any", "all"):
        return int(op == "all")
    if dtype in FLOATS:
        return -math.inf if op in ("amax", "argmax") else math.inf
    bits = 1 if dtype == "bool" else int(ELEMENTS[dtype][1][1:])
    signed = dtype not in ("u8", "bool")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return low if op == "amax" else high


def _step(t: Text, op: str, dtype: str, total: Value, value: Value) -> Value:
    if op in ("sum", "mean"):
        return total + value
    if op in ("any", "all"):
        return total | value if op == "any" else total & value
    kind = "max" if op == "amax" else "min"
    name = f"{kind}imumf" if dtype in FLOATS else f"{kind}{'ui' if dtype in ('u8', 'bool') else 'si'}"
    return t.op(f"arith.{name} {total}, {value} : {total.type}", total.type)


def _reduced(t: Text, op: str, dtype: str, value: Value) -> Value:
    """One number of all lanes, halves folded onto each other."""
    while value.count > 1:
        half = value.count // 2
        value = _step(t, op, dtype, t.slice(value, 0, half), t.slice(value, half, half))
    return value


def _fold(t: Text, params: dict[str, Any], lanes: int, x: Value, base: Value, n: Value) -> Value:
    op, dtype, work = params["op"], params["x"], _work(params)
    start = t.constant(_start(op, work), vector(lanes, ELEMENTS[work][1]))
    whole = n - n % lanes
    with t.loop(0, whole, lanes, carry=[start]) as loop:
        value = convert(t, load(t, x, base + loop.index, dtype, lanes), dtype, work)
        loop.carry([_step(t, op, work, loop.values[0], value)])
    mask = first_lanes(t, n - whole, lanes)
    rest = convert(t, load(t, x, base + whole, dtype, lanes, mask), dtype, work)
    total = _reduced(t, op, work, _step(t, op, work, loop.results[0], t.select(mask, rest, start)))
    if op == "mean":
        total = total / t.cast("sitofp", n, "f32")
    return convert(t, total, work, params["y"])


def _place(t: Text, params: dict[str, Any], lanes: int, x: Value, base: Value, n: Value) -> Value:
    """The first place of the greatest (or least) element; NaN counts as greatest (least)."""
    op, dtype = params["op"], params["x"]
    order = "ugt" if op == "argmax" else "ult"
    best, where = t.constant(_start(op, "f32"), f"vector<{lanes}xf32>"), t.constant(0, f"vector<{lanes}xi64>")
    numbers = t.constants(range(lanes), "i64")
    whole = n - n % lanes

    def better(a: Value, a_at: Value, b: Value, b_at: Value, there: Value | None = None) -> tuple[Value, Value]:
        """b where it wins over a: greater or NaN, and equal ones by their place."""
        first = a.compare("oeq", b) & (b_at < a_at)
        wins = (b.compare(order, a) & a.compare("ord", a)) | first
        if there is not None:
            wins = wins & there
        return t.select(wins, b, a), t.select(wins, b_at, a_at)

    with t.loop(0, whole, lanes, carry=[best, where]) as loop:
        value = load(t, x, base + loop.index, dtype, lanes)
        loop.carry(better(loop.values[0], loop.values[1], value, t.broadcast(loop.index, lanes) + numbers))
    mask = first_lanes(t, n - whole, lanes)
    value = load(t, x, base + whole, dtype, lanes, mask)
    best, where = better(loop.results[0], loop.results[1], value, t.broadcast(whole, lanes) + numbers, mask)
    while best.count > 1:
        half = best.count // 2
        low, high = ((t.slice(best, i, half), t.slice(where, i, half)) for i in (0, half))
        best, where = better(*low, *high)
    return convert(t, where, "i64", params["y"])
