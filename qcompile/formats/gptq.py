"""GPTQ: codes along the inputs in words, zero points along the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from qcompile.expr import Expr, bits, k, n
from qcompile.format import Problem, Stored
from qcompile.formats.affine import Affine, Terms
from qcompile.formats.stream import Word, planar, stream

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a 1 in every field of a word


@dataclass(frozen=True)
class Gptq(Affine):
    """Affine codes of 2 to 8 bits, packed along K; the zero of `v1` files is stored less one.

    With G = ceil(K / group): qweight i32 [ceil(K * bits / 32), N], qzeros i32 [G, ceil(N * bits / 32)], scales [G, N]
    and, where `indirect`, g_idx i32 [K], the group of each input. `word`: 8 or 16 for words of i8 or i16 (2, 4 or 8
    bits). `planar`: bit planes instead of one stream (5 to 7 bits always). v1 files of 2, 4 and 8 bits subtract from
    the whole word, so a zero of 0 borrows from the next field; not so AutoRound's (`by_field`), where a field of ones
    is a zero of 2 ** bits.
    """

    kind: ClassVar[str] = "gptq"
    bits: int = 4
    group: int = 128
    v1: bool = True
    indirect: bool = False
    planar: bool = False
    scale: str = "f16"
    by_field: bool = False
    word: int = 32

    def stored(self, N: int, K: int) -> tuple[Stored, ...]:
        groups, word = -(-K // self.group), f"i{self.word}"
        out = (
            Stored("qweight", word, (-(-K * self.bits // self.word), N)),
            Stored("qzeros", word, (groups, -(-N * self.bits // self.word))),
            Stored("scales", self.scale, (groups, N)),
        )
        return (*out, Stored("g_idx", "i32", (K,))) if self.indirect else out

    def fields(self, t: Any, N: int, K: int) -> dict[str, Expr]:
        g = t.g_idx[k] if self.indirect else k // self.group

        def unpack(word: Word, i: Expr, width: int) -> Expr:
            return planar(word, i, width) if self.planar else stream(word, i, width, self.word)

        whole = self.v1 and self.bits in ONES and not self.by_field  # v1 subtracted from whole words
        one = ONES.get(self.bits, 0) if whole else 0
        zero = unpack(lambda i: t.qzeros[g, i] + one if one else t.qzeros[g, i], n, self.bits)
        out = {
            "code": unpack(lambda i: t.qweight[i, n], k, self.bits),
            "zero": bits(zero + 1, 0, self.bits + self.by_field) if self.v1 and not whole else zero,
            "scale": t.scales[g, n],
        }
        return out | {"group": g} if self.indirect else out

    def terms(self, f: Any) -> Terms:
        return Terms(f.code, f.scale, f.zero, rounding=f"product-{self.scale}" if self.scale != "f32" else "none")

    def check(self, N: int, K: int) -> list[Problem]:
        if self.word != 32 and (self.planar or self.bits not in ONES):
            return [
                Problem(f"{self.bits} bits in words of {self.word}", "words of 32, or 2, 4 or 8 bits in one stream")
            ]
        if self.planar and (N % 32 or K % 32):
            return [Problem(f"[{N}, {K}]", "multiples of 32 for bit planes")]
        return []

    def group_size(self, N: int, K: int) -> int | None:
        return None if self.indirect else min(self.group, K)
