"""Lowering of pointwise nodes: an ATen node, or a region of them, becomes one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qcompile.dtypes import NAMES
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.meaning import FILLS, READ, Reader, operator
from qcompile.lowering.pointwise import Operand, call


def is_pointwise(node: Node) -> bool:
    """Whether the node is an ATen operation that a pointwise kernel can hold."""
    return isinstance(node.target, torch._ops.OpOverload) and operator(node) in READ


def lower_pointwise(node: Node, ctx: Context) -> None:
    inputs = [item for item in node.all_input_nodes if isinstance(item.meta.get("val"), torch.Tensor)]
    inputs = [] if operator(node) in FILLS else inputs
    reader = Reader([(item, ctx.strided(item).dtype) for item in inputs])
    result = reader.read(node)
    dtype = ctx.dtype(node)
    operands = [Operand(ctx.view(item), ctx.strided(item).dtype) for item in inputs]
    ctx.emit(call(ctx, operands, [Operand(ctx.output(node), dtype)], reader.ops, [result]))


def lower_region(node: Node, ctx: Context) -> None:
    """A call_module whose GraphModule holds pointwise nodes only; all outputs have one shape."""
    region: Any = ctx.program.graph.get_submodule(str(node.target))
    nodes = list(region.graph.nodes)
    places = [inner for inner in nodes if inner.op == "placeholder"]
    args = [item for item in node.args if isinstance(item, Node)]
    if len(args) != len(places):
        raise Refuse("a region with operands that are not tensors")
    reader = Reader([(place, ctx.strided(item).dtype) for place, item in zip(places, args, strict=True)])
    for inner in nodes:
        if inner.op == "call_function":
            reader.read(inner)
        elif inner.op not in ("placeholder", "output"):
            raise Refuse(f"a region with a node of kind {inner.op}")
    found = nodes[-1].args[0]
    several = isinstance(found, (list, tuple))
    results = [reader.tensor(item) for item in (found if several else [found])]
    values = node.meta["val"] if several else [node.meta["val"]]
    if any(value.shape != values[0].shape for value in values):
        raise Refuse("a region whose outputs have several shapes")
    views = ctx.outputs_of(node) if several else [ctx.output(node)]
    outputs = [Operand(view, NAMES[value.dtype]) for view, value in zip(views, values, strict=True)]
    inputs = [Operand(ctx.view(item), ctx.strided(item).dtype) for item in args]
    ctx.emit(call(ctx, inputs, outputs, reader.ops, results))
