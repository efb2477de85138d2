"""Which rule lowers which operator on the CPU: a table of operator -> "module:function", looked at when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch.fx import Node

from qcompile.lowering.base import Context
from qcompile.lowering.mlir.regions import is_pointwise, lower_pointwise, lower_region

Rule = Callable[[Node, Context], None]

RULES: dict[str, str] = {
    "qcompile.linear.default": "linear_rule:lower_linear",
    "qcompile.embedding.default": "embedding:lower_embedding",
    "qcompile.experts.default": "experts_gemv:lower_experts",
    "qcompile.attention.default": "attention:lower_attention",
    "qcompile.cached_attention.default": "attention:lower_cached_attention",
    "qcompile.rope.default": "attention:lower_rope",
    "qcompile.rms_norm.default": "norm:lower_rms_norm",
    "aten.scaled_dot_product_attention.default": "attention:lower_sdpa",
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
    "aten.cat.default": "cat:lower_cat",
    "aten.stack.default": "cat:lower_stack",
}


def rule_for(node: Node) -> Rule | None:
    """The rule of a node: a region, a line of the table, any pointwise operator; None where there is none."""
    if node.op == "call_module":
        return lower_region
    place = RULES.get(str(node.target))
    if place is not None:
        module, _, function = place.partition(":")
        found: Rule = getattr(import_module(f"qcompile.lowering.mlir.{module}"), function)
        return found
    return lower_pointwise if is_pointwise(node) else None
