"""SpQR: tiles of 3-bit codes whose scales and zeros are 3-bit codes themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bitcast, bits, cast, cat, k, n
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms

SIDE = 16  # of a tile
SECOND = ("scale_scale", "zero_scale", "scale_zero", "zero_zero")


@dataclass(frozen=True)
class Spqr(Affine):
    """W = s * (code - z) with s = scale_scale * (scale - scale_zero) and z likewise; every operation rounds to float16.

    words i32 [N / 16, K / 16, 16, 2]: 64 bits, the low half first, for each row of a tile. From the lowest bit: scale and
    zero of 3 bits, 16 codes of 3 bits, a byte. Rows 2f and 2f + 1 hold one byte twice, byte f of the tile's four float16
    numbers; each row of weights reads its own copies.
    """

    kind: ClassVar[str] = "spqr"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("words", "i32", (N // SIDE, K // SIDE, SIDE, 2)),)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        tile, row = (n // SIDE, k // SIDE), n % SIDE
        starts = [k % SIDE * 3 + 6 + i for i in range(3)]
        copies = [bits(t.words[(*tile, 2 * byte + n % 2, 1)], 22, 8) for byte in range(8)]
        numbers = {name: bitcast("f16", cat(copies[2 * i], copies[2 * i + 1])) for i, name in enumerate(SECOND)}
        return {
            "code": cat(*(bits(t.words[(*tile, row, start // 32)], start % 32, 1) for start in starts)),
            "scale": bits(t.words[(*tile, row, 0)], 0, 3),
            "zero": bits(t.words[(*tile, row, 0)], 3, 3),
            **numbers,
        }

    def terms(self, f: Any) -> Terms:
        scale = f.scale_scale * (cast("f16", f.scale) - f.scale_zero)
        zero = f.zero_scale * (cast("f16", f.zero) - f.zero_zero)
        return Terms(f.code, scale, zero, rounding="each-f16")

    def check(self, N: int, K: int) -> list[Problem]:
        return [Problem(f"[{N}, {K}]", f"multiples of {SIDE}")] if N % SIDE or K % SIDE else []

    def group_size(self, N: int, K: int) -> int | None:
        return SIDE
