"""Two nodes that compute the same become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.passes.base import Context, Pass
from qcompile.passes.fold_constants import RANDOM
from qcompile.passes.graph import substitute
from qcompile.program import Program


@dataclass(frozen=True)
class ShareSubexpressions(Pass):
    """Equal operators on equal arguments are computed once, at the first place that needs them."""

    name: ClassVar[str] = "share-subexpressions"

    def run(self, program: Program, ctx: Context) -> int:
        first: dict[tuple[Any, str, str], torch.fx.Node] = {}
        count = 0
        for node in list(program.graph.graph.nodes):
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            schema = node.target._schema
            if schema.is_mutable or any(word in schema.name for word in RANDOM):
                continue
            known = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if known is not node and ctx.take():
                substitute(node, known)
                count += 1
        return count
