"""Gemma's own checkpoints: integers of 2 or 4 bits in bytes, each row by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bits, const, k, n
from qcompile.format import Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.blocks import grid, place


@dataclass(frozen=True)
class Gemma(Affine):
    """W = (code - 2 ** (bits - 1)) * scale over runs of `columns` inputs (0: all of them).

    weight u8 [N, ceil(K / codes in a byte)], the first input in the lowest bits; scale (`scale`) [N, K / columns].
    """

    kind: ClassVar[str] = "gemma"
    bits: Literal[2, 4] = 4
    columns: int = 0
    scale: str = "f32"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        each = 8 // self.bits
        return (Stored("weight", "u8", (N, -(-K // each))), Stored("scale", self.scale, grid(N, K, 1, self.columns)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        each = 8 // self.bits
        code = bits(t.weight[n, k // each], k % each * self.bits, self.bits)
        return {"code": code, "scale": t.scale[place(1, self.columns)]}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, const(1 << (self.bits - 1)))

    def group_size(self, N: int, K: int) -> int | None:
        return self.columns or K
