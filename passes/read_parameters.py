"""Reads the small tensors that no method packs: norm weights, biases, position tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import set_tensor
from qcompile.program import Program


@dataclass(frozen=True)
class ReadParameters(Pass):
    """Every parameter that is still on the meta device is read from the source, in the dtype the graph has for it.

    CheckpointError when the source's tensor has another shape.
    """

    name: ClassVar[str] = "read-parameters"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in list(program.graph.graph.nodes):
            name = node.meta.get("tensor") if node.op == "get_attr" else None
            if name is None or program.tensors[name].device.type != "meta":
                continue
            set_tensor(program, name, program.load(name, by=name))
            count += 1
        return count
