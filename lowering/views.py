"""ATen operators that only look at the same data in another way: each becomes a strided view, and moves nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.symbolic import Strided, size

aten = torch.ops.aten


def _number(item: Any) -> Any:
    return item.meta["val"] if isinstance(item, Node) else item


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _reshape(node: Node, ctx: Context) -> Strided:
    source = ctx.strided(_args(node)[0])
    shape = [size(item) for item in node.meta["val"].shape]
    view = source.reshape(shape) or ctx.copied(source).reshape(shape)
    assert view is not None  # a contiguous copy takes any shape
    return view


def _slice(node: Node, ctx: Context) -> Strided:
    axis, start, _end, step = (list(_args(node)[1:]) + [0, None, None, 1][len(_args(node)) - 1 :])[:4]
    source = ctx.strided(_args(node)[0])
    first = size(_number(start) or 0)
    if first.is_negative:
        first = sympy.expand(first + source.shape[axis])
    length = node.meta["val"].shape[axis]
    if not isinstance(length, int) and first.free_symbols:
        raise Refuse("a slice starts at a size that is known only at run time")
    return source.slice(axis, first, length, step)


def _split(node: Node, ctx: Context) -> tuple[Strided, ...]:
    source = ctx.strided(_args(node)[0])
    axis: Any = node.kwargs.get("dim", _args(node)[2] if len(_args(node)) > 2 else 0)
    parts, start = [], size(0)
    for value in node.meta["val"]:
        length = size(value.shape[axis])
        parts.append(source.slice(axis, start, length))
        start = sympy.expand(start + length)
    return tuple(parts)


def _unbind(node: Node, ctx: Context) -> tuple[Strided, ...]:
    source, axis = ctx.strided(_args(node)[0]), _args(node)[1] if len(_args(node)) > 1 else 0
    return tuple(source.select(axis, index) for index in range(len(node.meta["val"])))


def _unfold(node: Node, ctx: Context) -> Strided:
    x, axis, length, step = _args(node)
    return ctx.strided(x).unfold(axis, node.meta["val"].shape[axis % x.meta["val"].dim()], length, step)


def _squeeze(node: Node, ctx: Context) -> Strided:
    source = ctx.strided(_args(node)[0])
    axes = _args(node)[1] if len(_args(node)) > 1 else range(len(source.shape))
    return source.squeeze([axes] if isinstance(axes, int) else list(axes))


def _source(node: Node, ctx: Context) -> Strided:
    return ctx.strided(_args(node)[0])


VIEWS: dict[Any, Callable[[Node, Context], Any]] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.permute.default: lambda node, ctx: _source(node, ctx).permute(_args(node)[1]),
    aten.transpose.int: lambda node, ctx: _source(node, ctx).transpose(*_args(node)[1:3]),
    aten.t.default: lambda node, ctx: _source(node, ctx).permute(list(range(len(node.meta["val"].shape)))[::-1]),
    aten.expand.default: lambda node, ctx: _source(node, ctx).expand(node.meta["val"].shape),
    aten.unsqueeze.default: lambda node, ctx: _source(node, ctx).unsqueeze(_args(node)[1]),
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: lambda node, ctx: _source(node, ctx).select(_args(node)[1], _number(_args(node)[2])),
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    aten.unfold.default: _unfold,
    aten.contiguous.default: _source,
    aten.clone.default: _source,
    aten.alias.default: _source,
    aten.detach.default: _source,
    operator.getitem: lambda node, ctx: ctx.values[_args(node)[0]][_args(node)[1]],
}
