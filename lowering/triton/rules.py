"""Which rule lowers which operator on CUDA: a table of operator -> "module:function", looked at when it is needed."""

from __future__ import annotations

from torch.fx import Node

from qcompile.lowering.rules import Rule, find

RULES: dict[str, str] = {
    "aten.scaled_dot_product_attention.default": "attention:lower_sdpa",
    "qcompile.attention.default": "attention:lower_attention",
    "qcompile.cached_attention.default": "attention:lower_cached_attention",
    "qcompile.dequantize.default": "dequantize:lower_dequantize",
    "qcompile.embedding.default": "embedding:lower_embedding",
    "qcompile.experts.default": "experts:lower_experts",
    "qcompile.linear.default": "linear_rule:lower_linear",
    "qcompile.rope.default": "attention:lower_rope",
    "qcompile.transform.default": "sparse:lower_transform",
}
"""What is not among the lines that all backends share."""


def rule_for(node: Node) -> Rule | None:
    """The rule of a node, or None where there is none."""
    return find(node, RULES, "qcompile.lowering.triton")
