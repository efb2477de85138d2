"""The kernel that puts the keys (turned) and values of new positions into the key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering.extents import Float, numbers, outside, strided
from qcompile.lowering.mlir.attention_kernel import first_slot
from qcompile.lowering.mlir.rope import turn_row
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "cache-write"


@dataclass(frozen=True)
class Params:
    """heads, d, dv, width (columns of k that are turned), and dtypes."""

    heads: int
    d: int
    dv: int
    width: int
    k: Float
    v: Float
    turn: Float
    k_cache: Float
    v_cache: Float

    def problem(self) -> str:
        few = 1 << 16
        return outside(
            self,
            heads=1 <= self.heads < few,
            d=1 <= self.d < few,
            dv=1 <= self.dv < few,
            width=0 <= self.width <= self.d and self.width % 2 == 0,
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    p, (b, s, t, *steps) = params, numbers(dims, 11 if params.width else 9)
    turns = [Extent(p.turn, strided((b, s, p.width), steps[6:]))] * 2 if p.width else []
    slots = b * p.heads * t
    return [
        Extent(p.k, strided((b, p.heads, s, p.d), steps[:3])), Extent(p.v, strided((b, p.heads, s, p.dv), steps[3:6])),
        *turns, Extent(p.k_cache, slots * p.d, True), Extent(p.v_cache, slots * p.dv, True), Extent("i64", 1),
    ]  # fmt: skip


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. Slots at or behind the capacity t are left alone.

    args: k, v, (cos, sin with width,) k_cache [B, heads, t, d], v_cache [B, heads, t, dv], past i64 [1].
    dims: b, s, t, strides of k (b, h, s) and of v (b, h, s), with width those of cos and sin (b, s).
    """
    t = Text(
        TEMPLATE.replace("-", "_"), f"cache[b, h, past + i] = rope(k)[b, h, i], v; rows shared by the threads. {params}"
    )
    heads, width = params["heads"], params["width"]
    names = ["k", "v", *(["cos", "sin"] if width else []), "k_cache", "v_cache", "past"]
    args = {name: t.arg(i) for i, name in enumerate(names)}
    b, s, capacity, *strides = (t.dim(i) for i in range(11 if width else 9))
    past = first_slot(t, args["past"], capacity)
    first, end = t.share(b * heads * s)
    with t.loop(first, end) as row:
        assert isinstance(row, Value)
        position, head, batch = row % s, row // s % heads, row // s // heads
        with t.when(past + position < capacity):
            slot = (batch * heads + head) * capacity + past + position
            turns = None
            if width:
                turns = (args["cos"], args["sin"], batch * strides[6] + position * strides[7], params["turn"])
            for name, size, turned, steps in (
                ("k", params["d"], width, strides[:3]),
                ("v", params["dv"], 0, strides[3:6]),
            ):
                source = batch * steps[0] + head * steps[1] + position * steps[2]
                cache = (args[f"{name}_cache"], slot * size, params[f"{name}_cache"])
                turn_row(
                    t, target.lanes, size, turned, (args[name], source, params[name]), cache, turns if turned else None
                )
    return t.finish()
