"""The rule that lowers `qcompile.linear`: which template runs at which number of rows, and what it is given.

Exact accuracy: up to 4 rows by "linear-gemv", more by "linear-pack" and "linear-gemm". Linears that round their input to
integers, and int8 accuracy, go to `linear_int8_rule`; where that has no kernel for a layout, int8 accuracy takes the exact
one (which is never less accurate) and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch.fx import Node

from qcompile.artifact import Call, View
from qcompile.dims import Dim, times
from qcompile.format import format_from_json
from qcompile.formats.lanes import Lanes, LanesDense
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.mlir import linear_gemm, linear_gemv, linear_pack
from qcompile.lowering.mlir.linear import LANES, Shape, norm_count
from qcompile.lowering.mlir.linear_int8_rule import lower_int8
from qcompile.lowering.mlir.linear_params import format_problem
from qcompile.ops import LinearSpec

GEMV_ROWS = (1, 4)  # what "linear-gemv" is written for


@dataclass(frozen=True)
class Request:
    """A linear node made ready: contiguous float32 operands in the order of `linear.py`, and its sizes."""

    ctx: Context
    spec: LinearSpec
    shape: Shape
    m: Dim
    x: View
    y: View
    stored: tuple[View, ...]
    extras: tuple[View, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        return (self.m, self.spec.k, *(part.n for part in self.spec.parts))

    @property
    def norms(self) -> tuple[View, ...]:
        """The prologue's tensors."""
        return self.extras[self.spec.bias :][: norm_count(self.spec.prologue)]

    @property
    def after_norms(self) -> tuple[View, ...]:
        """The extras without the prologue's."""
        start = int(self.spec.bias)
        return self.extras[:start] + self.extras[start + len(self.norms) :]


Choice = tuple[tuple[Dim, int] | None, list[Call]]


def lower_linear(node: Node, ctx: Context) -> None:
    """y = epilogue(prologue(x) @ W.T + bias) as one step; the number of rows chooses the variant when it runs."""
    x, stored, extras, text = cast("tuple[Node, list[Node], list[Node], str]", node.args)
    spec = LinearSpec.from_text(text)
    if ctx.dtype(node) != "f32":
        raise Refuse(f"linear kernels write f32, not {ctx.dtype(node)}")
    reason = ""
    if spec.accuracy == "int8" or spec.before:
        try:
            lower_int8(node, spec, ctx)
            return _report(node, spec, ctx, reason)
        except Refuse as refusal:
            if spec.before:
                raise
            reason = f"exact instead of int8: {refusal}"
    shape = _shape(spec)
    weights = tuple(ctx.view(item) for item in stored)
    given = tuple(ctx.as_float(item) for item in extras)
    source, m = ctx.contiguous(x, "f32"), times(*ctx.shape(x)[:-1])
    ctx.variants(_choices(Request(ctx, spec, shape, m, source, ctx.output(node), weights, given)))
    _report(node, spec, ctx, reason)


def _shape(spec: LinearSpec) -> Shape:
    formats = [format_from_json(part.format) for part in spec.parts]
    sizes = tuple(
        None if isinstance(format, Lanes | LanesDense) else (part.n, spec.k)
        for format, part in zip(formats, spec.parts, strict=True)
    )
    for format, size in zip(formats, sizes, strict=True):
        if size is not None and (problem := format_problem(format, size)):
            raise Refuse(f"no text for {problem}")
    rows = [part.n for part in spec.parts]
    if any(step["op"] == "glu" for step in spec.epilogue):
        halves = len(rows) == 2 and rows[0] == rows[1]
        if not halves and (len(rows) != 1 or rows[0] % (2 * LANES)):
            raise Refuse(f"a gated unit over parts of {rows} rows: its halves are not whole blocks of {LANES}")
    ragged = any(n % LANES for n in rows)
    formats_json = tuple(part.format for part in spec.parts)
    return Shape(formats_json, ragged, spec.bias, spec.prologue, spec.epilogue, sizes)


def _choices(request: Request) -> list[Choice]:
    """The variants, least number of rows first."""
    m = request.m
    if isinstance(m, int):
        rows = next((rows for rows in GEMV_ROWS if m <= rows), None)
        return [(None, [_gemv(request, rows)] if rows else _gemm(request))]
    few: list[Choice] = [((m, rows), [_gemv(request, rows)]) for rows in GEMV_ROWS]
    return [*few, (None, _gemm(request))]


def _gemv(request: Request, rows: int) -> Call:
    ctx, params = request.ctx, request.shape.params(rows=rows)
    args = [request.x, request.y, *request.stored, *request.extras]
    size = linear_gemv.scratch(params, request.spec.k)
    if size:
        args.append(ctx.temp(("threads", size), "f32"))
    return ctx.call(linear_gemv.TEMPLATE, params, args, request.dims, (1, len(args) - 1) if size else (1,))


def _gemm(request: Request) -> list[Call]:
    ctx, k, shape = request.ctx, request.spec.k, request.shape
    tile = linear_gemm.tile(ctx.target)
    packed = ctx.temp((linear_pack.packed_size(request.m, k, tile.rows),), "f32")
    pack = ctx.call(
        linear_pack.TEMPLATE, {"tile": tile.rows, "prologue": shape.prologue}, [request.x, packed, *request.norms],
        request.dims[:2], (1,),
    )  # fmt: skip
    rest = Shape(shape.formats, shape.ragged, shape.bias, None, shape.epilogue, shape.sizes)
    scratch = ctx.temp(("threads", linear_gemm.scratch(tile)), "f32")
    args = [packed, request.y, *request.stored, *request.after_norms, scratch]
    return [pack, ctx.call(linear_gemm.TEMPLATE, rest.params(tile=tile.rows), args, request.dims, (1, len(args) - 1))]


def _report(node: Node, spec: LinearSpec, ctx: Context, reason: str) -> None:
    """Kernel and tier of each module whose weight the node reads."""
    at, kernel = 0, ctx.steps[-1].variants[0].calls[-1].kernel
    tensors = [item.meta["tensor"] for item in cast("list[Node]", node.args[1])]
    for part in spec.parts:
        tier = "native" if "int8" in kernel else "lanes" if part.format["kind"].startswith("lanes") else "generic"
        ctx.serves(tensors[at : at + part.tensors], kernel, tier, reason)
        at += part.tensors
