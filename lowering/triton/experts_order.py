"""The template "experts-order": the rows of a batch in the order of their experts, each expert's in the order they came.

Program e counts the rows of the experts before e, and writes those of e behind them. No sort, and no two programs write to
the same place: the order is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile import codec
from qcompile.artifact import Extent
from qcompile.lowering.extents import numbers, outside
from qcompile.lowering.triton import experts
from qcompile.lowering.triton.source import Source
from qcompile.lowering.triton.text import interpreted, module
from qcompile.target import Target

TEMPLATE = experts.ORDER


@dataclass(frozen=True)
class Params:
    """How many experts there are."""

    experts: int

    def problem(self) -> str:
        return outside(self, experts=1 <= self.experts <= 4096)


def extents(params: Params, dims: tuple[int, ...], threads: int) -> list[Extent]:
    (t,) = numbers(dims, 1)
    return [Extent("i64", t), Extent("i32", t, True), Extent("i32", params.experts, True)]


def emit(params: dict[str, Any], target: Target) -> Source:
    """The kernel. Pointers: expert i64 [T], order i32 [T], ends i32 [experts]; d0 = T.

    order holds the rows of expert 0, then those of 1 ...; ends[e] is where those of e end. An expert that does not exist
    counts as the nearest that does.
    """
    p: Params = codec.decode(Params, params, TEMPLATE)
    block = 32 if interpreted(target) else 1024
    read = [
        f"    row = first + tl.arange(0, {block})",
        "    given = tl.load(expert + row, mask=row < d0, other=0)",
        f"    given = tl.where(row < d0, tl.minimum(tl.maximum(given, 0), {p.experts - 1}), {p.experts}).to(tl.int32)",
    ]
    lines = [
        "mine = tl.program_id(0)",
        f"if mine >= {p.experts}:",
        "    return",
        f"before = tl.zeros([{block}], tl.int32)",
        f"for first in range(0, d0, {block}):",
        *read,
        "    before += (given < mine).to(tl.int32)",
        "end = tl.sum(before, 0)",
        f"for first in range(0, d0, {block}):",
        *read,
        "    belongs = (given == mine).to(tl.int32)",
        "    tl.store(order + end + tl.cumsum(belongs, 0) - 1, row, mask=given == mine)",
        "    end += tl.sum(belongs, 0)",
        "tl.store(ends + mine, end)",
    ]
    about = (
        "order = the rows of expert 0, those of expert 1 ...; ends[e]: where those of e end.\n\n"
        f"A program places the rows of one expert, {block} rows a step; d0 = T."
    )
    text = module("experts_order", about, ["expert", "order", "ends"], 1, "\n".join(lines), target)
    return Source(text, "experts_order", ("i64", "i32", "i32"), 1, (p.experts, 1, 1))
