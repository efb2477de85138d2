"""Vectors of weights named by indices into codebooks: AQLM and VPTQ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, cast, cat, const, k, n, where
from qcompile.format import Format, Problem, Stored


def container(width: int) -> str:
    """The narrowest signed integer that holds `width` bits."""
    return "i8" if width <= 8 else "i16" if width <= 16 else "i32"


def field(word: Callable[[Expr], Expr], start: Expr, width: int, unit: int) -> Expr:
    """Bits [start, start + width) of a stream of 32-bit words, where `unit` divides start and width or nothing straddles."""
    if unit >= width:
        return bits(word(start // 32), start % 32, width)
    return cat(*(bits(word((start + at) // 32), (start + at) % 32, unit) for at in range(0, width, unit)))


@dataclass(frozen=True)
class Aqlm(Format):
    """W = scale * the sum over codebooks of one entry each; an entry is a block of `rows` outputs and `columns` inputs.

    codes (i8, i16 or i32, by `width`) [N / rows, K / columns, books], whose lowest `width` bits count; codebooks
    (`dtype`) [books, 2 ** width, rows, columns]; scales (`scale`) [N / rows, 1, 1, 1]. Computed in float32.
    """

    kind: ClassVar[str] = "aqlm"
    books: int = 1
    width: int = 16
    rows: int = 1
    columns: int = 8
    dtype: str = "f16"
    scale: str = "f16"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks = (N // self.rows, K // self.columns)
        return (
            Stored("codes", container(self.width), (*blocks, self.books)),
            Stored("codebooks", self.dtype, (self.books, 2**self.width, self.rows, self.columns)),
            Stored("scales", self.scale, (blocks[0], 1, 1, 1)),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        row, column, out = n // self.rows, k // self.columns, {"scale": t.scales[n // self.rows, 0, 0, 0]}
        for i in range(self.books):
            out[f"code{i}"] = code = bits(t.codes[row, column, i], 0, self.width)
            out[f"entry{i}"] = t.codebooks[i, code, n % self.rows, k % self.columns]
        return out

    def value(self, f: Any) -> Expr:
        total = cast("f32", f.entry0)
        for i in range(1, self.books):
            total = total + cast("f32", f.get(f"entry{i}"))
        return total * cast("f32", f.scale)

    def check(self, N: int, K: int) -> list[Problem]:
        out = [Problem(f"N = {N}", f"a multiple of out_group_size, {self.rows}")] if N % self.rows else []
        return out + ([Problem(f"K = {K}", f"a multiple of in_group_size, {self.columns}")] if K % self.columns else [])


@dataclass(frozen=True)
class Vptq(Format):
    """An entry of a codebook for each `vector` outputs of an input, in `groups` of inputs with a codebook each.

    `centroids` entries, and `residuals` more to add (0: none). The first `outliers` inputs have a codebook of their own of
    `outlier_centroids` entries of `outlier_vector` outputs. With C = (K - outliers) / groups, V = vector, b and r the bits
    of the two indices: indices i32 [groups, ceil(N / V), ceil(C * (b + r) / 32)], a stream of b + r bits for each input,
    the index of the residual above; centroids [groups, centroids * V]; res_centroids [groups, residuals * V];
    outlier_indices i16 [1, ceil(N / outlier_vector), outliers], unsigned; outlier_centroids likewise. Where `norm`, each
    input's weights times scale [K] plus bias [K]. Floats are of `dtype`, the arithmetic is float32.
    """

    kind: ClassVar[str] = "vptq"
    vector: int = 8
    centroids: int = 256
    residuals: int = 0
    groups: int = 1
    outliers: int = 0
    outlier_vector: int = 0
    outlier_centroids: int = 0
    norm: bool = True
    dtype: str = "f16"

    @property
    def index_bits(self) -> tuple[int, int]:
        """Of the index and of that of the residual."""
        return (self.centroids - 1).bit_length(), (self.residuals - 1).bit_length() if self.residuals else 0

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        columns, rows = (K - self.outliers) // self.groups, -(-N // self.vector)
        out = [
            Stored("indices", "i32", (self.groups, rows, -(-columns * sum(self.index_bits) // 32))),
            Stored("centroids", self.dtype, (self.groups, self.centroids * self.vector)),
        ]
        if self.residuals:
            out.append(Stored("res_centroids", self.dtype, (self.groups, self.residuals * self.vector)))
        if self.outliers:
            entries = self.outlier_centroids * self.outlier_vector
            out.append(Stored("outlier_indices", "i16", (1, -(-N // self.outlier_vector), self.outliers)))
            out.append(Stored("outlier_centroids", self.dtype, (1, entries)))
        norm = [Stored(name, self.dtype, (K,)) for name in ("scale", "bias")]
        return (*out, *(norm if self.norm else ()))

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        columns, first = (K - self.outliers) // self.groups, const(self.outliers)
        inner = where(k < first, const(0), k - first) if self.outliers else k
        group, width, extra = inner // columns, *self.index_bits
        unit = 32 if 32 % (width + extra) == 0 else math.gcd(width, extra, 32)
        start = inner % columns * (width + extra)

        def word(i: Expr) -> Expr:
            found: Expr = t.indices[group, n // self.vector, i]
            return found

        index = field(word, start, width, unit)
        out = {"index": index, "entry": t.centroids[group, index * self.vector + n % self.vector]}
        if self.residuals:
            out["residual_index"] = index = field(word, start + width, extra, unit)
            out["residual"] = t.res_centroids[group, index * self.vector + n % self.vector]
        if self.outliers:
            column, vector = where(k < first, k, 0), self.outlier_vector
            out["outlier_index"] = index = bits(t.outlier_indices[0, n // vector, column], 0, 16)
            out["outlier"] = t.outlier_centroids[0, index * vector + n % vector]
        return out | ({"scale": t.scale[k], "bias": t.bias[k]} if self.norm else {})

    def value(self, f: Any) -> Expr:
        made = cast("f32", f.entry)
        if self.residuals:
            made = made + cast("f32", f.residual)
        if self.outliers:
            made = where(k < self.outliers, cast("f32", f.outlier), made)
        return made * cast("f32", f.scale) + cast("f32", f.bias) if self.norm else made

    def check(self, N: int, K: int) -> list[Problem]:
        if self.outliers < K and (K - self.outliers) % self.groups == 0:
            return []
        return [Problem(f"K = {K}", f"{self.outliers} outliers and {self.groups} equal groups of inputs")]
