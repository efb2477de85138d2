"""Pointwise operators that feed each other become regions: one kernel each, nothing in between in memory."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import networkx
import torch
from torch.fx import Graph, GraphModule, Node

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import inherit, shape
from qcompile.program import Program

aten = torch.ops.aten

POINTWISE = frozenset(
    overload
    for name in (
        "__and__", "__or__", "__xor__", "_to_copy", "abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor",
        "ceil", "clamp", "clamp_max", "clamp_min", "cos", "div", "eq", "erf", "exp",
        "expm1", "floor", "ge", "gelu", "gt", "hardsigmoid", "hardswish", "hardtanh", "le", "leaky_relu", "log", "log1p",
        "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "maximum", "minimum", "mul", "ne", "neg", "pow",
        "reciprocal", "relu", "round", "rsqrt", "rsub", "sigmoid", "sign", "silu", "sin", "softplus", "sqrt", "square", "sub",
        "tanh", "to", "where",
    )
    for overload in (getattr(getattr(aten, name), o) for o in getattr(aten, name).overloads())
    if "out" not in overload._overloadname
) | {aten.view.dtype}  # fmt: skip
"""Operators that compute every element of their result from the elements at the same place of their operands."""

CHEAP = frozenset({
    aten.to.dtype, aten._to_copy.default,
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar,
})  # fmt: skip
"""Operators that cost less to compute again for every element than to store."""


def is_pointwise(node: Node) -> bool:
    """True for a node that a region may hold: pointwise, on tensors, with one tensor as its result."""
    return node.op == "call_function" and node.target in POINTWISE and isinstance(node.meta.get("val"), torch.Tensor)


def _contract(graph: networkx.DiGraph, into: Node, gone: Node) -> None:
    """Makes two nodes of the quotient graph one."""
    graph.add_edges_from((p, into) for p in graph.predecessors(gone) if p is not into)
    graph.add_edges_from((into, s) for s in graph.successors(gone) if s is not into)
    graph.remove_node(gone)


def _absorb(members: dict[Node, list[Node]], home: dict[Node, Node]) -> None:
    """Cheap operators on smaller shapes join the one region that reads them, and are computed again for every element."""
    for key in reversed(list(members)):
        small = members[key]
        readers = {home[user] for node in small for user in node.users} - {key}
        if len(readers) != 1 or any(node.target not in CHEAP for node in small):
            continue
        region = next(iter(readers))
        if region not in members or not _broadcasts(shape(key), shape(region)):
            continue
        members[region] += members.pop(key)
        for node in small:
            home[node] = region


def _broadcasts(small: tuple[object, ...], large: tuple[object, ...]) -> bool:
    aligned = large[len(large) - len(small) :]
    return len(small) <= len(large) and all(a in (1, b) for a, b in zip(small, aligned, strict=True))


def regions(graph: Graph) -> Iterator[list[Node]]:
    """The regions of a graph, each a list of pointwise nodes of one shape, in order.

    Two neighbours join when no path leads out of the one and into the other: a region is convex, and the graph in which each
    region is one node has no cycle.
    """
    quotient = networkx.DiGraph()
    for node in graph.nodes:
        quotient.add_node(node)
        quotient.add_edges_from((source, node) for source in node.all_input_nodes)
    home = {node: node for node in graph.nodes}
    members = {node: [node] for node in graph.nodes if is_pointwise(node)}
    for node in list(members):
        for source in node.all_input_nodes:
            a, b = home[source], home[node]
            if a is b or a not in members or shape(a) != shape(node):
                continue
            quotient.remove_edge(a, b)
            if networkx.has_path(quotient, a, b):
                quotient.add_edge(a, b)
                continue
            _contract(quotient, a, b)
            members[a] += members.pop(b)
            for member in members[a]:
                home[member] = a
    _absorb(members, home)
    order = {node: at for at, node in enumerate(graph.nodes)}
    for found in members.values():
        yield sorted(found, key=order.__getitem__)


@dataclass(frozen=True)
class FormRegions(Pass):
    """Each region becomes a call of a graph of its own; its inputs broadcast to the shape that all its results have.

    Backends without region kernels leave the graph as it is.
    """

    name: ClassVar[str] = "form-regions"

    def run(self, program: Program, ctx: Context) -> int:
        if not ctx.backend.regions:
            return 0
        count = 0
        for nodes in list(regions(program.graph.graph)):
            if ctx.take():
                self._outline(program, nodes, f"region_{count}")
                count += 1
        if count:
            _sort(program.graph.graph)
        return count

    def _outline(self, program: Program, nodes: list[Node], name: str) -> None:
        inside = set(nodes)
        inputs = list(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in inside))
        results = [node for node in nodes if any(user not in inside for user in node.users)]
        body, copies = Graph(), {}
        for source in inputs:
            copies[source] = body.placeholder(source.name)
            copies[source].meta |= {"val": source.meta["val"]}
        for node in nodes:
            copies[node] = body.node_copy(node, copies.__getitem__)
        body.output(tuple(copies[node] for node in results))
        program.graph.add_submodule(name, GraphModule(torch.nn.Module(), body))
        graph, last = program.graph.graph, nodes[-1]
        with graph.inserting_after(last):
            made = inherit(graph.call_module(name, tuple(inputs)), last, self.name)
        made.meta["val"] = tuple(node.meta["val"] for node in results)
        place = made
        for index, node in enumerate(results):
            with graph.inserting_after(place):
                place = inherit(graph.call_function(operator.getitem, (made, index)), node, self.name)
            place.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(place, delete_user_cb=lambda user: user not in inside)
        for node in reversed(nodes):
            graph.erase_node(node)


def _sort(graph: Graph) -> None:
    """Moves nodes behind what they read, keeping the order otherwise: a region stands where its last member stood."""
    placed: dict[Node, None] = {}
    waiting = list(graph.nodes)
    while waiting:
        later = []
        for node in waiting:
            if all(source in placed for source in node.all_input_nodes):
                placed[node] = None
            else:
                later.append(node)
        waiting = later
    nodes = list(placed)
    for before, node in itertools.pairwise(nodes):
        before.append(node)
