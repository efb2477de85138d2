"""The template "experts-grouped": rows in the order of their experts, in blocks that share one's packed weight; see `experts`."""

from __future__ import annotations

from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers
from qcompile.lowering.triton import experts
from qcompile.lowering.triton.elementary import functions
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
    return params.extents(t)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: `Params.pointers`, of which order and ends are what "experts-order" wrote; d0 = T.

    A block has rows of one expert; there are at most T / rows + experts of them. An expert that does not exist gives a row of
    NaN.
    """
    p: Params = codec.decode(Params, params, TEMPLATE)
    block_n = 16 if interpreted(target) else 64
    block_k = min(MOST_K, max(pad(p.k), 16))
    own = {"block", "e", "end", "begin", "count", "last", "mine", "first", "stop", "place", "live", "row", "acc", "xs"}
    weights = experts.weights(p, block_n, block_k, target, own | {"given", "result"})
    ragged = " & k_in" if p.k % block_k else ""
    w, x = dot_operand(weights.value, params, target), dot_operand("xs", params, target)
    lines = [
        "block = tl.program_id(0)",
        f"e = tl.arange(0, {pad(p.experts)})",
        f"end = tl.load(ends + e, mask=e < {p.experts}, other=d0)",
        f"begin = tl.load(ends + e - 1, mask=(e > 0) & (e < {p.experts}), other=0)",
        f"count = tl.where(e < {p.experts}, (end - begin + {p.rows - 1}) // {p.rows}, 0)",
        "last = tl.cumsum(count, 0)  # blocks up to and with those of expert e",
        "if block >= tl.max(last, 0):",
        "    return",
        "mine = (block >= last - count) & (block < last)",
        "chosen = tl.sum(tl.where(mine, e, 0), 0)",
        f"first = tl.sum(tl.where(mine, begin + (block - last + count) * {p.rows}, 0), 0)",
        "stop = tl.sum(tl.where(mine, end, 0), 0)",
        f"place = first + tl.arange(0, {p.rows})",
        "live = place < stop",
        "row = tl.load(order + place, mask=live, other=0).to(tl.int64)",
        *weights.before,
        f"acc = tl.zeros([{block_n}, {p.rows}], tl.float32)",
        f"for k0 in range(0, {p.k}, {block_k}):",
        *(f"    {line}" for line in weights.step),
        f"    xs = tl.load(x + (row * {p.k})[:, None] + k0 + j, mask=live[:, None]{ragged}, other=0.0)",
        f"    acc += tl.dot({w}, tl.trans({x}))",
        *["acc = acc + tl.load(bias + n)"] * p.bias,
        "given = tl.load(expert + row, mask=live, other=0)",
        'result = tl.where((given == chosen)[None, :], acc, float("nan"))',
        f"tl.store(y + (row * {p.n})[None, :] + local, result, mask=live[None, :] & (local < {p.n}))",
    ]
    about = (
        f"y[t, n] = W[expert[t] * {p.n} + n] x[t]{' + bias[expert[t], n]' * p.bias}, W [{p.size[0]}, {p.k}] in"
        f" {p.parsed}.\n\nA program computes {block_n} outputs of {p.rows} rows that share an expert, {block_k} inputs a step;"
        " d0 = T."
    )
    body = "\n".join(lines)
    text = module("experts_grouped", about, [item.name for item in p.pointers], 1, body, target, functions(body))
    grid = (f"(d0 + {p.rows - 1})//{p.rows} + {p.experts}", -(-p.n // block_n), 1)
    return Source(text, "experts_grouped", types(p.pointers), 1, grid, fusion=False)
