"""aten.topk of rows of a known length, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from qcompile.artifact import Extent
from qcompile.dims import times
from qcompile.lowering.alignment import MOST_COLUMNS, tile
from qcompile.lowering.base import Context, Refuse, operands
from qcompile.lowering.extents import Float, numbers, outside, require

TEMPLATE = "topk"
MOST = 256  # elements that are taken of a row


def lower_topk(node: Node, ctx: Context) -> None:
    x, k, axis, largest, _ = operands(node, dim=-1, largest=True, sorted=True)
    source, rank = ctx.strided(x), len(x.meta["val"].shape)
    if not rank or axis % rank != rank - 1:
        raise Refuse("topk over another than the last dimension")
    if source.dtype not in ("f32", "f16", "bf16"):
        raise Refuse(f"topk of {source.dtype} elements")
    *rows, n = ctx.shape(x)
    if not isinstance(n, int) or not isinstance(k, int) or n > MOST_COLUMNS or not 1 <= k <= MOST:
        raise Refuse(f"topk with k = {k} of rows of {n} elements; at most {MOST} of {MOST_COLUMNS} are taken")
    params = {"x": source.dtype, "k": k, "largest": largest, **tile(ctx, n)}
    args = [ctx.contiguous(x), *ctx.outputs_of(node)]
    ctx.emit(ctx.call(TEMPLATE, params, args, [times(*rows), n], [1, 2]))


@dataclass(frozen=True)
class Params:
    """The dtype of x and of the values, how many are taken, and whether the greatest or the least."""

    x: Float
    k: int
    largest: bool

    def problem(self) -> str:
        return outside(self, k=1 <= self.k <= MOST)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    rows, n = numbers(dims, 2)
    require(params.k <= n < 2**31, "a kernel takes more elements of a row than there are, or counts too many", n)
    taken = rows * params.k
    return [Extent(params.x, rows * n), Extent(params.x, taken, True), Extent("i64", taken, True)]
