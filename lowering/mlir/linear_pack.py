"""The template "linear-pack": rows of x, normalised where there is a norm in front, interleaved for "linear-gemm".

Full tiles of `tile` rows come first, each as [K, tile]; the rows that are left follow as [K, width], where width is
their number rounded up to a third of a tile, the last row repeated.
"""

from __future__ import annotations

from typing import Any

from qcompile.dims import Dim, plus, times
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


def emit(params: dict[str, Any], target: Target) -> str:
    """`params`: "tile", a multiple of 3, and "prologue" of `LinearSpec`. Args: x, packed, norm tensors. Dims: M, K."""
    tile, prologue = params["tile"], params["prologue"]
    t = Text(TEMPLATE.replace("-", "_"), f"packed = norm(x) in tiles of {tile} rows; norm: {prologue}")
    x, packed = t.arg(0), t.arg(1)
    norm = [t.arg(2 + i) for i in range(norm_count(prologue))]
    m, k = t.dim(0), t.dim(1)
    full = m // tile * tile
    rest = rest_width(m - full, tile)
    first, end = t.share(full + rest)
    with t.loop(first, end) as row:
        source = open_row(t, prologue, x.at(row.least(m - 1) * k, "f32"), norm, k)
        inside = row < full
        base = t.select(inside, row // tile * tile, full)
        width = t.select(inside, t.constant(tile, "i64"), rest)
        _scatter(t, source, packed.at(base * k + (row - base), "f32"), k, width)
    return t.finish()


def _scatter(t: Text, row: Row, to: Value, k: Value, width: Value) -> None:
    whole = k - k % LANES
    with t.loop(0, whole, LANES) as at:
        values = row.read(at, LANES)
        for lane in range(LANES):
            t.store(t.slice(values, lane, 1), to.at((at + lane) * width, "f32"))
    with t.loop(whole, k) as at:
        t.store(row.read(at, 1), to.at(at * width, "f32"))
