"""The values that most formats share: an integer code times a scale, or a table's entry times a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.errors import InternalError
from qcompile.expr import Expr, cast, const, table
from qcompile.format import Format

ROUNDINGS = ("none", "product-f16", "product-bf16", "each-f16", "each-bf16")


@dataclass(frozen=True)
class Terms:
    """The parts of a value: rounding((code - zero) * scale + offset) * factor, or rounding(table[code] * scale).

    `code` is an i32 expression; `zero`, `scale` and `offset` are i32 or float ones that do not change inside a group.
    `rounding`: "none": f32 arithmetic; "product-f16": f32 arithmetic and one rounding of the result; "each-f16": the
    difference and the product each rounded, as f16 arithmetic does ("bf16" likewise). `factor` multiplies last, in f32.
    """

    code: Expr
    scale: Expr
    zero: Expr | None = None
    offset: Expr | None = None
    table: tuple[float, ...] | None = None
    rounding: str = "none"
    factor: float = 1.0

    def value(self) -> Expr:
        """The weight, f32."""
        if self.rounding not in ROUNDINGS:
            raise InternalError("unknown rounding", found=self.rounding, expected=", ".join(ROUNDINGS))
        mode, _, to = self.rounding.partition("-")
        dtype = to if mode == "each" else "f32"
        value = cast(dtype, self.code if self.table is None else table(self.table, self.code))
        if self.zero is not None:
            value = value - cast(dtype, self.zero)
        value = value * cast(dtype, self.scale)
        if self.offset is not None:
            value = value + cast(dtype, self.offset)
        value = cast("f32", cast(to, value)) if to else value
        return value if self.factor == 1.0 else value * const(self.factor, "f32")


class Affine(Format):
    """A format whose weight is made of `Terms`."""

    def terms(self, f: Any) -> Terms:
        """The terms of W[n, k] from its fields; here those called code, scale, zero and offset, without a rounding."""
        return Terms(f.code, f.scale, f.get("zero"), f.get("offset"))

    def value(self, f: Any) -> Expr:
        return self.terms(f).value()
