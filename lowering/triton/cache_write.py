"""The template "cache-write": the keys (turned) and values of new positions go to their slots of the key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import Float, numbers, outside
from qcompile.lowering.triton.rope import read
from qcompile.lowering.triton.rows import Rows, blocks
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import cast, module
from qcompile.target import Target

TEMPLATE = "cache-write"
BLOCK = 16  # positions of one program


@dataclass(frozen=True)
class Params:
    """k [B, heads, S, d] of which `width` columns are turned (0: none), v [B, heads, S, dv], and the dtype of the cache."""

    heads: int
    d: int
    dv: int
    width: int
    k: Rows
    v: Rows
    turn: Rows | None
    cache: Float

    def problem(self) -> str:
        return (
            outside(
                self,
                heads=1 <= self.heads < 1 << 16,
                d=1 <= self.d <= 4096,
                dv=1 <= self.dv <= 4096,
                width=0 <= self.width <= self.d and self.width % 2 == 0,
                k=len(self.k.steps) == 3,
                v=len(self.v.steps) == 3,
                turn=(self.turn is None or len(self.turn.steps) == 2) and (self.turn is None) == (self.width == 0),
            )
            or self.k.problem()
            or self.v.problem()
            or (self.turn.problem() if self.turn else "")
        )

    @property
    def dims(self) -> list[str]:
        turn = self.turn.given("turn", "bs") if self.turn else []
        return ["b", "s", "c", *self.k.given("k", "bhs"), *self.v.given("v", "bhs"), *turn]


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    p, dim = params, dict(zip(params.dims, numbers(dims, len(params.dims)), strict=True))
    b, s, slots = dim["b"], dim["s"], dim["b"] * p.heads * dim["c"]
    turn = [Extent(p.turn.dtype, p.turn.reach("turn", "bs", (b, s, p.width), dim))] * 2 if p.turn else []
    return [
        Extent(p.k.dtype, p.k.reach("k", "bhs", (b, p.heads, s, p.d), dim)),
        Extent(p.v.dtype, p.v.reach("v", "bhs", (b, p.heads, s, p.dv), dim)),
        *turn, Extent(p.cache, slots * p.d, True), Extent(p.cache, slots * p.dv, True), Extent("i64", 1),
    ]  # fmt: skip


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Slots at or behind the capacity C are left alone.

    Pointers: k, v, (cos, sin with a width,) k_cache [B, heads, C, d], v_cache [B, heads, C, dv], past i64 [1]. Dims: B, S, C,
    then the strides that are given.
    """
    p: Params = codec.decode(Params, params, TEMPLATE)
    k_dims, v_dims = p.k.given("k", "bhs"), p.v.given("v", "bhs")
    turn = []
    if p.turn:
        turn = [
            *p.turn.lines("turn", "bs", 3 + len(k_dims) + len(v_dims)),
            f"turn_at = {p.turn.at('turn', 'bs', b='batch', s='position')}",
        ]
    body = [
        "head = tl.program_id(1).to(tl.int64)",
        "batch = tl.program_id(2).to(tl.int64)",
        f"if (head >= {p.heads}) | (batch >= d0):",
        "    return",
        *p.k.lines("k", "bhs", 3),
        *p.v.lines("v", "bhs", 3 + len(k_dims)),
        f"position = tl.program_id(0).to(tl.int64) * {BLOCK} + tl.arange(0, {BLOCK})",
        *turn,
        "slot = tl.minimum(tl.maximum(tl.load(past), 0), d2) + position",
        "live = (position < d1) & (slot < d2)",
        f"slot = (batch * {p.heads} + head) * d2 + slot",
        f"k_at = {p.k.at('k', 'bhs', b='batch', h='head', s='position')}",
        *read("key", "k", "k_at", "live", p.d, p.width, "turn_at"),
        f"tl.store(k_cache + (slot * {p.d})[:, None] + key_col, {cast('key', p.cache, target)},"
        f" mask=live[:, None] & (key_col < {p.d}))",
        f"v_at = {p.v.at('v', 'bhs', b='batch', h='head', s='position')}",
        *read("value", "v", "v_at", "live", p.dv),
        f"tl.store(v_cache + (slot * {p.dv})[:, None] + value_col, {cast('value', p.cache, target)},"
        f" mask=live[:, None] & (value_col < {p.dv}))",
    ]
    about = (
        "k_cache[b, h, past + s] = k[b, h, s]" + (f", its first {p.width} columns turned" if p.width else "")
        + f"; v_cache[b, h, past + s] = v[b, h, s].\n\nA program writes {BLOCK} positions of one head; d0 = B, d1 = S,"
        " d2 = C, the slots of the cache."
    )  # fmt: skip
    names = ["k", "v", *(["cos", "sin"] if p.turn else []), "k_cache", "v_cache", "past"]
    text = module("cache_write", about, names, len(p.dims), "\n".join(body), target)
    turns = (p.turn.dtype, p.turn.dtype) if p.turn else ()
    pointers = (p.k.dtype, p.v.dtype, *turns, p.cache, p.cache, "i64")
    return Source(text, "cache_write", pointers, len(p.dims), (blocks("d1", BLOCK), p.heads, "d0"))
