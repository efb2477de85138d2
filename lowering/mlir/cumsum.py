"""The text of running sums: one row after another, one element after another."""

from __future__ import annotations

from typing import Any

from qcompile.lowering.cumsum import TEMPLATE, Params, extents
from qcompile.lowering.mlir.memory import FLOATS, convert, load, store
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

__all__ = ["Params", "emit", "extents"]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x [rows, n], y [rows, n]. dims: rows, n. Floats are summed in f32, integers in i64."""
    source, result = params["x"], params["y"]
    work = "f32" if result in FLOATS else "i64"
    t = Text(TEMPLATE, f"y[row, i] = sum of x[row, : i + 1]; rows shared by the threads. {params}")
    x, y, n = t.arg(0), t.arg(1), t.dim(1)
    first, end = t.share(t.dim(0))
    with t.loop(first, end) as row:
        assert isinstance(row, Value)
        with t.loop(row * n, (row + 1) * n, carry=[t.constant(0, work)]) as loop:
            total = loop.values[0] + convert(t, load(t, x, loop.index, source), source, work)
            store(t, convert(t, total, work, result), y, loop.index, result)
            loop.carry([total])
    return t.finish()
