"""`qcompile.linear` nodes as passes read and change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from qcompile.format import Format, Packed, format_from_json
from qcompile.ops import ROUNDED, LinearSpec, Part
from qcompile.passes.graph import call, is_call
from qcompile.program import Program

qc = torch.ops.qcompile


@dataclass(frozen=True)
class Linear:
    """The arguments of a `qcompile.linear` node."""

    node: Node
    x: Node
    stored: tuple[Node, ...]
    extras: tuple[Node, ...]
    spec: LinearSpec

    @staticmethod
    def of(node: Node) -> Linear:
        x, stored, extras, spec = node.args
        return Linear(node, x, tuple(stored), tuple(extras), LinearSpec.from_text(spec))  # type: ignore[arg-type]

    @property
    def formats(self) -> tuple[Format, ...]:
        return tuple(format_from_json(part.format) for part in self.spec.parts)

    @property
    def is_plain(self) -> bool:
        """True for a linear of one part that has taken nothing in but its bias and what its method does to x and to y."""
        return len(self.spec.parts) == 1 and self.spec.prologue is None and self.only_rounds

    @property
    def only_rounds(self) -> bool:
        """True where the result is the product and its bias, rounded or not."""
        return all(step["op"] in ROUNDED for step in self.spec.epilogue)

    @property
    def treatment(self) -> tuple[Node, ...]:
        """The stored tensors of the transforms of x."""
        norms = {"rms_norm": 1, "layer_norm": 2}[self.spec.prologue["op"]] if self.spec.prologue else 0
        first = int(self.spec.bias) + norms
        return self.extras[first : first + sum(len(each.stored(self.spec.k)) for each in self.spec.transforms())]

    def parts(self) -> Iterator[tuple[Part, tuple[Node, ...]]]:
        """Each part with its stored tensors."""
        at = 0
        for part in self.spec.parts:
            yield part, self.stored[at : at + part.tensors]
            at += part.tensors

    def written(self, before: Node, made_by: str) -> Node:
        """A new node with these arguments in front of `before`, with the origin of the old one."""
        args = (self.x, list(self.stored), list(self.extras), self.spec.to_text())
        return call(before, qc.linear.default, args, made_by, like=self.node)


def linears(program: Program) -> list[Linear]:
    """Every linear of the graph, in order."""
    return [Linear.of(node) for node in program.graph.graph.nodes if is_call(node, qc.linear.default)]


def packed(program: Program, format_: Format, stored: Sequence[Node], n: int, k: int) -> Packed:
    """The weight that `stored` holds."""
    names = [item.name for item in format_.stored(n, k)]
    tensors = (program.tensors[node.meta["tensor"]] for node in stored)
    return Packed(format_, dict(zip(names, tensors, strict=True)), n, k)


def owners(program: Program, stored: Sequence[Node]) -> list[str]:
    """The paths of the modules whose weight `stored` holds."""
    names = [node.meta["tensor"] for node in stored]
    return [path for path, record in program.weights.items() if list(record.tensors.values()) == names]
