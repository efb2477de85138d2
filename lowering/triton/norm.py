"""The text of the kernels that look at whole rows, for GPUs: a program holds its rows where they fit, or reads them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.lowering import norm
from qcompile.lowering.extents import numbers
from qcompile.lowering.norm import TEMPLATE
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.memory import load, pointer, store
from qcompile.lowering.triton.scalar_ops import constant
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import module
from qcompile.lowering.triton.tiling import Tiled, columns, grid, height, row_lines, warps
from qcompile.target import Target


@dataclass(frozen=True, kw_only=True)
class Params(norm.Params, Tiled):
    """What is done to each row, the dtypes, and the tile."""

    def problem(self) -> str:
        return norm.Params.problem(self) or Tiled.problem(self)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    params.check(*numbers(dims, 2))
    return norm.extents(params, dims, threads)


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: x [rows, n], weight [n] and bias [n] where params name their dtypes, y [rows, n].
    dims: rows, n."""
    names = ["x", *(name for name in ("weight", "bias") if params.get(name)), "y"]
    dtypes = [params[name] for name in names]
    row = _Row(params, target)
    {"rms_norm": _rms_norm, "layer_norm": _layer_norm, "softmax": _softmax, "log_softmax": _softmax}[params["op"]](row)
    text = "\n".join([*row_lines(params, "d0", "d1"), *row.lines])
    about = (
        f"{params['op']} of each row of x [d0, d1]. {params}\n\n"
        f"{height(params)} rows a program, {params['columns']} columns at a time."
    )
    entry = TEMPLATE.replace("-", "_")
    source = module(entry, about, names, 2, text, target, functions(text))
    return Source(source, entry, tuple(pointer(dtype) for dtype in dtypes), 2, grid(params, "d0"), warps(params))


class _Row:
    """The statements so far: x is read once where a tile holds a row, else as often as it is looked at."""

    def __init__(self, params: dict[str, Any], target: Target):
        self.params, self.target = params, target
        self.lines: list[str] = []
        self.read = f"v = {load('x + row.to(tl.int64) * n + col', params['x'], 'live')}"
        self.vectors = {
            name: load(f"{name} + col", params[name], "col < n") for name in ("weight", "bias") if params.get(name)
        }
        if params["whole"]:
            self.lines += [*columns(params, []), self.read]

    def fold(self, name: str, function: str, absent: str, kind: str = "sum") -> None:
        """`name` [rows, 1] = the sum (or maximum) of `function`, an expression of v, over the row."""
        value = f"tl.where(live, {function}, {absent})"
        if self.params["whole"]:
            self.lines.append(f"{name} = tl.{kind}({value}, 1, keep_dims=True)")
            return
        step = f"{name} + {value}" if kind == "sum" else f"tl.maximum({name}, {value})"
        self.lines.append(f"{name} = tl.full([{height(self.params)}, {self.params['columns']}], {absent}, tl.float32)")
        self.lines += columns(self.params, [self.read, f"{name} = {step}"])
        self.lines.append(f"{name} = tl.{kind}({name}, 1, keep_dims=True)")

    def write(self, *statements: str) -> None:
        """y = v after `statements`, which may use the vectors."""
        made = [*statements, store("y + row.to(tl.int64) * n + col", "v", self.params["y"], self.target, "live")]
        self.lines += made if self.params["whole"] else columns(self.params, [self.read, *made])


def _rms_norm(row: _Row) -> None:
    params = row.params
    row.fold("total", "v * v", "0.0")
    row.lines.append(
        f"scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, n.to(tl.float32)) + {constant(params['eps'], 'f32')}))"
    )
    offset = params.get("offset")
    weight = f"w + {constant(offset, 'f32')}" if offset else "w"
    row.write(f"w = {row.vectors['weight']}", f"v = v * scale * ({weight})")


def _layer_norm(row: _Row) -> None:
    row.fold("total", "v", "0.0")
    row.lines.append("mean = tl.div_rn(total, n.to(tl.float32))")
    row.fold("square", "(v - mean) * (v - mean)", "0.0")
    row.lines.append(
        f"scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, n.to(tl.float32)) + {constant(row.params['eps'], 'f32')}))"
    )
    statements = ["v = (v - mean) * scale"]
    if "weight" in row.vectors:
        statements += [f"w = {row.vectors['weight']}", "v = v * w"]
    if "bias" in row.vectors:
        statements += [f"b = {row.vectors['bias']}", "v = v + b"]
    row.write(*statements)


def _softmax(row: _Row) -> None:
    """A row whose maximum is minus infinity gives NaN, as in torch."""
    row.fold("most", "v", 'float("-inf")', "max")
    row.fold("total", "exp(v - most)", "0.0")
    if row.params["op"] == "log_softmax":
        row.lines.append("shift = tl.log(total) + most")
        row.write("v = v - shift")
    else:
        row.lines.append("share = tl.div_rn(1.0, total)")
        row.write("v = exp(v - most) * share")
