"""BitNet: weights of -1, 0 and 1 with one scale for the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, cast, const, k, n
from qcompile.format import Stored
from qcompile.formats.affine import Affine, Terms


@dataclass(frozen=True)
class Ternary(Affine):
    """W = (code - 1) * scale, or (code - 1) / scale where `inverse`: codes of two bits, of which 3 never occurs.

    weight u8 [R, K] with R = ceil(N / 4), whose byte [r, k] holds the rows r, r + R, r + 2R and r + 3R from its lowest
    bits on; scale (`scale`) [1].
    """

    kind: ClassVar[str] = "bitnet"
    scale: str = "bf16"
    inverse: bool = True

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("weight", "u8", (-(-N // 4), K)), Stored("scale", self.scale, (1,)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        rows = -(-N // 4)
        return {"code": bits(t.weight[n % rows, k], n // rows * 2, 2), "scale": t.scale[0]}

    def terms(self, f: Any) -> Terms:
        scale = cast("f32", f.scale)
        # Codes are 0 and +-1, so that a product with the rounded 1 / scale is the rounded quotient.
        return Terms(f.code, const(1.0) / scale if self.inverse else scale, const(1))

    def group_size(self, N: int, K: int) -> int | None:
        return K
