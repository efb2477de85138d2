"""FP-Quant's weights: FP4 codes under byte scales that fill whole tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bitcast, bits, cast, k, n, table
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.minifloat import E2M1, exponent


@dataclass(frozen=True)
class FpQuant(Affine):
    """W = E2M1[code] * scale / weight_global_scale, in f32: a scale for 16 (nvfp4) or 32 inputs (mxfp4).

    qweight u8 [N, K / 2], the even input in the low nibble; scales u8 [N, K / group] and what fills N up to a multiple
    of 128 and the blocks up to one of 4: the bits of e4m3 numbers (nvfp4) or exponents (mxfp4); weight_global_scale
    bf16 [1].
    """

    kind: ClassVar[str] = "fp-quant"
    dtype: Literal["nvfp4", "mxfp4"] = "nvfp4"

    @property
    def group(self) -> int:
        return 16 if self.dtype == "nvfp4" else 32

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (
            Stored("qweight", "u8", (N, K // 2)),
            Stored("scales", "u8", (-(-N // 128) * 128, -(-K // self.group // 4) * 4)),
            Stored("weight_global_scale", "bf16", (1,)),
        )

    def check(self, N: int, K: int) -> list[Problem]:
        return [Problem(f"K = {K}", f"a multiple of {self.group}")] if K % self.group else []

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        code = bits(t.qweight[n, k // 2], k % 2 * 4, 4)
        return {"code": code, "scale": t.scales[n, k // self.group], "whole": t.weight_global_scale[0]}

    def scale(self, f: Any) -> Expr:
        return cast("f32", bitcast("f8e4m3", f.scale)) if self.dtype == "nvfp4" else exponent(f.scale)

    def value(self, f: Any) -> Expr:
        return table(E2M1, f.code) * self.scale(f) / cast("f32", f.whole)

    def terms(self, f: Any) -> Terms:
        """Another order of the same operations than `value`: one unit in the last place from it."""
        return Terms(f.code, self.scale(f) / cast("f32", f.whole), table=E2M1)

    def group_size(self, N: int, K: int) -> int | None:
        return self.group
