"""A weight that is not quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, cast, k, n
from qcompile.format import Format, Stored


@dataclass(frozen=True)
class Dense(Format):
    """The float weight itself, as torch keeps it."""

    kind: ClassVar[str] = "dense"
    dtype: str = "f32"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("weight", self.dtype, (N, K)),)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"weight": t.weight[n, k]}

    def value(self, f: Any) -> Expr:
        return cast("f32", f.weight)

    def group_size(self, N: int, K: int) -> int | None:
        return K
