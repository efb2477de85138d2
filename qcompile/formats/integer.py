"""Integers of a byte each, with scales (and zeros) for blocks of the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, k, n
from qcompile.format import Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.blocks import grid, place


@dataclass(frozen=True)
class Int8(Affine):
    """W = (weight - zero) * scale over blocks of `rows` outputs and `columns` inputs (0: all of them).

    weight (`dtype`) [N, K]; scale (`scale`) [ceil(N / rows), ceil(K / columns)]; zero (`zero`, "": none) likewise.
    """

    kind: ClassVar[str] = "int8"
    dtype: Literal["i8", "u8"] = "i8"
    scale: str = "f32"
    zero: str = ""
    rows: int = 1
    columns: int = 0
    rounding: str = "none"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks = grid(N, K, self.rows, self.columns)
        zero = (Stored("zero", self.zero, blocks),) if self.zero else ()
        return (Stored("weight", self.dtype, (N, K)), Stored("scale", self.scale, blocks), *zero)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        at = place(self.rows, self.columns)
        zero = {"zero": t.zero[at]} if self.zero else {}
        return {"code": t.weight[n, k], "scale": t.scale[at], **zero}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, f.get("zero"), rounding=self.rounding)

    def group_size(self, N: int, K: int) -> int | None:
        return self.columns or K
