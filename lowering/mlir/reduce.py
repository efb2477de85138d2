"""The text of reductions: one row after another, a register of elements at a time."""

from __future__ import annotations

from typing import Any

from qcompile.lowering.mlir.memory import ELEMENTS, FLOATS, convert, first_lanes, load, store
from qcompile.lowering.mlir.text import Text, Value, vector
from qcompile.lowering.reduce import TEMPLATE, Params, extents, start, work_dtype
from qcompile.target import Target

__all__ = ["Params", "emit", "extents"]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. args: x [rows, n], y [rows]. dims: rows, n. Floats are summed in f32, integers in i64."""
    op, lanes = params["op"], target.lanes
    t = Text(TEMPLATE, f"y[row] = {op} of x[row, :]; rows shared by the threads. {params}")
    x, y, n = t.arg(0), t.arg(1), t.dim(1)
    first, end = t.share(t.dim(0))
    with t.loop(first, end) as row:
        assert isinstance(row, Value)
        value = (_place if op.startswith("arg") else _fold)(t, params, lanes, x, row * n, n)
        store(t, value, y, row, params["y"])
    return t.finish()


def _step(t: Text, op: str, dtype: str, total: Value, value: Value) -> Value:
    if op in ("sum", "mean"):
        return total + value
    if op in ("any", "all"):
        return total | value if op == "any" else total & value
    kind = "max" if op == "amax" else "min"
    name = f"{kind}imumf" if dtype in FLOATS else f"{kind}{'ui' if dtype in ('u8', 'bool') else 'si'}"
    return t.op(f"arith.{name} {total}, {value} : {total.type}", total.type)


def _reduced(t: Text, op: str, dtype: str, value: Value) -> Value:
    """One number of all lanes, halves folded onto each other."""
    while value.count > 1:
        half = value.count // 2
        value = _step(t, op, dtype, t.slice(value, 0, half), t.slice(value, half, half))
    return value


def _fold(t: Text, params: dict[str, Any], lanes: int, x: Value, base: Value, n: Value) -> Value:
    op, dtype, work = params["op"], params["x"], work_dtype(params)
    initial = t.constant(start(op, work), vector(lanes, ELEMENTS[work][1]))
    whole = n - n % lanes
    with t.loop(0, whole, lanes, carry=[initial]) as loop:
        value = convert(t, load(t, x, base + loop.index, dtype, lanes), dtype, work)
        loop.carry([_step(t, op, work, loop.values[0], value)])
    mask = first_lanes(t, n - whole, lanes)
    rest = convert(t, load(t, x, base + whole, dtype, lanes, mask), dtype, work)
    total = _reduced(t, op, work, _step(t, op, work, loop.results[0], t.select(mask, rest, initial)))
    if op == "mean":
        total = total / t.cast("sitofp", n, "f32")
    return convert(t, total, work, params["y"])


def _place(t: Text, params: dict[str, Any], lanes: int, x: Value, base: Value, n: Value) -> Value:
    """The first place of the greatest (or least) element; NaN counts as greatest (least)."""
    op, dtype = params["op"], params["x"]
    order = "ugt" if op == "argmax" else "ult"
    best, where = t.constant(start(op, "f32"), f"vector<{lanes}xf32>"), t.constant(0, f"vector<{lanes}xi64>")
    numbers = t.constants(range(lanes), "i64")
    whole = n - n % lanes

    def better(a: Value, a_at: Value, b: Value, b_at: Value, there: Value | None = None) -> tuple[Value, Value]:
        """b where it wins over a: greater or NaN, and equal ones by their place."""
        first = a.compare("oeq", b) & (b_at < a_at)
        wins = (b.compare(order, a) & a.compare("ord", a)) | first
        if there is not None:
            wins = wins & there
        return t.select(wins, b, a), t.select(wins, b_at, a_at)

    with t.loop(0, whole, lanes, carry=[best, where]) as loop:
        value = load(t, x, base + loop.index, dtype, lanes)
        loop.carry(better(loop.values[0], loop.values[1], value, t.broadcast(loop.index, lanes) + numbers))
    mask = first_lanes(t, n - whole, lanes)
    value = load(t, x, base + whole, dtype, lanes, mask)
    best, where = better(loop.results[0], loop.results[1], value, t.broadcast(whole, lanes) + numbers, mask)
    while best.count > 1:
        half = best.count // 2
        low, high = ((t.slice(best, i, half), t.slice(where, i, half)) for i in (0, half))
        best, where = better(*low, *high)
    return convert(t, where, "i64", params["y"])
