"""The linear layers of a mixture of experts on CUDA: the rule of `qcompile.experts`, and what its kernels share.

    y[t, n] = sum over k of W[expert[t] * N + n, k] * x[t, k] + bias[expert[t], n]

The weights of all experts lie one below the other in one packed weight. Few rows are multiplied one by one
("experts-gather"), each with the weight of its own expert. Many are put in the order of their experts first
("experts-order"), and then taken in blocks that share an expert ("experts-grouped").
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch.fx import Node

from qcompile.artifact import Call, Extent
from qcompile.experts import ExpertsSpec
from qcompile.format import Format, format_from_json
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.experts import lower_noted, only_part
from qcompile.lowering.extents import outside
from qcompile.lowering.triton.experts_fragments import shape_of
from qcompile.lowering.triton.linear import Compute, Pointer, Shape, compute_dtype
from qcompile.lowering.triton.linear_params import problem_of
from qcompile.lowering.triton.weights import Tables, Tile
from qcompile.target import Target

GATHER, ORDER, GROUPED = "experts-gather", "experts-order", "experts-grouped"
FEW = 16  # rows that are multiplied one by one: so few hardly share an expert
BLOCKS = (16, 64)  # rows of x that a block may have


@dataclass(frozen=True)
class Params:
    """A weight of `experts` times [n, k] in one format, whether there is a bias, the dtype of a dot's operands.

    `rows`: the rows of a block that shares an expert; 1 for rows one by one.
    """

    format: dict[str, Any]
    experts: int
    n: int
    k: int
    bias: bool
    compute: Compute
    rows: int

    def problem(self) -> str:
        return outside(
            self, experts=1 <= self.experts <= 4096, n=1 <= self.n < 2**31, rows=self.rows in (1, *BLOCKS)
        ) or problem_of(self.parsed, *self.size)

    @property
    def parsed(self) -> Format:
        return format_from_json(self.format)

    @property
    def size(self) -> tuple[int, int]:
        """Of the whole weight."""
        return self.experts * self.n, self.k

    @functools.cached_property
    def linear(self) -> Shape | None:
        """The linear that each expert is, where the weight is in fragment order."""
        return shape_of(self.parsed, self.n, self.k, self.bias, self.compute)

    @property
    def tables(self) -> Tables:
        """Those that a format's expression reads."""
        return Tables(()) if self.linear else Tables.of([(self.parsed, *self.size)])

    @property
    def about(self) -> str:
        """The formula."""
        bias = " + bias[expert[t], n]" if self.bias else ""
        return f"y[t, n] = W[expert[t] * {self.n} + n] x[t]{bias}, W {list(self.size)} in {self.parsed}."

    @property
    def stored(self) -> list[Pointer]:
        return [Pointer(f"w_{item.name}", item.dtype) for item in self.parsed.stored(*self.size)]

    @property
    def pointers(self) -> list[Pointer]:
        """x, expert, y, the stored tensors, bias, tables; for blocks then the order and the ends."""
        bias = [Pointer("bias", "f32")] * self.bias
        sorted_ = [Pointer("order", "i32"), Pointer("ends", "i32")] if self.rows > 1 else []
        first = [Pointer("x", "f32"), Pointer("expert", "i64"), Pointer("y", "f32")]
        return [*first, *self.stored, *bias, *self.tables.pointers, *sorted_]

    def extents(self, t: int) -> list[Extent]:
        """Of all pointers, for t rows of x."""
        stored = [Extent(item.dtype, math.prod(item.shape)) for item in self.parsed.stored(*self.size)]
        bias = [Extent("f32", self.experts * self.n)] * self.bias
        sorted_ = [Extent("i32", t), Extent("i32", self.experts)] if self.rows > 1 else []
        return [
            Extent("f32", t * self.k), Extent("i64", t), Extent("f32", t * self.n, True), *stored, *bias,
            *self.tables.extents, *sorted_,
        ]  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Statements that decode W[n, k0 .. k0 + block_k): `before` the loop over k0, `step` inside, and `value` [BN, block_k]."""

    before: list[str]
    step: list[str]
    value: str


def weights(params: Params, block_n: int, block_k: int, target: Target, taken: set[str]) -> Weights:
    """The tile of outputs `local` [BN, 1] of the expert `chosen`; inputs that are not there are 0.

    `k_in` [1, block_k] is the condition that they are, where some are not.
    """
    tile = Tile(params.parsed, params.size, block_k)
    names = {"n", "j", "k0", "k_in", "local", "chosen", *(pointer.name for pointer in params.pointers)}
    render, value = tile.renderer(target, params.stored, params.tables, names | taken)
    inside = [f"k_in = {'k0 + j' if tile.looped else 'j'} < {params.k}"] * tile.ragged
    value = f"tl.where(k_in, {value}, 0.0)" if tile.ragged else value
    before = [
        f"local = tl.program_id(1) * {block_n} + tl.arange(0, {block_n})[:, None]",
        f"n = chosen * {params.n} + tl.minimum(local, {params.n - 1})",
        f"j = tl.arange(0, {block_k})[None, :]",
        *([] if tile.looped else inside),
        *render.once,
    ]
    made = f"w = tl.broadcast_to({value}, [{block_n}, {block_k}])"
    return Weights(before, [*(inside if tile.looped else []), *render.lines, made], "w")


def lower_experts(node: Node, ctx: Context) -> None:
    """`qcompile.experts`, where its weight is in one format."""
    lower_noted(node, ctx, _lower)


def _lower(node: Node, ctx: Context) -> tuple[str, str]:
    """Emits the calls; the kernel of few rows and its tier."""
    x, expert, stored, bias, text = cast("tuple[Node, Node, list[Node], Node | None, str]", node.args)
    spec = ExpertsSpec.from_text(text)
    part = only_part(node, ctx, spec)
    compute = compute_dtype(ctx.program)
    one = Params(part.format, spec.experts, spec.n, spec.k, bias is not None, compute, 1)
    if problem := one.problem():
        raise Refuse(f"no text for {problem}")
    t = ctx.shape(x)[0]
    biases = [] if bias is None else [ctx.as_float(bias)]
    ids, weight = ctx.contiguous(expert, "i64"), [ctx.view(item) for item in stored]
    args = [ctx.contiguous(x, "f32"), ids, ctx.output(node), *weight, *biases, *one.tables.views(ctx)]
    gather = ctx.call(GATHER, asdict(one), args, [t], [2])
    order, ends = ctx.temp((t,), "i32"), ctx.temp((spec.experts,), "i32")
    put = ctx.call(ORDER, {"experts": spec.experts}, [ids, order, ends], [t], [1, 2])

    def grouped(rows: int) -> list[Call]:
        params = asdict(one) | {"rows": rows}
        return [put, ctx.call(GROUPED, params, [*args, order, ends], [t], [2])]

    few, many = BLOCKS
    bounds = [FEW, few * spec.experts]
    if isinstance(t, int):
        ctx.emit(*([gather] if t <= bounds[0] else grouped(few if t <= bounds[1] else many)))
    else:
        ctx.variants([((t, bounds[0]), [gather]), ((t, bounds[1]), grouped(few)), (None, grouped(many))])
    return ctx.steps[-1].variants[0].calls[-1].kernel, "lanes" if one.linear else "generic"
