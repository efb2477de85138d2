"""The template "sparse": x times a sparse matrix, for the outliers of a weight; and its rule.

    y[m, n] = sum over the numbers i of row n of x[m, column[i]] * number[i]

The numbers are sorted by row and column when the model is compiled, so that a program adds those of a row in their order:
nothing is added to memory that others add to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import Dim, times
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.triton.linear_params import MOST
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.target import Target
from qcompile.transform import transform_from_json
from qcompile.transforms.sparse import Sparse

TEMPLATE = "sparse"
_ROWS, _STEP = 4, 64  # rows of x that a program multiplies, and numbers at a time


@dataclass(frozen=True)
class Params:
    """A matrix [n, k] of `count` numbers."""

    n: int
    k: int
    count: int

    def problem(self) -> str:
        return outside(self, n=1 <= self.n <= MOST, k=1 <= self.k <= MOST, count=1 <= self.count <= MOST)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    matrix = [Extent("i32", params.n + 1), Extent("i32", params.count), Extent("f32", params.count)]
    return [Extent("f32", m * params.k), *matrix, Extent("f32", m * params.n, True)]


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: x f32 [M, K], first i32 [N + 1], column i32 [count], number f32 [count], y f32 [M, N]. Dims: M.

    The numbers of row n are those from first[n] to first[n + 1]. What is read of these tensors is held within them, as data may
    say anything.
    """
    p = Params(**params)
    body = f"""
n = tl.program_id(0)
m = (tl.program_id(1) * {_ROWS} + tl.arange(0, {_ROWS}))[:, None]
i = tl.arange(0, {_STEP})[None, :]
start = tl.maximum(tl.load(first + n), 0)
end = tl.minimum(tl.load(first + n + 1), {p.count})
total = tl.zeros(({_ROWS}, {_STEP}), tl.float32)
for i0 in range(start, end, {_STEP}):
    inside = i < end - i0
    k = tl.minimum(tl.maximum(tl.load(column + i0 + i, mask=inside, other=0), 0), {p.k - 1})
    w = tl.load(number + i0 + i, mask=inside, other=0.0)
    total += tl.load(x + m.to(tl.int64) * {p.k} + k, mask=(m < d0) & inside, other=0.0) * w
tl.store(y + m.to(tl.int64) * {p.n} + n, tl.sum(total, 1, keep_dims=True), mask=m < d0)
"""
    about = (
        f"y = x @ W.T, W sparse [{p.n}, {p.k}] with {p.count} numbers\n\nOne program a row of W and {_ROWS} rows of x."
    )
    pointers = {"x": "f32", "first": "i32", "column": "i32", "number": "f32", "y": "f32"}
    grid: tuple[Dim, Dim, Dim] = (p.n, f"(d0 + {_ROWS - 1})//{_ROWS}", 1)
    text = module("sparse", about, list(pointers), 1, body, target)
    return Source(text, "sparse", tuple(pointers.values()), 1, grid, 1, 2)


def lower_transform(node: Node, ctx: Context) -> None:
    """A `qcompile.transform` that multiplies with a sparse matrix."""
    x, stored, text = cast("tuple[Node, list[Node], str]", node.args)
    transform = transform_from_json(json.loads(text))
    if not isinstance(transform, Sparse) or transform.count < 1:
        raise Refuse(f"no kernel makes '{transform.kind}' by itself")
    if ctx.dtype(node) != "f32" or any(item.op != "get_attr" for item in stored):
        raise Refuse(f"a sparse matrix that is computed, or {ctx.dtype(node)} rows")
    names = [item.meta["tensor"] for item in stored]
    row, column, number = (ctx.program.tensors[name] for name in names)
    k = int(x.meta["val"].shape[-1])
    order = torch.argsort(row.long() * k + column.long(), stable=True)
    first = torch.searchsorted(row[order].contiguous(), torch.arange(transform.rows + 1, dtype=row.dtype))
    sorted_ = {"first": first.int(), "column": column[order], "number": number[order].float()}
    views = [ctx.constant(f"{names[0]}.{name}", tensor) for name, tensor in sorted_.items()]
    m = times(*ctx.shape(x)[:-1])
    params = {"n": transform.rows, "k": k, "count": transform.count}
    ctx.emit(ctx.call(TEMPLATE, params, [ctx.contiguous(x, "f32"), *views, ctx.output(node)], (m,), (4,)))
