"""Which rule lowers which operator: the lines that every backend with generated kernels shares, and how they are found.

A line is operator -> "module:function", looked at when it is needed. The rules here only decide shapes and arguments;
each backend has its own text for the kernels that they call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from torch.fx import Node

from qcompile.lowering.base import Context
from qcompile.lowering.regions import is_pointwise, lower_pointwise, lower_region

Rule = Callable[[Node, Context], None]

SHARED: dict[str, str] = {
    "qcompile.rms_norm.default": "norm:lower_rms_norm",
    "aten.layer_norm.default": "norm:lower_layer_norm",
    "aten.softmax.int": "norm:lower_softmax",
    "aten._softmax.default": "norm:lower_softmax",
    "aten.log_softmax.int": "norm:lower_softmax",
    "aten._log_softmax.default": "norm:lower_softmax",
    "aten.sum.default": "reduce:lower_reduction",
    "aten.sum.dim_IntList": "reduce:lower_reduction",
    "aten.mean.default": "reduce:lower_reduction",
    "aten.mean.dim": "reduce:lower_reduction",
    "aten.amax.default": "reduce:lower_reduction",
    "aten.amin.default": "reduce:lower_reduction",
    "aten.max.default": "reduce:lower_reduction",
    "aten.min.default": "reduce:lower_reduction",
    "aten.argmax.default": "reduce:lower_reduction",
    "aten.argmin.default": "reduce:lower_reduction",
    "aten.any.default": "reduce:lower_reduction",
    "aten.any.dim": "reduce:lower_reduction",
    "aten.any.dims": "reduce:lower_reduction",
    "aten.all.default": "reduce:lower_reduction",
    "aten.all.dim": "reduce:lower_reduction",
    "aten.all.dims": "reduce:lower_reduction",
    "aten.embedding.default": "gather:lower_embedding",
    "aten.index_select.default": "gather:lower_index_select",
    "aten.index.Tensor": "gather:lower_index",
    "aten.topk.default": "topk:lower_topk",
    "aten.cumsum.default": "cumsum:lower_cumsum",
    "aten.cat.default": "cat:lower_cat",
    "aten.diff.default": "diff:lower_diff",
    "aten.constant_pad_nd.default": "cat:lower_pad",
    "aten.pad.default": "cat:lower_pad",
    "aten.repeat.default": "cat:lower_repeat",
    "aten.repeat_interleave.self_int": "cat:lower_repeat_interleave",
    "aten.stack.default": "cat:lower_stack",
}


def find(node: Node, own: Mapping[str, str], package: str) -> Rule | None:
    """The rule of a node: a region, a line of `own` (modules of `package`), a shared one, any pointwise operator, or None."""
    if node.op == "call_module":
        return lower_region
    name = str(node.target)
    place = f"{package}.{own[name]}" if name in own else f"qcompile.lowering.{SHARED[name]}" if name in SHARED else None
    if place is not None:
        module, _, function = place.partition(":")
        found: Rule = getattr(import_module(module), function)
        return found
    return lower_pointwise if is_pointwise(node) else None
