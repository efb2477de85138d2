"""The template "embedding": rows of a packed table, any format, decoded sixteen inputs at a time; and its rule."""

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
from qcompile.lowering.mlir.linear_params import format_problem
from qcompile.lowering.mlir.memory import first_lanes, store
from qcompile.lowering.mlir.text import Text
from qcompile.lowering.render import Renderer
from qcompile.simplify import coordinates, simplify
from qcompile.target import Target

TEMPLATE = "embedding"
LANES = 16


@dataclass(frozen=True)
class Params:
    """A table [n, k] in a format."""

    format: dict[str, Any]
    n: int
    k: int

    def problem(self) -> str:
        return format_problem(format_from_json(self.format), (self.n, self.k))


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (t,) = numbers(dims, 1)
    stored = format_from_json(params.format).stored(params.n, params.k)
    tables = [Extent(item.dtype, math.prod(item.shape)) for item in stored]
    return [Extent("i64", t), Extent("f32", t * params.k, True), *tables]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. Args: ids i64 [T], y f32 [T, k], the stored tensors. Dims: T.

    An id outside 0 .. n - 1 gives a row of NaN. Threads share the pieces of sixteen inputs of all rows.
    """
    format, n, k = format_from_json(params["format"]), params["n"], params["k"]
    t = Text(TEMPLATE, f"y[t, k] = W[ids[t], k], W [{n}, {k}] in {format}")
    ids, y = t.arg(0), t.arg(1)
    facts = coordinates(n, k)
    weight = simplify(format.weight(n, k), facts)
    tensors = {stored.name: t.arg(2 + i) for i, stored in enumerate(format.stored(n, k))}
    render = Renderer(t, [weight], tensors, facts)
    pieces = -(-k // LANES)
    first, end = t.share(t.dim(0) * pieces)
    with t.loop(first, end) as piece:
        row, start = piece // pieces, piece % pieces * LANES
        given = t.load(ids.at(row, "i64"), "i64")
        valid = given.least(n - 1).most(0)
        place = t.broadcast(t.cast("trunci", start, "i32"), LANES) + t.constants(range(LANES), "i32")
        if k % LANES:
            place = place.least(k - 1)
        value = render(weight, {"n": t.cast("trunci", valid, "i32"), "k": place})
        value = t.broadcast(value, LANES) if value.count == 1 else value
        inside = t.broadcast(given.equals(valid), LANES)
        mask = first_lanes(t, t.constant(k, "i64") - start, LANES) if k % LANES else None
        store(t, t.select(inside, value, float("nan")), y, row * k + start, "f32", mask)
    return t.finish()


def lower_embedding(node: Node, ctx: Context) -> None:
    """`qcompile.embedding` as one call."""
    ids, stored, text, n, k = cast("tuple[Node, list[Node], str, int, int]", node.args)
    if ctx.dtype(node) != "f32":
        raise Refuse(f"the embedding kernel writes f32, not {ctx.dtype(node)}")
    if problem := format_problem(format_from_json(json.loads(text)), (n, k)):
        raise Refuse(f"no text for {problem}")
    params = {"format": json.loads(text), "n": n, "k": k}
    rows = ctx.contiguous(ids, "i64")
    tables = [ctx.view(item) for item in stored]
    args = [rows, ctx.output(node), *tables]
    call = ctx.call(TEMPLATE, params, args, (times(*ctx.shape(ids)),), (1,))
    ctx.emit(call)
    ctx.serves([item.meta["tensor"] for item in stored], call.kernel, "generic")
