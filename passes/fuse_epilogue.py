"""What is done to a linear's result becomes a part of the linear: bias, activation, gate, product, residual sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch._ops import OpOverload
from torch.fx import Node

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import args_of, arguments, erase_unused, infer, is_call, shape, substitute
from qcompile.passes.linears import Linear, linears
from qcompile.program import Program

aten = torch.ops.aten
ACTIVATIONS = {
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}


def activation(node: Node) -> str:
    """The name that `LinearSpec` has for an activation node."""
    if is_call(node, aten.gelu.default) and arguments(node)["approximate"] == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS[cast(OpOverload, node.target)]


@dataclass(frozen=True)
class _Step:
    """A linear's reader that it can take in: the node whose value the linear then has, and what changes."""

    node: Node
    op: dict[str, Any] | None
    extra: Node | None = None


def _glu(linear: Linear) -> _Step | None:
    """act(first half) * second half."""
    y, n = linear.node, linear.spec.n
    last = y.meta["val"].dim() - 1
    slices = [user for user in y.users if is_call(user, aten.slice.Tensor) and user.args[1] in (last, -1)]
    halves = {args_of(user)[2:4]: user for user in slices}
    gate = halves.get((0, n // 2))
    up = next((halves[ends] for ends in halves if ends[0] == n // 2 and ends[1] >= n), None)
    if len(y.users) != 2 or gate is None or up is None or len(gate.users) != 1 or len(up.users) != 1:
        return None
    act, product = next(iter(gate.users)), next(iter(up.users))
    if act.target not in ACTIVATIONS or not is_call(product, aten.mul.Tensor) or list(act.users) != [product]:
        return None
    return _Step(product, {"op": "glu", "act": activation(act)})


def _step(linear: Linear) -> _Step | str | None:
    """What a linear can take in next; a reason when its reader is of the right kind and does not fit; None otherwise."""
    y = linear.node
    if linear.only_rounds and len(y.users) == 2:
        return _glu(linear)
    kinds = (*ACTIVATIONS, aten.add.Tensor, aten.mul.Tensor)
    readers = [user for user in y.users if is_call(user, *kinds)]
    if len(y.users) != 1:
        return f"it has {len(y.users)} readers" if readers and not linear.spec.epilogue else None
    user = next(iter(y.users))
    if not readers:
        return None
    if user.target in ACTIVATIONS:
        return _Step(user, {"op": activation(user)})
    other = user.args[1] if user.args[0] is y else user.args[0]
    if not isinstance(other, Node) or other is y or arguments(user).get("alpha", 1) != 1:
        return "the other operand is a number, the linear itself, or scaled"
    name = "add" if is_call(user, aten.add.Tensor) else "mul"
    bare = not linear.spec.bias and not linear.spec.epilogue
    if bare and name == "add" and other.op == "get_attr" and shape(other) == (linear.spec.n,):
        return _Step(user, None, other)
    if shape(other) != shape(y) or other.meta["val"].dtype != y.meta["val"].dtype:
        return f"the other operand of {name} has shape {list(shape(other))}, the linear's is {list(shape(y))}"
    return _Step(user, {"op": name}, other)


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """A linear takes in the only reader of its result, again and again, as long as the backend's kernels can."""

    name: ClassVar[str] = "fuse-epilogue"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in [linear.node for linear in linears(program)]:
            linear = Linear.of(node)
            while True:
                step = _step(linear)
                reason = step if isinstance(step, str) else None
                if isinstance(step, _Step):
                    reason = ctx.backend.epilogue(linear.formats, step.op["op"] if step.op else "bias")
                if reason is not None:
                    ctx.refuse(self.name, linear.node, reason)
                if reason is not None or not isinstance(step, _Step) or not ctx.take():
                    break
                linear = self._take_in(program, linear, step)
                count += 1
        return count

    def _take_in(self, program: Program, linear: Linear, step: _Step) -> Linear:
        spec, extras = linear.spec, linear.extras
        if step.op is None:
            assert step.extra is not None  # a bias
            spec, extras = replace(spec, bias=True), (step.extra, *extras)
        else:
            spec = replace(spec, epilogue=(*spec.epilogue, step.op))
            extras = (*extras, *([step.extra] if step.extra is not None else []))
        made = replace(linear, extras=extras, spec=spec).written(step.node, self.name)
        inputs = step.node.all_input_nodes
        substitute(step.node, made)
        erase_unused(inputs)
        infer(program, [made])
        return Linear.of(made)
