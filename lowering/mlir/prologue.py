"""The start of a linear kernel as MLIR text: a row of x, normalised where the node has a norm in front."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcompile.lowering.mlir.linear import LANES
from qcompile.lowering.mlir.memory import first_lanes, load, store, tiles
from qcompile.lowering.mlir.text import Text, Value, vector


@dataclass(frozen=True)
class Row:
    """A row of K inputs whose statistics are taken: `read` gives inputs k .. k + lanes - 1, zeros without mask."""

    t: Text
    prologue: dict[str, Any] | None
    x: Value
    norm: list[Value]
    mean: Value | None
    rate: Value | None

    def read(self, k: Value, lanes: int, mask: Value | None = None) -> Value:
        t = self.t
        value = load(t, self.x, k, "f32", lanes, mask)
        if self.prologue is None or self.rate is None:
            return value
        if self.mean is not None:
            value = value - t.broadcast(self.mean, lanes)
        weight = load(t, self.norm[0], k, "f32", lanes, mask)
        if self.prologue.get("offset"):
            weight = weight + float(self.prologue["offset"])
        value = value * t.broadcast(self.rate, lanes) * weight
        return value + load(t, self.norm[1], k, "f32", lanes, mask) if self.mean is not None else value


def open_row(t: Text, prologue: dict[str, Any] | None, x: Value, norm: list[Value], k: Value) -> Row:
    """The row at `x`; emits what its norm needs to know about the whole row."""
    if prologue is None:
        return Row(t, None, x, [], None, None)
    count, mean = t.cast("sitofp", k, "f32"), None
    if prologue["op"] == "layer_norm":
        mean = _sum(t, x, k, lambda value, total, mask: total + value) / count

    def square(value: Value, total: Value, mask: Value | None) -> Value:
        if mean is not None:
            value = value - t.broadcast(mean, value.count)
            value = value if mask is None else t.select(mask, value, 0.0)
        return t.fma(value, value, total)

    variance = _sum(t, x, k, square) / count
    return Row(t, prologue, x, norm, mean, 1.0 / t.math("sqrt", variance + float(prologue["eps"])))


def _sum(t: Text, x: Value, k: Value, add: Callable[[Value, Value, Value | None], Value]) -> Value:
    """add(value, total, mask) over the row, in four chains."""
    chains, zero = 4, t.constant(0.0, vector(LANES, "f32"))
    step = chains * LANES
    whole = k - k % step
    with t.loop(0, whole, step, carry=[zero] * chains) as loop:
        values = [load(t, x, loop.index + i * LANES, "f32", LANES) for i in range(chains)]
        loop.carry([add(value, total, None) for value, total in zip(values, loop.values, strict=True)])
    totals = list(loop.results)
    for i in range(chains):
        start = whole + i * LANES
        mask = first_lanes(t, (k - start).most(0), LANES)
        totals[i] = add(load(t, x, start, "f32", LANES, mask), totals[i], mask)
    return t.reduce("add", (totals[0] + totals[1]) + (totals[2] + totals[3]))


def write_row(t: Text, row: Row, out: Value, k: Value) -> None:
    """The row in order, to `out`."""
    for at, mask in tiles(t, k, LANES):
        store(t, row.read(at, LANES, mask), out, at, "f32", mask)


def write_sums(t: Text, x: Value, out: Value, k: Value, group: int) -> None:
    """The sum over each group of the (normalised) row at x, one behind the other, to `out`."""
    lanes = next(width for width in (16, 8, 4, 1) if group % width == 0)
    with t.loop(0, k // group) as g:
        zero = t.constant(0.0, vector(lanes, "f32"))
        with t.loop(0, group, lanes, carry=[zero]) as loop:
            loop.carry([loop.values[0] + load(t, x, g * group + loop.index, "f32", lanes)])
        t.store(t.reduce("add", loop.results[0]), out.at(g, "f32"))
