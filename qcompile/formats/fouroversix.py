"""FourOverSix's weights: padded FP4 codes, and block scales in the order of Blackwell's 128 x 4 tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bits, cast, const, k, n, table
from qcompile.format import Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.minifloat import E2M1


def padded(N: int, K: int, group: int) -> tuple[int, int]:
    """The stored sizes: whole tiles of 128 outputs and 4 blocks of `group` inputs.

    >>> padded(64, 320, 16)
    (128, 320)
    """
    return -(-N // 128) * 128, -(-K // (4 * group)) * 4 * group


@dataclass(frozen=True)
class FourOverSix(Affine):
    """W = E2M1[code] * scale * amax / limit, or E2M1[code] * scale with `dtype` "mxfp4", in f32.

    values u8 [Np, Kp / 2], the even input in the low nibble; scale_factors f8e4m3 (mxfp4: f8e8m0) [Np * Kp / group], in
    tiles; amax f32 [1], of nvfp4 only. `limit` is the largest value that a code times a scale can have.
    """

    kind: ClassVar[str] = "fouroversix"
    dtype: Literal["nvfp4", "mxfp4"] = "nvfp4"
    limit: float = 1536.0

    @property
    def group(self) -> int:
        return 16 if self.dtype == "nvfp4" else 32

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        rows, columns = padded(N, K, self.group)
        scale, amax = ("f8e4m3", (Stored("amax", "f32", (1,)),)) if self.dtype == "nvfp4" else ("f8e8m0", ())
        return (
            Stored("values", "u8", (rows, columns // 2)),
            Stored("scale_factors", scale, (rows * columns // self.group,)),
            *amax,
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        tiles, block = padded(N, K, self.group)[1] // self.group // 4, k // self.group
        at = (n // 128 * tiles + block // 4) * 512 + n % 32 * 16 + n % 128 // 32 * 4 + block % 4
        amax = {"amax": t.amax[0]} if self.dtype == "nvfp4" else {}
        return {"code": bits(t.values[n, k // 2], k % 2 * 4, 4), "scale": t.scale_factors[at], **amax}

    def value(self, f: Any) -> Expr:
        value = table(E2M1, f.code) * cast("f32", f.scale)
        return value * f.amax / const(self.limit, "f32") if self.dtype == "nvfp4" else value

    def terms(self, f: Any) -> Terms:
        """Another order of the same operations than `value`: up to 2 units in the last place from it."""
        scale = cast("f32", f.scale)
        return Terms(
            f.code, scale * (f.amax / const(self.limit, "f32")) if self.dtype == "nvfp4" else scale, table=E2M1
        )

    def group_size(self, N: int, K: int) -> int | None:
        return self.group
