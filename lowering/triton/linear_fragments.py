"""The template "linear-fragments": rows of x times weights in the order of tensor cores; `fragment_text` writes it.

There are three kinds of it, which schedules tell apart: "skinny" for up to 32 rows of x, "mid" for up to 128, and "large".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Call, Extent
from qcompile.formats.fragments import ROWS, Fragments
from qcompile.lowering.base import Refuse
from qcompile.lowering.extents import numbers, outside, require
from qcompile.lowering.triton import before, prologue, schedule, split
from qcompile.lowering.triton.fragment_text import Text
from qcompile.lowering.triton.fragment_way import FEW, MID, SKINNY, Way
from qcompile.lowering.triton.linear import Request, Shape
from qcompile.lowering.triton.linear_params import LinearParams, problem_of
from qcompile.lowering.triton.source import Source
from qcompile.target import Target

TEMPLATE, TIER = "linear-fragments", "lanes"


def calls(request: Request, most: int | None) -> list[Call]:
    """The calls for x of at most `most` rows; Refuse for weights that are not all in fragment order."""
    shape = request.shape
    for format, n in zip(shape.parse(), shape.rows, strict=True):
        if problem := refusal(format, n, shape):
            raise Refuse(problem)
    made: list[Call] = []
    if request.spec.before or most is None or most > FEW:
        # Every program of a column of tiles reads the same x: beyond a few rows it is rounded once.
        made, request = prologue.normalised(request, always=most is None or most > SKINNY, most=most)
    bucket = most or schedule.OPEN
    split_k = schedule.split(shape.n_out, shape.k, bucket)
    scratch = split.scratch(request.ctx, request.shape, request.m, split_k)
    return [*made, request.call(TEMPLATE, scratch, most=bucket, split_k=split_k)]


def refusal(format: object, n: int, shape: Shape) -> str:
    """Why there is no text for a part; empty when there is."""
    if not isinstance(format, Fragments):
        return f"a weight of format '{getattr(format, 'kind', format)}' is not in the order of tensor cores"
    if shape.glu and len(shape.rows) == 1 and n // 2 % ROWS:
        return f"a gated unit over halves of {n // 2} rows, no whole blocks of {ROWS}"
    if format.tensor and format.offset is not None:
        return "a scale of the tensor beside an offset"
    way = Way(format, shape.k, shape.compute, 1)
    if way.whole and way.shifted:
        return "zeros that are no whole numbers, or offsets, for all inputs at once"
    return problem_of(format, n, shape.k)


@dataclass(frozen=True, kw_only=True)
class Params(LinearParams):
    """Those of `linear.Shape`; `most`, the M it is made for; and `split_k`, the programs that share a sum."""

    most: int
    split_k: int

    def problem(self) -> str:
        return (
            outside(
                self,
                most=1 <= self.most <= schedule.OPEN,
                split_k=schedule.may_split(self.k, self.split_k),
                prologue=self.prologue is None or self.most <= FEW,
            )
            or super().problem()
            or before.problem(self.before, self.k, self.most, self.x)
            or next(
                (text for f, n in zip(self.parts, self.rows, strict=True) if (text := refusal(f, n, self.shape))), ""
            )
        )


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (m,) = numbers(dims, 1)
    require(m <= params.most or params.most > 128, "more rows than the kernel is written for", m, params.most)
    out = [*params.extents(m), *split.extents(params.shape, m, params.split_k)]
    return out + before.extents(params.before, m)


def emit(params: dict[str, Any], target: Target) -> Source:
    """Pointers: those of `linear`, the scratch of `split`, those of `before`. Dims: M."""
    most = params["most"]
    if target.portable:  # the fallback: two buckets of rows are less to compile
        most = FEW if most <= FEW else MID
    made = Text(Shape.of(params), most, params["split_k"], target).source()
    return before.joined(made, params.get("before"), ["x"], params["split_k"], target)
