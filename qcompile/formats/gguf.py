"""GGUF's block formats (ggml-quants.c): scales and codes of consecutive inputs together in blocks of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bitcast, bits, cast, cat, const, k, n
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms


class Blocks(Affine):
    """Rows of blocks: data u8 [N, K / inputs * nbytes]."""

    inputs: ClassVar[int] = 32  # in a block
    nbytes: ClassVar[int]  # of a block
    run: ClassVar[int] = 32  # inputs that share a scale

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        return (Stored("data", "u8", (N, K // self.inputs * self.nbytes)),)

    def check(self, N: int, K: int) -> list[Problem]:
        return [Problem(f"K = {K}", f"a multiple of the block, {self.inputs}")] if K % self.inputs else []

    def group_size(self, N: int, K: int) -> int | None:
        return self.run

    def byte(self, t: Any, i: Expr | int) -> Expr:
        """Byte `i` of the block that holds input k."""
        byte: Expr = t.data[n, k // self.inputs * self.nbytes + i]
        return byte

    def half(self, t: Any, i: int) -> Expr:
        """The f16 at byte `i` of the block."""
        return bitcast("f16", cat(bits(self.byte(t, i), 0, 8), bits(self.byte(t, i + 1), 0, 8)))

    def nibble(self, t: Any, i: int) -> Expr:
        """The code's nibble in sixteen bytes from `i`: the first half of the block in the low nibbles."""
        return bits(self.byte(t, k % 16 + i), k % 32 // 16 * 4, 4)

    def fifth(self, t: Any, i: int) -> Expr:
        """The code's bit in the four bytes from `i`."""
        return bits(self.byte(t, k % 32 // 8 + i), k % 8, 1)


@dataclass(frozen=True)
class Q4_0(Blocks):
    """W = d * (code - 8)."""

    kind: ClassVar[str] = "gguf-q4_0"
    nbytes: ClassVar[int] = 18

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": self.nibble(t, 2), "scale": self.half(t, 0)}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, const(8))


@dataclass(frozen=True)
class Q4_1(Blocks):
    """W = d * code + m."""

    kind: ClassVar[str] = "gguf-q4_1"
    nbytes: ClassVar[int] = 20

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": self.nibble(t, 4), "scale": self.half(t, 0), "offset": self.half(t, 2)}


@dataclass(frozen=True)
class Q5_0(Blocks):
    """W = d * (code - 16), the fifth bits in a word of their own."""

    kind: ClassVar[str] = "gguf-q5_0"
    nbytes: ClassVar[int] = 22

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": cat(self.nibble(t, 6), self.fifth(t, 2)), "scale": self.half(t, 0)}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, const(16))


@dataclass(frozen=True)
class Q5_1(Blocks):
    """W = d * code + m, the fifth bits in a word of their own."""

    kind: ClassVar[str] = "gguf-q5_1"
    nbytes: ClassVar[int] = 24

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        code = cat(self.nibble(t, 8), self.fifth(t, 4))
        return {"code": code, "scale": self.half(t, 0), "offset": self.half(t, 2)}


@dataclass(frozen=True)
class Q8_0(Blocks):
    """W = d * code, int8."""

    kind: ClassVar[str] = "gguf-q8_0"
    nbytes: ClassVar[int] = 34

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": bitcast("i8", self.byte(t, k % 32 + 2)), "scale": self.half(t, 0)}


@dataclass(frozen=True)
class Q6_K(Blocks):
    """W = d * s * (code - 32): an int8 scale `s` for 16 inputs, an f16 `d` for 256."""

    kind: ClassVar[str] = "gguf-q6_k"
    inputs: ClassVar[int] = 256
    nbytes: ClassVar[int] = 210
    run: ClassVar[int] = 16

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        half, quarter = k % 256 // 128, k % 128 // 32
        low = bits(self.byte(t, half * 64 + k % 64), quarter // 2 * 4, 4)
        high = bits(self.byte(t, half * 32 + k % 32 + 128), quarter * 2, 2)
        scale = bitcast("i8", self.byte(t, k % 256 // 16 + 192))
        return {"code": cat(low, high), "scale": scale, "super": self.half(t, 208)}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, cast("f32", f.super) * cast("f32", f.scale), const(32))
