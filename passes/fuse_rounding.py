"""The rounding of a linear's result to a type of 16 bits becomes a part of the linear."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import args_of, is_call, substitute
from qcompile.passes.linears import Linear
from qcompile.program import Program
from qcompile.transform import transform_from_json
from qcompile.transforms.cast import RoundTo

qc = torch.ops.qcompile


@dataclass(frozen=True)
class FuseRounding(Pass):
    """A linear that only a `round-to` reads takes it in, if the backend's kernels can."""

    name: ClassVar[str] = "fuse-rounding"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in program.graph.graph.find_nodes(op="call_function", target=qc.transform.default):
            y, _, text = args_of(node)
            transform = transform_from_json(json.loads(text))
            if not isinstance(transform, RoundTo) or not is_call(y, qc.linear.default) or len(y.users) > 1:
                continue
            linear = Linear.of(y)
            reason = ctx.backend.epilogue(linear.formats, transform.dtype)
            if reason is not None:
                ctx.refuse(self.name, y, reason)
            elif ctx.take():
                spec = replace(linear.spec, epilogue=(*linear.spec.epilogue, {"op": transform.dtype}))
                substitute(node, replace(linear, spec=spec).written(node, self.name))
                program.graph.graph.erase_node(y)
                count += 1
        return count
