"""The text of topk: a row is read again for each element that is taken, which is the greatest behind the last one."""

from __future__ import annotations

from typing import Any

from qcompile.lowering.mlir.memory import first_lanes, lane_numbers, load, store
from qcompile.lowering.mlir.text import Text, Value
from qcompile.lowering.topk import TEMPLATE, Params, extents
from qcompile.target import Target

__all__ = ["Params", "emit", "extents"]

PLACES = 2**31 - 1
LEAST, GREATEST = -(2**63), 2**63 - 1


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x [rows, n], values [rows, k], indices [rows, k]. dims: rows, n. NaN counts as greatest, and
    of equal elements the first is taken first."""
    k, dtype, lanes = params["k"], params["x"], target.lanes
    t = Text(
        TEMPLATE, f"the {k} first of each row of x in order, and where they are; rows shared by the threads. {params}"
    )
    x, values, indices, n = t.arg(0), t.arg(1), t.arg(2), t.dim(1)
    first, end = t.share(t.dim(0))
    whole = n - n % lanes
    mask = first_lanes(t, n - whole, lanes)
    none = t.broadcast(t.constant(LEAST, "i64"), lanes)
    with t.loop(first, end) as row:
        assert isinstance(row, Value)
        start = row * n
        with t.loop(row * k, (row + 1) * k, carry=[t.constant(GREATEST, "i64")]) as taken:
            last = t.broadcast(taken.values[0], lanes)
            with t.loop(0, whole, lanes, carry=[none]) as loop:
                keys = _keys(t, load(t, x, start + loop.index, dtype, lanes), loop.index, params["largest"])
                loop.carry([loop.values[0].most(t.select(keys < last, keys, none))])
            keys = _keys(t, load(t, x, start + whole, dtype, lanes, mask), whole, params["largest"])
            best = t.reduce("maxsi", loop.results[0].most(t.select((keys < last) & mask, keys, none)))
            place = PLACES - (best & PLACES)
            store(t, load(t, x, start + place, dtype), values, taken.index, dtype)
            store(t, place, indices, taken.index, "i64")
            taken.carry([best])
    return t.finish()


def _keys(t: Text, value: Value, start: Value, largest: bool) -> Value:
    """i64 lanes in the order of the floats, -0 as 0, with the place in the lower half: no two of a row are equal."""
    bits = t.cast("bitcast", value, "i32")
    size = bits & PLACES
    order = t.select(value.compare("uno", 0.0), PLACES, t.select(bits < 0, 0 - size, size))
    order = t.cast("extsi", order if largest else -1 - order, "i64")
    return (order << 32) + (PLACES - (t.broadcast(start, value.count) + lane_numbers(t, value.count)))
