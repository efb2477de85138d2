"""Floats of 8 and 4 bits (OCP Microscaling and NVIDIA's forms) with scales for blocks of the matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bitcast, bits, cast, cat, k, n
from qcompile.format import Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.blocks import grid, place

# The values of the 4-bit codes: a sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def minifloats(exponents: int, mantissa: int, bias: int) -> tuple[float, ...]:
    """The values of all codes of a float with a sign, without infinities and NaN.

    >>> minifloats(2, 1, 1) == E2M1
    True
    """
    positive = []
    for code in range(1 << (exponents + mantissa)):
        power, fraction = code >> mantissa, code % (1 << mantissa)
        whole = fraction + (1 << mantissa) if power else fraction
        positive.append(whole * 2.0 ** (max(power, 1) - bias - mantissa))
    return (*positive, *(-value for value in positive))


def exponent(byte: Expr) -> Expr:
    """2 ** (byte - 127), f32, from a byte stored as u8 (the "e8m0" scale of OCP); 255 is NaN."""
    return cast("f32", bitcast("f8e8m0", byte))


@dataclass(frozen=True)
class Fp8(Affine):
    """W = weight * scale over blocks of `rows` outputs and `columns` inputs (0: all of them).

    weight (`dtype`) [N, K]; scale [ceil(N / rows), ceil(K / columns)] of dtype `scale`, where "u8" are the
    exponents of powers of two.
    """

    kind: ClassVar[str] = "fp8"
    dtype: Literal["f8e4m3", "f8e5m2"] = "f8e4m3"
    scale: str = "f32"
    rows: int = 1
    columns: int = 0
    rounding: str = "none"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks = grid(N, K, self.rows, self.columns)
        return (Stored("weight", self.dtype, (N, K)), Stored("scale", self.scale, blocks))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": t.weight[n, k], "scale": t.scale[place(self.rows, self.columns)]}

    def terms(self, f: Any) -> Terms:
        scale = exponent(f.scale) if self.scale == "u8" else f.scale
        return Terms(f.code, scale, rounding=self.rounding)

    def group_size(self, N: int, K: int) -> int | None:
        return self.columns or K


@dataclass(frozen=True)
class Fp4(Affine):
    """W = E2M1[code] * scale, the scale for `group` inputs of one output.

    weight u8 [N, K / 2], the even input in the low nibble; scale [N, K / group] of dtype `scale`, where "u8" are the
    exponents of powers of two. `tensor` adds tensor_scale f32 [1], by which each scale is multiplied or divided first.
    """

    kind: ClassVar[str] = "fp4"
    group: int = 32
    scale: Literal["u8", "f8e8m0", "f8e4m3", "f32", "f16", "bf16"] = "u8"
    tensor: Literal["", "multiply", "divide"] = ""
    rounding: str = "none"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        tensor = (Stored("tensor_scale", "f32", (1,)),) if self.tensor else ()
        return (
            Stored("weight", "u8", (N, -(-K // 2))),
            Stored("scale", self.scale, grid(N, K, 1, self.group)),
            *tensor,
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        tensor = {"tensor_scale": t.tensor_scale[0]} if self.tensor else {}
        return {"code": bits(t.weight[n, k // 2], k % 2 * 4, 4), "scale": t.scale[n, k // self.group], **tensor}

    def terms(self, f: Any) -> Terms:
        scale = exponent(f.scale) if self.scale == "u8" else cast("f32", f.scale)
        if self.tensor == "multiply":
            scale = scale * f.tensor_scale
        elif self.tensor == "divide":
            scale = scale / f.tensor_scale
        return Terms(f.code, scale, table=E2M1, rounding=self.rounding)

    def group_size(self, N: int, K: int) -> int | None:
        return self.group


@dataclass(frozen=True)
class Fp6(Affine):
    """W = element[code] * 2 ** (scale - 127), the scale for `group` inputs of one output.

    weight u8 [N, ceil(K * 6 / 8)]: the codes of an output as one little-endian bit stream, four in three bytes; scale u8
    [N, ceil(K / group)].
    """

    kind: ClassVar[str] = "fp6"
    element: Literal["e2m3", "e3m2"] = "e2m3"
    group: int = 32

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("weight", "u8", (N, -(-K * 6 // 8))), Stored("scale", "u8", grid(N, K, 1, self.group)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        pairs = (k * 6 + 2 * i for i in range(3))  # two bits never lie in two bytes
        code = cat(*(bits(t.weight[n, start // 8], start % 8, 2) for start in pairs))
        return {"code": code, "scale": t.scale[n, k // self.group]}

    def terms(self, f: Any) -> Terms:
        entries = minifloats(2, 3, 1) if self.element == "e2m3" else minifloats(3, 2, 3)
        return Terms(f.code, exponent(f.scale), table=entries)

    def group_size(self, N: int, K: int) -> int | None:
        return self.group
