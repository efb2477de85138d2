"""The template "dequantize": a packed weight decoded once, any format; and its rule.

    y[n, k] = W[n, k]

It is what `qcompile.dequantize` becomes, and the first step of a linear that multiplies many rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.format import format_from_json
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.extents import numbers
from qcompile.lowering.triton import text
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.linear import Element, Pointer, types
from qcompile.lowering.triton.linear_params import problem_of
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.weights import Tables, Tile
from qcompile.target import Target

TEMPLATE = "dequantize"
BLOCK = 2048  # weights of one program


@dataclass(frozen=True)
class Params:
    """A weight [n, k] in a format, decoded to the dtype `y`."""

    format: dict[str, Any]
    n: int
    k: int
    y: Element

    def problem(self) -> str:
        return problem_of(format_from_json(self.format), self.n, self.k)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    numbers(dims, 0)
    format = format_from_json(params.format)
    stored = [Extent(item.dtype, math.prod(item.shape)) for item in format.stored(params.n, params.k)]
    return [
        Extent(params.y, params.n * params.k, True), *stored, *Tables.of([(format, params.n, params.k)]).extents
    ]  # fmt: skip


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: y [n, k], the stored tensors, the tables. No dims."""
    format, n, k = format_from_json(params["format"]), params["n"], params["k"]
    block_k = min(256, 1 << (k - 1).bit_length())
    block_n = BLOCK // block_k
    tables = Tables.of([(format, n, k)])
    stored = [Pointer(f"w_{item.name}", item.dtype) for item in format.stored(n, k)]
    pointers = [Pointer("y", params["y"]), *stored, *tables.pointers]
    tile = Tile(format, (n, k), block_k, n_in="n_in" if n % block_n else "")
    taken = {"n", "j", "k0", "n_in", "k_in", *(pointer.name for pointer in pointers)}
    render, value = tile.renderer(target, stored, tables, taken)
    steps = -(-k // block_k)
    conditions = [name for name, used in (("n_in", tile.n_in), ("k_in", tile.ragged)) if used]
    inputs = "k0 + j" if tile.looped else "j"
    lines = [
        f"n = tl.program_id(0) * {block_n} + tl.arange(0, {block_n})[:, None]",
        f"j = tl.arange(0, {block_k})[None, :]",
        *[f"k0 = tl.program_id(1) * {block_k}"] * tile.looped,
        *[f"n_in = n < {n}"] * bool(tile.n_in),
        *[f"k_in = {inputs} < {k}"] * tile.ragged,
        *render.once,
        *render.lines,
        f"w = tl.broadcast_to({value}, [{block_n}, {block_k}])",
        f"at = n.to(tl.int64) * {k} + {inputs}",
        f"tl.store(y + at, {text.cast('w', params['y'], target)}"
        + (f", mask={' & '.join(conditions)})" if conditions else ")"),
    ]
    about = f"y[n, k] = W[n, k], W [{n}, {k}] in {format}, as {params['y']}"
    names = [pointer.name for pointer in pointers]
    body = "\n".join(lines)
    made = text.module(TEMPLATE, about, names, 0, body, target, functions(body))
    return Source(made, TEMPLATE, types(pointers), 0, (-(-n // block_n), steps, 1), fusion=False)


def lower_dequantize(node: Node, ctx: Context) -> None:
    """`qcompile.dequantize` as one call."""
    stored, form, n, k = cast("tuple[list[Node], str, int, int]", node.args)
    format = format_from_json(json.loads(form))
    if problem := problem_of(format, n, k):
        raise Refuse(f"no text for {problem}")
    views = [*(ctx.view(item) for item in stored), *Tables.of([(format, n, k)]).views(ctx)]
    params = {"format": json.loads(form), "n": n, "k": k, "y": ctx.dtype(node)}
    call = ctx.call(TEMPLATE, params, [ctx.output(node), *views], (), (0,))
    ctx.emit(call)
    ctx.serves([item.meta["tensor"] for item in stored], call.kernel, "generic")
