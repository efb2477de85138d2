"""Who makes rows of x ready: the linear kernel itself, or calls of "activation" and of what looks at all rows before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompile.artifact import Call, View
from qcompile.lowering.triton import activation, outlier_columns
from qcompile.lowering.triton.before import FEW, Before
from qcompile.lowering.triton.linear import Request
from qcompile.row_transforms import alone, reads_all_rows
from qcompile.transforms.llm_int8 import LlmInt8


def apart(request: Request, most: int | None) -> str:
    """Why x, of at most `most` rows, is made ready by kernels in front; empty where the linear kernel does it."""
    if most is None or most > FEW:
        return f"more than {FEW} rows"
    return alone(request.spec.transforms())


def within(request: Request, out: str, padded: int) -> Before:
    """What the linear kernel does to x first where nothing is `apart`; the form `out` is as in `rows`."""
    transforms = request.spec.transforms()
    whole = "self" if transforms and reads_all_rows(transforms[-1]) else "none"
    return Before(_params(request, out, padded) | {"whole": whole}, tuple(_read(request)))


def _params(request: Request, out: str, padded: int) -> dict[str, Any]:
    spec = request.spec
    params: dict[str, Any] = {"k": spec.k, "padded": padded, "prologue": spec.prologue, "transforms": list(spec.before)}
    return params | {"out": out, "whole": "none", "rest": request.shape.compute, "most": False}


def _read(request: Request) -> list[View]:
    return [request.x, *request.norms, *(view for views in request.transforms for view in views)]


def rows(
    request: Request, out: str, padded: int, written: Sequence[View], most: int | None, columns: View | None = None
) -> list[Call]:
    """The calls that normalise, transform and round x, of at most `most` rows, to `written` in the form `out`.

    `written`: rows, or codes and scales and, if `columns` with outliers stay floats, those; `columns` is written as well.
    """
    ctx, spec, transforms = request.ctx, request.spec, request.spec.transforms()
    params, read = _params(request, out, padded), _read(request)
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
