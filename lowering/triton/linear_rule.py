"""The rule that lowers `qcompile.linear` on CUDA: which tier serves it at which number of rows.

For each bucket of M the tiers are asked in order and the first that has a kernel serves; why the others do not is in the
report. The last of them, generic, has one for every format.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import cast

from torch.fx import Node

from qcompile.artifact import Call, View
from qcompile.dims import Dim, times
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.triton import linear_dense
from qcompile.lowering.triton.linear import Request, Shape, compute_dtype, norm_count
from qcompile.lowering.triton.schedule import BUCKETS
from qcompile.ops import LinearSpec
from qcompile.row_transforms import alone

FAST = ("linear_native", "linear_fragments", "linear_codebook")
"""The modules of the fast tiers, fastest first; `linear` says what they are."""


def lower_linear(node: Node, ctx: Context) -> None:
    """y = epilogue(prologue(x) @ W.T + bias) as one step; the number of rows chooses the variant when it runs."""
    request = _request(node, ctx)
    choices: list[tuple[int | None, list[Call]]] = []
    served: tuple[ModuleType, str] | None = None
    for most in _buckets(request.m):
        tier, calls, reason = _serve(request, most)
        served = served or (tier, reason)
        if choices and choices[-1][1] == calls:
            choices.pop()
        choices.append((most, calls))
    last = len(choices) - 1
    ctx.variants([(None if i == last else (request.m, most or 0), calls) for i, (most, calls) in enumerate(choices)])
    assert served is not None
    _report(node, request.spec, ctx, *served)


def _buckets(m: Dim) -> Sequence[int | None]:
    """The greatest M of each variant, None for any number: one row, those of the schedules, few enough not to decode first."""
    bounds = sorted({1, *BUCKETS[:-1], linear_dense.LEAST - 1})
    if isinstance(m, int):
        return [next((most for most in bounds if m <= most), None)]
    return [*bounds, None]


def _serve(request: Request, most: int | None) -> tuple[ModuleType, list[Call], str]:
    """The tier that serves a bucket, its calls, and why the tiers before it do not."""
    refusals: list[str] = []
    many = most is None or most >= linear_dense.LEAST
    # Of many rows tensor cores multiply decoded weights as fast as they can; native codes they multiply faster still. Formats
    # without a fast kernel are decoded first sooner.
    slow = most is not None and BUCKETS[-2] < most < linear_dense.LEAST
    for name in (FAST[0], *["linear_dense"] * many, *FAST[1:], *["linear_dense"] * slow, "linear_generic"):
        tier = import_module(f"qcompile.lowering.triton.{name}")
        try:
            return tier, tier.calls(request, most), "; ".join(refusals)
        except Refuse as refusal:
            refusals.append(f"{name}: {refusal}")
    raise Refuse("; ".join(refusals))


def _request(node: Node, ctx: Context) -> Request:
    """The node's operands as the tiers want them, and the buffer of its output."""
    x, stored, extras, text = cast("tuple[Node, list[Node], list[Node], str]", node.args)
    spec = LinearSpec.from_text(text)
    if ctx.dtype(node) != "f32":
        raise Refuse(f"linear kernels write f32, not {ctx.dtype(node)}")
    if spec.accuracy != "exact":
        raise Refuse(f"accuracy '{spec.accuracy}' has no CUDA kernel")
    rows = tuple(part.n for part in spec.parts)
    if any(step["op"] == "glu" for step in spec.epilogue) and not _halves(rows):
        raise Refuse(f"a gated unit over parts of {list(rows)} rows, which are no halves")
    shape = Shape(
        tuple(part.format for part in spec.parts), rows, spec.k, spec.bias, spec.prologue, spec.epilogue,
        compute_dtype(ctx.program),
    )  # fmt: skip
    weights, rest = [ctx.contiguous(item) for item in stored], list(extras)

    def take(count: int, floats: bool = True) -> tuple[View, ...]:
        taken, rest[:] = rest[:count], rest[count:]
        return tuple(ctx.as_float(item) if floats else ctx.contiguous(item) for item in taken)

    parts = []
    for part in spec.parts:
        parts.append(tuple(weights[: part.tensors]))
        del weights[: part.tensors]
    bias, norms = take(int(spec.bias)), take(norm_count(spec.prologue))
    transforms = tuple(take(len(each.stored(spec.k)), floats=False) for each in spec.transforms())
    return Request(
        ctx, spec, shape, times(*ctx.shape(x)[:-1]), ctx.contiguous(x, "f32"), ctx.output(node), tuple(parts),
        next(iter(bias), None), norms, transforms, take(len(rest)),
    )  # fmt: skip


def _halves(rows: tuple[int, ...]) -> bool:
    """Whether a gated unit's two halves are parts, or halves of one."""
    return (len(rows) == 1 and rows[0] % 2 == 0) or (len(rows) == 2 and rows[0] == rows[1])


def _report(node: Node, spec: LinearSpec, ctx: Context, tier: ModuleType, reason: str) -> None:
    """Kernel and tier of each module whose weight the node reads: those of the fewest rows."""
    if why := alone(spec.transforms()):
        reason = "; ".join(filter(None, [reason, f"x is made ready by a kernel in front: {why}"]))
    at, kernel = 0, ctx.steps[-1].variants[0].calls[-1].kernel
    tensors = [item.meta["tensor"] for item in cast("list[Node]", node.args[1])]
    for part in spec.parts:
        ctx.serves(tensors[at : at + part.tensors], kernel, tier.TIER, reason)
        at += part.tensors
