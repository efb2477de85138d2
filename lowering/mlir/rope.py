"""Rotary embedding: of one row inside other kernels, and as a kernel of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering.extents import Float, numbers, outside, strided
from qcompile.lowering.mlir.memory import load, store, tiles
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "rope"
Place = tuple[Value, Value, str]  # pointer, index of the first element, dtype


def turn_row(
    t: Text, lanes: int, d: int, width: int, source: Place, target: Place,
    turns: tuple[Value, Value, Value, str] | None, scale: float = 1.0,
) -> None:  # fmt: skip
    """target[0 .. d) = scale * rope(source): the first `width` columns turned, pairs half of `width` apart.

    `turns` is (cos, sin, index of their first element, their dtype), None for width 0.
    """
    half = width // 2

    def write(value: Value, place: Value, mask: Value | None) -> None:
        store(t, value if scale == 1.0 else value * scale, target[0], target[1] + place, target[2], mask)

    if turns is not None:
        cos, sin, at, dtype = turns
        for i, mask in tiles(t, t.constant(half, "i64"), lanes):
            a = load(t, source[0], source[1] + i, source[2], lanes, mask)
            b = load(t, source[0], source[1] + i + half, source[2], lanes, mask)
            c1, s1 = (load(t, table, at + i, dtype, lanes, mask) for table in (cos, sin))
            c2, s2 = (load(t, table, at + i + half, dtype, lanes, mask) for table in (cos, sin))
            write(a * c1 - b * s1, i, mask)
            write(b * c2 + a * s2, i + half, mask)
    if width < d:
        for i, mask in tiles(t, t.constant(d - width, "i64"), lanes):
            write(load(t, source[0], source[1] + i + width, source[2], lanes, mask), i + width, mask)


@dataclass(frozen=True)
class Params:
    """heads, d, width (columns that are turned), and dtypes."""

    heads: int
    d: int
    width: int
    x: Float
    turn: Float
    y: Float

    def problem(self) -> str:
        few, whole = 1 << 16, self.width % 2 == 0
        return outside(
            self, heads=1 <= self.heads < few, d=1 <= self.d < few, width=0 <= self.width <= self.d and whole
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    p, (b, s, *steps) = params, numbers(dims, 7)
    turn = Extent(p.turn, strided((b, s, p.width), steps[3:]))
    x = Extent(p.x, strided((b, p.heads, s, p.d), steps[:3]))
    return [x, turn, turn, Extent(p.y, b * p.heads * s * p.d, True)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x, cos, sin, y [B, H, S, d]. dims: b, s, strides of
    x (b, h, s), strides of cos and sin (b, s)."""
    t = Text(TEMPLATE, f"y = x with its first columns turned by cos and sin; rows shared by the threads. {params}")
    heads, d = params["heads"], params["d"]
    x, cos, sin, y = (t.arg(i) for i in range(4))
    b, s, *strides = (t.dim(i) for i in range(7))
    first, end = t.share(b * heads * s)
    with t.loop(first, end) as row:
        assert isinstance(row, Value)
        position, head, batch = row % s, row // s % heads, row // s // heads
        at = batch * strides[0] + head * strides[1] + position * strides[2]
        turns = (cos, sin, batch * strides[3] + position * strides[4], params["turn"])
        turn_row(t, target.lanes, d, params["width"], (x, at, params["x"]), (y, row * d, params["y"]), turns)
    return t.finish()
