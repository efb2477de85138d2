"""The template "embedding": rows of a packed table, any format, decoded as they are gathered; and its rule.

y[t, k] = W[ids[t], k]
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.format import format_from_json
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.extents import numbers
from qcompile.lowering.triton import text
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.linear import Pointer, types
from qcompile.lowering.triton.linear_params import problem_of
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.weights import Tables, Tile
from qcompile.target import Target

TEMPLATE = "embedding"
ROWS, INPUTS = 4, 256  # of one program


@dataclass(frozen=True)
class Params:
    """A table [n, k] in a format."""

    format: dict[str, Any]
    n: int
    k: int

    def problem(self) -> str:
        return problem_of(format_from_json(self.format), self.n, self.k)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (count,) = numbers(dims, 1)
    format = format_from_json(params.format)
    stored = [Extent(item.dtype, math.prod(item.shape)) for item in format.stored(params.n, params.k)]
    tables = Tables.of([(format, params.n, params.k)]).extents
    return [Extent("i64", count), Extent("f32", count * params.k, True), *stored, *tables]


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: ids i64 [T], y f32 [T, k], the stored tensors, the tables. Dims: T. An id outside of the table gives NaN."""
    format, n, k = format_from_json(params["format"]), params["n"], params["k"]
    block_k = min(INPUTS, 1 << (k - 1).bit_length())
    tables = Tables.of([(format, n, k)])
    stored = [Pointer(f"w_{item.name}", item.dtype) for item in format.stored(n, k)]
    pointers = [Pointer("ids", "i64"), Pointer("y", "f32"), *stored, *tables.pointers]
    tile = Tile(format, (n, k), block_k)
    taken = {"t", "t_in", "given", "n", "j", "k", "k0", "k_in", "w", *(pointer.name for pointer in pointers)}
    render, value = tile.renderer(target, stored, tables, taken)
    lines = [
        f"t = tl.program_id(0) * {ROWS} + tl.arange(0, {ROWS})[:, None]",
        "t_in = t < d0",
        "given = tl.load(ids + t, mask=t_in, other=0)",
        f"n = tl.minimum(tl.maximum(given, 0), {n - 1}).to(tl.int32)",
        f"j = tl.arange(0, {block_k})[None, :]",
        *[f"k0 = tl.program_id(1) * {block_k}"] * tile.looped,
        "k = k0 + j" if tile.looped else "k = j",
        *[f"k_in = k < {k}"] * tile.ragged,
        *render.once,
        *render.lines,
        f"w = tl.where(given == n, {value}, float('nan'))",
        f"tl.store(y + t.to(tl.int64) * {k} + k, w, mask={'t_in & k_in' if tile.ragged else 't_in'})",
    ]
    body = "\n".join(lines)
    about = f"y[t, k] = W[ids[t], k], W [{n}, {k}] in {format}"
    made = text.module(
        TEMPLATE, about, [pointer.name for pointer in pointers], 1, body, target, functions(body)
    )  # fmt: skip
    grid = (f"(d0 + {ROWS - 1})//{ROWS}", -(-k // block_k), 1)
    return Source(made, TEMPLATE, types(pointers), 1, grid, fusion=False)


def lower_embedding(node: Node, ctx: Context) -> None:
    """`qcompile.embedding` as one call."""
    ids, stored, form, n, k = cast("tuple[Node, list[Node], str, int, int]", node.args)
    format = format_from_json(json.loads(form))
    if ctx.dtype(node) != "f32":
        raise Refuse(f"the embedding kernel writes f32, not {ctx.dtype(node)}")
    if problem := problem_of(format, n, k):
        raise Refuse(f"no text for {problem}")
    views = [*(ctx.view(item) for item in stored), *Tables.of([(format, n, k)]).views(ctx)]
    args = [ctx.contiguous(ids, "i64"), ctx.output(node), *views]
    call = ctx.call(TEMPLATE, {"format": json.loads(form), "n": n, "k": k}, args, (times(*ctx.shape(ids)),), (1,))
    ctx.emit(call)
    ctx.serves([item.meta["tensor"] for item in stored], call.kernel, "generic")
