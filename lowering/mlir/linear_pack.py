"""The template "linear-pack": rows of x, normalised where there is a norm in front, interleaved for "linear-gemm".

Full tiles of `tile` rows come first, each as [K, tile]; the rows that are left follow as [K, width], where width is
their number rounded up to a third of a tile, the last row repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.dims import Dim, plus, times
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.linear_steps import Norm
from qcompile.lowering.mlir.linear import LANES, norm_count
from qcompile.lowering.mlir.prologue import Row, open_row
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "linear-pack"


def packed_size(rows: Dim, k: int, tile: int) -> Dim:
    """float32 elements of `rows` packed rows of k inputs."""
    third = tile // 3
    up = plus(rows, third - 1)
    return up // third * third * k if isinstance(up, int) else times(f"({up})//{third}", third * k)


def rest_width(rest: Value, tile: int) -> Value:
    """The width in which the rows that fill no tile are stored."""
    third = tile // 3
    return (rest + (third - 1)) // third * third


@dataclass(frozen=True)
class Params:
    """ "tile", a multiple of 3, and "prologue" of `LinearSpec`."""

    tile: int
    prologue: Norm | None

    def problem(self) -> str:
        return outside(self, tile=3 <= self.tile <= 48 and self.tile % 3 == 0)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    m, k = numbers(dims, 2)
    packed = int(packed_size(m, k, params.tile))
    return [Extent("f32", m * k), Extent("f32", packed, True), *Norm.extents(params.prologue, k)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. Args: x, packed, norm tensors. Dims: M, K."""
    tile, prologue = params["tile"], params["prologue"]
    t = Text(TEMPLATE.replace("-", "_"), f"packed = norm(x) in tiles of {tile} rows; norm: {prologue}")
    x, packed = t.arg(0), t.arg(1)
    norm = [t.arg(2 + i) for i in range(norm_count(prologue))]
    m, k = t.dim(0), t.dim(1)
    tiles = m // tile
    rest = rest_width(m - tiles * tile, tile)
    # What the norm knows about each row of a tile: its rate, and for layer_norm its mean.
    waiting = [t.stack(tile, "f32") for _ in norm]
    first, end = t.share(tiles + rest.least(1))
    with t.loop(first, end) as number:
        top = number * tile
        width = t.select(number < tiles, t.constant(tile, "i64"), rest)
        if prologue is not None:
            with t.loop(0, width) as lane:
                row = open_row(t, prologue, _source(x, top + lane, m, k), norm, k)
                for known, place in zip((row.rate, row.mean), waiting, strict=False):
                    assert known is not None
                    t.store(known, place.at(lane, "f32"))
        for at, lanes in _steps(t, k):
            with t.loop(0, width) as lane:
                rate, mean = [*(t.load(place.at(lane, "f32"), "f32") for place in waiting), None, None][:2]
                values = Row(t, prologue, _source(x, top + lane, m, k), norm, mean, rate).read(at, lanes)
                for i in range(lanes):
                    one = values if lanes == 1 else t.slice(values, i, 1)
                    t.store(one, packed.at(top * k + (at + i) * width + lane, "f32"))
    return t.finish()


def _source(x: Value, row: Value, m: Value, k: Value) -> Value:
    return x.at(row.least(m - 1) * k, "f32")


def _steps(t: Text, k: Value) -> Iterator[tuple[Value, int]]:
    """For a body that is written twice: sixteen inputs at a time, then one by one."""
    whole = k - k % LANES
    for start, end, lanes in ((t.constant(0, "i64"), whole, LANES), (whole, k, 1)):
        with t.loop(start, end, lanes) as at:
            yield at, lanes
