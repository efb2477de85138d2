"""The template "attention-combine": the parts of an attention whose keys are shared out, joined in order into its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import Float, numbers, outside, require
from qcompile.lowering.triton.attention_text import LOWEST
from qcompile.lowering.triton.rope import pad
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import cast, module
from qcompile.target import Target

TEMPLATE = "attention-combine"
STEP = 16  # parts that are added at once


@dataclass(frozen=True)
class Params:
    """heads, dv, the most parts that there can be, dtypes sinks ("" for none) and y."""

    heads: int
    dv: int
    most_parts: int
    sinks: Literal["", "f32", "f16", "bf16"]
    y: Float

    def problem(self) -> str:
        return outside(
            self, heads=1 <= self.heads < 1 << 16, dv=1 <= self.dv <= 4096, most_parts=1 <= self.most_parts <= 1024
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    b, parts = numbers(dims, 2)
    require(parts <= params.most_parts, "there are more parts than the kernel joins", parts, params.most_parts)
    rows = b * params.heads
    sinks = [Extent(params.sinks, params.heads)] if params.sinks else []
    return [
        Extent("f32", rows * parts * params.dv), Extent("f32", rows * parts * 2), *sinks,
        Extent(params.y, rows * params.dv, True),
    ]  # fmt: skip


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: sums f32 [B, heads, P, dv], stats f32 [B, heads, P, 2], (sinks [heads],) y [B, heads, dv].

    Dims: B (of many queries: batch x queries), P. Sums of a part that has seen no key, whose share in `stats` is 0, may be
    anything.
    """
    p: Params = codec.decode(Params, params, TEMPLATE)
    sink = [
        f"sink = tl.load(sinks + (row % {p.heads})).to(tl.float32)",
        "new = tl.maximum(top, sink)",
        "keep = tl.exp(top - new)",
        "total = total * keep + tl.exp(sink - new)",
        "acc = acc * keep",
    ]
    body = [
        "row = tl.program_id(0).to(tl.int64)",
        f"if row >= d0 * {p.heads}:",
        "    return",
        f"part = tl.arange(0, {pad(p.most_parts)})",
        f"most = tl.load(stats + (row * d1 + part) * 2, mask=part < d1, other={LOWEST})",
        "share = tl.load(stats + (row * d1 + part) * 2 + 1, mask=part < d1, other=0.0)",
        "top = tl.max(most, 0)",
        "total = tl.sum(share * tl.exp(most - top), 0)",
        "used = tl.max(tl.where(share != 0.0, part + 1, 0), 0)",
        f"col = tl.arange(0, {pad(p.dv)})",
        f"acc = tl.zeros([{pad(p.dv)}], tl.float32)",
        f"for first in range(0, used, {STEP}):",
        f"    one = first + tl.arange(0, {STEP})",
        f"    weight = tl.exp(tl.load(stats + (row * d1 + one) * 2, mask=one < used, other={LOWEST}) - top)",
        f"    there = (weight != 0.0)[:, None] & (col < {p.dv})[None, :]",
        f"    value = tl.load(sums + ((row * d1 + one) * {p.dv})[:, None] + col[None, :], mask=there, other=0.0)",
        "    acc += tl.sum(weight[:, None] * value, 0)",
        *(sink if p.sinks else []),
        "result = tl.where(total != 0.0, acc / total, 0.0)",
        f"tl.store(y + row * {p.dv} + col, {cast('result', p.y, target)}, mask=col < {p.dv})",
    ]
    about = (
        "y = sum over the parts of exp(most of the part - most) * sums, over the like sum of their shares"
        f"{' and those of the sinks' if p.sinks else ''}.\n\nA program joins the parts of one head. d0 = B, d1 = P."
    )
    names = ["sums", "stats", *(["sinks"] if p.sinks else []), "y"]
    text = module("attention_combine", about, names, 2, "\n".join(body), target)
    pointers = ("f32", "f32", *([p.sinks] if p.sinks else []), p.y)
    return Source(text, "attention_combine", pointers, 2, (f"d0*{p.heads}", 1, 1))
