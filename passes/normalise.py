"""Brings a captured graph to one form: one kind of linear, slices for splits, and nothing that does nothing."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.passes.base import Context, Pass, drop_unused
from qcompile.passes.graph import arguments, call, infer, is_call, same_type, shape, substitute
from qcompile.passes.pattern import Match, Pattern, rewrite
from qcompile.program import Program

aten = torch.ops.aten

NO_OPS = {
    aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default, aten.alias.default,
    aten.detach.default, aten.detach_.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default, aten.to.dtype, aten.slice.Tensor, aten.expand.default, aten.reshape.default,
    aten.expand_as.default,
}  # fmt: skip
"""Operators that give their first argument back when it has the result's type."""

VIEWS = {aten.view.default, aten._unsafe_view.default}
CASTS = {aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default}
NOISE = {aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}


def _is_parameter(node: Any, dims: int) -> bool:
    """True for a stored tensor, or a transposed one."""
    while is_call(node, aten.t.default, aten.transpose.int, aten.permute.default):
        node = node.args[0]
    return isinstance(node, Node) and node.op == "get_attr" and node.meta["val"].dim() == dims


def _weight_is_stored(match: Match) -> str | None:
    return None if _is_parameter(match["w"], 2) else "the second matrix is not a stored weight"


def _addmm(bias: Any, x: Any, w: Any) -> Any:
    return aten.addmm.default(bias, x, w)


def _mm(x: Any, w: Any) -> Any:
    return aten.mm.default(x, w)


def _matmul(x: Any, w: Any) -> Any:
    return aten.matmul.default(x, w)


def _baddbmm(bias: Any, x: Any, w: Any, size: Any) -> Any:
    return aten.baddbmm.default(bias, x, aten.expand.default(aten.unsqueeze.default(w, 0), size))


def _linear(x: Any, w: Any, bias: Any = None) -> Any:
    return aten.linear.default(x, aten.t.default(w), bias)


def _bias_is_a_vector(match: Match) -> str | None:
    reason = _weight_is_stored(match)
    if reason is None and match["bias"].meta["val"].dim() != 1:
        return f"the added tensor has shape {list(shape(match['bias']))}, not [N]"
    return reason


def _flat_linear(x: Any, flat: Any, w: Any, bias: Any, back: Any) -> Any:
    return aten.reshape.default(aten.linear.default(aten.reshape.default(x, flat), w, bias), back)


def _keeps_rows(match: Match) -> str | None:
    before, after, inputs = shape(match["x"]), shape(match.root), shape(match["w"])[1]
    if before[:-1] == after[:-1] and before[-1] == inputs:
        return None
    return "the views around the linear do more than merge rows"


def _double_t(w: Any) -> Any:
    return aten.t.default(aten.t.default(w))


def _outer(column: Any, row: Any) -> Any:
    return aten.matmul.default(column, row)


def _is_outer(match: Match) -> str | None:
    left, right = shape(match["column"]), shape(match["row"])
    return None if len(left) == len(right) > 1 and left[-1] == right[-2] == 1 else ""


def _outer_t(column: Any, row: Any, a: int, b: int) -> Any:
    return aten.transpose.int(aten.mul.Tensor(column, row), a, b)


def _small_factors(match: Match) -> str | None:
    ranks = [match[name].meta["val"].dim() for name in ("column", "row")]
    return None if ranks[0] == ranks[1] else ""


def _t_outer(column: Any, row: Any, a: int, b: int) -> Any:
    return aten.mul.Tensor(aten.transpose.int(column, a, b), aten.transpose.int(row, a, b))


def _doubled(x: Any, table: Any, dim: Any) -> Any:
    product = aten.mul.Tensor(x, table)
    return aten.cat.default([product, product], dim)


def _is_table(match: Match) -> str | None:
    """Angles of a rotary embedding: positions [.., 1] times frequencies [n], once for each half of a head."""
    x, table = match["x"], match["table"]
    if not _is_parameter(table, 1) or shape(x)[-1] != 1 or match["dim"] % len(shape(x)) != len(shape(x)) - 1:
        return ""
    return None


