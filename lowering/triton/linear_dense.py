"""Linears of many rows whose format has no fast kernel: weights decoded once to the compute dtype, then a plain product.

From a hundred rows on decoding once is less work than decoding by a format's formula for every tile of rows; from a few
hundred on tensor cores bound the time of any kernel. The template "linear-finish" is the end of such a linear:

    y[m, n] = epilogue(sums[m, n] + bias[n])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Call, Extent, View
from qcompile.formats.dense import Dense
from qcompile.lowering.base import Refuse
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.linear_steps import Ending
from qcompile.lowering.triton import activation_calls, dequantize, text
from qcompile.lowering.triton.elementary import functions
from qcompile.lowering.triton.epilogue import finish
from qcompile.lowering.triton.linear import Pointer, Request, Section, Shape, types
from qcompile.lowering.triton.linear_params import problem_of
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.weights import Tables
from qcompile.row_transforms import problem
from qcompile.target import Target

TEMPLATE, TIER = "linear-finish", "generic"
LEAST = 512  # rows from which on decoding first is faster than any kernel that decodes as it goes
MOST = 1 << 27  # weights that are decoded into memory: 256 MiB
BLOCK_N, BLOCK_M = 128, 8


def calls(request: Request, most: int | None) -> list[Call]:
    """The calls for x of any number of rows; Refuse for weights too large to be decoded."""
    spec, shape, ctx = request.spec, request.shape, request.ctx
    for format, n in zip(shape.parse(), shape.rows, strict=True):
        if why := problem_of(format, n, shape.k):
            raise Refuse(f"no text for {why}")
    if why := problem(spec.transforms(), spec.k):
        raise Refuse(f"no text for {why}")
    weights, made = _weights(request)
    rows = ctx.temp((request.m, shape.k), shape.compute)
    made += activation_calls.rows(request, shape.compute, shape.k, [rows], most)
    plain = not (shape.bias or shape.epilogue)
    whole = View(request.y.buffer, (request.m, shape.n), (shape.n, 1))
    sums = whole if plain else ctx.temp((request.m, shape.n), "f32")
    operands: tuple[Any, ...] = ([{"view": 0}, {"view": 1}], {})
    made.append(Call("qcompile.matmul.default", (rows, weights, sums), (), (2,), operands))
    if not plain:
        ending = {"rows": list(shape.rows), "bias": shape.bias, "epilogue": list(shape.epilogue)}
        args = [sums, request.y, *([request.bias] if request.bias else []), *request.extras]
        made.append(ctx.call(TEMPLATE, ending, args, (request.m,), (1,)))
    return made


def _weights(request: Request) -> tuple[View, list[Call]]:
    """The weights [N, K] in the compute dtype, and the calls that decode them; none where they are so already."""
    shape = request.shape
    if shape.parse() == (Dense(shape.compute),):
        return request.stored[0][0], []
    if shape.n * shape.k > MOST:
        raise Refuse(f"{shape.n * shape.k} weights would be decoded into memory, {MOST} are the most")
    if any(first * shape.k % 8 for first in _starts(shape)):
        raise Refuse("a part would not start at a multiple of 16 bytes")
    weights = request.ctx.temp((shape.n, shape.k), shape.compute)
    return weights, [_decoded(request, weights, part) for part in range(len(shape.rows))]


def _starts(shape: Shape) -> list[int]:
    return [sum(shape.rows[:part]) for part in range(len(shape.rows))]


def _decoded(request: Request, weights: View, part: int) -> Call:
    """The call that decodes a part into its rows of `weights`."""
    shape = request.shape
    n, first = shape.rows[part], _starts(shape)[part]
    params = {"format": shape.formats[part], "n": n, "k": shape.k, "y": shape.compute}
    target = View(weights.buffer, (n, shape.k), (shape.k, 1), first * shape.k)
    tables = Tables.of([(shape.parse()[part], n, shape.k)]).views(request.ctx)
    return request.ctx.call(dequantize.TEMPLATE, params, [target, *request.stored[part], *tables], (), (0,))


@dataclass(frozen=True)
class Params:
    """The rows of each part, whether there is a bias, and the epilogue, as in `linear.Shape`."""

    rows: tuple[int, ...]
    bias: bool
    epilogue: tuple[Ending, ...]

    @property
    def gated(self) -> bool:
        return any(step.op == "glu" for step in self.epilogue)

    def problem(self) -> str:
        gates = [step for step in self.epilogue if step.op == "glu"]
        return outside(
            self,
            rows=1 <= len(self.rows) <= 64 and min(self.rows) >= 1 and (not gates or sum(self.rows) % 2 == 0),
            epilogue=len(self.epilogue) <= 16 and len(gates) <= 1 and all(step.act for step in gates),
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    n = sum(params.rows)
    y = m * (n // 2 if params.gated else n)
    extras = [Extent("f32", y)] * sum(step.op in ("add", "mul") for step in params.epilogue)
    return [Extent("f32", m * n), Extent("f32", y, True), *[Extent("f32", n)] * params.bias, *extras]


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: sums [M, N], y [M, n_out], bias [N], one [M, n_out] an add or mul. Dims: M."""
    n = sum(params["rows"])
    shape = Shape(({},), (n,), 1, params["bias"], None, tuple(params["epilogue"]))
    columns = shape.n_out
    section = Section(((0, 0), (0, columns)) if shape.glu else ((0, 0),), 0, columns)
    ragged = columns % BLOCK_N != 0
    names = ["acc", "acc_up"][: len(section.streams)]
    inside = f"(m < d0) & (n < {columns})"
    lines = [
        f"n = tl.program_id(0) * {BLOCK_N} + tl.arange(0, {BLOCK_N})[None, :]",
        f"m = tl.program_id(1) * {BLOCK_M} + tl.arange(0, {BLOCK_M})[:, None]",
        *[
            f"{name} = tl.load(sums + m.to(tl.int64) * {n} + (n + {first}), mask={inside}, other=0.0)"
            for name, (_, first) in zip(names, section.streams, strict=True)
        ],
        *finish(shape, section, names, ragged=ragged),
    ]
    pointers = [
        Pointer("sums", "f32"), Pointer("y", "f32"), *[Pointer("bias", "f32")] * shape.bias, *shape.extras(),
    ]  # fmt: skip
    body, entry = "\n".join(lines), TEMPLATE.replace("-", "_")
    steps = ", ".join(step["op"] for step in shape.epilogue)
    about = f"y = {', '.join(['sums' + ' + bias' * shape.bias, *[steps] * bool(steps)])}; {n} columns of sums"
    made = text.module(entry, about, [pointer.name for pointer in pointers], 1, body, target, functions(body))
    grid = (-(-columns // BLOCK_N), f"(d0 + {BLOCK_M - 1})//{BLOCK_M}", 1)
    return Source(made, entry, types(pointers), 1, grid, fusion=False)
