"""SINQ: tiles with a scale for each of their rows and columns; the rows' scales and zeros may be 8-bit themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, cast, const, k, n
from qcompile.format import Format, Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.rows import shared_row
from qcompile.formats.tables import NF3, NF4

PARTS = {8: 1, 4: 2, 2: 4, 1: 8, 3: 10, 5: 6, 6: 5}  # bits of a code -> codes in a word
TABLES = {"nf4": NF4, "nf3": NF3}
SCALES = 32  # rows of the matrix of scales whose columns share an 8-bit range


@dataclass(frozen=True)
class _Tiles(Format):
    """Codes and the rows' scales and zeros of tiles of `group` inputs; `tall` outputs, 0: all of them.

    Row n * (K / group) + j of the codes holds W[n, j * group : (j + 1) * group]; there are R = N * K / group. W_q u8, or
    i32 for 3, 5 and 6 bits, [ceil(R / parts), group]. scale and zero (`dtype`) have R entries: [R, 1], or [tiles, tall, 1].
    `nested`: each is x * s + m instead, rounded after both: scale_x u8 [32, R / 32], scale_s and scale_m [1, R / 32];
    zero_x u8 [R, 1], zero_s and zero_m [1, 1]. A number as `zero` is the same everywhere, and not stored. `table` "nf4" or
    "nf3": codes are places in it.
    """

    bits: int = 4
    group: int = 64
    nested: bool = True
    table: Literal["", "nf4", "nf3"] = ""
    zero: float | None = None
    dtype: Literal["f16", "bf16", "f32"] = "f16"

    @property
    def tall(self) -> int:
        return 0

    def tiles(self, N: int, K: int) -> int:
        """How many tiles there are."""
        return (N // self.tall if self.tall else 1) * (K // self.group)

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        R = N * K // self.group
        word = "i32" if self.bits in (3, 5, 6) else "u8"
        shape = (self.tiles(N, K), self.tall, 1) if self.tall else (R, 1)
        out = [Stored("W_q", word, (-(-R // PARTS[self.bits]), self.group))]
        for name, ranges in (("scale", (SCALES, R // SCALES)), ("zero", (R, 1))):
            if name == "zero" and self.zero is not None:
                continue
            if not self.nested:
                out.append(Stored(name, self.dtype, shape))
                continue
            out.append(Stored(f"{name}_x", "u8", ranges))
            out += [Stored(f"{name}_{part}", self.dtype, (1, ranges[1])) for part in "sm"]
        return tuple(out)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        wide = K // self.group
        R, row = N * wide, n * wide + k // self.group
        code = shared_row(lambda at: t.W_q[at, k % self.group], row, R, PARTS[self.bits], self.bits)
        out = {"code": code}
        tile = n // self.tall * wide + k // self.group if self.tall else const(0)
        flat = tile * self.tall + n % self.tall if self.tall else row  # the place among all rows of all tiles
        if not self.nested:
            place: tuple[Expr | int, ...] = (tile, n % self.tall, 0) if self.tall else (row, 0)
            return out | {"scale": t.scale[place]} | ({"zero": t.zero[place]} if self.zero is None else {})
        columns = R // SCALES
        at = (flat // columns, flat % columns)
        out |= {"scale_x": t.scale_x[at], "scale_s": t.scale_s[0, at[1]], "scale_m": t.scale_m[0, at[1]]}
        if self.zero is None:
            out |= {"zero_x": t.zero_x[flat, 0], "zero_s": t.zero_s[0, 0], "zero_m": t.zero_m[0, 0]}
        return out

    def terms(self, f: Any) -> Terms:
        def number(name: str) -> Expr:
            found: Expr = getattr(f, name if not self.nested else f"{name}_x")
            return cast(self.dtype, found) * getattr(f, f"{name}_s") + getattr(f, f"{name}_m") if self.nested else found

        zero = number("zero") if self.zero is None else const(self.zero, "f32")
        return Terms(f.code, number("scale"), zero, table=TABLES[self.table] if self.table else None)

    def check(self, N: int, K: int) -> list[Problem]:
        if K % self.group:
            return [Problem(f"K = {K}", f"a multiple of the group, {self.group}")]
        out, R = [], N * K // self.group
        if self.bits in (4, 2, 1) and R % PARTS[self.bits]:
            out.append(Problem(f"{R} rows of {self.group}", f"a multiple of {PARTS[self.bits]}"))
        if self.nested and R % SCALES:
            out.append(Problem(f"{R} rows of {self.group}", f"a multiple of {SCALES}, whose scales share a range"))
        return out

    def group_size(self, N: int, K: int) -> int | None:
        return self.group


@dataclass(frozen=True)
class Sinq(_Tiles, Affine):
    """W = (code - zero) * scale over `group` inputs of one output; the columns' scales belong to x."""

    kind: ClassVar[str] = "sinq"


@dataclass(frozen=True)
class SinqSquare(_Tiles):
    """W = (code - zero) * scale * scale2 over square tiles; scale2 (`dtype`) [tiles, 1, group] is for a tile's columns."""

    kind: ClassVar[str] = "sinq-square"

    @property
    def tall(self) -> int:
        return self.group

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (*super().stored(N, K), Stored("scale2", self.dtype, (self.tiles(N, K), 1, self.group)))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        tile = n // self.group * (K // self.group) + k // self.group
        return super().fields(t, N, K) | {"scale2": t.scale2[tile, 0, k % self.group]}

    def value(self, f: Any) -> Expr:
        return self.terms(f).value() * cast("f32", f.scale2)

    def check(self, N: int, K: int) -> list[Problem]:
        out = [Problem(f"N = {N}", f"a multiple of the group, {self.group}")] if N % self.group else []
        return out + super().check(N, K)

    def group_size(self, N: int, K: int) -> int | None:
        return 1
