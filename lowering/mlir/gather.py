"""The text of the kernel that copies chosen rows of a tensor: one row after another, a register of elements at a time."""

from __future__ import annotations

import math
from typing import Any

from qcompile.lowering.gather import TEMPLATE, Params, extents
from qcompile.lowering.mlir.memory import ELEMENTS, FLOATS, convert, load, store, tiles
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

__all__ = ["Params", "emit", "extents"]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x [outer, rows, inner], index [count], y [outer, count, inner]. dims: outer, rows, count,
    inner. A negative index counts from the end; one out of range reads nothing and gives NaN (0 for integers)."""
    t = Text(TEMPLATE, f"y[i, j] = x[i, index[j]]; rows shared by the threads. {params}")
    x, index, y = (t.arg(i) for i in range(3))
    outer, rows, count, inner = (t.dim(i) for i in range(4))
    lanes = target.lanes
    first, end = t.share(outer * count)
    with t.loop(first, end) as item:
        assert isinstance(item, Value)
        row = convert(t, load(t, index, item % count, params["index"]), params["index"], "i64")
        row = t.select(row < 0, row + rows, row)
        inside = row.compare("ult", rows)
        source = (item // count * rows + t.select(inside, row, 0)) * inner
        with t.when(inside):
            for i, mask in tiles(t, inner, lanes):
                value = convert(t, load(t, x, source + i, params["x"], lanes, mask), params["x"], params["y"])
                store(t, value, y, item * inner + i, params["y"], mask)
        with t.when(inside.equals(0)):
            wrong = t.constant(math.nan if params["y"] in FLOATS else 0, f"vector<{lanes}x{ELEMENTS[params['y']][1]}>")
            for i, mask in tiles(t, inner, lanes):
                store(t, wrong, y, item * inner + i, params["y"], mask)
    return t.finish()
