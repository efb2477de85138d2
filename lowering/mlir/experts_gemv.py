"""The template "experts-gemv": each row of x times the packed weight of its own expert; and the rule of `qcompile.experts`.

    y[t, n] = sum over k of W[expert[t] * N + n, k] * x[t, k] + bias[expert[t], n]

The weights of all experts lie one below the other in one packed weight, each in whole blocks of sixteen outputs: a row is
a product as in "linear-gemv" that starts at another block. Every thread computes its own blocks of every row.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.experts import ExpertsSpec
from qcompile.format import format_from_json
from qcompile.formats.lanes import Lanes, LanesDense
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.experts import lower_noted, only_part
from qcompile.lowering.extents import numbers, outside, require
from qcompile.lowering.mlir import linear_gemv
from qcompile.lowering.mlir.linear import LANES, Shape
from qcompile.lowering.mlir.linear_gemv import Gemv
from qcompile.lowering.mlir.linear_params import format_problem
from qcompile.lowering.mlir.memory import load, store
from qcompile.lowering.mlir.text import Text, Value
from qcompile.target import Target

TEMPLATE = "experts-gemv"


@dataclass(frozen=True, kw_only=True)
class Params(linear_gemv.Params):
    """Those of "linear-gemv", for one part of `experts` times `n` rows and one row of x at a time."""

    experts: int
    n: int

    def problem(self) -> str:
        return (
            outside(
                self,
                formats=len(self.formats) == 1,
                ragged=not self.ragged,
                rows=self.rows == 1,
                prologue=self.prologue is None,
                epilogue=not self.epilogue,
                experts=1 <= self.experts < 2**20,
                n=LANES <= self.n < 2**31 and self.n % LANES == 0,
            )
            or super().problem()
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    m, k, rows = numbers(dims, 3)
    require(rows == params.experts * params.n, "rows that are not those of the experts", rows)
    _, *weight = params.extents(m, k, [rows])
    size = linear_gemv.scratch(asdict(params), k)
    scratch = [Extent("f32", threads * size, True)] * (size > 0)
    return [Extent("f32", m * k), Extent("f32", m * params.n, True), *weight, *scratch, Extent("i64", m)]


def emit(params: dict[str, Any], target: Target) -> str:
    """Text of the kernel. Args: those of a linear, then expert i64 [T]. Dims: T, K, rows of all experts.

    An expert that does not exist gives a row of NaN.
    """
    shape = Shape.of(params)
    t = Text(TEMPLATE.replace("-", "_"), f"y[t] = W[expert[t]] x[t] + bias[expert[t]]\n{shape}")
    _Experts(t, target, shape, bool(linear_gemv.scratch(params, 1 << 20)), params["experts"], params["n"]).emit()
    return t.finish()


class _Experts(Gemv):
    def __init__(self, t: Text, target: Target, shape: Shape, needs_scratch: bool, experts: int, n: int):
        super().__init__(t, target, shape, 1, needs_scratch)
        self.experts, self.n, self.all = experts, n, self.operands
        count = 2 + sum(map(len, self.all.stored)) + (self.all.bias is not None) + needs_scratch
        self.expert = t.arg(count)

    def _work(self) -> None:
        t = self.t
        first, end = t.share(self.n // LANES)
        whole = end - (end - first) % self.blocks
        with t.loop(0, self.all.m) as row:
            given = t.load(self.expert.at(row, "i64"), "i64")
            expert = given.least(self.experts - 1).most(0)
            exists = t.broadcast(given.equals(expert), LANES)
            self.operands = copy.copy(self.all)
            self.operands.x = self.all.x.at(row * self.k, "f32")
            self.x, self.sums = self._rows()
            with t.loop(first, whole, self.blocks) as block:
                self._finish(row, expert, exists, [block + i for i in range(self.blocks)])
            if self.blocks > 1:
                with t.loop(whole, end) as block:
                    self._finish(row, expert, exists, [block])

    def _finish(self, row: Value, expert: Value, exists: Value, blocks: list[Value]) -> None:
        t, start = self.t, expert * (self.n // LANES)
        sums = self._dot(self.readers[0], [start + block for block in blocks])
        for block, y in zip(blocks, sums, strict=True):
            if self.all.bias is not None:
                y = y + load(t, self.all.bias, (start + block) * LANES, "f32", LANES)
            place = row * self.n + block * LANES
            store(t, t.select(exists, y, float("nan")), self.all.y, place, "f32", None)


def lower_experts(node: Node, ctx: Context) -> None:
    """`qcompile.experts` as one call, where its weight is one part and each expert has whole blocks of outputs."""
    lower_noted(node, ctx, _lower)


def _lower(node: Node, ctx: Context) -> tuple[str, str]:
    """Emits the call; its kernel and tier."""
    x, expert, stored, bias, text = cast("tuple[Node, Node, list[Node], Node | None, str]", node.args)
    spec = ExpertsSpec.from_text(text)
    part = only_part(node, ctx, spec)
    if spec.n % LANES:
        raise Refuse(f"{spec.n} outputs of each expert are no multiple of {LANES}")
    size = None if isinstance(format_from_json(part.format), Lanes | LanesDense) else (part.n, spec.k)
    if size is not None and (problem := format_problem(format_from_json(part.format), size)):
        raise Refuse(f"no text for {problem}")
    shape = Shape((part.format,), bias=bias is not None, sizes=(size,))
    params = shape.params(rows=1, experts=spec.experts, n=spec.n)
    extras = [] if bias is None else [ctx.as_float(bias)]
    args = [ctx.contiguous(x, "f32"), ctx.output(node), *(ctx.view(item) for item in stored), *extras]
    scratch = linear_gemv.scratch(params, spec.k)
    writes: tuple[int, ...] = (1,)
    if scratch:
        writes = (1, len(args))
        args.append(ctx.temp(("threads", scratch), "f32"))
    args.append(ctx.contiguous(expert, "i64"))
    call = ctx.call(TEMPLATE, params, args, (ctx.shape(x)[0], spec.k, part.n), writes)
    ctx.emit(call)
    return call.kernel, "lanes" if size is None else "generic"
