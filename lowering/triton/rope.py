"""Rotary embedding: of a tile of rows inside other kernels, and the template "rope", a kernel of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import Float, numbers, outside
from qcompile.lowering.triton.rows import Rows, blocks
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import cast, module
from qcompile.target import Target

TEMPLATE = "rope"
BLOCK = 16  # positions of one program
DOT_K = 16  # the fewest columns that a product on tensor cores adds up


def pad(size: int) -> int:
    """The least power of two that is not below `size`: how long a tile's axis is.

    >>> pad(1), pad(64), pad(80)
    (1, 64, 128)
    """
    return 1 << (size - 1).bit_length()


def read(name: str, pointer: str, at: str, live: str, d: int, width: int = 0, turn: str = "") -> list[str]:
    """Statements: `name` f32 [rows, columns] = the rows that begin at `pointer` + `at`, their first `width` columns turned.

    `at` is an i64 [rows] of the text, `live` an i1 [rows], `turn` the i64 [rows] where cos and sin begin. `<name>_col` becomes
    the columns [1, columns], as many as tensor cores take or more. Rows that are not live, and columns behind d, are 0.
    """
    col = f"{name}_col"
    there = f"{live}[:, None] & ({col} < {d})"
    lines = [
        f"{col} = tl.arange(0, {max(pad(d), DOT_K)})[None, :]",
        f"{name} = tl.load({pointer} + {at}[:, None] + {col}, mask={there}, other=0.0).to(tl.float32)",
    ]
    if width:
        half = width // 2
        turned = f"{name}_turned"
        lines += [
            f"# of the first {width} columns, each is turned by the one {half} away",
            f"{turned} = {live}[:, None] & ({col} < {width})",
            f"{name}_mate = ({col} + {half}) % {width}",
            f"{name}_pair = tl.load({pointer} + {at}[:, None] + {name}_mate, mask={turned}, other=0.0).to(tl.float32)",
            f"{name}_pair = tl.where({col} < {half}, -{name}_pair, {name}_pair)",
            f"{name}_cos = tl.load(cos + {turn}[:, None] + {col}, mask={turned}, other=1.0).to(tl.float32)",
            f"{name}_sin = tl.load(sin + {turn}[:, None] + {col}, mask={turned}, other=0.0).to(tl.float32)",
            f"{name} = {name} * {name}_cos + {name}_pair * {name}_sin",
        ]
    return lines


@dataclass(frozen=True)
class Params:
    """x [B, heads, S, d] of which `width` columns are turned by `turn`, the rows of cos and sin [B, S, width]; y's dtype."""

    heads: int
    d: int
    width: int
    x: Rows
    turn: Rows
    y: Float

    def problem(self) -> str:
        few, whole = 1 << 16, self.width % 2 == 0
        return (
            outside(
                self,
                heads=1 <= self.heads < few,
                d=1 <= self.d <= 4096,
                width=0 < self.width <= self.d and whole,
                x=len(self.x.steps) == 3,
                turn=len(self.turn.steps) == 2,
            )
            or self.x.problem()
            or self.turn.problem()
        )

    @property
    def dims(self) -> list[str]:
        return ["b", "s", *self.x.given("x", "bhs"), *self.turn.given("turn", "bs")]


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    p, dim = params, dict(zip(params.dims, numbers(dims, len(params.dims)), strict=True))
    b, s = dim["b"], dim["s"]
    turn = Extent(p.turn.dtype, p.turn.reach("turn", "bs", (b, s, p.width), dim))
    x = Extent(p.x.dtype, p.x.reach("x", "bhs", (b, p.heads, s, p.d), dim))
    return [x, turn, turn, Extent(p.y, b * p.heads * s * p.d, True)]


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: x, cos, sin, y [B, heads, S, d]; dims: B, S, then the strides that are given."""
    p: Params = codec.decode(Params, params, TEMPLATE)
    body = [
        "head = tl.program_id(1).to(tl.int64)",
        "batch = tl.program_id(2).to(tl.int64)",
        f"if (head >= {p.heads}) | (batch >= d0):",
        "    return",
        *p.x.lines("x", "bhs", 2),
        *p.turn.lines("turn", "bs", 2 + len(p.x.given("x", "bhs"))),
        f"position = tl.program_id(0).to(tl.int64) * {BLOCK} + tl.arange(0, {BLOCK})",
        "live = position < d1",
        f"x_at = {p.x.at('x', 'bhs', b='batch', h='head', s='position')}",
        f"turn_at = {p.turn.at('turn', 'bs', b='batch', s='position')}",
        *read("row", "x", "x_at", "live", p.d, p.width, "turn_at"),
        f"y_at = ((batch * {p.heads} + head) * d1 + position) * {p.d}",
        f"tl.store(y + y_at[:, None] + row_col, {cast('row', p.y, target)}, mask=live[:, None] & (row_col < {p.d}))",
    ]
    about = (
        f"y[b, h, s] = x[b, h, s] with its first {p.width} columns turned by cos[b, s] and sin[b, s].\n\n"
        f"A program turns {BLOCK} positions of one head; d0 = B, d1 = S."
    )
    text = module("rope", about, ["x", "cos", "sin", "y"], len(p.dims), "\n".join(body), target)
    pointers = (p.x.dtype, p.turn.dtype, p.turn.dtype, p.y)
    return Source(text, "rope", pointers, len(p.dims), (blocks("d1", BLOCK), p.heads, "d0"))
