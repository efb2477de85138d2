"""The walk from the final graph to an executable: views cost nothing, a rule or else ATen does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from qcompile.artifact import Buffer, Call, Executable, Port
from qcompile.dtypes import NAMES
from qcompile.errors import InternalError, LoweringError
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.pointwise import copier
from qcompile.lowering.symbolic import Strided, size
from qcompile.lowering.views import VIEWS
from qcompile.program import Program
from qcompile.target import Target

RuleFor = Callable[[Node], Callable[[Node, Context], None] | None]
"""A backend's rule for a node; None where it has none."""


def lower(
    program: Program, target: Target, accuracy: str, *, strict: bool = False
) -> tuple[Executable, dict[str, torch.Tensor]]:
    """The executable of `program`, and its weight tensors by buffer name.

    A node for which the target has no rule, or whose rule refuses, runs through ATen: that is a fallback in the report,
    and a LoweringError under `strict`.
    """
    rule_for = _rules(target)
    ctx = Context(program, target, accuracy, copier)
    _placeholders(program, ctx)
    for node in program.graph.graph.nodes:
        ctx.node = node
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            _tensor(node, ctx)
        elif node.op == "output":
            ctx.node = None
            _outputs(node, ctx)
        elif isinstance(node.meta.get("val"), (int, float, torch.SymInt)):
            ctx.values[node] = node.meta["val"]
        else:
            _operation(node, ctx, rule_for, strict)
    calls = [call for step in ctx.steps for variant in step.variants for call in variant.calls]
    used = {view.buffer for call in calls for view in call.args}
    used |= {port.view.buffer for port in (*ctx.inputs, *ctx.outputs)}
    used |= {name for name, buffer in ctx.buffers.items() if buffer.kind == "state"}
    executable = Executable(
        buffers={name: buffer for name, buffer in ctx.buffers.items() if name in used},
        inputs=tuple(ctx.inputs),
        outputs=tuple(ctx.outputs),
        steps=tuple(ctx.steps),
        kernels={name: spec for name, spec in ctx.kernels.items() if any(call.kernel == name for call in calls)},
    )
    return executable, {name: tensor for name, tensor in ctx.weights.items() if name in used}


def _rules(target: Target) -> RuleFor:
    if target.backend == "cuda":
        from qcompile.lowering.triton.rules import rule_for
    else:
        from qcompile.lowering.mlir.rules import rule_for
    return rule_for


def _placeholders(program: Program, ctx: Context) -> None:
    """Inputs and states get buffers of their names; the symbols in their shapes get the names of the sizes."""
    nodes = program.graph.graph.find_nodes(op="placeholder")
    ports = (*program.inputs, *program.states.values())
    for node, port in zip(nodes, ports, strict=True):
        for name, value in zip(port.shape, node.meta["val"].shape, strict=True):
            if isinstance(name, str) and isinstance(size(value), sympy.Symbol):
                ctx.names[size(value)] = name
            elif isinstance(name, str) and size(value).is_number:
                raise InternalError("a size was fixed by a pass", where=port.name, found=value, expected=name)
    for node, port in zip(nodes, ports, strict=True):
        is_state = port.name in program.states
        ctx.values[node] = Strided.contiguous_in(port.name, port.dtype, node.meta["val"].shape)
        ctx.buffers[port.name] = Buffer(port.name, port.dtype, ctx.shape(node), "state" if is_state else "input")
        if not is_state:
            ctx.inputs.append(Port(port.name, ctx.view(node), port.dtype))


def _tensor(node: Node, ctx: Context) -> None:
    name = node.meta["tensor"]
    tensor = ctx.program.tensors[name]
    ctx.weight(name)
    ctx.values[node] = Strided.contiguous_in(name, NAMES[tensor.dtype], tensor.shape)


