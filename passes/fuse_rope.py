"""Rotary embeddings become `qcompile.rope`, and then a part of the attention that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import arguments, infer, is_call, shape
from qcompile.passes.pattern import Match, Pattern, rewrite
from qcompile.program import Program

aten, qc = torch.ops.aten, torch.ops.qcompile
mul = aten.mul.Tensor
VIEWS = frozenset({aten.unsqueeze.default, aten.slice.Tensor})


def _rotated(
    x: Any, cos: Any, sin: Any, at: Any, dim1: Any, end1: Any, dim2: Any, start2: Any, end2: Any, cat: Any
) -> Any:
    turned = aten.cat.default(
        [aten.neg.default(aten.slice.Tensor(x, dim2, start2, end2)), aten.slice.Tensor(x, dim1, 0, end1)], cat
    )
    return aten.add.Tensor(mul(x, aten.unsqueeze.default(cos, at)), mul(turned, aten.unsqueeze.default(sin, at)))


def _halves(match: Match) -> str | None:
    width = shape(match["x"])[-1]
    last = {3, -1}
    if not {match["dim1"], match["dim2"], match["cat"]} <= last or match["at"] not in (1, 2):
        return "the halves are not those of the last dimension"
    if not isinstance(width, int) or match["end1"] != width // 2 or match["start2"] != width // 2:
        return f"the parts that trade places are not the halves of {width}"
    if shape(match["cos"])[-1] != width or match["cos"].meta["val"].dim() != 3:
        return f"cos has shape {list(shape(match['cos']))}, not [b, s, {width}]"
    return None


def _rope(x: Any, cos: Any, sin: Any, at: int, *_: Any) -> Any:
    if at == 1:
        return qc.rope.default(x, cos, sin)
    return aten.transpose.int(qc.rope.default(aten.transpose.int(x, 1, 2), cos, sin), 1, 2)


def _partial(x: Any, cos: Any, sin: Any, dim1: Any, width: Any, dim2: Any, rest: Any, cat: Any) -> Any:
    return aten.cat.default(
        [qc.rope.default(aten.slice.Tensor(x, dim1, 0, width), cos, sin), aten.slice.Tensor(x, dim2, width, rest)], cat
    )


def _first_columns(match: Match) -> str | None:
    last = {match["dim1"] % 4, match["dim2"] % 4, match["cat"] % 4} == {3}
    whole = shape(match["cos"])[-1] == match["width"] and shape(match.root) == shape(match["x"])
    return None if last and whole else "the turned part is not the first columns of the head"


def _transposed_twice(x: Any) -> Any:
    return aten.transpose.int(aten.transpose.int(x, 1, 2), 1, 2)


PATTERNS = (
    Pattern("rope", _rotated, _rope, _halves, shared=VIEWS, key=aten.neg.default),
    Pattern(
        "rope-of-first-columns", _partial, lambda x, cos, sin, *_: qc.rope.default(x, cos, sin), _first_columns,
        shared=frozenset({aten.slice.Tensor}), key=qc.rope.default,
    ),
    Pattern("transposed-twice", _transposed_twice, lambda x: x, shared=frozenset({aten.transpose.int})),
)  # fmt: skip


@dataclass(frozen=True)
class FuseRope(Pass):
    """x * cos + rotate_half(x) * sin becomes `qcompile.rope`; where both q and k of a cached attention are such, with the
    same tables, the attention turns them itself, as it writes k to its cache."""

    name: ClassVar[str] = "fuse-rope"

    def run(self, program: Program, ctx: Context) -> int:
        count = 0
        for pattern in PATTERNS:
            count += rewrite(program, ctx, pattern)
            infer(program)
        for node in list(program.graph.graph.nodes):
            if is_call(node, qc.cached_attention.default):
                count += self._into_attention(node, ctx)
        return count

    def _into_attention(self, node: torch.fx.Node, ctx: Context) -> int:
        given = arguments(node)
        q, k = given["q"], given["k"]
        if given["cos"] is not None or not (is_call(q, qc.rope.default) or is_call(k, qc.rope.default)):
            return 0
        if not (is_call(q, qc.rope.default) and is_call(k, qc.rope.default)) or q.args[1:] != k.args[1:]:
            ctx.refuse("rope-in-attention", node, "q and k are not turned by the same tables")
            return 0
        if len(q.users) > 1 or len(k.users) > 1:
            ctx.refuse("rope-in-attention", node, "the turned q or k is used elsewhere too")
            return 0
        if not ctx.take():
            return 0
        node.args = (q.args[0], k.args[0], node.args[2], *q.args[1:], *node.args[5:])
        return 1
