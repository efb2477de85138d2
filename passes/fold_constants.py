"""Computes once, now, what depends on stored tensors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import inherit, substitute, tensor_node, unused_name
from qcompile.program import Program

RANDOM = ("rand", "bernoulli", "normal", "multinomial", "dropout", "empty")


def _sized(value: Any) -> bool:
    """True for a tensor whose sizes are numbers."""
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)


def _has_symbol(node: Node) -> bool:
    found: list[Any] = []
    torch.fx.node.map_aggregate((node.args, node.kwargs), lambda item: found.append(isinstance(item, torch.SymInt)))
    return any(found)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """A node all of whose inputs are stored tensors becomes a stored tensor.

    Results larger than `largest` elements and larger than all their inputs are left to be computed, and packed weights
    are never unpacked here.
    """

    name: ClassVar[str] = "fold-constants"
    largest: int = 1 << 20

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in list(program.graph.graph.nodes):
            if not self._constant(program, node):
                continue
            inputs = sum(source.meta["val"].numel() for source in node.all_input_nodes)
            size = node.meta["val"].numel()
            if size > max(self.largest, inputs):
                ctx.refuse(self.name, node, f"the result has {size} elements, its inputs have {inputs}")
                continue
            if not ctx.take():
                break
            with torch.no_grad():
                args, kwargs = map_arg((node.args, node.kwargs), lambda source: program.tensors[source.meta["tensor"]])
                value = node.target(*args, **kwargs).detach().contiguous()
            if size < inputs and value.untyped_storage().nbytes() > value.nbytes:
                value = value.clone()  # a window of a large tensor would keep all of it
            made = tensor_node(program, unused_name(program, f"constant.{node.name}"), value)
            substitute(node, inherit(made, node, self.name))
            count += 1
        return count

    def _constant(self, program: Program, node: Node) -> bool:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return False
        schema = node.target._schema
        if node.target.namespace != "aten" or schema.is_mutable or any(w in schema.name for w in RANDOM):
            return False
        stored = all(
            source.op == "get_attr" and not program.tensors[source.meta["tensor"]].is_meta
            for source in node.all_input_nodes
        )
        return stored and _sized(node.meta.get("val")) and not _has_symbol(node)
