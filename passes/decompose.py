"""Transforms become a part of the linear behind them where the backend can, and else the ATen operators they are made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.ops import parse_transform
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import (
    args_of,
    call,
    erase_unused,
    fake_mode,
    inherit,
    is_call,
    substitute,
    tensor_node,
    unused_name,
    value,
)
from qcompile.passes.linears import Linear, linears
from qcompile.program import Program
from qcompile.transform import transform_from_json
from qcompile.transforms.sparse import Sparse

aten, qc = torch.ops.aten, torch.ops.qcompile


@dataclass(frozen=True)
class Decompose(Pass):
    """A linear takes in as many transforms of its input as the backend has kernels for. Every other `qcompile.transform`, but
    for those that the backend computes by themselves, is replaced by its own eager implementation, traced.
    """

    name: ClassVar[str] = "decompose"

    def run(self, program: Program, ctx: Context) -> int:
        count = sum(self._take_in(linear, ctx) for linear in linears(program))
        for node in program.graph.graph.find_nodes(op="call_function", target=qc.transform.default):
            x, stored, text = node.args
            transform = transform_from_json(json.loads(text))
            if ctx.backend.transform(transform):
                count += isinstance(transform, Sparse) and self._reorder(program, node, ctx)
                continue
            if not ctx.take():
                break
            traced = self._trace(program, value(x), [value(t) for t in stored], text)
            self._inline(node, traced, [x, *stored])
            count += 1
        return count

    def _take_in(self, linear: Linear, ctx: Context) -> int:
        """The number of transforms that the linear has taken in: the last one of its input, the one before it, ..."""
        chain, x = list[Node](), linear.x
        while is_call(x, qc.transform.default) and value(x).dtype == torch.float32:
            chain.insert(0, x)
            (x,) = args_of(x)[:1]
        while chain:
            transforms = [transform_from_json(json.loads(args_of(node)[2])) for node in chain]
            reason = ctx.backend.activation(transforms, linear.formats[0], linear.spec.n, linear.spec.k)
            if reason is None:
                break
            if reason:
                ctx.refuse(self.name, linear.node, reason)
            chain = chain[1:]
        if not chain or not ctx.take():
            return 0
        stored = tuple(tensor for node in chain for tensor in args_of(node)[1])
        spec = replace(linear.spec, before=tuple(transform.to_json() for transform in transforms))
        taken = replace(linear, x=args_of(chain[0])[0], extras=(*linear.extras, *stored), spec=spec)
        substitute(linear.node, taken.written(linear.node, self.name))
        erase_unused(chain)
        return len(chain)

    def _reorder(self, program: Program, node: Node, ctx: Context) -> bool:
        """A sparse matrix behind inputs in another order reads them where they are: its columns are renamed."""
        x, (row, column, number), text = args_of(node)
        if not is_call(x, aten.index_select.default) or args_of(x)[1] not in (-1, value(x).dim() - 1):
            return False
        order = args_of(x)[2]
        if order.op != "get_attr" or column.op != "get_attr" or not ctx.take():
            return False
        name = column.meta["tensor"]
        renamed = program.tensors[order.meta["tensor"]][program.tensors[name].long()].to(torch.int32)
        held = tensor_node(program, unused_name(program, f"{name}.reordered"), renamed)
        made = call(node, qc.transform.default, (args_of(x)[0], [row, held, number], text), self.name)
        substitute(node, made)
        erase_unused([x])
        return True

    def _trace(self, program: Program, x: torch.Tensor, stored: list[torch.Tensor], text: str) -> Graph:
        def eager(x: torch.Tensor, *stored: torch.Tensor) -> torch.Tensor:
            what, tensors = parse_transform(x, stored, text)
            made: torch.Tensor = what.apply(x.to(torch.float32), tensors).to(x.dtype)
            return made

        with fake_mode(program):
            made: Any = make_fx(eager, tracing_mode="fake", _allow_non_fake_inputs=False)(x, *stored)
        graph: Graph = made.graph
        return graph

    def _inline(self, node: Node, traced: Graph, inputs: list[Node]) -> None:
        values: dict[Node, Any] = {}
        given = iter(inputs)
        with node.graph.inserting_before(node):
            for inner in traced.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(given)
                elif inner.op == "output":
                    substitute(node, values[inner.args[0]])
                else:
                    made = node.graph.node_copy(inner, values.__getitem__)
                    made.meta = {"val": inner.meta["val"]}
                    values[inner] = inherit(made, node, self.name)
