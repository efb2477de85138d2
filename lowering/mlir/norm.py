"""The text of the kernels that look at whole rows: one row after another, read as often as it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from qcompile.lowering.mlir.elementary import log
from qcompile.lowering.mlir.memory import first_lanes, load, store, tiles
from qcompile.lowering.mlir.text import Text, Value
from qcompile.lowering.mlir.vecmath import exp
from qcompile.lowering.norm import TEMPLATE, Params, extents
from qcompile.target import Target

__all__ = ["Params", "emit", "extents"]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x [rows, n], weight [n] and bias [n] where params name their dtypes, y [rows, n].
    dims: rows, n."""
    t = Text(TEMPLATE.replace("-", "_"), f"{params['op']} of each row, rows shared by the threads. {params}")
    row = _Row(t, params, target.lanes)
    first, end = t.share(t.dim(0))
    with t.loop(first, end) as i:
        assert isinstance(i, Value)
        row.start = i * row.n
        {"rms_norm": _rms_norm, "layer_norm": _layer_norm, "softmax": _softmax, "log_softmax": _softmax}[params["op"]](
            row
        )
    return t.finish()


class _Row:
    """The row in work: x and y, and loops over them."""

    def __init__(self, t: Text, params: dict[str, Any], lanes: int):
        self.t, self.params, self.lanes = t, params, lanes
        names = ["x", *(name for name in ("weight", "bias") if name in params), "y"]
        self.pointers = {name: t.arg(i) for i, name in enumerate(names)}
        self.n = t.dim(1)
        self.start = self.n
        self.type = f"vector<{lanes}xf32>"

    def read(self, name: str, i: Value, mask: Value | None) -> Value:
        at = i if name in ("weight", "bias") else self.start + i
        return load(self.t, self.pointers[name], at, self.params[name], self.lanes, mask)

    def fold(self, name: str, step: Callable[[Value, Value], Value], kind: str, start: float) -> Value:
        """All elements of x or y folded by `step(total, element)`: a scalar. Absent lanes count as `start`."""
        t, n = self.t, self.n
        whole = n - n % self.lanes
        initial = t.constant(start, self.type)
        with t.loop(0, whole, self.lanes, carry=[initial]) as loop:
            loop.carry([step(loop.values[0], self.read(name, loop.index, None))])
        mask = first_lanes(t, n - whole, self.lanes)
        total = t.select(mask, step(loop.results[0], self.read(name, whole, mask)), loop.results[0])
        return t.reduce(kind, total)

    def write(self, name: str, function: Callable[[Value, Value, Value | None], Value]) -> None:
        """y[i] = function(element of x or y, i, mask)."""
        for i, mask in tiles(self.t, self.n, self.lanes):
            value = function(self.read(name, i, mask), i, mask)
            store(self.t, value, self.pointers["y"], self.start + i, self.params["y"], mask)

    def wide(self, value: Value) -> Value:
        return self.t.broadcast(value, self.lanes)

    def length(self) -> Value:
        return self.t.cast("sitofp", self.n, "f32")


def _rms_norm(row: _Row) -> None:
    t, params = row.t, row.params
    mean = row.fold("x", lambda total, x: t.fma(x, x, total), "add", 0.0) / row.length()
    scale = row.wide(1.0 / t.math("sqrt", mean + params["eps"]))
    offset = params["offset"]

    def scaled(x: Value, i: Value, mask: Value | None) -> Value:
        weight = row.read("weight", i, mask)
        return x * scale * (weight + offset if offset else weight)

    row.write("x", scaled)


def _layer_norm(row: _Row) -> None:
    t, params = row.t, row.params
    mean = row.wide(row.fold("x", lambda total, x: total + x, "add", 0.0) / row.length())
    variance = row.fold("x", lambda total, x: t.fma(x - mean, x - mean, total), "add", 0.0) / row.length()
    scale = row.wide(1.0 / t.math("sqrt", variance + params["eps"]))

    def scaled(x: Value, i: Value, mask: Value | None) -> Value:
        y = (x - mean) * scale
        if "weight" in params:
            y = y * row.read("weight", i, mask)
        return y + row.read("bias", i, mask) if "bias" in params else y

    row.write("x", scaled)


def _softmax(row: _Row) -> None:
    """A row whose maximum is minus infinity gives NaN, as in torch."""
    most = row.wide(row.fold("x", lambda total, x: total.most(x), "maxnumf", -math.inf))
    total = row.fold("x", lambda total, x: total + exp(x - most), "add", 0.0)
    if row.params["op"] == "log_softmax":
        shift = row.wide(log(total)) + most
        row.write("x", lambda x, i, mask: x - shift)
    else:
        share = row.wide(1.0 / total)
        row.write("x", lambda x, i, mask: exp(x - most) * share)
