"""The linear layers of a mixture of experts on CUDA: the rule of `qcompile.experts`, and what its kernels share.

    z[t, n] = gate(sum over k of W[expert[t] * N + n, k] * x[t // each, k] + bias[expert[t], n])
    y[m, n] = z[m, n], or the sum over j of share[m, j] * z[m * summed + j, n]

The weights of all experts lie one below the other in one packed weight. Few rows are multiplied one by one
("experts-gather"), each with the weight of its own expert. Many are put in the order of their experts first
("experts-order"), and then taken in blocks that share an expert ("experts-grouped"); a last kernel adds what is summed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch.fx import Node

from qcompile.artifact import Call, Extent, View
from qcompile.dims import Dim
from qcompile.experts import ExpertsSpec, Gate
from qcompile.format import Format, format_from_json
from qcompile.lowering.base import Context, Refuse
from qcompile.lowering.experts import lower_noted, only_part
from qcompile.lowering.extents import outside, require
from qcompile.lowering.pointwise import Operand, call
from qcompile.lowering.triton import split
from qcompile.lowering.triton.experts_fragments import shape_of
from qcompile.lowering.triton.linear import Compute, Pointer, Shape, compute_dtype
from qcompile.lowering.triton.linear_params import problem_of
from qcompile.lowering.triton.weights import Tables
from qcompile.ops import ACTIVATIONS

GATHER, ORDER, GROUPED = "experts-gather", "experts-order", "experts-grouped"
FEW = 16  # rows that are multiplied one by one: so few hardly share an expert
BLOCKS = (16, 64)  # rows of x that a block may have
MOST_EACH = 64  # experts of one row


@dataclass(frozen=True)
class Params:
    """A weight of `experts` times [n, k] in one format, whether there is a bias, the dtype of a dot's operands.

    `rows`: the rows of a block that shares an expert; 1 for rows one by one. `each`, `gate` and `summed` are as in
    `ExpertsSpec`.
    """

    format: dict[str, Any]
    experts: int
    n: int
    k: int
    bias: bool
    compute: Compute
    rows: int
    each: int
    gate: Gate | None
    summed: int

    def problem(self) -> str:
        gate = self.gate
        return outside(
            self,
            experts=1 <= self.experts <= 4096,
            n=1 <= self.n < 2**31 and (gate is None or self.n % 2 == 0),
            rows=self.rows in (1, *BLOCKS),
            each=1 <= self.each <= MOST_EACH,
            gate=gate is None or (gate.act in ACTIVATIONS and (gate.alpha == 1.0 or gate.act == "silu")),
            summed=0 <= self.summed <= MOST_EACH,
        ) or problem_of(self.parsed, *self.size)

    @property
    def parsed(self) -> Format:
        return format_from_json(self.format)

    @property
    def size(self) -> tuple[int, int]:
        """Of the whole weight."""
        return self.experts * self.n, self.k

    @property
    def columns(self) -> int:
        """Of y."""
        return self.n // 2 if self.gate else self.n

    @property
    def parts(self) -> int:
        """Programs that share a tile of y: those that add what they have made."""
        return max(self.summed, 1) if self.rows == 1 else 1

    @functools.cached_property
    def linear(self) -> Shape | None:
        """The linear that each expert is, where the weight is in fragment order."""
        return shape_of(self.parsed, self.n, self.k, self.gate, self.compute)

    @property
    def whole(self) -> Shape:
        """Its rows."""
        return Shape((self.format,), (self.n,), self.k)

    @property
    def tables(self) -> Tables:
        """Those that a format's expression reads."""
        return Tables(()) if self.linear else Tables.of([(self.parsed, *self.size)])

    @property
    def about(self) -> str:
        """The formula."""
        bias = " + bias[expert[t], n]" if self.bias else ""
        made = f"W[expert[t] * {self.n} + n] x[{f't // {self.each}' if self.each > 1 else 't'}]{bias}"
        made = f"({made}) through {self.gate}" if self.gate else made
        if self.summed:
            made = f"share[t] * ({made})" + (f", summed over {self.parts} t" if self.parts > 1 else "")
        return f"y[t, n] = {made}, W {list(self.size)} in {self.parsed}."

    @property
    def stored(self) -> list[Pointer]:
        return [Pointer(f"w_{item.name}", item.dtype) for item in self.parsed.stored(*self.size)]

    @property
    def pointers(self) -> list[Pointer]:
        """x, expert, y, the stored tensors, bias, share, tables; for blocks the order and the ends; for sums their scratch."""
        bias, share = [Pointer("bias", "f32")] * self.bias, [Pointer("share", "f32")] * bool(self.summed)
        sorted_ = [Pointer("order", "i32"), Pointer("ends", "i32")] if self.rows > 1 else []
        first = [Pointer("x", "f32"), Pointer("expert", "i64"), Pointer("y", "f32")]
        scratch = split.POINTERS if self.parts > 1 else []
        return [*first, *self.stored, *bias, *share, *self.tables.pointers, *sorted_, *scratch]

    def extents(self, t: int, m: int) -> list[Extent]:
        """Of all pointers but the scratch, for t rows that are asked of experts and m rows of y."""
        require(t % self.each == 0, "rows that are not for as many experts each", t, self.each)
        stored = [Extent(item.dtype, math.prod(item.shape)) for item in self.parsed.stored(*self.size)]
        bias, share = [Extent("f32", self.experts * self.n)] * self.bias, [Extent("f32", t)] * bool(self.summed)
        sorted_ = [Extent("i32", t), Extent("i32", self.experts)] if self.rows > 1 else []
        return [
            Extent("f32", t // self.each * self.k), Extent("i64", t), Extent("f32", m * self.columns, True), *stored,
            *bias, *share, *self.tables.extents, *sorted_,
        ]  # fmt: skip


def lower_experts(node: Node, ctx: Context) -> None:
    """`qcompile.experts`, where its weight is in one format."""
    lower_noted(node, ctx, _lower)


def _lower(node: Node, ctx: Context) -> tuple[str, str]:
    """Emits the calls; the kernel of few rows and its tier."""
    x, expert, stored, bias, text = cast("tuple[Node, Node, list[Node], Node | None, str]", node.args[:5])
    share = cast("tuple[Node, ...]", node.args[5:])
    spec = ExpertsSpec.from_text(text)
    part = only_part(node, ctx, spec)
    one = Params(
        part.format, spec.experts, spec.n, spec.k, bias is not None, compute_dtype(ctx.program), 1, spec.each, spec.gate,
        spec.summed,
    )  # fmt: skip
    if problem := one.problem():
        raise Refuse(f"no text for {problem}")
    (t,), (m, _) = ctx.shape(expert), ctx.shape(node)
    ids, y = ctx.contiguous(expert, "i64"), ctx.output(node)
    weight = [
        *(ctx.view(item) for item in stored), *([] if bias is None else [ctx.as_float(bias)]),
        *(ctx.contiguous(item, "f32") for item in share), *one.tables.views(ctx),
    ]  # fmt: skip
    rows = ctx.contiguous(x, "f32")
    scratch = split.scratch(ctx, one.whole, m, one.parts, 1)
    args = [rows, ids, y, *weight, *scratch]
    written = (2, *range(len(args) - len(scratch), len(args)))
    gather = ctx.call(GATHER, asdict(one), args, [m], written)
    order, ends = ctx.temp((t,), "i32"), ctx.temp((spec.experts,), "i32")
    put = ctx.call(ORDER, {"experts": spec.experts}, [ids, order, ends], [t], [1, 2])
    each = ctx.temp((t, spec.n_out), "f32") if one.parts > 1 else y

    def grouped(rows_: int) -> list[Call]:
        made = ctx.call(GROUPED, asdict(one) | {"rows": rows_}, [rows, ids, each, *weight, order, ends], [t], [2])
        return [put, made, *([_added(ctx, each, y, m, one.parts)] if one.parts > 1 else [])]

    few, many = BLOCKS
    bounds = [FEW, few * spec.experts]
    if isinstance(t, int):
        ctx.emit(*([gather] if t <= bounds[0] else grouped(few if t <= bounds[1] else many)))
    else:
        ctx.variants([((t, bounds[0]), [gather]), ((t, bounds[1]), grouped(few)), (None, grouped(many))])
    return ctx.steps[-1].variants[0].calls[-1].kernel, "lanes" if one.linear else "generic"


def _added(ctx: Context, each: View, y: View, m: Dim, count: int) -> Call:
    """The call that adds `count` rows of `each`, one after another, to a row of y [m, n]."""
    n = y.shape[1]
    assert isinstance(n, int)
    slices = [Operand(View(each.buffer, (m, n), (count * n, 1), i * n), "f32") for i in range(count)]
    ops = [["add", "f32", [count + i - 2 if i > 1 else 0, i]] for i in range(1, count)]
    return call(ctx, slices, [Operand(y, "f32")], ops, [2 * count - 2])
