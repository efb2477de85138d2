"""Convolutions become linear maps of windows of their input: views, where channels lie innermost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from qcompile.dtypes import DTYPES, NAMES
from qcompile.format import Packed
from qcompile.formats.dense import Dense
from qcompile.methods.base import Skip
from qcompile.passes.base import Context, Pass
from qcompile.passes.fuse_epilogue import ACTIVATIONS
from qcompile.passes.graph import arguments, call, is_call, substitute, value
from qcompile.passes.quantize import Placed, keep_record, layer, place
from qcompile.program import Module, Program

aten = torch.ops.aten
CONVOLUTIONS = tuple(
    op for n in (1, 2, 3) for op in (getattr(aten, f"conv{n}d").default, getattr(aten, f"conv{n}d").padding)
)


@dataclass(frozen=True)
class Convolutions(Pass):
    """A convolution of one group with a stored weight [N, C, *window] is a linear with a weight [N, K].

    Its input is padded, with its channels innermost, and seen as windows [.., *places, K], K = window * C: those of one axis
    are runs that overlap. The permutation of its result goes behind the activations that follow.
    """

    name: ClassVar[str] = "convolutions"

    def run(self, program: Program, ctx: Context) -> int:
        placed: dict[str, Placed] = {}
        count = 0
        for node in list(program.graph.graph.nodes):
            if not is_call(node, *CONVOLUTIONS):
                continue
            given = arguments(node)
            reason = _problem(program, given)
            if reason:
                ctx.refuse(self.name, node, reason)
                continue
            if not ctx.take():
                break
            name = given["weight"].meta["tensor"]
            if name not in placed:
                placed[name] = self._place(program, ctx, name)
            self._rewrite(node, given, placed[name])
            count += 1
        return count

    def _place(self, program: Program, ctx: Context, name: str) -> Placed:
        """The weight as a matrix, in the dtype that the source has it in."""
        weight, stored = program.load(name, by=name), program.source.info(name)
        matrix = weight.movedim(1, -1).flatten(1).contiguous()
        if stored.dtype in ("f16", "bf16"):
            matrix = matrix.to(DTYPES[stored.dtype])
        n, k = matrix.shape
        path = name.removesuffix(".weight")
        module = Module(path, "Convolution", n, k, name, dtype=NAMES[matrix.dtype], window=tuple(weight.shape[2:]))
        made = place(program, module, Packed(Dense(NAMES[matrix.dtype]), {"weight": matrix}, n, k))
        keep_record(program, ctx, module, Skip("a convolution, which methods leave as it is"), made)
        return made

    def _rewrite(self, node: Node, given: dict[str, Any], placed: Placed) -> None:
        x = given["input"]
        window = value(given["weight"]).shape[2:]
        last = value(x).dim() - 1
        first = last - len(window)  # the axis of channels, and then the first one of places
        x = call(node, aten.permute.default, (x, [*range(first), *range(first + 1, last + 1), first]), self.name)
        x = self._windows(node, x, first, window, given)
        y = layer(node, x, given["bias"], placed, self.name)
        back = [*range(first), last, *range(first, last)]
        moved = call(node, aten.permute.default, (y, back), self.name)
        substitute(node, moved)
        self._behind_activations(moved, back)

    def _windows(self, node: Node, x: Node, first: int, window: Sequence[int], given: dict[str, Any]) -> Node:
        """[.., *places, K] of x [.., *sizes, C], whose places begin at axis `first`."""
        axes = len(window)
        stride, dilation = (_each(given[name], axes) for name in ("stride", "dilation"))
        reach = [step * (size - 1) + 1 for step, size in zip(dilation, window, strict=True)]
        pads = _padding(given["padding"], reach)
        if any(pads):
            x = call(node, aten.constant_pad_nd.default, (x, [0, 0, *pads]), self.name)
        for axis in range(axes):
            x = call(node, aten.unfold.default, (x, first + axis, reach[axis], stride[axis]), self.name)
            if dilation[axis] != 1:
                x = call(
                    node, aten.slice.Tensor, (x, first + axes + 1 + axis, 0, reach[axis], dilation[axis]), self.name
                )
        channels = first + axes
        order = [*range(channels), *range(channels + 1, channels + 1 + axes), channels]
        x = call(node, aten.permute.default, (x, order), self.name)
        return call(node, aten.flatten.using_ints, (x, channels, -1), self.name)

    def _behind_activations(self, moved: Node, order: list[int]) -> None:
        while len(moved.users) == 1 and next(iter(moved.users)).target in ACTIVATIONS:
            (user,) = moved.users
            (y, _) = moved.args
            made = call(user, user.target, (y, *user.args[1:]), self.name, like=user)
            made.kwargs = user.kwargs
            again = call(user, aten.permute.default, (made, order), self.name, like=moved)
            substitute(user, again)
            moved.graph.erase_node(moved)
            moved = again


def _problem(program: Program, given: dict[str, Any]) -> str:
    """Why a convolution with these arguments is left as it is; empty when it becomes a linear."""
    if given["weight"].meta.get("tensor") not in program.source.names():
        return "the weight is not a tensor of the source"
    return f"a convolution of {given['groups']} groups" if given["groups"] != 1 else ""


def _each(given: int | Sequence[int], count: int) -> list[int]:
    """One number for each axis; torch takes one for all."""
    values = [given] if isinstance(given, int) else list(given)
    return values * count if len(values) == 1 else values


def _padding(given: int | str | Sequence[int], reach: Sequence[int]) -> list[int]:
    """Numbers of zeros before and behind each axis, the last axis first; "same" keeps as many places as there are inputs."""
    if isinstance(given, str):
        pairs = [((size - 1) // 2, size // 2) if given == "same" else (0, 0) for size in reach]
    else:
        pairs = [(count, count) for count in _each(given, len(reach))]
    return [count for pair in reversed(pairs) for count in pair]
