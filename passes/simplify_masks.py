"""Attention masks as models build them, without the detours: gathers that only line dimensions up, and masks of nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.passes.base import Context, Pass
from qcompile.passes.graph import args_of, arguments, call, infer, is_call, shape, substitute
from qcompile.program import Program

aten = torch.ops.aten
VIEWS = (aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.slice.Tensor)
ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)
ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)


def _root(node: Any) -> Any:
    """What `node` is a view of."""
    while is_call(node, *VIEWS):
        node = node.args[0]
    return node


def _is_arange(node: Any) -> bool:
    """True for the numbers 0, 1, 2, ..."""
    return is_call(node, aten.arange.default)


def _is_true(program: Program, node: Any) -> bool:
    """True for a bool tensor without a False, as far as one can see."""
    if not isinstance(node, Node) or node.meta["val"].dtype != torch.bool:
        return False
    root = _root(node)
    if root.op == "get_attr":
        held = program.tensors[root.meta["tensor"]]
        return not held.is_meta and bool(held.all())
    if is_call(root, *ANDS):
        return all(_is_true(program, arg) for arg in root.args)
    counts = is_call(root, aten.ge.Scalar) and _is_arange(_root(root.args[0])) and root.args[1] <= 0
    return counts or is_call(root, *ONES)


def _lined_up(node: Node) -> list[int] | None:
    """For x[i0, i1, ...] that takes every element once: the axes of the result at which dimensions of size 1 are put in.

    Each index must count 0, 1, ... through its whole dimension along an axis of its own, in the order of x's dimensions.
    """
    x, indices = args_of(node)
    sizes, rank = shape(x), node.meta["val"].dim()
    axes: list[int] = []
    if len(indices) != len(sizes) or rank < len(sizes):
        return None
    for index, size in zip(indices, sizes, strict=True):
        if index is None or not _is_arange(_root(index)) or shape(_root(index)) != (size,):
            return None
        wide = [axis for axis, length in enumerate(shape(index), rank - len(shape(index))) if length != 1]
        if len(wide) != 1 or (axes and wide[0] <= axes[-1]) or shape(index)[wide[0] - rank] != size:
            return None
        axes.append(wide[0])
    return [axis for axis in range(rank) if axis not in axes]


@dataclass(frozen=True)
class SimplifyMasks(Pass):
    """mask[arange, arange] becomes a view, `true & mask` the mask, and attention under a mask of all True needs none."""

    name: ClassVar[str] = "simplify-masks"

    def run(self, program: Program, ctx: Context) -> int:
        total = 0
        for node in list(program.graph.graph.nodes):
            count = 0
            if is_call(node, aten.index.Tensor):
                count = self._index(node, ctx)
            elif is_call(node, *ANDS):
                count = self._and(program, node, ctx)
            elif is_call(node, aten.scaled_dot_product_attention.default):
                count = self._attention(program, node, ctx)
            if count:
                infer(program)
            total += count
        return total

    def _attention(self, program: Program, node: Node, ctx: Context) -> int:
        if not _is_true(program, arguments(node)["attn_mask"]) or not ctx.take():
            return 0
        node.args = node.args[:3] + tuple(None if at == 0 else x for at, x in enumerate(node.args[3:]))
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
        return 1

    def _index(self, node: Node, ctx: Context) -> int:
        axes = _lined_up(node)
        if axes is None or not ctx.take():
            return 0
        made = args_of(node)[0]
        for axis in axes:
            made = call(node, aten.unsqueeze.default, (made, axis), self.name)
        substitute(node, made)
        return 1

    def _and(self, program: Program, node: Node, ctx: Context) -> int:
        for other, mask in ((0, 1), (1, 0)):
            if _is_true(program, node.args[other]) and ctx.take():
                substitute(node, self._expanded(program, node, args_of(node)[mask]))
                return 1
        return 0

    def _expanded(self, program: Program, node: Node, mask: Node) -> Node:
        """`mask` in the shape of `node`."""
        wanted = shape(node)
        had = (None,) * (len(wanted) - len(shape(mask))) + shape(mask)
        if had == wanted:
            return mask
        sizes = [
            -1 if before == size else size if isinstance(size, int) else self._size(program, node, size)
            for before, size in zip(had, wanted, strict=True)
        ]
        return call(node, aten.expand.default, (mask, sizes), self.name)

    def _size(self, program: Program, node: Node, size: Any) -> Node:
        """A node for a symbolic size that an input of the graph has, or else `node` itself gives."""
        for source in program.graph.graph.nodes:
            if source.op == "placeholder" and size in shape(source):
                return call(node, aten.sym_size.int, (source, shape(source).index(size)), self.name)
        source = next(arg for arg in args_of(node) if size in shape(arg))
        return call(node, aten.sym_size.int, (source, shape(source).index(size)), self.name)
