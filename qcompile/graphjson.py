"""A program's FX graph as data (`artifact.Graph`): regions inlined, tensors by name, operators of the closed table."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile import operators
from qcompile.artifact import Buffer, Graph, GraphNode
from qcompile.dtypes import NAMES
from qcompile.errors import ArtifactError, LoweringError
from qcompile.program import Program

_SCALAR = {function: name for name, function in operators.SCALAR.items()}


def graph_of(program: Program) -> Graph:
    """The graph of `program` as data; LoweringError for a node that has no form as data."""
    nodes: list[GraphNode] = []
    values: dict[Node, Any] = {}
    outputs: Any = ()
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = {"node": str(node.target)}
        elif node.op == "output":
            outputs = [_literal(item, values, node) for item in node.args[0]]
        else:
            _add(node, program.graph, "", values, nodes)
    return Graph(
        inputs=tuple(Buffer(i.name, i.dtype, i.shape, "input") for i in program.inputs),
        states=tuple(Buffer(i.name, i.dtype, i.shape, "state") for i in program.states.values()),
        nodes=tuple(nodes),
        outputs=dict(zip(program.outputs, outputs, strict=True)),
    )


def _add(node: Node, owner: GraphModule, prefix: str, values: dict[Node, Any], nodes: list[GraphNode]) -> None:
    if node.op == "get_attr":
        values[node] = {"tensor": node.meta["tensor"]}
        return
    if node.op == "call_module":
        values[node] = _inline(node, owner, prefix, values, nodes)
        return
    if node.target is operator.getitem and isinstance(made := values[node.args[0]], list):  # type: ignore[index]
        values[node] = made[node.args[1]]  # type: ignore[index]
        return
    name = prefix + node.name
    arguments = tuple(_literal(item, values, node) for item in node.args)
    keywords = {key: _literal(item, values, node) for key, item in node.kwargs.items()}
    keywords = {key: item for key, item in keywords.items() if item != {"layout": "strided"}}
    nodes.append(GraphNode(name, _operator(node), arguments, keywords, node.meta.get("module") or ""))
    values[node] = {"node": name}


def _inline(node: Node, owner: GraphModule, prefix: str, values: dict[Node, Any], nodes: list[GraphNode]) -> Any:
    """The nodes of a region, named after it; its value is that of its output, a list where it has several."""
    region = owner.get_submodule(str(node.target))
    assert isinstance(region, GraphModule)
    inner: dict[Node, Any] = {}
    given = iter(node.args)
    for each in region.graph.nodes:
        if each.op == "placeholder":
            inner[each] = _literal(next(given), values, node)
        elif each.op == "output":
            result = each.args[0]
            return _literal(result, inner, each)
        else:
            _add(each, region, f"{prefix}{node.name}.", inner, nodes)
    raise LoweringError("a region has no output", where=node.name)


def _operator(node: Node) -> str:
    overload = isinstance(node.target, torch._ops.OpOverload)
    name = str(node.target) if overload else _SCALAR.get(node.target, str(node.target))  # type: ignore[arg-type]
    try:
        operators.reference(name)
    except ArtifactError as error:
        raise LoweringError(
            error.summary, where=f"{node.meta.get('module') or ''} ({node.name})", found=error.found,
            expected=error.expected, remedy="a pass must rewrite this node",
        ) from None  # fmt: skip
    return name


def _literal(item: Any, values: dict[Node, Any], user: Node) -> Any:
    if isinstance(item, Node):
        return values[item]
    if isinstance(item, (list, tuple)):
        return [_literal(part, values, user) for part in item]
    if isinstance(item, torch.dtype) and item in NAMES:
        return {"dtype": NAMES[item]}
    if isinstance(item, torch.device):
        return {"device": "run"}
    if isinstance(item, torch.memory_format):
        return {"memory_format": str(item).removeprefix("torch.")}
    if item is torch.strided:
        return {"layout": "strided"}
    if isinstance(item, float) and not math.isfinite(item):
        return {"float": str(item)}
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    raise LoweringError("an argument has no form as data", where=user.name, found=repr(item)[:200])
