"""The template "experts-grouped": rows in the order of their experts, in blocks that share one's packed weight; see `experts`."""

from __future__ import annotations

from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers
from qcompile.lowering.triton import experts
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.experts_fragments import Expert
from qcompile.lowering.triton.experts_text import ending, rows_of, weights
from qcompile.lowering.triton.linear import types
from qcompile.lowering.triton.rope import pad
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import dot_operand, interpreted, module
from qcompile.target import Target

TEMPLATE = experts.GROUPED
MOST_K = 64
Params = experts.Params


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (t,) = numbers(dims, 1)
    return params.extents(t, t)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: `Params.pointers`, of which order and ends are what "experts-order" wrote; d0 = T.

    A block has rows of one expert; there are at most T / rows + experts of them. An expert that does not exist gives a row of
    NaN. Nothing is added up: y has a row for each expert that was asked for.
    """
    p: Params = codec.decode(Params, params, TEMPLATE)
    if p.linear:
        expert = Expert(p, target)
        about = (
            f"{p.about}\n\nA program computes outputs of {expert.block_m} rows that share an expert as a linear with its weight;"
            " d0 = T."
        )
        blocks = f"(d0 + {expert.block_m - 1})//{expert.block_m} + {p.experts}"
        return expert.text("experts_grouped", about, _chosen(p, expert.block_m), (blocks, 1))
    block_n = 16 if interpreted(target) else 64
    block_k = min(MOST_K, max(pad(p.k), 16))
    chosen = _chosen(p, p.rows)
    own = {line.partition(" = ")[0] for line in chosen}
    streams = [weights(p, i, block_n, block_k, target, own) for i in range(len(rows_of(p.gate, p.n)))]
    sums = ["acc", "acc_up"][: len(streams)]
    looped, ragged = p.k > block_k, p.k % block_k != 0
    inside = [f"k_in = {'k0 + j' if looped else 'j'} < {p.k}"] * ragged
    x_row = f"x + (tl.trans(source) // {p.each}).to(tl.int64) * {p.k}"
    lines = [
        *chosen,
        f"n = tl.program_id(0) * {block_n} + tl.arange(0, {block_n})[:, None]",
        f"j = tl.arange(0, {block_k})[None, :]",
        *([] if looped else inside),
        *(line for stream in streams for line in stream.before),
        *(f"{acc} = tl.zeros([{block_n}, {p.rows}], tl.float32)" for acc in sums),
        f"for k0 in range(0, {p.k}, {block_k}):",
        *(f"    {line}" for line in inside * looped),
        *(f"    {line}" for stream in streams for line in stream.step),
        f"    xs = tl.load({x_row} + k0 + j, mask=tl.trans(m < d0){' & k_in' * ragged}, other=0.0)",
        f"    xs = tl.trans({dot_operand('xs', params, target)})",
        *(
            f"    {acc} += tl.dot({dot_operand(stream.value, params, target)}, xs)"
            for acc, stream in zip(sums, streams, strict=True)
        ),
        *ending(p, sums, p.whole, block_n, target),
    ]
    about = (
        f"{p.about}\n\nA program computes {block_n} outputs of {p.rows} rows that share an expert, {block_k} inputs a step;"
        " d0 = T."
    )
    body = "\n".join(lines)
    text = module("experts_grouped", about, [item.name for item in p.pointers], 1, body, target, functions(body))
    grid = (-(-p.columns // block_n), f"(d0 + {p.rows - 1})//{p.rows} + {p.experts}", 1)
    return Source(text, "experts_grouped", types(p.pointers), 1, grid, fusion=False)


def _chosen(p: Params, rows: int) -> list[str]:
    """Statements: the expert of a block, and the rows of y."""
    return [
        f"e = tl.arange(0, {pad(p.experts)})",
        f"e_end = tl.load(ends + e, mask=e < {p.experts}, other=d0)",
        f"e_begin = tl.load(ends + e - 1, mask=(e > 0) & (e < {p.experts}), other=0)",
        f"e_blocks = tl.where(e < {p.experts}, (e_end - e_begin + {rows - 1}) // {rows}, 0)",
        "e_last = tl.cumsum(e_blocks, 0)  # blocks up to and with those of expert e",
        "e_block = tl.program_id(1)",
        "if e_block >= tl.max(e_last, 0):",
        "    return",
        "e_mine = (e_block >= e_last - e_blocks) & (e_block < e_last)",
        "chosen = tl.sum(tl.where(e_mine, e, 0), 0)",
        f"e_first = tl.sum(tl.where(e_mine, e_begin + (e_block - e_last + e_blocks) * {rows}, 0), 0)",
        "e_stop = tl.sum(tl.where(e_mine, e_end, 0), 0)",
        f"e_place = e_first + tl.arange(0, {rows})",
        "m = tl.load(order + e_place, mask=e_place < e_stop, other=d0)[None, :]",
        "source = tl.minimum(m, d0 - 1)",
        "right = tl.load(expert + source) == chosen",
        *[f"bias = bias + chosen * {p.n}"] * p.bias,
    ]
