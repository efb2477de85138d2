"""The rule of a `qcompile.linear` whose input is rounded to integers: which kernel runs for how many rows, with which tiles."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch.fx import Node

from qcompile.artifact import Call, View
from qcompile.dims import Dim, times
from qcompile.integer_sums import integer_codes
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.mlir import activation_int8, linear_int8_gemm, linear_int8_gemv
from qcompile.lowering.mlir.linear import LANES, Shape, norm_count
from qcompile.lowering.mlir.linear_int8 import scheme
from qcompile.ops import LinearSpec
from qcompile.target import Target

FEW = (1, 4)  # rows that "linear-int8-gemv" is written for


def tiling(target: Target) -> dict[str, int]:
    """`tile` rows and `side` blocks, whose i32 sums fit the registers, and `m_block` rows that codes are unpacked for."""
    tile, side = (8, 3) if target.isa == "avx512" else (4, 1)
    return {"tile": tile, "side": side, "m_block": 256}


def lower_int8(node: Node, spec: LinearSpec, ctx: Context) -> None:
    """Emits the step of a linear node that rounds its input, or whose accuracy is "int8"; Refuse says what has no kernel."""
    halves = spec.n // 2 if spec.n != spec.n_out and len(spec.parts) == 1 else 0
    if halves % LANES:
        raise Refuse(f"the {halves} rows of each half of a gated unit are no multiple of {LANES}")
    ragged = any(part.n % LANES for part in spec.parts)
    shape = Shape(tuple(part.format for part in spec.parts), ragged, spec.bias, spec.prologue, spec.epilogue)
    common = {"k": spec.k, **_rounding(spec)}
    lanes = scheme({**shape.params(), **common}).lanes
    if lanes.rounding != "none" and spec.accuracy == "exact":
        raise Refuse(f"a weight is not just a code times a scale, but rounded: {lanes.rounding}")
    operands = _Operands(node, spec, ctx)
    choices: list[tuple[tuple[Dim, int] | None, list[Call]]] = []
    for rows in FEW:
        if isinstance(operands.m, str) or operands.m <= rows:
            params = shape.params(**common, rows=rows, blocks=2 if rows == 1 or ctx.target.isa == "avx512" else 1)
            choices.append(((operands.m, rows), [operands.few(params)]))
    if isinstance(operands.m, str) or not choices:
        choices.append((None, operands.many(shape, common)))
    ctx.variants(choices[:1] if isinstance(operands.m, int) else choices)


def _rounding(spec: LinearSpec) -> dict[str, Any]:
    """How x is rounded: what its method does, else `ops.round_activations`."""
    if not spec.before:
        return {"act_group": spec.act_group, "rounding": None}
    (how,) = spec.transforms()
    codes = integer_codes(how)
    if isinstance(codes, str):
        raise Refuse(codes)
    return {"act_group": codes.size or spec.k, "rounding": spec.before[0]}


class _Operands:
    """The views of a linear node, and the calls on them."""

    def __init__(self, node: Node, spec: LinearSpec, ctx: Context):
        operands: Any = node.args
        x, stored, extras, _ = operands
        self.spec, self.ctx = spec, ctx
        self.m: Dim = times(*ctx.shape(x)[:-1])
        self.x = ctx.contiguous(x, "f32")
        self.stored = [ctx.contiguous(item) for item in stored]
        self.extras = [ctx.as_float(item) for item in extras]
        self.y = ctx.output(node)
        self.dims: list[Dim] = [self.m, spec.k, *(part.n for part in spec.parts)]

    def few(self, params: dict[str, Any]) -> Call:
        scratch = self._scratch(linear_int8_gemv.scratch(params))
        args = [self.x, self.y, *self.stored, *self.extras, scratch]
        return self.ctx.call(linear_int8_gemv.TEMPLATE, params, args, self.dims, (1, len(args) - 1))

    def many(self, shape: Shape, common: dict[str, Any]) -> list[Call]:
        tiles = tiling(self.ctx.target)
        bare = Shape(shape.formats, shape.ragged, shape.bias, None, shape.epilogue)
        params = bare.params(**common, **tiles)
        rounding = scheme(params).tile(tiles["tile"], shape.prologue)
        rounded = self.ctx.temp((self._tiles(rounding.tile), rounding.words), "i32")
        first, count = int(shape.bias), norm_count(shape.prologue) + rounding.stored
        given, rest = self.extras[first : first + count], self.extras[first + count :]
        scratch = self._scratch(linear_int8_gemm.scratch(params))
        args = [rounded, self.y, *self.stored, *self.extras[:first], *rest, scratch]
        return [
            self.ctx.call(
                activation_int8.TEMPLATE, asdict(rounding), [self.x, *given, rounded], [self.m], (1 + count,)
            ),
            self.ctx.call(linear_int8_gemm.TEMPLATE, params, args, self.dims, (1, len(args) - 1)),
        ]

    def _tiles(self, rows: int) -> Dim:
        """How many tiles hold all rows of x."""
        return -(-self.m // rows) if isinstance(self.m, int) else f"({self.m} + {rows - 1})//{rows}"

    def _scratch(self, elements: int) -> View:
        return self.ctx.temp(("threads", elements), "f32")
