"""HQQ: groups of the flattened weight, float zeros, codes of far-apart rows in one byte."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, k, n
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.rows import shared_row


@dataclass(frozen=True)
class Hqq(Affine):
    """Affine codes with a float zero, both operations rounded in the compute dtype.

    The flattened weight is seen as [R, C] with C = group (axis 1: a row is a group) or R = group (axis 0: a column is
    one). The rows are cut into `parts` equal parts: 8 // bits that share a byte, or for 3 bits 10 that share an i32,
    part 0 in the highest bits.
    W_q u8 or i32 [ceil(R / parts), C], scale and zero in `dtype`, [R, 1] or [1, C]. 5 and 6 bits are stored as 8.
    """

    kind: ClassVar[str] = "hqq"
    bits: int = 4
    group: int = 64
    axis: int = 1
    dtype: str = "f16"

    @property
    def parts(self) -> int:
        return 10 if self.bits == 3 else 8 // self.bits

    def grid(self, N: int, K: int) -> tuple[int, int]:
        """The group layout [R, C]."""
        other = N * K // self.group
        return (other, self.group) if self.axis == 1 else (self.group, other)

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        R, C = self.grid(N, K)
        groups = (R, 1) if self.axis == 1 else (1, C)
        return (
            Stored("W_q", "i32" if self.bits == 3 else "u8", (-(-R // self.parts), C)),
            Stored("scale", self.dtype, groups),
            Stored("zero", self.dtype, groups),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        R, C = self.grid(N, K)
        row, column = (n * K + k) // C, (n * K + k) % C
        at = (row, 0) if self.axis == 1 else (0, column)
        code = shared_row(lambda word: t.W_q[word, column], row, R, self.parts, self.bits)
        return {"code": code, "scale": t.scale[at], "zero": t.zero[at]}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, f.zero, rounding=f"each-{self.dtype}" if self.dtype != "f32" else "none")

    def check(self, N: int, K: int) -> list[Problem]:
        if N * K % self.group:
            return [Problem(f"N * K = {N * K}", f"a multiple of the group, {self.group}")]
        R = self.grid(N, K)[0]
        return [Problem(f"{R} rows", f"a multiple of {self.parts}")] if self.bits != 3 and R % self.parts else []

    def group_size(self, N: int, K: int) -> int | None:
        if self.axis == 1:
            return math.gcd(self.group, K)
        return K if self.group == N * K else 1
