"""The text of reductions for GPUs: a program folds its rows lane by lane, then its lanes, always in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.expr import FLOATS
from qcompile.lowering import reduce
from qcompile.lowering.extents import numbers
from qcompile.lowering.reduce import TEMPLATE, start, work_dtype
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.memory import convert, load, pointer, store
from qcompile.lowering.triton.scalar_ops import OPS, constant
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import DTYPES, module
from qcompile.lowering.triton.tiling import Tiled, columns, grid, height, row_lines, warps
from qcompile.target import Target


@dataclass(frozen=True)
class Params(reduce.Params, Tiled):
    """The operation, the dtypes, and the tile."""

    def problem(self) -> str:
        return Tiled.problem(self)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    params.check(*numbers(dims, 2))
    return reduce.extents(params, dims, threads)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: x [rows, n], y [rows]. dims: rows, n. Floats are summed in f32, integers in i64."""
    x, y, op = params["x"], params["y"], params["op"]
    made = _place(params) if op.startswith("arg") else _fold(params, target)
    body = [
        *row_lines(params, "d0", "d1"),
        *made,
        store("y + row", f"({convert('total', _result(params), y, target)})", y, target, "inside"),
    ]
    about = f"y[row] = {op} of x[row, :], x {x} [d0, d1], y {y}."
    about += f"\n\n{height(params)} rows a program, {params['columns']} columns at a time."
    text = "\n".join(body)
    source = module(TEMPLATE, about, ["x", "y"], 2, text, target, functions(text))
    return Source(source, TEMPLATE, (pointer(x), pointer(y)), 2, grid(params, "d0"), warps(params))


def _result(params: dict[str, Any]) -> str:
    return "i64" if params["op"].startswith("arg") else work_dtype(params)


def _fold(params: dict[str, Any], target: Target) -> list[str]:
    op, dtype, work = params["op"], params["x"], work_dtype(params)
    held = "i32" if work == "bool" else work
    first = start(op, work)
    absent = constant(first, held)
    kind = {"amax": "max", "any": "max", "amin": "min", "all": "min"}.get(op, "sum")
    step = {"max": "maximum", "min": "minimum", "sum": "add"}[kind]
    value = convert("v", dtype, work, target)
    lines = [
        f"total = tl.full([{height(params)}, {params['columns']}], {absent if held in FLOATS else first}, {DTYPES[held]})",
        *columns(params, [
            f"v = {load('x + row.to(tl.int64) * n + col', dtype, 'live')}",
            f"v = {f'({value}).to(tl.int32)' if work == 'bool' else value}",
            f"total = {OPS[step](held, 'total', f'tl.where(live, v, {absent})')}",
        ]),
    ]  # fmt: skip
    if kind != "sum" and held in FLOATS:  # NaN wins over every number, of which tl.max and tl.min know nothing
        lines.append("wrong = tl.max((total != total).to(tl.int32), 1, keep_dims=True)")
    lines.append(f"total = tl.{kind}(total, 1, keep_dims=True)")
    if kind != "sum" and held in FLOATS:
        lines.append('total = tl.where(wrong > 0, float("nan"), total)')
    if work == "bool":
        lines.append("total = total != 0")
    return [*lines, "total = total / n"] if op == "mean" else lines


def _place(params: dict[str, Any]) -> list[str]:
    """The first place of the greatest (or least) element; NaN counts as greatest (least).

    Floats are compared as integers in the same order, -0 as 0.
    """
    kind = "max" if params["op"] == "argmax" else "min"
    worst, best = (-(2**31), 2**31 - 1) if kind == "max" else (2**31 - 1, -(2**31))
    shape, sign = f"[{height(params)}, {params['columns']}]", ">" if kind == "max" else "<"
    return [
        f"best = tl.full({shape}, {worst}, tl.int32)",
        f"place = tl.zeros({shape}, tl.int32)",
        *columns(params, [
            f"v = {load('x + row.to(tl.int64) * n + col', params['x'], 'live')}",
            "key = tl.where(v == 0.0, 0.0, v).to(tl.int32, bitcast=True)",
            "key = tl.where(key < 0, key ^ 0x7FFFFFFF, key)",
            f"key = tl.where(live, tl.where(v == v, key, {best}), {worst})",
            f"place = tl.where(key {sign} best, col, place)",
            f"best = tl.{'maximum' if kind == 'max' else 'minimum'}(best, key)",
        ]),
        f"most = tl.{kind}(best, 1, keep_dims=True)",
        "total = tl.min(tl.where(best == most, place, 0x7FFFFFFF), 1, keep_dims=True).to(tl.int64)",
    ]  # fmt: skip
