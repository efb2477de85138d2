"""GGUF's blocks of 256 inputs whose scales are integers times a float, and its codes with a table (ggml-quants.c)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, cast, cat, const, k
from qcompile.formats.affine import Terms
from qcompile.formats.gguf import Blocks

IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
"""The values of the 4-bit codes of IQ4_NL and IQ4_XS."""


class SuperBlocks(Blocks):
    """Blocks of 256 inputs with an f16 `super` that multiplies an integer scale of each run of inputs."""

    inputs: ClassVar[int] = 256

    def pair(self, t: Any, i: int) -> Expr:
        """The code's two bits in 64 bytes from `i`: 32 inputs in the lowest bits of 32 bytes, the next 32 above them."""
        return bits(self.byte(t, k % 256 // 128 * 32 + k % 32 + i), k % 128 // 32 * 2, 2)

    def wide(self, t: Any, i: int) -> Expr:
        """The code's nibble in 128 bytes from `i`: 32 inputs in the low nibbles of 32 bytes, the next 32 in the high."""
        return bits(self.byte(t, k % 256 // 64 * 32 + k % 32 + i), k % 64 // 32 * 4, 4)

    def plane(self, t: Any, i: int) -> Expr:
        """The code's bit in 32 bytes from `i`: bit b belongs to the inputs from 32 * b."""
        return bits(self.byte(t, k % 32 + i), k % 256 // 32, 1)

    def scale(self, f: Any) -> Expr:
        return cast("f32", f.super) * cast("f32", f.scale)


class WithMinimum(SuperBlocks):
    """W = super * scale * code - super_min * min."""

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, self.scale(f), offset=cast("f32", f.super_min) * cast("f32", f.min) * -1.0)


@dataclass(frozen=True)
class Q2_K(WithMinimum):
    """2-bit codes; a nibble of scale and one of min for 16 inputs."""

    kind: ClassVar[str] = "gguf-q2_k"
    nbytes: ClassVar[int] = 84
    run: ClassVar[int] = 16

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        both = self.byte(t, k % 256 // 16)
        return {
            "code": self.pair(t, 16),
            "scale": bits(both, 0, 4),
            "min": bits(both, 4, 4),
            "super": self.half(t, 80),
            "super_min": self.half(t, 82),
        }


@dataclass(frozen=True)
class Q3_K(SuperBlocks):
    """W = super * (scale - 32) * (code - 4): 3-bit codes, 6-bit scales for 16 inputs, each in two parts."""

    kind: ClassVar[str] = "gguf-q3_k"
    nbytes: ClassVar[int] = 110
    run: ClassVar[int] = 16

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        run = k % 256 // 16
        low = bits(self.byte(t, run % 8 + 96), run // 8 * 4, 4)
        high = bits(self.byte(t, run % 4 + 104), run // 4 * 2, 2)
        code = cat(self.pair(t, 32), self.plane(t, 0))
        return {"code": code, "scale": cat(low, high), "super": self.half(t, 108)}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, cast("f32", f.super) * cast("f32", f.scale - 32), const(4))


class SixBits(WithMinimum):
    """A scale and a min of 6 bits for 32 inputs, the eight of each in the same twelve bytes."""

    def head(self, t: Any) -> dict[str, Expr]:
        """The fields beside the code.

        Bytes 4..7 begin with the first four scales, 8..11 with the first four mins. The other four have their low
        nibbles in bytes 12..15 and two more bits each above the 6 bits of the first.
        """
        run = k % 256 // 32
        above = run // 4 * 2 + 4
        scale = cat(bits(self.byte(t, run // 4 * 4 + run + 4), 0, 4), bits(self.byte(t, run % 4 + 4), above, 2))
        least = cat(bits(self.byte(t, run + 8), run // 4 * 4, 4), bits(self.byte(t, run % 4 + 8), above, 2))
        return {"scale": scale, "min": least, "super": self.half(t, 0), "super_min": self.half(t, 2)}


@dataclass(frozen=True)
class Q4_K(SixBits):
    """4-bit codes."""

    kind: ClassVar[str] = "gguf-q4_k"
    nbytes: ClassVar[int] = 144

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": self.wide(t, 16), **self.head(t)}


@dataclass(frozen=True)
class Q5_K(SixBits):
    """5-bit codes, the fifth bits in 32 bytes of their own."""

    kind: ClassVar[str] = "gguf-q5_k"
    nbytes: ClassVar[int] = 176

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": cat(self.wide(t, 48), self.plane(t, 16)), **self.head(t)}


@dataclass(frozen=True)
class IQ4_NL(Blocks):
    """W = d * table[code]."""

    kind: ClassVar[str] = "gguf-iq4_nl"
    nbytes: ClassVar[int] = 18

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        return {"code": self.nibble(t, 2), "scale": self.half(t, 0)}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, table=IQ4)


@dataclass(frozen=True)
class IQ4_XS(SuperBlocks):
    """W = super * (scale - 32) * table[code]: 6-bit scales for 32 inputs, each in two parts."""

    kind: ClassVar[str] = "gguf-iq4_xs"
    nbytes: ClassVar[int] = 136

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        run = k % 256 // 32
        low = bits(self.byte(t, run // 2 + 4), run % 2 * 4, 4)
        high = bits(self.byte(t, run // 4 + 2), run % 4 * 2, 2)
        code = bits(self.byte(t, run * 16 + k % 16 + 8), k % 32 // 16 * 4, 4)
        return {"code": code, "scale": cat(low, high), "super": self.half(t, 0)}

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, cast("f32", f.super) * cast("f32", f.scale - 32), table=IQ4)
