"""The parameters of Triton linear kernels as an artifact has them: what they may be, and what the kernels touch."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

from qcompile.artifact import Extent
from qcompile.dtypes import DTYPES
from qcompile.format import Format, format_from_json
from qcompile.lowering.extents import outside
from qcompile.lowering.linear_steps import Ending, Norm
from qcompile.lowering.triton import activation
from qcompile.lowering.triton.linear import Compute, Element, Shape

MOST = 2**31 - 1  # N, K and M are i32


@dataclass(frozen=True, kw_only=True)
class LinearParams:
    """What `linear.Shape` says, from an artifact; and `before`, what is done to x first."""

    formats: tuple[dict[str, Any], ...]
    rows: tuple[int, ...]
    k: int
    bias: bool
    prologue: Norm | None
    epilogue: tuple[Ending, ...]
    compute: Compute
    x: Element
    before: activation.Params | None = None

    @functools.cached_property
    def parts(self) -> list[Format]:
        return [format_from_json(data) for data in self.formats]

    @property
    def shape(self) -> Shape:
        """The same as `linear.Shape`."""
        prologue = None if self.prologue is None else asdict(self.prologue)
        endings = tuple(
            {key: value for key, value in asdict(step).items() if value is not None} for step in self.epilogue
        )
        return Shape(self.formats, self.rows, self.k, self.bias, prologue, endings, self.compute, self.x)

    @property
    def gated(self) -> bool:
        return any(step.op == "glu" for step in self.epilogue)

    def problem(self) -> str:
        """Which parameter is out of range; empty when none is."""
        count, gates = len(self.formats), [step for step in self.epilogue if step.op == "glu"]
        halves = self.rows[:1] == self.rows[1:] if count == 2 else count == 1 and self.rows[0] % 2 == 0
        found = outside(
            self,
            formats=1 <= count <= (2 if gates else 64),
            rows=len(self.rows) == count and min(self.rows) >= 1 and sum(self.rows) <= MOST and (halves or not gates),
            k=1 <= self.k <= MOST,
            epilogue=len(self.epilogue) <= 16 and len(gates) <= 1 and all(step.act for step in gates),
        )
        return found or next(
            (text for format, n in zip(self.parts, self.rows, strict=True) if (text := problem_of(format, n, self.k))),
            "",
        )

    def extents(self, m: int) -> list[Extent]:
        """Of all pointers up to the scratch."""
        y = m * (sum(self.rows) // 2 if self.gated else sum(self.rows))
        out = [Extent(self.x, m * self.k, self.before is not None), Extent("f32", y, True)]
        for format, n in zip(self.parts, self.rows, strict=True):
            out += [Extent(item.dtype, math.prod(item.shape)) for item in format.stored(n, self.k)]
        out += [Extent("f32", sum(self.rows))] * self.bias
        out += Norm.extents(self.prologue, self.k)
        return out + [Extent("f32", y)] * sum(step.op in ("add", "mul") for step in self.epilogue)


def problem_of(format: Format, n: int, k: int) -> str:
    """Why there is no text for a weight [n, k] in this format; empty when there is."""
    bits: int = getattr(format, "bits", 1)
    if not 1 <= bits <= 8:
        return f"bits = {bits}"
    if min(n, k) < 1 or max(n, k) > MOST or format.check(n, k):
        return f"a {format.kind} weight {[n, k]}"
    wrong = (s for s in format.stored(n, k) if min(s.shape, default=1) < 1 or s.dtype not in DTYPES)
    return next((f"{s.name} {s.dtype[:40]!r} {list(s.shape)}" for s in wrong), "")
