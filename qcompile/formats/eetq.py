"""EETQ: int8 rows in the byte order of a tensor-core kernel (GPUs of capability 7.5 to 8.9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, const, k, n, table
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms

PLACE = (0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)  # where input i of sixteen lies
BYTE = (0, 2, 1, 3)  # the middle bytes of a word are swapped


@dataclass(frozen=True)
class Eetq(Affine):
    """Symmetric int8 codes plus 128, one scale per output. weight i8 [K, N] (bytes permuted), weight_scales [N]."""

    kind: ClassVar[str] = "eetq"
    scale: str = "f16"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("weight", "i8", (K, N)), Stored("weight_scales", self.scale, (N,)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        j = k % 64 // 16 * 16 + table(PLACE, k % 16)
        at = n // 2 * (2 * K) + k // 64 * 128 + n % 2 * 64 + j // 4 * 4 + table(BYTE, j % 4)
        return {"code": bits(t.weight[at // N, at % N], 0, 8), "scale": t.weight_scales[n]}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, const(128), rounding=f"product-{self.scale}" if self.scale != "f32" else "none")

    def check(self, N: int, K: int) -> list[Problem]:
        return [Problem(f"[{N}, {K}]", "multiples of 64")] if N % 64 or K % 64 else []

    def group_size(self, N: int, K: int) -> int | None:
        return K
