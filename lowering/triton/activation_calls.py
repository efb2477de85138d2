"""The calls of the template "activation", and of what has to look at all rows of x before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompile.artifact import Call, View
from qcompile.lowering.triton import activation, outlier_columns
from qcompile.lowering.triton.linear import Request
from qcompile.row_transforms import reads_all_rows
from qcompile.transforms.llm_int8 import LlmInt8

FEW = 4  # rows of x that each program may look at


def rows(
    request: Request, out: str, padded: int, written: Sequence[View], most: int | None, columns: View | None = None
) -> list[Call]:
    """The calls that normalise, transform and round x, of at most `most` rows, to `written` in the form `out`.

    `written`: rows, or codes and scales and, if `columns` with outliers stay floats, those; `columns` is written as well.
    """
    ctx, spec, transforms = request.ctx, request.spec, request.spec.transforms()
    params: dict[str, Any] = {"k": spec.k, "padded": padded, "prologue": spec.prologue, "transforms": list(spec.before)}
    params |= {"out": out, "whole": "none", "rest": request.shape.compute, "most": False}
    read = [request.x, *request.norms, *(view for views in request.transforms for view in views)]
    calls, results = list[Call](), list(written)
    if transforms and reads_all_rows(transforms[-1]):
        params["whole"] = "self" if most is not None and most <= FEW else "given"
        last = transforms[-1]
        if params["whole"] == "given":
            outliers = isinstance(last, LlmInt8)
            first = len(read) - len(request.transforms[-1])
            if not outliers or spec.prologue or len(transforms) > 1:
                made = [ctx.temp((request.m, spec.k), "f32")] + [ctx.temp((request.m,), "f32")] * (not outliers)
                before = {"padded": spec.k, "transforms": list(spec.before[:-1]), "out": "f32", "whole": "none"}
                calls.append(_call(request, params | before | {"most": not outliers}, read[:first], made))
                read = [made[0], *read[first:], *made[1:]]
                params |= {"prologue": None, "transforms": [spec.before[-1]]}
            if isinstance(last, LlmInt8):
                assert columns is not None
                look = {"k": spec.k, "padded": padded, "threshold": last.threshold}
                calls.append(ctx.call(outlier_columns.TEMPLATE, look, [read[0], columns], (request.m,), (1,)))
                read.append(columns)
        elif columns is not None:
            results.append(columns)
    return [*calls, _call(request, params, read, results)]


def _call(request: Request, params: dict[str, Any], read: Sequence[View], written: Sequence[View]) -> Call:
    args = [*read, *written]
    return request.ctx.call(activation.TEMPLATE, params, args, (request.m,), tuple(range(len(read), len(args))))