PATTERNS = (
    Pattern("addmm-to-linear", _addmm, lambda bias, x, w: _linear(x, w, bias), _bias_is_a_vector),
    Pattern("baddbmm-to-linear", _baddbmm, lambda bias, x, w, size: _linear(x, w, bias), _bias_is_a_vector),
    Pattern("mm-to-linear", _mm, _linear, _weight_is_stored),
    Pattern("outer-product", _outer, aten.mul.Tensor, _is_outer),
    Pattern("matmul-to-linear", _matmul, _linear, _weight_is_stored),
    Pattern("transposed-twice", _double_t, lambda w: w, shared=frozenset({aten.t.default})),
    Pattern("rows-of-linear", _flat_linear, lambda x, flat, w, bias, back: aten.linear.default(x, w, bias), _keeps_rows),
    Pattern(
        "product-twice", _doubled,
        lambda x, table, dim: aten.mul.Tensor(x, aten.cat.default([table, table], 0)), _is_table,
    ),
    Pattern("transposed-product", _outer_t, _t_outer, _small_factors),
)  # fmt: skip


def _hoist_tensors(program: Program) -> int:
    """Puts every stored tensor at the top, so that any node may read any of them."""
    graph, last = program.graph.graph, None
    for node in list(graph.nodes):
        if node.op == "placeholder" or (node.op == "get_attr" and node.prev is last):
            last = node
        elif node.op == "get_attr" and last is not None:
            last.append(node)
            last = node
    return 0


def _drop_noise(program: Program) -> int:
    dropped = 0
    for node in reversed(program.graph.graph.nodes):
        if node.op == "call_function" and node.target in NOISE and not node.users:
            program.graph.graph.erase_node(node)
            dropped += 1
    return dropped


def _one_spelling(program: Program) -> int:
    """A change of dtype is aten.to.dtype, one of shape aten.reshape: that holds however its input lies in memory, which other
    rewrites may change."""
    count = 0
    for node in list(program.graph.graph.nodes):
        if is_call(node, *VIEWS):
            node.target = aten.reshape.default
            count += 1
        elif is_call(node, *CASTS):
            substitute(node, call(node, aten.to.dtype, (node.args[0], node.meta["val"].dtype), "normalise"))
            count += 1
    return count


def _drop_no_ops(program: Program) -> int:
    count = 0
    for node in list(program.graph.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or not is_call(node, *NO_OPS, aten.add.Tensor, aten.mul.Tensor):
            continue
        neutral = {aten.add.Tensor: 0, aten.mul.Tensor: 1}.get(node.target)
        if neutral is not None and (isinstance(node.args[1], Node) or node.args[1] != neutral):
            continue
        if same_type(node.meta["val"], source.meta["val"]) and arguments(node).get("step", 1) == 1:
            substitute(node, source)
            count += 1
    return count


def _slices(program: Program) -> int:
    """split, chunk, split_with_sizes and unbind become slices and selects of their input."""
    splits = (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
    count = 0
    for node in list(program.graph.graph.nodes):
        if not is_call(node, *splits) or any(user.target is not operator.getitem for user in node.users):
            continue
        source, dim = node.args[0], arguments(node)["dim"] % node.args[0].meta["val"].dim()
        lengths: list[Any] = [
            None if node.target is aten.unbind.int else piece.shape[dim] for piece in node.meta["val"]
        ]
        if not all(isinstance(length, int) or length is None for length in lengths):
            continue
        for user in list(node.users):
            index = user.args[1]
            if node.target is aten.unbind.int:
                made = call(user, aten.select.int, (source, dim, index), "normalise")
            else:
                start = sum(lengths[:index])
                made = call(user, aten.slice.Tensor, (source, dim, start, start + lengths[index]), "normalise")
            substitute(user, made)
            count += 1
        program.graph.graph.erase_node(node)
    return count


@dataclass(frozen=True)
class Normalise(Pass):
    """One form of everything that later passes look for.

    linear, addmm, mm, matmul, baddbmm and Conv1D with a stored weight become `aten.linear(x, w, bias)` with w [N, K], where
    w is a stored tensor or `aten.t` of one; casts become `aten.to.dtype`, views `aten.reshape`; splits become slices;
    operators that change nothing, and checks that export left behind, go.
    """

    name: ClassVar[str] = "normalise"

    def run(self, program: Program, ctx: Context) -> int:
        _hoist_tensors(program)
        total = _drop_noise(program)
        while True:
            count = 0
            for step in (_one_spelling, _drop_no_ops, _slices):
                count += step(program)
                infer(program)
            for pattern in PATTERNS:
                count += rewrite(program, ctx, pattern)
                infer(program)
            drop_unused(program)
            if not count:
                return total
            total += count
