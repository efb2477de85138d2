"""The parameters of linear kernels as an artifact has them: what they may be, and what the kernels touch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.format import Format, format_from_json
from qcompile.formats.affine import ROUNDINGS
from qcompile.formats.lanes import Lanes, LanesDense
from qcompile.lowering.extents import outside, require
from qcompile.lowering.linear_steps import Ending, Norm
from qcompile.lowering.mlir.linear import LANES
from qcompile.lowering.mlir.memory import ELEMENTS, FLOATS
from qcompile.lowering.render import check

MOST_ROWS = 16  # of x that a kernel's text is unrolled for


@dataclass(frozen=True, kw_only=True)
class LinearParams:
    """What `linear.Shape` says, from an artifact."""

    formats: tuple[dict[str, Any], ...]
    ragged: bool
    bias: bool
    prologue: Norm | None
    epilogue: tuple[Ending, ...]
    sizes: tuple[tuple[int, int] | None, ...]

    @functools.cached_property
    def parts(self) -> list[Format]:
        return [format_from_json(data) for data in self.formats]

    @property
    def gated(self) -> bool:
        return any(step.op == "glu" for step in self.epilogue)

    def problem(self) -> str:
        """Which parameter is out of range; empty when none is."""
        count, gates = len(self.formats), [step for step in self.epilogue if step.op == "glu"]
        found = outside(
            self,
            formats=1 <= count <= (2 if gates else 64),
            sizes=len(self.sizes) == count,
            epilogue=len(self.epilogue) <= 16 and len(gates) <= 1 and all(step.act for step in gates),
        )
        for format, size in zip(self.parts, self.sizes, strict=False):
            packed = isinstance(format, Lanes | LanesDense)
            found = found or outside(self, sizes=(size is None) == packed) or format_problem(format, size)
        return found

    def extents(self, m: int, k: int, rows: Sequence[int], before: int = 0) -> list[Extent]:
        """Of y and all that follows, but the scratch; `before` numbers belong to what the kernel does to x."""
        require(self.ragged or not any(n % LANES for n in rows), "rows are no whole blocks", list(rows))
        halves = len(rows) == 2 and rows[0] == rows[1]
        whole = not self.gated or halves or (len(rows) == 1 and rows[0] % (2 * LANES) == 0)
        require(whole, "a gated unit's halves differ, or are no whole blocks", list(rows))
        y = m * (sum(rows) // 2 if self.gated else sum(rows))
        out = [Extent("f32", y, True)]
        for format, size, n in zip(self.parts, self.sizes, rows, strict=True):
            require(size in (None, (n, k)), "a kernel is called for another size than it was made for", (n, k), size)
            for problem in format.check(n, k):
                require(False, "a format cannot hold a weight of this size", problem.found, problem.expected)
            out += [Extent(stored.dtype, math.prod(stored.shape)) for stored in format.stored(n, k)]
        out += [Extent("f32", sum(rows))] * self.bias
        out += [*Norm.extents(self.prologue, k), *[Extent("f32", 1)] * before]
        return out + [Extent("f32", y)] * sum(step.op in ("add", "mul") for step in self.epilogue)


def format_problem(format: Format, size: tuple[int, int] | None) -> str:
    """Which parameter of a format is out of range, also for the [N, K] that its text is made for; empty when none is."""
    if isinstance(format, Lanes):
        return outside(
            format,
            bits=1 <= format.bits <= 8,
            group=1 <= format.group < 2**31,
            table=format.table is None or 1 <= len(format.table) <= 2 ** min(format.bits, 8),
            zero=not isinstance(format.zero, str) or format.zero in ELEMENTS,
            scale=format.scale in FLOATS,
            offset=format.offset in (None, *FLOATS),
            rounding=format.rounding in ROUNDINGS,
            code=format.code == "int"
            or (format.code in ("f8e4m3", "f8e5m2") and format.bits == 8 and format.table is None and not format.zero),
        ) or _size_problem(format, size)
    if isinstance(format, LanesDense):
        return outside(format, dtype=format.dtype in FLOATS) or _size_problem(format, size)
    bits: int = getattr(format, "bits", 1)
    return f"bits = {bits}" if not 1 <= bits <= 8 else _size_problem(format, size)


def _size_problem(format: Format, size: tuple[int, int] | None) -> str:
    if size is None:
        return ""
    n, k = size
    # A place in the weight is computed as an i32.
    if min(size) < 1 or n * k >= 2**31 or format.check(n, k):
        return f"a {format.kind} weight {list(size)}"
    check(format.weight(n, k))
    return next((f"{s.name} {list(s.shape)}" for s in format.stored(n, k) if min(s.shape, default=1) < 1), "")