def _operation(node: Node, ctx: Context, rule_for: RuleFor, strict: bool) -> None:
    reason = "no rule"
    before = len(ctx.steps)
    try:
        view = VIEWS.get(node.target)
        if view is not None:
            ctx.values[node] = view(node, ctx)
            return
        rule = rule_for(node)
        if rule is not None:
            rule(node, ctx)
            ctx.program.report.lowered(node, [_kernels(step) for step in ctx.steps[before:]])
            return
    except Refuse as refusal:
        reason = str(refusal)
    del ctx.steps[before:]
    if node.op == "call_module":
        _inline(node, ctx, rule_for, strict)
        return
    if strict:
        raise LoweringError(
            f"no kernel for {node.target}",
            where=f"{node.meta.get('module', '')} ({node.name})",
            found=reason,
            remedy="compile without strict to run this node through ATen",
        )
    ctx.program.report.fallback(node, reason)
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            ctx.serves([source.meta["tensor"]], str(node.target), "aten", reason)
    _aten(node, ctx)


def _inline(node: Node, ctx: Context, rule_for: RuleFor, strict: bool) -> None:
    """A region that its rule refused, one operation after another."""
    module = ctx.program.graph.get_submodule(str(node.target))
    assert isinstance(module, torch.fx.GraphModule)
    region, operands = module.graph, node.args
    for inner, outer in zip(region.find_nodes(op="placeholder"), operands, strict=True):
        assert isinstance(outer, Node)
        ctx.values[inner] = ctx.values[outer]
    for inner in region.nodes:
        if inner.op == "call_function":
            ctx.node = inner
            _operation(inner, ctx, rule_for, strict)
    results: Any = region.output_node().args[0]
    several = isinstance(results, (list, tuple))
    ctx.values[node] = tuple(ctx.values[item] for item in results) if several else ctx.values[results]
    ctx.node = node


def _kernels(step: Any) -> list[str]:
    return [call.kernel for variant in step.variants for call in variant.calls]


def _aten(node: Node, ctx: Context) -> None:
    """One ATen call on views of the buffers; every result is written to a buffer of its own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "qcompile"):
        raise LoweringError(
            "a node is neither a kernel nor an ATen operator",
            where=f"{node.meta.get('module', '')} ({node.name})",
            found=target,
            remedy="report this node: a pass should have removed it",
        )
    args: list[Any] = []

    def literal(item: Any) -> Any:
        if isinstance(item, Node):
            value = ctx.values[item]
            if isinstance(value, Strided):
                args.append(ctx.view(value))
                return {"view": len(args) - 1}
            if isinstance(value, (int, torch.SymInt)):
                return {"dim": ctx.dim(value)}
            return value
        if isinstance(item, torch.SymInt):
            return {"dim": ctx.dim(item)}
        if isinstance(item, torch.dtype):
            return {"dtype": NAMES[item]}
        if isinstance(item, (list, tuple)):
            return [literal(part) for part in item]
        if isinstance(item, float) and not math.isfinite(item):
            return {"float": str(item)}
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, (torch.device, torch.layout, torch.memory_format)):
            return None
        raise InternalError("an argument has no form as data", where=node.name, found=repr(item))

    names = [argument.name for argument in target._schema.arguments]
    literals = [literal(item) for item in node.args]
    keywords = {name: literal(item) for name, item in node.kwargs.items() if name in names}
    made = ctx.outputs_of(node) if isinstance(node.meta["val"], (list, tuple)) else [ctx.output(node)]
    first = len(args)
    ctx.emit(Call(str(target), (*args, *made), (), tuple(range(first, first + len(made))), (literals, keywords)))


def _outputs(node: Node, ctx: Context) -> None:
    """Each output gets a buffer of its own: the one it was computed in when that holds exactly this value."""
    taken: set[str] = set()
    results: Any = node.args[0]
    for name, item in zip(ctx.program.outputs, results, strict=True):
        if not isinstance(item, Node):
            raise LoweringError("an output is not a tensor", where=name, found=repr(item), expected="a tensor")
        source = ctx.strided(item)
        own = ctx.buffers[source.buffer].kind == "temp" and source.buffer not in taken
        if not (own and source.is_contiguous and source.numel == ctx.extents[source.buffer]):
            source = ctx.copied(source)
        taken.add(source.buffer)
        # The runtime hands out the buffer itself, so it takes the shape that the caller is to see.
        view = ctx.view(source)
        ctx.buffers[source.buffer] = Buffer(source.buffer, source.dtype, view.shape, "output")
        ctx.outputs.append(Port(name, view, source.dtype))
