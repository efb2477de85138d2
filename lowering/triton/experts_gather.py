"""The template "experts-gather": each row of x times the packed weight of its own expert, in any format; see `experts`."""

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
from qcompile.lowering.triton.text import module
from qcompile.target import Target

TEMPLATE = experts.GATHER
BLOCK_N, MOST_K = 16, 256
Params = experts.Params


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (t,) = numbers(dims, 1)
    return params.extents(t)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: `Params.pointers`; d0 = T. An expert that does not exist gives a row of NaN."""
    p: Params = codec.decode(Params, params, TEMPLATE)
    if p.linear:
        about = f"{p.about}\n\nA program computes outputs of one row as a linear with its expert's weight; d0 = T."
        return Expert(p.linear, 1, p.experts, target).gather(p.pointers, about)
    block_k = min(MOST_K, max(pad(p.k), 16))
    weights = experts.weights(p, BLOCK_N, block_k, target, {"row", "given", "acc", "result", "xs"})
    ragged = ", mask=k_in, other=0.0" if p.k % block_k else ""
    lines = [
        "row = tl.program_id(0).to(tl.int64)",
        "if row >= d0:",
        "    return",
        "given = tl.load(expert + row)",
        f"chosen = tl.minimum(tl.maximum(given, 0), {p.experts - 1}).to(tl.int32)",
        *weights.before,
        f"acc = tl.zeros([{BLOCK_N}, {block_k}], tl.float32)",
        f"for k0 in range(0, {p.k}, {block_k}):",
        *(f"    {line}" for line in weights.step),
        f"    xs = tl.load(x + row * {p.k} + k0 + j{ragged})",
        f"    acc = tl.fma({weights.value}, tl.broadcast_to(xs, [{BLOCK_N}, {block_k}]), acc)",
        f"result = tl.reshape(tl.sum(acc, 1), [{BLOCK_N}, 1])" + (" + tl.load(bias + n)" if p.bias else ""),
        'result = tl.where(given == chosen, result, float("nan"))',
        f"tl.store(y + row * {p.n} + local, result, mask=local < {p.n})",
    ]
    about = f"{p.about}\n\nA program computes {BLOCK_N} outputs of one row, {block_k} inputs a step; d0 = T."
    body = "\n".join(lines)
    text = module("experts_gather", about, [item.name for item in p.pointers], 1, body, target, functions(body))
    return Source(text, "experts_gather", types(p.pointers), 1, ("d0", -(-p.n // BLOCK_N), 1), fusion=False)
