"""Integers of 1 to 8 bits in rows of 32-bit words, with scales for blocks of the matrix: "pack-quantized"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qcompile.expr import Expr, bits, const, k, n
from qcompile.format import Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.blocks import grid, place
from qcompile.formats.stream import stream


@dataclass(frozen=True)
class Bitstream(Affine):
    """W = (code - zero) * scale over blocks of `rows` outputs and `columns` inputs (0: all of them).

    packed i32 [N, words of K codes]: a little-endian bit stream, or, `padded`, floor(32 / bits) codes to a word. Codes
    are integers of both signs plus 2 ** (bits - 1). scale (`scale`) [ceil(N / rows), ceil(K / columns)]. `zero`: "": there
    is none; "packed": i32 [words of N zeros, ceil(K / columns)], stored along the outputs as the codes are along the
    inputs; "i8": of the scale's shape, as plain integers. `indirect`: g_idx i32 [K] is the column of scales of each input.
    """

    kind: ClassVar[str] = "bitstream"
    bits: int = 4
    rows: int = 1
    columns: int = 128
    scale: str = "bf16"
    zero: Literal["", "packed", "i8"] = ""
    padded: bool = False
    indirect: bool = False

    def words(self, count: int) -> int:
        """The words that hold `count` codes."""
        return -(-count // (32 // self.bits)) if self.padded else -(-count * self.bits // 32)

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        blocks = grid(N, K, self.rows, self.columns)
        out = [Stored("packed", "i32", (N, self.words(K))), Stored("scale", self.scale, blocks)]
        if self.zero:
            packed = self.zero == "packed"
            shape = (self.words(N), blocks[1]) if packed else blocks
            out.append(Stored("zero", "i32" if packed else "i8", shape))
        return (*out, Stored("g_idx", "i32", (K,))) if self.indirect else tuple(out)

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        row, column = place(self.rows, self.columns)
        column = t.g_idx[k] if self.indirect else column
        out = {"code": self._field(lambda i: t.packed[n, i], k), "scale": t.scale[row, column]}
        if self.zero:
            out["zero"] = self._field(lambda i: t.zero[i, column], n) if self.zero == "packed" else t.zero[row, column]
        return out | {"group": column} if self.indirect else out

    def _field(self, word: Callable[[Expr], Expr], i: Expr) -> Expr:
        if not self.padded:
            return stream(word, i, self.bits)
        count = 32 // self.bits
        return bits(word(i // count), i % count * self.bits, self.bits)

    def terms(self, f: Any) -> Terms:
        middle = const(1 << (self.bits - 1))
        zero = {"": middle, "packed": f.get("zero")}.get(self.zero)
        rounding = "none" if self.scale == "f32" else f"product-{self.scale}"
        return Terms(f.code, f.scale, f.zero + middle if zero is None else zero, rounding=rounding)

    def group_size(self, N: int, K: int) -> int | None:
        return None if self.indirect else self.columns or K
