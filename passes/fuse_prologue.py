"""A norm that only linears read becomes a part of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import args_of, arguments, call, infer, is_call, operator_name, shape, substitute
from qcompile.passes.linears import Linear
from qcompile.program import Program

aten, qc = torch.ops.aten, torch.ops.qcompile
SELECTIONS = (aten.index.Tensor, aten.index_select.default, aten.slice.Tensor, aten.select.int)


@dataclass(frozen=True)
class _Norm:
    """A norm node: its input, its weight tensors and its place in a `LinearSpec`."""

    node: Node
    x: Node
    weights: tuple[Node, ...]
    prologue: dict[str, Any]

    def again(self, before: Node, x: Node, weights: tuple[Node, ...], made_by: str) -> Node:
        """The same norm of another input with other weights."""
        now = dict(zip((self.x, *self.weights), (x, *weights), strict=True))
        args = [now.get(arg, arg) if isinstance(arg, Node) else arg for arg in self.node.args]
        return call(before, self.node.target, args, made_by, like=self.node)


def _norm(node: Node) -> _Norm | None:
    if is_call(node, qc.rms_norm.default):
        given = arguments(node)
        prologue = {"op": "rms_norm", "eps": given["eps"], "offset": given["offset"]}
        return _Norm(node, given["x"], (given["weight"],), prologue)
    if is_call(node, aten.layer_norm.default):
        given = arguments(node)
        weights = (given["weight"], given["bias"])
        if len(given["normalized_shape"]) == 1 and None not in weights:
            return _Norm(node, given["input"], weights, {"op": "layer_norm", "eps": given["eps"]})
    return None


def _keeps_columns(user: Node, norm: Node) -> bool:
    """True when `user` picks rows of the norm's result and leaves each row whole."""
    last = norm.meta["val"].dim() - 1
    if not is_call(user, *SELECTIONS) or user.args[0] is not norm:
        return False
    if is_call(user, aten.index.Tensor):
        indices = args_of(user)[1]
        picks = [at for at, index in enumerate(indices) if index is not None]
        return len(indices) <= last and len(picks) == 1
    return bool(args_of(user)[1] % (last + 1) != last)


@dataclass(frozen=True)
class FusePrologue(Pass):
    """Linears apply the norm of their input themselves, when every reader of the norm is such a linear.

    Where rows of a norm are selected, or its columns put in another order, that is done first: the norm then reads fewer rows,
    and the linear behind it can take it in.
    """

    name: ClassVar[str] = "fuse-prologue"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in list(program.graph.graph.nodes):
            norm = _norm(node)
            if norm is not None:
                count += self._select_first(program, norm, ctx)
        for node in list(program.graph.graph.nodes):
            norm = _norm(node)
            if norm is None or not any(is_call(user, qc.linear.default) for user in node.users):
                continue
            reason = self._reason(norm, ctx)
            if reason is not None:
                ctx.refuse(self.name, node, reason)
            elif ctx.take():
                self._take_in(norm)
                count += 1
        return count

    def _select_first(self, program: Program, norm: _Norm, ctx: Context) -> int:
        """norm(x)[rows] becomes norm(x[rows]), and norm(x)[:, order] becomes norm(x[:, order]) with reordered weights."""
        last, count = norm.node.meta["val"].dim() - 1, 0
        for user in list(norm.node.users):
            reorders = is_call(user, aten.index_select.default) and user.args[1] == last and user.args[0] is norm.node
            if not (_keeps_columns(user, norm.node) or reorders) or not ctx.take():
                continue
            moved = call(user, user.target, (norm.x, *user.args[1:]), self.name)
            weights = norm.weights
            if reorders:
                weights = tuple(call(user, aten.index_select.default, (w, 0, user.args[2]), self.name) for w in weights)
            made = norm.again(user, moved, weights, self.name)
            substitute(user, made)
            count += 1
        if count:
            infer(program)
        if count and not norm.node.users:
            program.graph.graph.erase_node(norm.node)
        return count

    def _reason(self, norm: _Norm, ctx: Context) -> str | None:
        """Why the norm must stay a node; None when all its readers can take it in."""
        for user in norm.node.users:
            if not is_call(user, qc.linear.default) or norm.node in args_of(user)[2]:
                return f"{operator_name(user)} ({user.name}) reads it too"
        for linear in map(Linear.of, norm.node.users):
            if linear.spec.prologue is not None or linear.x is not norm.node:
                return f"{linear.node.name} has a prologue already"
            if shape(norm.weights[0]) != (linear.spec.k,):
                return f"the norm's weight has shape {list(shape(norm.weights[0]))}, not [{linear.spec.k}]"
            reason = ctx.backend.prologue(linear.formats, norm.prologue["op"])
            if reason is not None:
                return reason
        return None

    def _take_in(self, norm: _Norm) -> None:
        for user in list(norm.node.users):
            linear = Linear.of(user)
            extras = list(linear.extras)
            at = int(linear.spec.bias)
            extras[at:at] = norm.weights
            spec = replace(linear.spec, prologue=norm.prologue)
            substitute(user, replace(linear, x=norm.x, extras=tuple(extras), spec=spec).written(user, self.name))
        norm.node.graph.erase_node(norm.node)
