"""Transforms become the ATen operators that they are made of, for backends whose kernels know only those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.ops import parse_transform
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import fake_mode, inherit, substitute
from qcompile.program import Program

qc = torch.ops.qcompile


@dataclass(frozen=True)
class Decompose(Pass):
    """Every `qcompile.transform` is replaced by its own eager implementation, traced."""

    name: ClassVar[str] = "decompose"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in program.graph.graph.find_nodes(op="call_function", target=qc.transform.default):
            if not ctx.take():
                break
            x, stored, text = node.args
            traced = self._trace(program, x.meta["val"], [t.meta["val"] for t in stored], text)
            self._inline(node, traced, [x, *stored])
            count += 1
        return count

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
