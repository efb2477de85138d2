"""The start of a linear kernel: rows of x made ready in the kernel where they are few, by a kernel in front where not."""

from __future__ import annotations

from typing import Any

from qcompile.artifact import Call
from qcompile.dims import times
from qcompile.lowering.base import Refuse
from qcompile.lowering.triton import activation_calls
from qcompile.lowering.triton.linear import Element, Request
from qcompile.row_transforms import problem

BLOCK = 1024  # inputs of a step over a row


def normalised(
    request: Request, dtype: Element | None = None, always: bool = False, most: int | None = None
) -> tuple[list[Call], Request]:
    """What makes x, of at most `most` rows, ready for a kernel that reads it as it is, and the request that is left.

    The rows are normalised, transformed and written in `dtype` (the compute dtype unless told); there is no call where nothing is
    to be done, unless `always`, or where the kernel does it itself.
    """
    spec, shape = request.spec, request.shape
    if spec.prologue is None and not spec.before and not always:
        return [], request
    if why := problem(spec.transforms(), spec.k):
        raise Refuse(f"no text for {why}")
    out = dtype or shape.compute
    made = request.ctx.temp((times(request.m, spec.k),), out)
    if not activation_calls.apart(request, most):
        return [], request.reading(made, out, activation_calls.within(request, out, spec.k))
    return activation_calls.rows(request, out, spec.k, [made], most), request.reading(made, out)


def offset(number: int) -> str:
    """`number` as the first term of a sum; nothing for 0."""
    return f"{number} + " if number else ""


def statistics(prologue: dict[str, Any], k: int, rows: int) -> list[str]:
    """The statements that make rate0, rate1 ... (and mean0, mean1 ... of a layer norm) of rows 0 .. `rows` - 1 of x f32 [M, k].

    Rows from d0 on, which there are not, count as zeros.
    """
    block = min(BLOCK, 1 << (k - 1).bit_length())
    lines = []
    for row in range(rows):
        inside = f"(at < {k}) & ({row} < d0)" if k % block else f"{row} < d0"
        value = f"tl.load(x + {offset(row * k)}at, mask={inside}, other=0.0)"
        if prologue["op"] == "layer_norm":
            lines += [*_total("value", value, k, block), f"mean{row} = tl.sum(total, 0) / {float(k)}"]
            value = f"tl.where({inside}, {value} - mean{row}, 0.0)"
        lines += _total("value * value", value, k, block)
        lines.append(f"rate{row} = tl.rsqrt(tl.sum(total, 0) / {float(k)} + {prologue['eps']!r})")
    return lines


def _total(term: str, value: str, k: int, block: int) -> list[str]:
    """The statements that add `term` of every `value` at inputs `at`, `block` of them side by side."""
    return [
        f"total = tl.zeros([{block}], tl.float32)",
        f"for start in range(0, {k}, {block}):",
        f"    at = start + tl.arange(0, {block})",
        f"    value = {value}",
        f"    total += {term}",
    ]


def weights(prologue: dict[str, Any], mask: str) -> list[str]:
    """The statements that load the norm's tensors at inputs k; `mask` is the condition that k is one, empty where it is."""
    masked = f", mask={mask}, other=0.0" if mask else ""
    plus = f" + {prologue['offset']!r}" if prologue.get("offset") else ""
    lines = [f"norm_scale = tl.load(norm_weight + k{masked}){plus}"]
    if prologue["op"] == "layer_norm":
        lines.append(f"norm_shift = tl.load(norm_bias + k{masked})")
    return lines


def apply(prologue: dict[str, Any], x: str, row: int) -> str:
    """The normalised inputs k of a row, from `x`, the name of those of x."""
    if prologue["op"] == "layer_norm":
        return f"({x} - mean{row}) * rate{row} * norm_scale + norm_shift"
    return f"{x} * rate{row} * norm_scale"
