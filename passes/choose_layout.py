"""Gives every packed weight the layout that the target's kernels read fastest."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from qcompile.backend import Layout
from qcompile.format import Format, Packed, format_from_json
from qcompile.ops import Part, activation_group
from qcompile.original import beside
from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import call, forget, is_call, substitute, tensor_node, unused_name
from qcompile.passes.linears import Linear, owners, packed
from qcompile.program import Program
from qcompile.transform import Transform

aten, qc = torch.ops.aten, torch.ops.qcompile


@dataclass
class _Weight:
    """A packed weight and every node that reads it."""

    stored: tuple[Node, ...]
    format: Format
    n: int
    k: int
    readers: list[Node]


def _weights(program: Program) -> list[_Weight]:
    """Every packed weight that linears and embeddings of one part read."""
    found: dict[tuple[Node, ...], _Weight] = {}
    for node in program.graph.graph.nodes:
        if is_call(node, qc.linear.default):
            linear = Linear.of(node)
            part, stored = next(linear.parts())
            data, n, k = part.format, part.n, linear.spec.k
        elif is_call(node, qc.embedding.default):
            stored, n, k = tuple(node.args[1]), node.args[3], node.args[4]
            data = json.loads(node.args[2])
        else:
            continue
        known = found.setdefault(stored, _Weight(stored, format_from_json(data), n, k, []))
        known.readers.append(node)
    return list(found.values())


def _treatment(weight: _Weight) -> tuple[Transform, ...]:
    """What every reader does to its input before the weight meets it; nothing where they differ."""
    treatments = [
        tuple(Linear.of(node).spec.transforms()) if is_call(node, qc.linear.default) else () for node in weight.readers
    ]
    return treatments[0] if all(each == treatments[0] for each in treatments) else ()


@dataclass(frozen=True)
class ChooseLayout(Pass):
    """Weights that a linear reads are repacked as the backend asks, value for value; the reason is kept where it declines.

    A layout that reorders inputs puts an index_select in front of the linear. Weights that only embeddings read keep their
    rows together. The accuracy of each linear, and how many activations share a scale, depend on the layout: they are
    settled here too.
    """

    name: ClassVar[str] = "choose-layout"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for weight in _weights(program):
            before = packed(program, weight.format, weight.stored, weight.n, weight.k)
            paths = owners(program, weight.stored)
            ctx.working(self.name, paths[0] if paths else weight.stored[0].meta["tensor"])
            layout = self._layout(ctx, weight, before)
            changed = layout.packed is not before and ctx.take()
            if changed:
                self._repack(program, weight, layout, paths)
            self._settle(ctx, weight)
            self._record(ctx, weight, layout if changed else Layout(before, reason=layout.reason), paths)
            count += changed
        return count

    def _layout(self, ctx: Context, weight: _Weight, before: Packed) -> Layout:
        embeddings = [node for node in weight.readers if is_call(node, qc.embedding.default)]
        if len(embeddings) == len(weight.readers):
            return Layout(before)
        layout = ctx.backend.layout(before, _treatment(weight))
        if layout.order is not None and embeddings:
            return Layout(before, reason="an embedding reads the same weight, so its inputs keep their order")
        return layout

    def _repack(self, program: Program, weight: _Weight, layout: Layout, paths: list[str]) -> None:
        after = layout.packed
        base = weight.stored[0].meta["tensor"].rpartition(".")[0]
        names = {}
        for stored in after.format.stored(after.N, after.K):
            names[stored.name] = name = unused_name(program, f"{base}.{stored.name}")
            program.tensors[name] = after.tensors[stored.name]
        nodes = tuple(tensor_node(program, name) for name in names.values())
        order = None
        if layout.order is not None:
            order = self._order(program, f"{base}.order", layout.order)
        wanted = beside(weight.format, weight.n, weight.k)
        kept = {
            s.name: node.meta["tensor"]
            for s, node in zip(weight.format.stored(weight.n, weight.k), weight.stored, strict=True)
            if s.name in wanted
        }
        held = {name: program.tensors[name] for name in kept.values()}
        for path in paths:
            record = program.weights[path]
            program.weights[path] = replace(
                record,
                format=after.format.to_json(),
                tensors=names,
                order=order.meta["tensor"] if order else None,
                origin=None if record.origin is None else replace(record.origin, kept=kept),
            )
        weight.readers = [self._relink(node, nodes, after, order) for node in weight.readers]
        forget(program, weight.stored)
        program.tensors |= held
        weight.stored, weight.format = nodes, after.format

    def _order(self, program: Program, name: str, order: torch.Tensor) -> Node:
        """The stored order; one tensor for all weights that have the same."""
        for held, known in program.tensors.items():
            if ".order" in held and known.dtype == order.dtype and torch.equal(known, order):
                return tensor_node(program, held)
        return tensor_node(program, unused_name(program, name), order)

    def _relink(self, node: Node, stored: tuple[Node, ...], after: Packed, order: Node | None) -> Node:
        if is_call(node, qc.embedding.default):
            args = (node.args[0], list(stored), json.dumps(after.format.to_json()), *node.args[3:])
            made = call(node, qc.embedding.default, args, self.name)
            substitute(node, made)
            return made
        linear = Linear.of(node)
        part = Part(after.format.to_json(), after.N, len(stored))
        spec = replace(linear.spec, parts=(part,))
        x = linear.x
        if order is not None:
            x = call(node, aten.index_select.default, (x, x.meta["val"].dim() - 1, order), self.name)
        made = replace(linear, x=x, stored=stored, spec=spec).written(node, self.name)
        substitute(node, made)
        return made

    def _settle(self, ctx: Context, weight: _Weight) -> None:
        accuracy = ctx.backend.accuracy(weight.format)
        for at, node in enumerate(weight.readers):
            if is_call(node, qc.linear.default):
                linear = Linear.of(node)
                if linear.spec.accuracy != accuracy:
                    group = activation_group(weight.format.group_size(weight.n, weight.k) or weight.k, weight.k)
                    spec = replace(linear.spec, accuracy=accuracy, act_group=group)
                    made = replace(linear, spec=spec).written(node, self.name)
                    substitute(node, made)
                    weight.readers[at] = made

    def _record(self, ctx: Context, weight: _Weight, layout: Layout, paths: list[str]) -> None:
        bits = layout.packed.format.bits_per_weight(weight.n, weight.k)
        for path in paths:
            first = path == paths[0]
            ctx.report.update_weight(
                path,
                layout=layout.packed.format.kind,
                bits=bits,
                bytes=round(bits * weight.n * weight.k / 8) if first else 0,
                reason=layout.reason if first else "",
            )
