"""Lowering of what only moves data: aten.cat, aten.stack, repetitions and padding copy into windows of the result."""

from __future__ import annotations

from torch.fx import Node

from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.meaning import number
from qcompile.lowering.pointwise import Operand, call
from qcompile.lowering.symbolic import Strided, size


def lower_cat(node: Node, ctx: Context) -> None:
    """One step of copies, which do not depend on each other."""
    given, axis = operands(node, dim=0)
    parts = [part for part in given if len(part.meta["val"].shape) > 1 or part.meta["val"].numel() != 0]
    ctx.output(node)
    target = ctx.strided(node)
    axis %= len(target.shape)
    start = size(0)
    for part in parts:
        source = ctx.strided(part)
        window = target.slice(axis, start, source.shape[axis])
        _copy(ctx, source, window)
        start = start + source.shape[axis]


def lower_stack(node: Node, ctx: Context) -> None:
    parts, axis = operands(node, dim=0)
    ctx.output(node)
    target = ctx.strided(node)
    for i, part in enumerate(parts):
        _copy(ctx, ctx.strided(part), target.select(axis % len(target.shape), i))


def lower_repeat(node: Node, ctx: Context) -> None:
    """One copy: of x where every dimension has one before it along which nothing changes."""
    x, repeats = operands(node)
    ctx.output(node)
    source, target = ctx.strided(x), ctx.strided(node)
    for _ in range(len(target.shape) - len(source.shape)):
        source = source.unsqueeze(0)
    sizes = list(source.shape)
    for axis in range(len(sizes)):
        source = source.unsqueeze(2 * axis)
    times = [item.meta["val"] if isinstance(item, Node) else item for item in repeats]
    pairs = [item for pair in zip(times, sizes, strict=True) for item in pair]
    window = target.reshape(pairs)
    assert window is not None  # the result is contiguous
    _copy(ctx, source.expand(pairs), window)


def lower_repeat_interleave(node: Node, ctx: Context) -> None:
    """One copy: of x where every element along an axis has a dimension behind it along which nothing changes."""
    x, count, axis = operands(node, dim=None)
    if axis is None:
        raise Refuse("repeat_interleave of no axis")
    ctx.output(node)
    source, target = ctx.strided(x), ctx.strided(node)
    axis = axis % len(source.shape) + 1
    sizes = [*source.shape[:axis], count.meta["val"] if isinstance(count, Node) else count, *source.shape[axis:]]
    window = target.reshape(sizes)
    assert window is not None  # the result is contiguous
    _copy(ctx, source.unsqueeze(axis).expand(sizes), window)


def lower_pad(node: Node, ctx: Context) -> None:
    """x inside, and two edges along each axis that is padded: those of the last axis first, the rest between them."""
    x, pad, mode, value = operands(node, mode="constant", value=None)
    if mode != "constant":
        raise Refuse(f"padding of mode '{mode}'")
    if any(not isinstance(count, int) or count < 0 for count in pad):
        raise Refuse(f"padding by {pad}, where only numbers from 0 on are handled")
    ctx.output(node)
    source, inside, dtype = ctx.strided(x), ctx.strided(node), ctx.dtype(node)
    filled = [["full", dtype, [number(value or 0)]]]
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = len(source.shape) - 1 - i
        length = source.shape[axis]
        for start, count in ((0, before), (before + length, after)):
            if count:
                edge = Operand(ctx.view(inside.slice(axis, start, count)), dtype)
                ctx.emit(call(ctx, [], [edge], filled, [0]))
        inside = inside.slice(axis, before, length)
    _copy(ctx, source, inside)


def _copy(ctx: Context, source: Strided, window: Strided) -> None:
    for item in (source, window):
        if item.dtype == "f8e8m0":
            raise Refuse(f"no copy kernel for elements of dtype {item.dtype}")
    ctx.emit(ctx.copy(source, window))
