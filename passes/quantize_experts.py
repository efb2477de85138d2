"""Puts the packed weights of mixtures of experts into the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.artifact import Mixture
from qcompile.experts import ExpertsSpec
from qcompile.format import Packed, format_from_json
from qcompile.methods.base import Quantized, Skip
from qcompile.ops import Part
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import args_of, call, substitute
from qcompile.passes.quantize import Placed, Weights, expert, layer, place, transformed
from qcompile.program import Module, Program
from qcompile.report import WeightRow
from qcompile.transform import Applied

aten, qc = torch.ops.aten, torch.ops.qcompile


@dataclass(frozen=True)
class QuantizeExperts(Pass):
    """Every `qcompile.experts_linear` becomes `qcompile.experts` over packed weights.

    The method decides for the weight of all experts, where it knows such, or for each expert's own layer, where the
    checkpoint has those quantized one by one; else it stays dense. Experts whose methods do different things around the
    matmul become layers of their own, each over all rows, of which every row takes its expert's.
    """

    name: ClassVar[str] = "quantize-experts"

    def run(self, program: Program, ctx: Context) -> int:
        weights = Weights.of(program, ctx)
        count = 0
        for node in program.graph.graph.find_nodes(op="call_function", target=qc.experts_linear.default):
            if not ctx.take():
                break
            module = program.modules[args_of(node)[2].meta["tensor"]]
            ctx.working(self.name, module.path)
            self._replace(program, ctx, node, module, _pack(weights, module))
            count += 1
        return count

    def _replace(self, program: Program, ctx: Context, node: Node, module: Module, parts: list[_Part]) -> None:
        for part in parts:
            part.packed.check(part.module.path)
        placed = [place(program, part.module, part.packed) for part in parts]
        alike = all(other.record.before == placed[0].record.before for other in placed)
        if (
            alike
            and not any(each.residual or each.bias for each in placed)
            and (len(placed) == 1 or not _after(placed))
        ):
            made = self._together(node, module, placed)
        else:
            made = self._apart(node, module, placed)
        made.meta["module"] = module.path
        substitute(node, made)
        for part, each in zip(parts, placed, strict=True):
            quantized = isinstance(part.selected, Quantized)
            assert each.record.origin is not None  # every weight that is placed has one
            origin = replace(each.record.origin, module=part.module, quantized=quantized)
            record = replace(each.record, rows=each.record.n, origin=origin)
            program.weights[part.module.path] = record
        program.mixtures[module.path] = Mixture(module.experts, tuple(part.module.path for part in parts))
        self._report(ctx, module, parts, placed)

    def _together(self, node: Node, module: Module, placed: Sequence[Placed]) -> Node:
        x, expert, _, bias, _ = args_of(node)
        records = [each.record for each in placed]
        for around in placed[0].before:
            x = transformed(node, x, around, self.name)
        parts = tuple(Part(record.format, record.n, len(record.tensors)) for record in records)
        spec = ExpertsSpec(module.experts, module.n, module.k, parts)
        stored = [tensor for each in placed for tensor in each.stored]
        made = call(node, qc.experts.default, (x, expert, stored, bias, spec.to_text()), self.name)
        for around in placed[0].after:
            made = transformed(node, made, around, self.name)
        return made

    def _apart(self, node: Node, module: Module, placed: Sequence[Placed]) -> Node:
        """Each expert's layers over all rows; of every row the result of its own expert is taken."""
        x, expert, _, bias, _ = args_of(node)
        several = len(placed) // module.experts
        result: Any = None
        for number in range(module.experts):
            own = None if bias is None else call(node, aten.select.int, (bias, 0, number), self.name)
            made, row = [], 0
            for each in placed[number * several : (number + 1) * several]:
                rows = each.record.n
                piece = own and call(node, aten.slice.Tensor, (own, 0, row, row + rows), self.name)
                made.append(layer(node, x, piece, each, self.name))
                row += rows
            y = made[0] if several == 1 else call(node, aten.cat.default, (made, 1), self.name)
            if result is not None:
                mine = call(node, aten.eq.Scalar, (expert, number), self.name)
                y = call(
                    node,
                    aten.where.self,
                    (call(node, aten.unsqueeze.default, (mine, 1), self.name), y, result),
                    self.name,
                )
            result = y
        found: Node = result
        return found

    def _report(self, ctx: Context, module: Module, parts: Sequence[_Part], placed: Sequence[Placed]) -> None:
        records = [each.record for each in placed]
        total = sum(format_from_json(r.format).bits_per_weight(r.n, r.k) * r.n * r.k for r in records)
        kinds = dict.fromkeys(record.format["kind"] for record in records)
        reasons = dict.fromkeys(p.selected.reason if isinstance(p.selected, Skip) else p.selected.note for p in parts)
        quantized = any(isinstance(part.selected, Quantized) for part in parts)
        kind = " and ".join(kinds)
        ctx.report.weight(
            WeightRow(
                module.path,
                ctx.report.method if quantized else "none",
                kind,
                module.n,
                module.k,
                kind,
                total / (module.experts * module.n * module.k),
                round(total / 8),
                reason="; ".join(filter(None, reasons)),
                around=placed[0].around,
            )
        )


@dataclass(frozen=True)
class _Part:
    """Rows of a mixture's weight: the layers that they belong to, and what the method did with them."""

    module: Module
    selected: Quantized | Skip
    packed: Packed


def _after(placed: Sequence[Placed]) -> bool:
    return any(each.after for each in placed)


def _pack(weights: Weights, module: Module) -> list[_Part]:
    """The weight of all experts as one part, or as each expert's own layers where they differ."""
    if weights.prequantized and module.parts:
        layers = [weights.modules[path] for path in module.parts]
        decided = [(each, weights.decide(each)) for each in layers]
        return [_Part(each, selected, weights.pack(each, selected)) for each, selected in decided]
    selected = weights.decide(module)
    if isinstance(selected, Skip) or weights.prequantized:
        return [_Part(module, selected, weights.pack(module, selected))]
    found = weights.quantize_experts(module)
    whole = joined(found)
    if whole is not None:
        return [_Part(module, selected, whole)]
    return [_Part(expert(module, e), selected, packed) for e, packed in enumerate(found)]


def joined(parts: Sequence[Packed]) -> Packed | None:
    """The weights one below the other as one, where their format stores each row by itself; None where it does not."""
    first = parts[0]
    if any(part.format != first.format or part.residual or part.bias is not None for part in parts):
        return None
    if not all(_same(part.before, first.before) and _same(part.after, first.after) for part in parts):
        return None
    if any(applied.tensors for applied in first.after):
        return None  # tensors of the outputs, which would have to be joined too
    rows = sum(part.N for part in parts)
    for stored in first.format.stored(rows, first.K):
        shapes = [part.tensors[stored.name].shape for part in parts]
        if stored.shape != (sum(shape[0] for shape in shapes), *shapes[0][1:]):
            return None
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}
    return replace(first, tensors=tensors, N=rows)


def _same(ours: Sequence[Applied], others: Sequence[Applied]) -> bool:
    return len(ours) == len(others) and all(
        a.transform == b.transform and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        for a, b in zip(ours, others, strict=True)
    )
