"""The kernel that joins the parts of a split attention (see attention_kernel.py) into its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qcompile.artifact import Extent
from qcompile.lowering.extents import Float, numbers, outside, require
from qcompile.lowering.mlir.attention_kernel import LOWEST, final_factor, first_slot
from qcompile.lowering.mlir.memory import load, store
from qcompile.lowering.mlir.text import Text, Value
from qcompile.lowering.mlir.vecmath import exp
from qcompile.target import Target

TEMPLATE = "attention-combine"


@dataclass(frozen=True)
class Params:
    """heads, dv, split (keys of a part), dtypes sinks ("" for none) and y."""

    heads: int
    dv: int
    split: int
    sinks: Literal["", "f32", "f16", "bf16"]
    y: Float

    def problem(self) -> str:
        few = 1 << 16
        return outside(self, heads=1 <= self.heads < few, dv=1 <= self.dv <= 4096, split=1 <= self.split < few)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    b, s, t, parts = numbers(dims, 4)
    require(parts * params.split >= t, "keys are in more parts than there is room for", t, parts)
    rows = b * s * params.heads
    sinks = [Extent(params.sinks, params.heads)] if params.sinks else []
    y = Extent(params.y, rows * params.dv, True)
    return [Extent("f32", rows * parts * (params.dv + 2)), Extent("i64", 1), *sinks, y]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel.

    args: parts f32 [B, S, H, parts, dv + 2], past i64 [1], (sinks [H],) y [B, S, H, dv]. dims: b, s, t (the capacity
    of the cache), parts.
    """
    heads, dv, sinks, lanes = params["heads"], params["dv"], params["sinks"], target.lanes
    t = Text(TEMPLATE.replace("-", "_"), f"y = sum of the parts weighted by exp(most of the part - most). {params}")
    source, past = t.arg(0), first_slot(t, t.arg(1), t.dim(2))
    logits, y = (t.arg(2), t.arg(3)) if sinks else (None, t.arg(2))
    keys = (past + t.dim(1)).least(t.dim(2))
    capacity, count = t.dim(3), (keys + (params["split"] - 1)) // params["split"]
    starts = range(0, dv, lanes)
    masks = [None if dv - at >= lanes else t.constants([int(at + i < dv) for i in range(lanes)], "i1") for at in starts]
    zeros = [t.constant(0.0, f"vector<{lanes}xf32>")] * len(starts)
    first, end = t.share(t.dim(0) * t.dim(1) * heads)
    with t.loop(first, end) as row:
        assert isinstance(row, Value)
        base = row * capacity * (dv + 2)
        with t.loop(0, count, carry=[t.constant(LOWEST, "f32")]) as loop:
            loop.carry([loop.values[0].most(load(t, source, base + loop.index * (dv + 2) + dv, "f32"))])
        most = loop.results[0]
        with t.loop(0, count, carry=[t.constant(0.0, "f32"), *zeros]) as loop:
            part = base + loop.index * (dv + 2)
            weight = exp(load(t, source, part + dv, "f32") - most)
            wide = t.broadcast(weight, lanes)
            sums = [
                t.fma(wide, load(t, source, part + at, "f32", lanes, mask), total)
                for at, mask, total in zip(starts, masks, loop.values[1:], strict=True)
            ]
            loop.carry([t.fma(weight, load(t, source, part + (dv + 1), "f32"), loop.values[0]), *sums])
        scale = t.broadcast(final_factor(t, most, loop.results[0], logits, row % heads, sinks), lanes)
        for at, mask, total in zip(starts, masks, loop.results[1:], strict=True):
            store(t, total * scale, y, row * dv + at, params["y"], mask)
    return t.finish()
