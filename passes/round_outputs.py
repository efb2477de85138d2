"""Outputs of other modules than linear layers are rounded as the method says, and what is rounded once stays as it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import call, is_call, substitute, tensor_node, unused_name
from qcompile.program import Program
from qcompile.transform import Applied, transform_from_json
from qcompile.transforms.round_int import RoundInt
from qcompile.transforms.rounding import Rounding

aten, qc = torch.ops.aten, torch.ops.qcompile
MOVES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.clone.default, aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int,
)  # fmt: skip


@dataclass(frozen=True)
class RoundOutputs(Pass):
    """The output of each module that the method names goes through a transform; then a rounding marked `once` goes away
    where its input comes, only moved, from another one: integers may have gone through a relu as well.
    """

    name: ClassVar[str] = "round-outputs"

    def run(self, program: Program, ctx: Context) -> int:
        if ctx.method is None or ctx.config is None:
            return 0
        count = 0
        for path, output in ctx.method.outputs(ctx.config, program.source).items():
            for name in output.claims:
                program.ledger.claim(name, name)
            calls = (
                n
                for n in reversed(program.graph.graph.nodes)
                if n.op == "call_function" and n.meta.get("module") == path
            )
            last = next(calls, None)
            if last is None:
                ctx.report.note(f"{path}: its output is not in the graph, and not rounded")
                continue
            if not ctx.take():
                return count
            self._round(program, last, output.applied, path)
            ctx.report.note(f"{path}: its output is rounded, {output.applied.transform.summary()}")
            count += 1
        for node in list(program.graph.graph.find_nodes(op="call_function", target=qc.transform.default)):
            if _rounded_already(node) and ctx.take():
                substitute(node, node.args[0])
                count += 1
        return count

    def _round(self, program: Program, last: Node, each: Applied, path: str) -> None:
        stored = [tensor_node(program, unused_name(program, f"{path}.{kept}"), t) for kept, t in each.tensors.items()]
        made = call(
            last.next, qc.transform.default, (last, stored, json.dumps(each.transform.to_json())), self.name, last
        )
        last.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def _once(node: Any) -> Rounding | None:
    """The rounding that a node makes, if it is one marked `once`."""
    if not is_call(node, qc.transform.default):
        return None
    transform = transform_from_json(json.loads(node.args[2]))
    return transform if isinstance(transform, Rounding) and transform.once else None


def _rounded_already(node: Node) -> bool:
    rounding, x = _once(node), node.args[0]
    moves = (*MOVES, aten.relu.default) if isinstance(rounding, RoundInt) else MOVES
    while rounding is not None and is_call(x, *moves):
        x = x.args[0]  # type: ignore[union-attr]
    return rounding is not None and _once(x) is not None
