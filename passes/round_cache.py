"""Keys and values are rounded as the method says before attention reads them and its cache keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import arguments, call, shape, tensor_node, unused_name
from qcompile.program import Program
from qcompile.transform import Applied

qc = torch.ops.qcompile


@dataclass(frozen=True)
class RoundCache(Pass):
    """The keys (after rotary embedding) and values of every causal `qcompile.attention` go through a transform.

    Which one the method says, for the path of each attention module; most methods leave them as they are.
    """

    name: ClassVar[str] = "round-cache"

    def run(self, program: Program, ctx: Context) -> int:
        if ctx.method is None or ctx.config is None:
            return 0
        count = 0
        for node in program.graph.graph.find_nodes(op="call_function", target=qc.attention.default):
            given, path = arguments(node), node.meta.get("module", "")
            heads, width = shape(given["k"])[1], shape(given["k"])[-1]
            found = ctx.method.cache(ctx.config, path, heads, width, program.source) if given["causal"] else None
            if found is None:
                continue
            if not ctx.take():
                break
            for name in found.claims:
                program.ledger.claim(name, name)
            sides = zip((1, 2), ("k", "v"), (found.k, found.v), strict=True)
            made = {at: self._through(program, node, given[side], each, f"{path}.{side}") for at, side, each in sides}
            node.args = tuple(made.get(at, value) for at, value in enumerate(node.args))
            if found.k:
                how = ", ".join(each.transform.summary() for each in found.k)
                ctx.report.note(f"{path}: keys and values are rounded, {how}")
            count += 1
        return count

    def _through(self, program: Program, node: Node, x: Node, transforms: Sequence[Applied], name: str) -> Node:
        for each in transforms:
            stored = []
            for kept, tensor in each.tensors.items():
                full = unused_name(program, f"{name}_{kept}")
                stored.append(tensor_node(program, full, tensor))
            text = json.dumps(each.transform.to_json())
            x = call(node, qc.transform.default, (x, stored, text), self.name)
        return x
