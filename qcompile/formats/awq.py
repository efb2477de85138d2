"""AWQ: the three layouts of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, k, n, table
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.stream import stream

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of output 8 * c + i


@dataclass(frozen=True)
class Awq(Affine):
    """GEMM layout: affine codes packed along N, `interleaved` as AWQ's kernel wants (its 4-bit files) or in order.

    qweight i32 [K, ceil(N * bits / 32)], qzeros i32 [K / group, ceil(N * bits / 32)], scales [K / group, N].
    """

    kind: ClassVar[str] = "awq"
    bits: int = 4
    group: int = 128
    interleaved: bool = True
    scale: str = "f16"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        groups, words = -(-K // self.group), -(-N * self.bits // 32)
        return (
            Stored("qweight", "i32", (K, words)),
            Stored("qzeros", "i32", (groups, words)),
            Stored("scales", self.scale, (groups, N)),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        g, i = k // self.group, n // 8 * 8 + table(ORDER, n % 8) if self.interleaved else n
        return {
            "code": stream(lambda word: t.qweight[k, word], i, self.bits),
            "zero": stream(lambda word: t.qzeros[g, word], i, self.bits),
            "scale": t.scales[g, n],
        }

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, f.zero, rounding=f"each-{self.scale}" if self.scale != "f32" else "none")

    def check(self, N: int, K: int) -> list[Problem]:
        out = [Problem(f"K = {K}", f"a multiple of the group, {self.group}")] if K % self.group else []
        return out + ([Problem(f"N = {N}", "a multiple of 8")] if self.interleaved and N % 8 else [])

    def group_size(self, N: int, K: int) -> int | None:
        return self.group


def _zero_words(K: int, group: int) -> int:
    """Words that hold the zeros of a row in the GEMV layouts: padded to what its kernel reads at once."""
    multiple = max(1, 128 // group)
    return -(-K // (group * 8 * multiple)) * multiple


@dataclass(frozen=True)
class AwqGemv(Affine):
    """GEMV layout: 4-bit affine codes packed along K in natural order, rows of zeros and scales padded.

    qweight i32 [N, K / 8], qzeros i32 [N, Z], scales [N, 8 * Z]; Z: words for a row's K / group zeros, padded.
    """

    kind: ClassVar[str] = "awq-gemv"
    group: int = 128
    scale: str = "f16"

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        words = _zero_words(K, self.group)
        return (
            Stored("qweight", "i32", (N, -(-K // 8))),
            Stored("qzeros", "i32", (N, words)),
            Stored("scales", self.scale, (N, 8 * words)),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        g = k // self.group
        return {
            "code": stream(lambda word: t.qweight[n, word], k, 4),
            "zero": stream(lambda word: t.qzeros[n, word], g, 4),
            "scale": t.scales[n, g],
        }

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, f.zero, rounding=f"each-{self.scale}")

    def check(self, N: int, K: int) -> list[Problem]:
        return [Problem(f"K = {K}", f"a multiple of the group, {self.group}")] if K % self.group else []

    def group_size(self, N: int, K: int) -> int | None:
        return self.group


@dataclass(frozen=True)
class AwqGemvFast(Affine):
    """Fast GEMV layout (llm-awq's too): 4-bit codes in blocks of 4 x 64, and an offset, -f16(scale * zero), for a zero.

    qweight i16 [N / 4, K], scales and qzeros (the offsets) f16 [8 * Z, N], Z as in `AwqGemv`.
    """

    kind: ClassVar[str] = "awq-gemv-fast"
    group: int = 128

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        rows = 8 * _zero_words(K, self.group)
        return (
            Stored("qweight", "i16", (N // 4, K)),
            Stored("scales", "f16", (rows, N)),
            Stored("qzeros", "f16", (rows, N)),
        )

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        # Within 32 inputs seen as [4, 4, 2] the first two axes are swapped; then evens go before odds in each 8.
        swapped = k % 8 // 2 * 8 + k % 32 // 8 * 2
        j = k % 64 // 32 * 32 + swapped // 8 * 8 + k % 2 * 4 + swapped % 8 // 2
        at = k // 64 * 256 + n % 4 * 64 + j  # four rows take turns every 64 inputs
        return {
            "code": bits(t.qweight[n // 4, at // 4], at % 4 * 4, 4),
            "scale": t.scales[k // self.group, n],
            "offset": t.qzeros[k // self.group, n],
        }

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, offset=f.offset, rounding="product-f16")

    def check(self, N: int, K: int) -> list[Problem]:
        out = [Problem(f"N = {N}", "a multiple of 4")] if N % 4 else []
        if K % 64 or K % self.group:
            out.append(Problem(f"K = {K}", f"a multiple of 64 and of the group, {self.group}"))
        return out

    def group_size(self, N: int, K: int) -> int | None:
        return self.group
