"""What the backends' rules for mixtures of experts share: the row in the report, and the weight's one part."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from qcompile.experts import ExpertsSpec
from qcompile.lowering.base import Context, Refuse
from qcompile.ops import Part


def lower_noted(node: Node, ctx: Context, lower: Callable[[Node, Context], tuple[str, str]]) -> None:
    """`lower`s the node, which gives its kernel and tier for the weight's row of the report (its parts have none)."""
    try:
        kernel, tier = lower(node, ctx)
    except Refuse as refusal:
        _note(node, ctx, kernel=str(node.target), tier="aten", reason=str(refusal))
        raise
    _note(node, ctx, kernel=kernel, tier=tier)


def _note(node: Node, ctx: Context, **what: str) -> None:
    path, report = node.meta.get("module", ""), ctx.program.report
    if path in report.weights:
        report.update_weight(path, **what)


def only_part(node: Node, ctx: Context, spec: ExpertsSpec) -> Part:
    """The weight, all experts one below the other; Refuse where it is in several formats."""
    if ctx.dtype(node) != "f32":
        raise Refuse(f"the kernels write f32, not {ctx.dtype(node)}")
    if len(spec.parts) != 1:
        raise Refuse(f"the weight is in {len(spec.parts)} parts")
    return spec.parts[0]
