"""Lowering of aten.diff: the differences of neighbours within each part, and those across the seams between parts."""

from __future__ import annotations

from torch.fx import Node

from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.pointwise import Operand, call
from qcompile.lowering.symbolic import Strided, size


def lower_diff(node: Node, ctx: Context) -> None:
    """Of `prepend`, x and `append` behind one another, without putting them there."""
    x, n, axis, prepend, append = operands(node, n=1, dim=-1, prepend=None, append=None)
    parts = [ctx.strided(part) for part in (prepend, x, append) if part is not None]
    dtype = ctx.dtype(node)
    if n != 1 or dtype not in ("f32", "i64", "i32") or any(part.dtype != dtype for part in parts):
        raise Refuse(f"diff of order {n} of {dtype} elements")
    ctx.output(node)
    target = ctx.strided(node)
    axis %= len(target.shape)
    start = size(0)
    last: Strided | None = None
    for part in parts:
        length = part.shape[axis]
        pairs = [] if last is None else [(last, part.slice(axis, 0, 1), 1)]
        if length != 1:
            pairs.append((part.slice(axis, 0, length - 1), part.slice(axis, 1, length - 1), length - 1))
        for left, right, count in pairs:
            views = [Operand(ctx.view(item), dtype) for item in (left, right, target.slice(axis, start, count))]
            ctx.emit(call(ctx, views[:2], views[2:], [["sub", dtype, [1, 0]]], [2]))
            start = start + count
        last = part.slice(axis, length - 1, 1)
