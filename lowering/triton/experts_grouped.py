"""The template "experts-grouped": rows in the order of their experts, in blocks that share one's packed weight; see `experts`."""

from __future__ import annotations

from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers
from qcompile.lowering.triton import experts
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.experts_fragments import Expert
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
    if p.linear:
        expert = Expert(p.linear, p.rows, p.experts, target)
        about = (
            f"{p.about}\n\nA program computes outputs of {expert.block_m} rows that share an expert as a linear with its weight;"
            " d0 = T."
        )
        return expert.grouped(p.pointers, about, _chosen(p, expert.block_m, "tl.program_id(1)"))
    block_n = 16 if interpreted(target) else 64
    block_k = min(MOST_K, max(pad(p.k), 16))
    chosen = _chosen(p, p.rows, "tl.program_id(0)")
    own = {line.partition(" = ")[0] for line in chosen} | {"live", "row", "acc", "xs", "given", "result"}
    weights = experts.weights(p, block_n, block_k, target, own)
    ragged = " & k_in" if p.k % block_k else ""
    w, x = dot_operand(weights.value, params, target), dot_operand("xs", params, target)
    lines = [
        *chosen,
        "live = token < d0",
        "row = tl.where(live, token, 0).to(tl.int64)",
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
        f"{p.about}\n\nA program computes {block_n} outputs of {p.rows} rows that share an expert, {block_k} inputs a step;"
        " d0 = T."
    )
    body = "\n".join(lines)
    text = module("experts_grouped", about, [item.name for item in p.pointers], 1, body, target, functions(body))
    grid = (f"(d0 + {p.rows - 1})//{p.rows} + {p.experts}", -(-p.n // block_n), 1)
    return Source(text, "experts_grouped", types(p.pointers), 1, grid, fusion=False)


def _chosen(p: Params, rows: int, block: str) -> list[str]:
    """Statements: the expert of a block, `chosen`, and its rows, `token` i32 [rows], T where there are fewer."""
    return [
        f"e = tl.arange(0, {pad(p.experts)})",
        f"e_end = tl.load(ends + e, mask=e < {p.experts}, other=d0)",
        f"e_begin = tl.load(ends + e - 1, mask=(e > 0) & (e < {p.experts}), other=0)",
        f"e_blocks = tl.where(e < {p.experts}, (e_end - e_begin + {rows - 1}) // {rows}, 0)",
        "e_last = tl.cumsum(e_blocks, 0)  # blocks up to and with those of expert e",
        f"e_block = {block}",
        "if e_block >= tl.max(e_last, 0):",
        "    return",
        "e_mine = (e_block >= e_last - e_blocks) & (e_block < e_last)",
        "chosen = tl.sum(tl.where(e_mine, e, 0), 0)",
        f"e_first = tl.sum(tl.where(e_mine, e_begin + (e_block - e_last + e_blocks) * {rows}, 0), 0)",
        "e_stop = tl.sum(tl.where(e_mine, e_end, 0), 0)",
        f"e_place = e_first + tl.arange(0, {rows})",
        "token = tl.load(order + e_place, mask=e_place < e_stop, other=d0)",
    ]
