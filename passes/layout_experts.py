"""Gives the packed weight of a mixture of experts the layout that the target's kernels read fastest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.artifact import WeightRecord
from qcompile.experts import ExpertsSpec
from qcompile.format import Format, Packed, format_from_json
from qcompile.ops import Part
from qcompile.original import beside
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import args_of, call, forget, substitute, tensor_node, unused_name
from qcompile.passes.linears import packed
from qcompile.program import Program

qc = torch.ops.qcompile


@dataclass(frozen=True)
class _Piece:
    """One part of the weight: the record of the layers that it belongs to, and where it is stored."""

    path: str
    record: WeightRecord
    nodes: tuple[Node, ...]
    format: Format


@dataclass(frozen=True)
class LayoutExperts(Pass):
    """All parts of a mixture's weight are repacked as the backend asks and laid one below the other, value for value.

    Where one part has no such layout, or another one than the rest, all stay as they are, and the report says why.
    """

    name: ClassVar[str] = "layout-experts"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for node in program.graph.graph.find_nodes(op="call_function", target=qc.experts.default):
            spec = ExpertsSpec.from_text(args_of(node)[4])
            pieces = list(_pieces(program, node, spec))
            path = node.meta["module"]
            ctx.working(self.name, path)
            made = self._layout(ctx, program, pieces, spec.k)
            if isinstance(made, str):
                ctx.report.update_weight(path, reason=made)
            elif made is not None and ctx.take():
                self._replace(program, ctx, node, spec, pieces, made)
                count += 1
        return count

    def _layout(self, ctx: Context, program: Program, pieces: Sequence[_Piece], k: int) -> Packed | str | None:
        """The whole weight in one layout; the reason why it has none; None where it has it already."""
        found: list[Packed] = []
        for piece in pieces:
            before = packed(program, piece.format, piece.nodes, piece.record.n, k)
            layout = ctx.backend.layout(before)
            if layout.reason:
                return layout.reason
            if layout.order is not None:
                return "its inputs would have to be reordered"
            if layout.packed is before and len(pieces) == 1:
                return None
            found.append(layout.packed)
        if len(found) == 1:
            return found[0]
        problem = ctx.backend.may_join([(each.format, each.N) for each in found])
        joined = ctx.backend.join(found) if problem is None else ()
        return joined[0] if len(joined) == 1 else problem or f"its {len(found)} parts have codebooks of their own"

    def _replace(
        self, program: Program, ctx: Context, node: Node, spec: ExpertsSpec, pieces: Sequence[_Piece], made: Packed
    ) -> None:
        path = node.meta["module"]
        names = {}
        for stored in made.format.stored(made.N, made.K):
            names[stored.name] = name = unused_name(program, f"{path}.{stored.name}")
            program.tensors[name] = made.tensors[stored.name]
        nodes = [tensor_node(program, name) for name in names.values()]
        row = 0
        held: dict[str, torch.Tensor] = {}
        for piece in pieces:
            wanted = beside(piece.format, piece.record.n, made.K)
            kept = {name: tensor for name, tensor in piece.record.tensors.items() if name in wanted}
            held |= {tensor: program.tensors[tensor] for tensor in kept.values()}
            origin = piece.record.origin and replace(piece.record.origin, kept=kept)
            program.weights[piece.path] = replace(
                piece.record, format=made.format.to_json(), tensors=names, n=made.N, row=row, origin=origin
            )
            row += piece.record.rows
        x, expert, _, bias, _ = args_of(node)
        part = Part(made.format.to_json(), made.N, len(nodes))
        text = replace(spec, parts=(part,)).to_text()
        new = call(node, qc.experts.default, (x, expert, nodes, bias, text), self.name)
        substitute(node, new)
        forget(program, [item for piece in pieces for item in piece.nodes])
        program.tensors |= held
        bits = made.format.bits_per_weight(made.N, made.K)
        ctx.report.update_weight(
            path, layout=made.format.kind, bits=bits, bytes=round(bits * made.N * made.K / 8), reason=""
        )


def _pieces(program: Program, node: Node, spec: ExpertsSpec) -> Iterator[_Piece]:
    stored: list[Any] = list(args_of(node)[2])
    paths = program.mixtures[node.meta["module"]].parts
    for path, part in zip(paths, spec.parts, strict=True):
        own, stored = tuple(stored[: part.tensors]), stored[part.tensors :]
        yield _Piece(path, program.weights[path], own, format_from_json(part.format))
