"""The template "experts-gather": each row of x times the packed weight of its own expert, in any format; see `experts`."""

from __future__ import annotations

from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers
from qcompile.lowering.triton import experts, split
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.experts_fragments import Expert
from qcompile.lowering.triton.experts_text import ending, rows_of, weights
from qcompile.lowering.triton.linear import types
from qcompile.lowering.triton.rope import pad
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.target import Target

TEMPLATE = experts.GATHER
BLOCK_N, MOST_K = 16, 256
Params = experts.Params


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    return [*params.extents(m * params.parts, m), *split.extents(params.whole, m, params.parts, 1)]


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: `Params.pointers`; d0 = rows of y. An expert that does not exist gives a row of NaN.

    Programs of one tile and row of y differ in the expert; the last of them adds up what all have made.
    """
    p: Params = codec.decode(Params, params, TEMPLATE)
    if p.linear:
        expert = Expert(p, target)
        about = (
            f"{p.about}\n\nA program computes outputs of one row as a linear with its expert's weight; d0 = rows of y."
        )
        return expert.text("experts_gather", about, _chosen(p, expert.block_m), ("d0", p.parts))
    block_k = min(MOST_K, max(pad(p.k), 16))
    streams = [weights(p, i, BLOCK_N, block_k, target, set()) for i in range(len(rows_of(p.gate, p.n)))]
    sums = ["acc", "acc_up"][: len(streams)]
    looped, ragged = p.k > block_k, p.k % block_k != 0
    inside = [f"k_in = {'k0 + j' if looped else 'j'} < {p.k}"] * ragged
    lines = [
        *_chosen(p, 1),
        f"n = tl.program_id(0) * {BLOCK_N} + tl.arange(0, {BLOCK_N})[:, None]",
        f"j = tl.arange(0, {block_k})[None, :]",
        *([] if looped else inside),
        *(line for stream in streams for line in stream.before),
        *(f"{acc} = tl.zeros([{BLOCK_N}, {block_k}], tl.float32)" for acc in sums),
        f"for k0 in range(0, {p.k}, {block_k}):",
        *(f"    {line}" for line in inside * looped),
        *(f"    {line}" for stream in streams for line in stream.step),
        f"    xs = tl.load(x + (source // {p.each}).to(tl.int64) * {p.k} + k0 + j{', mask=k_in, other=0.0' * ragged})",
    ]
    for acc, stream in zip(sums, streams, strict=True):
        lines.append(f"    {acc} = tl.fma({stream.value}, tl.broadcast_to(xs, [{BLOCK_N}, {block_k}]), {acc})")
    lines += [f"{acc} = tl.sum({acc}, 1, keep_dims=True)" for acc in sums]
    lines += ending(p, sums, p.whole, BLOCK_N, target)
    about = f"{p.about}\n\nA program computes {BLOCK_N} outputs of one row, {block_k} inputs a step; d0 = rows of y."
    body = "\n".join(lines)
    text = module("experts_gather", about, [item.name for item in p.pointers], 1, body, target, functions(body))
    grid = (-(-p.columns // BLOCK_N), "d0", p.parts)
    return Source(text, "experts_gather", types(p.pointers), 1, grid, fusion=False)


def _chosen(p: Params, rows: int) -> list[str]:
    """Statements: the row of y that a program computes as the first of `rows`, the only one, and its expert."""
    place = f"tl.program_id(1) * {p.parts} + tl.program_id(2)" if p.parts > 1 else "tl.program_id(1)"
    return [
        f"m = tl.where(tl.arange(0, {rows}) == 0, tl.program_id(1), d0)[None, :]" if rows > 1 else
        "m = tl.full([1, 1], 0, tl.int32) + tl.program_id(1)",
        f"place = {place}",
        "source = m * 0 + place",
        "given = tl.load(expert + place)",
        f"chosen = tl.minimum(tl.maximum(given, 0), {p.experts - 1}).to(tl.int32)",
        "right = given == chosen",
        *[f"bias = bias + chosen * {p.n}"] * p.bias,
    ]  # fmt: skip
