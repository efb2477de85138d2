"""Linears that read the same input become one: q, k and v; gate and up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.format import Packed
from qcompile.ops import Part
from qcompile.passes.base import Context, Pass
from qcompile.passes.fuse_epilogue import ACTIVATIONS
from qcompile.passes.graph import args_of, call, forget, infer, is_call, substitute, tensor_node, unused_name
from qcompile.passes.linears import Linear, linears, owners, packed
from qcompile.program import Program

aten = torch.ops.aten


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation_of(linear: Linear) -> Node | None:
    """The activation that alone reads a linear."""
    user = _only_user(linear.node)
    return user if user is not None and user.target in ACTIVATIONS else None


def _gated(members: list[Linear]) -> list[list[Linear]]:
    """Pairs (gate, up) with act(gate(x)) * up(x)."""
    by_node = {linear.node: linear for linear in members}
    pairs = []
    for gate in members:
        activation = _activation_of(gate)
        product = _only_user(activation) if activation is not None else None
        if product is not None and is_call(product, aten.mul.Tensor):
            up = next((by_node[arg] for arg in args_of(product) if arg in by_node), None)
            if up is not None and len(up.node.users) == 1:
                pairs.append([gate, up])
    return pairs


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Linears of one input, treated alike, and of layouts that the backend can join become one; slices give each its columns.

    A gate and the linear that it multiplies are merged in this order, [gate; up], with each other only. Other linears whose
    only reader is an activation stay, so that they can take it in.
    """

    name: ClassVar[str] = "merge-linears"
    max_members: int = 8

    def run(self, program: Program, ctx: Context) -> int:
        by_input: dict[tuple[Any, ...], list[Linear]] = {}
        for linear in linears(program):
            if linear.is_plain and all(extra.op == "get_attr" for extra in linear.extras):
                treated = (json.dumps([linear.spec.before, linear.spec.epilogue]), linear.treatment)
                by_input.setdefault((linear.x, linear.spec.accuracy, *treated), []).append(linear)
        count = 0
        for members in by_input.values():
            for group in self._groups(program, members, ctx):
                if ctx.take():
                    self._merge(program, ctx, group)
                    count += 1
        return count

    def _groups(self, program: Program, members: list[Linear], ctx: Context) -> list[list[Linear]]:
        candidates = []
        for linear in members:
            shared = [s.name for s in linear.stored if len(s.users) > 1]
            if len(members) > 1 and shared:
                ctx.refuse(self.name, linear.node, f"its weight is read elsewhere too ({', '.join(shared)})")
            else:
                candidates.append(linear)
        groups = [pair for pair in _gated(candidates) if self._joins(ctx, pair, refuse=True)]
        taken = {linear.node for pair in _gated(candidates) for linear in pair}
        buckets: list[list[Linear]] = []
        for linear in candidates:
            if linear.node in taken or _activation_of(linear) is not None:
                continue
            bucket = next((b for b in buckets if len(b) < self.max_members and self._joins(ctx, [*b, linear])), None)
            if bucket is not None:
                bucket.append(linear)
            else:
                if buckets:
                    self._joins(ctx, [*buckets[-1], linear], refuse=True)
                buckets.append([linear])
        return groups + [bucket for bucket in buckets if len(bucket) > 1]

    def _joins(self, ctx: Context, members: list[Linear], *, refuse: bool = False) -> bool:
        reason = ctx.backend.may_join([(m.formats[0], m.spec.n) for m in members])
        if reason is not None and refuse:
            ctx.refuse(self.name, members[-1].node, reason)
        return reason is None

    def _merge(self, program: Program, ctx: Context, group: Sequence[Linear]) -> None:
        members = {m.node for m in group}
        first = next(node for node in program.graph.graph.nodes if node in members)
        weights = [packed(program, m.formats[0], m.stored, m.spec.n, m.spec.k) for m in group]
        paths = [owners(program, m.stored) for m in group]
        joined = ctx.backend.join(weights)
        if len(joined) == 1:
            name = self._name(
                program, [p[0] if p else m.stored[0].meta["tensor"] for p, m in zip(paths, group, strict=True)]
            )
            stored = self._store(program, joined[0], name)
            row = 0
            for member, modules in zip(group, paths, strict=True):
                for path in modules:
                    names = dict(zip(joined[0].tensors, (node.meta["tensor"] for node in stored), strict=True))
                    record = program.weights[path]
                    program.weights[path] = replace(record, tensors=names, n=joined[0].N, row=row)
                row += member.spec.n
        else:
            stored = [node for m in group for node in m.stored]
        parts = tuple(
            Part(part.format.to_json(), part.N, len(part.format.stored(part.N, part.K))) for part in joined
        )  # fmt: skip
        bias = self._bias(program, group)
        spec = replace(group[0].spec, parts=parts, bias=bias is not None)
        extras = ((bias,) if bias else ()) + group[0].treatment
        whole = replace(group[0], stored=tuple(stored), extras=extras, spec=spec).written(first, self.name)
        infer(program, [whole])
        self._slice(group, whole)
        if len(joined) == 1:
            forget(program, [node for m in group for node in m.stored])

    def _slice(self, group: Sequence[Linear], whole: Node) -> None:
        row, last, place = 0, whole.meta["val"].dim() - 1, whole.next
        for member in group:
            args = (whole, last, row, row + member.spec.n)
            made = call(place, aten.slice.Tensor, args, self.name, like=member.node)
            substitute(member.node, made)
            place = made.next
            row += member.spec.n

    def _name(self, program: Program, paths: list[str]) -> str:
        """`a.b.gate_proj_up_proj` for a.b.gate_proj and a.b.up_proj."""
        base = []
        for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
            if len(set(names)) > 1:
                break
            base.append(names[0])
        return ".".join([*base, "_".join(path.rpartition(".")[2] for path in paths)])

    def _store(self, program: Program, weight: Packed, name: str) -> list[Node]:
        return [
            tensor_node(program, unused_name(program, f"{name}.{stored}"), tensor)
            for stored, tensor in weight.tensors.items()
        ]

    def _bias(self, program: Program, group: Sequence[Linear]) -> Node | None:
        """The biases one below the other, zeros where a linear has none."""
        if not any(m.spec.bias for m in group):
            return None
        biases = [
            program.tensors[m.extras[0].meta["tensor"]].float() if m.spec.bias else torch.zeros(m.spec.n) for m in group
        ]
        names = [m.extras[0].meta["tensor"] if m.spec.bias else m.stored[0].meta["tensor"] for m in group]
        name = self._name(program, [tensor.rpartition(".")[0] for tensor in names])
        return tensor_node(program, unused_name(program, f"{name}.bias"), torch.cat(biases))
