"""Quanto's 4- and 2-bit weights: planes of rows in bytes, a scale and a shift for each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bits, const, k, n
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms


@dataclass(frozen=True)
class QuantoBits(Affine):
    """W = code * scale - shift, or (code - shift) * scale where the shift is a zero point, as arithmetic of the scale's dtype.

    The weight is R = N * K / group rows of `group` values (0: R = N, whole rows). With P = ceil(R * bits / 8), data u8
    [P, group] holds row r in byte row r % P, at bit bits * (r // P). scale (`scale`) [R, 1]; shift [R, 1] of that dtype,
    or u8 (`zero`).
    """

    kind: ClassVar[str] = "quanto"
    bits: Literal[4, 2] = 4
    group: int = 0
    scale: str = "f32"
    zero: bool = False

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        group = self.group or K
        rows = N * K // group
        return (
            Stored("data", "u8", (-(-rows * self.bits // 8), group)),
            Stored("scale", self.scale, (rows, 1)),
            Stored("shift", "u8" if self.zero else self.scale, (rows, 1)),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        group = self.group or K
        planes = -(-N * K // group * self.bits // 8)
        row = n * (K // group) + k // group
        code = bits(t.data[row % planes, k % group], row // planes * self.bits, self.bits)
        return {"code": code, "scale": t.scale[row, 0], "shift": t.shift[row, 0]}

    def terms(self, f: Any) -> Terms:
        each = "none" if self.scale == "f32" else f"each-{self.scale}"
        if self.zero:
            return Terms(f.code, f.scale, f.shift, rounding=each)
        return Terms(f.code, f.scale, None, const(0.0, self.scale) - f.shift, rounding=each)

    def check(self, N: int, K: int) -> list[Problem]:
        if self.group and K % self.group:
            return [Problem(f"K = {K}", f"a multiple of the group, {self.group}")]
        return []

    def group_size(self, N: int, K: int) -> int | None:
        return self.group or K


def group_of(K: int) -> int:
    """The group that quanto takes for K inputs: the first of 128, 96, 64 and 32 that divides it, 0 if K <= 128 or none.

    >>> group_of(384), group_of(128), group_of(160), group_of(200)
    (128, 0, 32, 0)
    """
    return next((group for group in (128, 96, 64, 32) if K % group == 0), 0) if K > 128 else 0
